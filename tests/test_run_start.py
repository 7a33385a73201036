"""What is refused before a run writes anything, and what a run notes about itself."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
from rich.console import Console

from qstar.__main__ import main
from qstar.report.render import environment as templates
from qstar.runs import folder
from qstar.runs.access import unlock
from qstar.runs.console import Screen
from qstar.runs.folder import end_run, environment, open_run
from qstar.train.metrics import show_table
from qstar.types import Rollout

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODELS = {
    "star_gsm8k": "smoke,model={}", "star_commonsense_qa": "smoke,model={}", "v_star_gsm8k": "smoke,model={}",
    "v_star_mbpp": "smoke,model={}", "grpo_gsm8k": "smoke,model={}", "quiet_star_mistral_7b": "model={}",
    "fast_quiet_star": "model={}", "quiet_star_text": "smoke,data=x.jsonl,model={}", "guided_cot_hotpotqa": "small={0},large={0}",
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_that_is_not_there_is_named(name, tmp_path, monkeypatch, capfd, shared):
    monkeypatch.chdir(tmp_path)
    argument = MODELS[name].format("Mistral-7B-v0.1")
    if "guided" in name:
        hotpot = shared("data/hotpotqa")
        argument += f",train={hotpot}/train_100.json,test={hotpot}/dev_sample_500.jsonl"
    elif "gsm8k" in name:
        argument += f",data={shared('data/gsm8k')}"
    elif "mbpp" in name:
        argument += f",data={shared('data/mbpp')}"
    elif "commonsense" in name:
        argument += f",data={shared('data/commonsenseqa')}"
    assert main(["train", f"--config={ROOT}/configs/{name}.py:{argument}", "--workdir=new"]) == 2
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith("qstar: ") and "model folder 'Mistral-7B-v0.1' does not exist" in said[-1], said
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_folder_that_is_not_there_is_named(tmp_path, monkeypatch, capfd, shared):
    monkeypatch.chdir(tmp_path)
    config = (
        f"train --config={ROOT}/configs/quiet_star_text.py:smoke,data=x.jsonl,model={shared('weights/stories260k')}"
    )
    assert main([*config.split(), "--config.data.tokenizer=nope"]) == 2
    assert "config.data.tokenizer=nope: no such folder" in capfd.readouterr().err


SUMS = f"train --config={ROOT}/configs/star_arithmetic.py:smoke"


@pytest.mark.parametrize("command", [
    f"{SUMS} --workdir=s3://bucket/x", f"{SUMS} --workdir=gs://",
    "evaluate --model=m --task=arithmetic --out=s3://b/x", "export --run=s3://b/x --out=x", "export --run=x --out=gs://b/x",
    "compare --a=x=a.jsonl --b=y=b.jsonl --out=gs://b/x",
])  # fmt: skip
def test_a_folder_in_a_bucket_is_refused_before_anything_is_written(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1 and "://" in said and "is no folder" in said
    assert not list(tmp_path.iterdir())


def test_a_run_notes_when_where_how_long_and_by_which_command(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(folder, "time", clock)
    monkeypatch.setattr(sys, "argv", ["/x/qstar/__main__.py", "train", "--config.name=a b"])
    now = 100.0
    open_run(tmp_path, {"method": "star"}, resolved={"arms": {"star": {"k": 1, "cap": float("inf"), "steps": (1, 2)}}})
    first = json.loads((tmp_path / "environment.json").read_text())
    assert first["command"] == "qstar train '--config.name=a b'"
    assert (
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["started"])
        and first["host"]
        and first["ended"] is None
    )
    now = 107.0
    end_run(tmp_path)
    ended = json.loads((tmp_path / "environment.json").read_text())
    assert ended["ended"] >= first["started"] and ended["seconds"] == 7.0 and ended["starts"] == 1
    unlock(tmp_path)
    end_run(tmp_path)  # not this process' run any more
    assert json.loads((tmp_path / "environment.json").read_text()) == ended
    monkeypatch.setattr(sys, "argv", ["/x/bin/qstar", "train"])
    open_run(tmp_path, {"method": "star"})
    again = json.loads((tmp_path / "environment.json").read_text())
    assert (again["command"], again["starts"], again["started"]) == ("qstar train", 2, first["started"])
    assert again["seconds"] == ended["seconds"]
    resolved = json.loads((tmp_path / "resolved.json").read_text())
    assert resolved == {"arms": {"star": {"k": 1, "cap": "inf", "steps": [1, 2]}}}
    unlock(tmp_path)


def test_the_head_of_a_page_says_it():
    parts = templates().get_template("parts.html.j2").module
    ended = {"ended": "x", "seconds": 3700.0, "starts": 3, "host": "<h>", "started": "2026-01-02T03:04:05"}
    text = " ".join(parts.provenance({**environment(), **ended}).split())
    assert "started 2026-01-02 03:04 UTC on &lt;h&gt; · 1:01:40 h in 3 starts" in text and "qstar 0." in text
    assert not parts.provenance({"jax": "0"}).strip()


def screen():
    out = Screen()
    out.console = Console(width=100, file=open(os.devnull, "w"), record=True, force_terminal=False)
    return out


def test_the_rate_is_that_of_this_process_right_after_a_resume(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("qstar.runs.console.time.perf_counter", lambda: clock[0])
    s = screen()
    with s.bar("train", 1500) as update:
        clock[0] += 10  # compilation
        update(400, {})
        clock[0] += 20
        update(700, {"loss": 0.5})
    text = s.console.export_text()
    assert "resumed at step 400 of 1,500" in text
    assert "700 of 1,500  15.0/s  0:00:53 left  loss 0.5000" in text


def test_no_time_left_is_told_from_the_first_of_many(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("qstar.runs.console.time.perf_counter", lambda: clock[0])
    s = screen()
    with s.bar("train", 300) as update:
        for done in (1, 6):
            clock[0] += 120
            update(done, {"loss": 0.5})
    text = s.console.export_text()
    assert "1 of 300  loss 0.5000" in text and "6 of 300  40.0 s each  3:16:00 left  loss 0.5000" in text


def test_samples_that_are_there_already_count_as_done(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("qstar.runs.console.time.perf_counter", lambda: clock[0])
    s = screen()
    row = (
        Rollout(**dict.fromkeys(Rollout.__dataclass_fields__, 0)) if hasattr(Rollout, "__dataclass_fields__") else None
    )
    with s.bar("sample", 100) as update:
        update(30, None)
        update(30, None)
        clock[0] += 20
        for n in range(10):
            monkeypatch.setattr("qstar.runs.console.one_line", lambda r: "")
            update(n + 1, row)
    text = s.console.export_text()
    assert "resumed at 60 of 100" in text and "61 of 100  20.0 s each" in text and text.count("resumed") == 1


def test_tables_that_are_too_wide_stay_readable_at_80_columns():
    row = {"votes": 50, "items": 50, "raters": 3, "wins": 20, "equal": 5, "losses": 25, "win_rate": 0.45,
           "win_rate_low": 0.312345, "win_rate_high": 0.59, "p": 0.7123}  # fmt: skip
    for rows in ([row], [{"rule": f"rule number {n}", **row} for n in range(3)]):
        console = Console(width=80, record=True, file=open(os.devnull, "w"))
        show_table(console, "A against B", rows)
        text = console.export_text()
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        for key in row:
            assert re.search(rf"\b{key}\b", text)
        assert text.count("0.312") == len(rows) and text.count("A against B") == 1


def test_transformers_does_not_say_that_pytorch_was_not_found():
    program = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name.split('.')[0] == 'torch' else find(name, *more)\n"
        "import qstar.text.tokenizer as t; t.char_tokenizer('ab', pad='a', eos='b')\n"
        "from transformers.utils import is_torch_available; assert not is_torch_available()"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
