"""Run folders in a bucket: the same results as on a disk, also after a kill."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest

from qstar import files
from qstar.__main__ import main
from qstar.errors import UserError
from qstar.runs import access
from qstar.train import metrics
from tests.buckets import buckets
from tests.methods import runs

# Not `importorskip`: gcsfs reads `tests.buckets`' variables when it is imported.
MISSING = importlib.util.find_spec("gcsfs") is None
pytestmark = pytest.mark.skipif(MISSING, reason="gcsfs, which reaches gs://, is not installed")
CONFIG = "sft.py:smoke"
SAVED = "runs/sft/sft/checkpoints/*/training/*/commit_success.txt"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A local folder that is gs://bucket for this process and its children."""
    root = tmp_path_factory.mktemp("gcs")
    (root / "bucket").mkdir()
    patch = pytest.MonkeyPatch()
    with buckets(root, patch):
        yield root / "bucket"
    patch.undo()


@pytest.fixture(scope="module")
def resumed(bucket):
    """A run in the bucket that was killed after its first checkpoint, and went on."""
    flags = [f"--config={runs.ROOT}/configs/{CONFIG}", "--workdir=gs://bucket/runs/sft"]
    command = [sys.executable, "-m", "qstar", "train", *flags]
    first = subprocess.Popen(command, env=runs.environment(), cwd=runs.scratch())
    while first.poll() is None and not list(bucket.glob(SAVED)):
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (bucket / "runs/sft/report.html").exists()
    done = runs.qstar("train", *flags)
    assert done.returncode == 0, done.stderr
    return bucket / "runs/sft", done


def test_a_killed_run_in_a_bucket_ends_with_the_weights_and_numbers_of_one_on_a_disk(resumed):
    folder, done = resumed
    whole = runs.finished(CONFIG)
    assert runs.weights(folder) == runs.weights(whole)
    assert runs.numbers(folder) == runs.numbers(whole)
    assert "gs://bucket/runs/sft/report.html" in done.stdout


def test_a_report_of_a_run_in_a_bucket_is_that_of_its_local_copy(resumed, bucket):
    folder, _ = resumed
    page = folder / "report.html"
    page.unlink()
    assert main(["report", "gs://bucket/runs/sft"]) == 0
    remote = page.read_text(encoding="utf-8")
    assert main(["report", str(folder)]) == 0
    assert remote == page.read_text(encoding="utf-8")


def test_runs_of_a_bucket_are_listed(resumed, capsys):
    assert main(["runs", "gs://bucket/runs", "--json"]) == 0
    assert '"run": "sft", "method": "sft", "status": "done"' in capsys.readouterr().out


def test_a_run_in_a_bucket_is_exported_to_a_disk(resumed, tmp_path):
    assert main(["export", "--run=gs://bucket/runs/sft", "--arm=sft", f"--out={tmp_path / 'model'}"]) == 0
    folder, _ = resumed
    assert main(["export", f"--run={folder}", "--arm=sft", f"--out={tmp_path / 'local'}"]) == 0
    remote, local = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "local"))
    assert remote == local


def test_an_evaluation_keeps_its_answers_in_a_bucket(bucket, capsys):
    flags = ["--model=random-tiny", "--task=gsm8k", '--task-options={"test": "built-in:gsm8k"}', "--limit=2"]
    command = ["evaluate", *flags, "--format=plain", "--max-new-tokens=4", "--out=gs://bucket/answers", "--json"]
    assert main(command) == 0
    first = capsys.readouterr().out
    kept = {p.name: p.read_bytes() for p in (bucket / "answers").glob("greedy_*.jsonl")}
    assert kept and main(command) == 0  # reads them back
    assert capsys.readouterr().out == first
    assert {p.name: p.read_bytes() for p in (bucket / "answers").glob("greedy_*.jsonl")} == kept


def test_the_lock_of_a_killed_process_of_this_host_is_free_and_that_of_a_living_one_is_not(bucket):
    run = files.as_path("gs://bucket/lock")
    access.lock(run)
    assert access.is_running(run)
    here = (bucket / "lock/.lock").read_text(encoding="utf-8")
    access.unlock(run)
    assert not access.is_running(run) and not list((bucket / "lock").glob("*"))
    parent = os.getppid()
    alive = f"{parent} {here.split()[1]} {access._begun(parent)}\n"
    files.write(run / ".lock", alive.encode())
    with pytest.raises(UserError, match=f"process {parent} on .* is running in it"):
        access.lock(run)
    files.write(run / ".lock", f"{parent} {here.split()[1]} 1\n".encode())  # the id was given to another process
    access.lock(run)
    access.unlock(run)


def test_rows_of_metrics_wait_for_each_other_and_none_for_a_checkpoint(bucket):
    writer = metrics.Writer(files.as_path("gs://bucket/metrics"))
    written = bucket / "metrics/metrics.jsonl"
    for step in range(3):
        writer.write(stage="train", step=step, loss=1.0)
    assert len(written.read_bytes().splitlines()) == 1  # an upload at most every ten seconds
    writer.flush()  # called before a checkpoint is saved
    assert [row["step"] for row in metrics.read(written.parent)] == [0, 1, 2]
    writer.write(stage="iteration", step=1, accuracy=0.5)
    assert len(written.read_bytes().splitlines()) == 4
    writer.close()


def test_a_changed_object_is_set_aside(bucket):
    path = files.as_path("gs://bucket/kept/a.json")
    files.write(path, b"{}\n", checksum=True)
    assert files.intact(path)
    (bucket / "kept/a.json").write_bytes(b"{ }\n")
    with pytest.warns(match=r"gs://bucket/kept/a.json: damaged"):
        assert not files.intact(path)
    assert (bucket / "kept/a.json.damaged").is_file() and not path.exists()


@pytest.mark.parametrize("name", ["s3://bucket/x", "gs://", "http://host/x"])
def test_other_schemes_are_refused(name):
    with pytest.raises(UserError, match="is no folder; name one on a disk, or in a bucket of Google Cloud Storage"):
        files.as_path(name)
