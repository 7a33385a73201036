"""Models by hub name: which files are asked for, which folder is read, and one line for each way in which a hub fails."""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import pytest
from huggingface_hub import errors

import qstar
from qstar.__main__ import main
from qstar.errors import UserError
from qstar.models import hub, weight_files
from qstar.models.config import ModelConfig
from qstar.models.model import Model, save
from qstar.models.scoring import init
from qstar.text.tokenizer import char_tokenizer

COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def model():
    tokenizer = char_tokenizer("0123456789+= _\n", pad="_", eos="\n")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    return Model(config, init(config, jax.random.key(0)), tokenizer)


@pytest.fixture
def remote(model, tmp_path, monkeypatch):
    """A fake hub: {name: folder}, the calls it got, and a `snapshot_download` that copies what the patterns allow."""

    class Hub:
        repositories: dict[str, pathlib.Path] = {}
        calls: list[tuple] = []

    def download(name, *, revision=None, allow_patterns=()):
        Hub.calls.append((name, revision, allow_patterns))
        source, target = Hub.repositories[name], tmp_path / "cache" / name.replace("/", "--") / COMMIT
        target.mkdir(parents=True, exist_ok=True)
        for path in filter(pathlib.Path.is_file, source.rglob("*")):
            at = path.relative_to(source)
            if any(fnmatch.fnmatch(str(at), pattern) for pattern in allow_patterns):
                (target / at).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / at)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    Hub.repositories, Hub.calls = {"owner/tiny": tmp_path / "remote"}, []
    save(model, tmp_path / "remote")
    hub._snapshot.cache_clear()
    yield Hub
    hub._snapshot.cache_clear()


def test_a_hub_model_is_the_model_of_its_files(remote, model, tmp_path):
    for other in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "original/params.json",
        "README.md",
    ):
        (tmp_path / "remote" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "remote" / other).write_bytes(b"not needed")
    loaded = qstar.load("owner/tiny", revision="v1")
    prompt, completion = [[1, 2, 3]], [[4, 5]]
    assert (
        qstar.logprobs(loaded, prompt, completion)[0].tolist() == qstar.logprobs(model, prompt, completion)[0].tolist()
    )
    assert loaded.tokenizer.encode("1+1") == model.tokenizer.encode("1+1")
    found = {p.name for p in (tmp_path / "cache/owner--tiny").rglob("*") if p.is_file()}
    assert found == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    # The weights come from the commit that the first answer was of.
    assert [call[:2] for call in remote.calls] == [("owner/tiny", "v1"), ("owner/tiny", COMMIT)]


def test_of_shards_those_of_the_index_are_fetched(remote, model, tmp_path):
    from qstar.models import hf

    hf.write_params(tmp_path / "shards", model.config, model.params, max_shard_bytes=20_000)
    (tmp_path / "shards" / "consolidated.safetensors").write_bytes(b"not needed")
    remote.repositories["owner/shards"] = tmp_path / "shards"
    folder = hub.resolve("owner/shards")
    listed = set(json.loads((folder / weight_files.INDEX).read_text())["weight_map"].values())
    assert len(listed) > 1 and {p.name for p in folder.glob("*.safetensors")} == listed


def test_small_files_alone_where_no_weights_are_needed(remote):
    folder = hub.resolve("owner/tiny@main", weights=False)
    assert (folder / "config.json").is_file() and not list(folder.glob("*.safetensors"))
    assert len(remote.calls) == 1 and remote.calls[0][1] == "main"


def test_local_folders_win_and_are_never_asked_for(remote, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/tiny").mkdir(parents=True)
    assert hub.resolve("owner/tiny") == pathlib.Path("owner/tiny")
    for name in ("./owner/x", "/owner/x", "~/owner", "runs/a/b", "stories260k", pathlib.Path("owner/none")):
        assert hub.is_local(name) and hub.resolve(name) == pathlib.Path(name).expanduser()
    assert hub.resolve("~nobody-here/x") == pathlib.Path("~nobody-here/x")
    assert not remote.calls
    with pytest.raises(UserError, match="'owner/tiny' is a local folder, which has no revision='v1'"):
        hub.resolve("owner/tiny", "v1")


def test_a_second_call_asks_no_hub(remote):
    assert hub.resolve("owner/tiny") == hub.resolve("owner/tiny") and len(remote.calls) == 2


def http(kind):
    return kind.__new__(kind, "denied")  # without the response, whose class changes with the library's version


FAULTS = {
    "gated": (lambda: http(errors.GatedRepoError), "is gated: accept its terms .*HF_TOKEN"),
    "not found": (lambda: http(errors.RepositoryNotFoundError), "neither a local folder nor a model of the hub"),
    "revision": (lambda: http(errors.RevisionNotFoundError), "has no such revision"),
    "name": (lambda: errors.HFValidationError("x--y"), "neither a local folder nor a valid name"),
    "offline": (lambda: errors.LocalEntryNotFoundError("no"), "not .whole. in the cache .* the hub cannot be reached"),
    "network": (lambda: ConnectionError("reset\nby peer"), r"could not be downloaded \(reset by peer\)"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_of_the_hub_is_one_line(remote, monkeypatch, kind):
    make, says = FAULTS[kind]

    def fail(*args, **options):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"^model 'owner/tiny', revision 'v9', .*{says}") as e:
        hub.resolve("owner/tiny", "v9")
    assert "\n" not in str(e.value)


def test_a_repository_without_safetensors_says_so(remote, tmp_path):
    (tmp_path / "remote/model.safetensors").rename(tmp_path / "remote/pytorch_model.bin")
    with pytest.raises(UserError, match="'owner/tiny' has no safetensors, the only format .*refs/pr/N"):
        qstar.load("owner/tiny")


def test_two_revisions_are_refused(remote):
    with pytest.raises(UserError, match="names a revision, and revision='b' is another"):
        hub.resolve("owner/tiny@a", "b")


def test_off_line_the_command_ends_in_one_line(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"PYTHONPATH": str(pathlib.Path(qstar.__file__).parents[1])}
    command = [sys.executable, "-m", "qstar", "sample", "--model=owner/tiny@v1", "--prompt=x"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert (
        line.startswith("qstar: model 'owner/tiny', revision 'v1', is no local folder")
        and "HF_HUB_OFFLINE is set" in line
    )


@pytest.mark.parametrize("config", ["star_arithmetic.py", "quiet_star_tiny.py"])
def test_a_config_names_a_model_of_the_hub_and_its_revision(config, tmp_path, capfd):
    root = pathlib.Path(__file__).resolve().parents[2]
    command = ["train", f"--config={root}/configs/{config}:smoke", f"--workdir={tmp_path}/run"]
    command += ["--config.model.path=owner/none", "--config.model.revision=v2"]
    assert main(command) == 2
    assert capfd.readouterr().err.startswith("qstar: model 'owner/none', revision 'v2', is no local folder")
    assert not (tmp_path / "run").exists()
