"""Fuzz of everything a user or a server hands in: a line and exit code 2, or accepted; no traceback, no NaN.

Every input is a function of its number. 45 by default; QSTAR_LONG_TESTS=1 makes it 300.
"""

import contextlib
import copy
import http.server
import json
import math
import os
import random
import shlex
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from qstar.__main__ import main
from qstar.data.sources import read_records
from qstar.errors import UserError
from qstar.flags import read_config
from qstar.methods.answerer import Answer, Cached, HttpAnswerer
from qstar.models.config import preset
from qstar.models.hf_names import abstract_params
from qstar.models.model import Model, save
from qstar.runs.context import RunContext
from qstar.runs.folder import open_run, write_json
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.tokenizer import char_tokenizer
from qstar.train.metrics import Writer
from tests.methods.stub import FunctionAnswerer
from tests.test_bad_input import ROOT

COUNT = 300 if os.environ.get("QSTAR_LONG_TESTS") else 45
SUMS = f"{ROOT}/configs/star_arithmetic.py:smoke"
SECONDS = 60  # that an input may take: this machine may be busy
ODD = [None, True, False, 0, -1, 7, 1.5, 2**70, 1e308, -1e308, math.nan, math.inf, "", "x", "\ud800", "../x", "é\u2028", "0",
       [], [1], {}, {"x": 1}, [[]], "a" * 10_000, ["x", None]]  # fmt: skip


class Accepted(BaseException):
    """A config was good enough to begin with."""


def odd_text(rng):
    """JSON (mostly) that is hard to read."""
    return rng.choice([
        "[" * 100_000, '{"a":' * 50_000, "9" * 5_000, "[" + "9" * 5_000 + "]", "", "null", "5", "[]", "{}", '"x"', "{", "\x00",
        "\ufeff{}", json.dumps([{}]), "NaN", '{"a": 1, "a": 2}', "\n\n",
    ])  # fmt: skip


def mutated(value, rng):
    """A JSON value with one part of it replaced, removed, or a text that is no longer that JSON."""
    value = copy.deepcopy(value)
    node, key = {"": value}, ""
    while True:
        inner = node[key]
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        if not keys or (node is not value and rng.random() < 0.2):
            break
        node, key = inner, rng.choice(list(keys))
    if isinstance(node, dict) and key and rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(ODD)
    return json.dumps(value if key != "" or isinstance(node, list) else node[""])


def broken(value, rng):
    return odd_text(rng) if rng.random() < 0.3 else mutated(value, rng)


def write(path, text):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tokenizer = char_tokenizer(ALPHABET, pad=PAD, eos=EOS)
    for name in ("tiny", "llama_20m"):
        size = dict(hidden_size=16, num_layers=1, vocab_size=tokenizer.vocab_size)
        size |= dict(num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=32) if name == "llama_20m" else {}
        config = preset(name, **size)
        params = jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), abstract_params(config))
        save(Model(config, params, tokenizer), root / name)
    open_run(root / "run", read_config(SUMS).to_dict())
    with contextlib.closing(Writer(root / "run")) as writer:
        writer.write(
            stage="iteration", step=0, arm="rationalisation", accuracy=0.5, accuracy_low=0.4, accuracy_high=0.6
        )
    (root / "run/rationalisation/rationales").mkdir(parents=True)
    row = {
        "problem_id": "1",
        "prompt": "1?",
        "completion": "2",
        "correct": True,
        "verdict": "kept",
        "group": "1",
        "hinted": False,
    }
    write(
        root / "run/rationalisation/rationales/iter_001.jsonl", json.dumps({**row, "iteration": 1, "gold": "2"}) + "\n"
    )
    write_json(root / "run/rationalisation/status.json", {"status": "stopped", "reason": "x"})
    for name in "ab":
        write(root / f"{name}.jsonl", json.dumps({**row, "completion": name}) + "\n")
    return root


def command(line, **names):
    return main(shlex.split(line.format(**names)))


def fuzz_override(rng, world, home, monkeypatch):
    """A value of the config."""

    def stop(self, *_, **__):
        raise Accepted

    monkeypatch.setattr(RunContext, "start", stop)
    config = read_config(SUMS).to_dict()
    sections = [k for k, v in config.items() if isinstance(v, dict) and v]
    section = rng.choice(sections)
    key = rng.choice([*config[section], "nothing"])
    values = [
        "",
        "0",
        "-1",
        "nan",
        "inf",
        "1e400",
        "None",
        "[]",
        "{}",
        "x",
        "True",
        "9" * 5000,
        "(",
        "'",
        "[" * 3000,
        "1_0",
        "0x10",
    ]
    monkeypatch.chdir(home)
    with contextlib.suppress(Accepted):
        return main(["train", f"--config={SUMS}", f"--config.{section}.{key}={rng.choice(values)}"])


def fuzz_records(rng, world, home, monkeypatch):
    """A data file."""
    good = {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
    name = rng.choice(["d.jsonl", "d.json", "d.parquet", "d.jsonl.gz"])
    rows = [json.dumps(good), broken(good, rng)]
    write(home / name, "\n".join(rows) if name != "d.json" else "[" + ",".join(rows) + "]")
    sources = [home / name] * 5 + ["http://x/y.jsonl", "ftp://x", "gs:/", "a/" * 2000, "x\0y", str(home)]
    read_records(str(rng.choice(sources)), ("question",), bad_rows=rng.choice([0, 0.4]))


def fuzz_options(rng, world, home, monkeypatch):
    """Options of a task on the command line."""
    good = {"test": str(home / "d.jsonl")}
    write(home / "d.jsonl", broken({"question": "1?", "answer": "#### 2"}, rng))
    text = broken(good, rng).replace("\x00", "")
    task = rng.choice(["gsm8k", "math", "arithmetic", "mbpp", "humaneval", "commonsense_qa"])
    line = ["evaluate", f"--model={world}/tiny", f"--task={task}", "--limit=1", "--max-new-tokens=1"]
    return main([*line, f"--task-options={text}"])


def fuzz_model(rng, world, home, monkeypatch):
    """A file of a model folder; what is accepted computes numbers."""
    shutil.copytree(world / rng.choice(["tiny", "llama_20m"]), home / "m")
    path = rng.choice(sorted(p for p in (home / "m").iterdir()))
    if path.suffix == ".json" and path.stat().st_size < 100_000:
        write(path, broken(json.loads(path.read_text()), rng))
        if rng.random() < 0.2:
            write(home / "m/model.safetensors.index.json", broken({"weight_map": {"a": "model.safetensors"}}, rng))
            (home / "m/model.safetensors").unlink()
    else:
        content = bytearray(path.read_bytes())
        path.write_bytes(rng.choice([content[: len(content) // 2], b"", content[:8] + b"\xff" * 4 + content[12:]]))
    return command("sample --model={home}/m --prompt=1 --max-new-tokens=2 --json", home=home)


def fuzz_votes(rng, world, home, monkeypatch):
    """Votes, or the key that they are counted with."""
    assert command("compare --a=x={w}/a.jsonl --b=y={w}/b.jsonl --out={home}/c", w=world, home=home) == 0
    key = json.loads((home / "c/key.json").read_text())
    vote = {"page": key["page"], "item": "000", "choice": "left", "rater": "me"}
    if rng.random() < 0.5:
        write(home / "c/key.json", broken(key, rng))
        write(home / "v.jsonl", json.dumps(vote) + "\n")
    else:
        write(home / "v.jsonl", broken(vote, rng) + "\n")
    return command("compare --out={home}/c --votes={home}/v.jsonl", home=home)


def fuzz_run(rng, world, home, monkeypatch):
    """A file of a run folder, for its report or an export."""
    shutil.copytree(world / "run", home / "run")
    if rng.random() < 0.7:  # as an earlier version, or somebody's editor, left it
        for folder in list((home / "run").rglob(".checksums")):
            shutil.rmtree(folder)
    path = rng.choice(sorted(p for p in (home / "run").rglob("*") if p.suffix in (".json", ".jsonl")))
    write(
        path,
        broken(json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text()), rng)
        + "\n",
    )
    line = rng.choice(["report {home}/run", "export --run={home}/run --arm=rationalisation --out={home}/new"])
    return command(line, home=home)


GOOD_REPLY = {"choices": [{"index": 0, "text": "2", "logprobs": {"token_logprobs": [None, -0.5]}}]}


def fuzz_reply(rng, world, home, monkeypatch):
    """What an endpoint replies."""
    body = broken(GOOD_REPLY, rng).encode("utf-8", "surrogatepass")
    status = rng.choice([200] * 6 + [400, 401, 404, 413, 429, 500, 302])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            (found,) = HttpAnswerer(f"http://127.0.0.1:{server.server_port}", "m", retries=1).answer(["1?"])
        finally:
            server.shutdown()
    assert isinstance(found.text, str) and math.isfinite(found.logprob) and found.text.encode() is not None


def fuzz_cache(rng, world, home, monkeypatch):
    """A file of answers."""
    ask = FunctionAnswerer(lambda prompts: ["2"] * len(prompts))
    Cached(ask, home / "a.jsonl").answer(["1?"])
    line = json.loads((home / "a.jsonl").read_text())
    write(home / "a.jsonl", broken(line, rng) + "\n")
    assert Cached(ask, home / "a.jsonl").answer(["1?"]) == [Answer("2", 0.0, 0)]


KINDS = [
    fuzz_override,
    fuzz_records,
    fuzz_options,
    fuzz_model,
    fuzz_votes,
    fuzz_run,
    fuzz_reply,
    fuzz_cache,
    fuzz_model,
]


@pytest.mark.filterwarnings("ignore::qstar.errors.QstarWarning")
@pytest.mark.parametrize("number", range(COUNT))
def test_an_odd_input_is_one_line_or_accepted(number, world, tmp_path, capfd, monkeypatch):
    for variable in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    kind = KINDS[number % len(KINDS)]
    began = time.monotonic()
    try:
        code = kind(random.Random(number), world, tmp_path, monkeypatch)
    except UserError as e:
        code = None
        assert str(e).strip()
    out, error = capfd.readouterr()
    assert time.monotonic() - began < SECONDS
    assert "Traceback" not in error
    if code == 2:
        assert [line.startswith("qstar: ") for line in error.splitlines() if "warning" not in line] == [True], error
    else:
        assert code in (0, None), (code, error)
    if kind is fuzz_model and code == 0:
        scores = [x for line in out.splitlines() for x in json.loads(line)["logprobs"]]
        assert np.isfinite(scores).all(), out
