"""The commands as a user calls them, where nothing is wrong: what they print, and what they leave behind."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from rich.console import Console

from qstar import files
from qstar.__main__ import COMMANDS, main
from qstar.flags import parse_overrides, read_config
from qstar.runs.context import loop_rows
from qstar.train.metrics import show_table

ROOT = pathlib.Path(__file__).resolve().parents[1]
SUMS = f"{ROOT}/configs/star_arithmetic.py:smoke"
# A run of a few seconds: every stage of the product, no matter how little is learnt.
QUICK = ("base.steps=4", "loop.n_iters=1", "loop.steps=lin:2:0", "loop.min_kept=0", "task.eval_per_length=4",
         "task.pool.1=6", "task.pool.2=6", "base.save_every=0", "evaluate.hinted=False", "loop.include_sft_data=True",
         "arms.no_rationalisation.preset=star_norat")  # fmt: skip


@pytest.fixture(scope="module")
def model(shared):
    return shared("weights/stories260k")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = [f"--config.{flag}" for flag in QUICK]
    command = [sys.executable, "-m", "qstar", "train", f"--config={SUMS}", f"--workdir={folder}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done


def call(capfd, *argv):
    """Runs a command that must succeed and say nothing on stderr; returns what it prints."""
    code = main([str(a) for a in argv])
    out = capfd.readouterr()
    assert (code, out.err) == (0, "")
    return out.out


def test_help_names_every_command_and_every_command_has_help(capfd):
    text = call(capfd, "--help")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
        with pytest.raises(SystemExit) as stop:  # argparse ends so
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: qstar {command}" in capfd.readouterr().out


def test_help_fits_a_narrow_terminal(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert max(map(len, capfd.readouterr().out.splitlines())) <= 80
    assert max(map(len, call(capfd, "--help").splitlines())) <= 80


def test_sample_prints_the_prompt_and_its_continuation(capfd, model):
    flags = ("--prompt=Once upon a time", "--temperature=0", "--max-new-tokens=8")
    text = call(capfd, "sample", f"--model={model}", *flags)
    assert text == "Once upon a time, there was a little girl\n"
    row = json.loads(call(capfd, "sample", f"--model={model}", *flags, "--json"))
    assert row["prompt"] + row["text"] + "\n" == text
    assert len(row["tokens"]) == len(row["logprobs"]) == 8


def test_samples_are_apart_from_each_other(capfd, model):
    text = call(capfd, "sample", f"--model={model}", "--prompt=One", "--prompt=Two", "--n=2", "--max-new-tokens=1")
    assert [part[:3] for part in text.split("\n\n")] == ["One", "One", "Two", "Two"]


def test_evaluate_keeps_its_answers_for_the_second_call(capfd, model, tmp_path):
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"question": "Tom has 2 apples.", "answer": "1 + 1 = 2\n#### 2"}) + "\n")
    flags = (
        f"--model={model}",
        "--task=gsm8k",
        "--task-options",
        json.dumps({"test": str(data)}),
        "--max-new-tokens=4",
        "--format=plain",  # its worked examples do not fit into the model's context, which is a warning
    )
    table = call(capfd, "evaluate", *flags)
    assert re.search(r"^accuracy +0\.000 +0\.000 +0\.000$", table, re.MULTILINE)
    out = f"--out={tmp_path / 'answers'}"
    first = json.loads(call(capfd, "evaluate", *flags, out, "--json"))
    assert first["problems"] == 1 and first["accuracy"] == 0
    kept = tmp_path / "answers" / "greedy_000.jsonl"
    answer = json.loads(kept.read_text())
    files.write(kept, (json.dumps({**answer, "correct": True}) + "\n").encode(), checksum=True)  # what is kept counts
    assert json.loads(call(capfd, "evaluate", *flags, out, "--json"))["accuracy"] == 1
    assert main(["evaluate", *flags, out, "--split=test", "--temperature=0.5"]) == 2  # other answers than these


def test_train_writes_a_run_and_says_nothing_on_stderr(run):
    folder, done = run
    assert done.stderr == ""
    assert (folder / "report.html").is_file() and str(folder / "report.html") in done.stdout
    assert json.loads((folder / "config.json").read_text())["base"]["steps"] == 4
    for arm in ("rationalisation", "no_rationalisation"):
        assert json.loads((folder / arm / "status.json").read_text())["status"] == "finished"
    tables = [line for line in done.stdout.splitlines() if line.startswith("loop  ")]
    assert tables and max(map(len, tables)) <= 80
    assert "…" not in "".join(tables) and "\x1b" not in done.stdout  # nothing cut, no escape codes in a file


def test_report_rewrites_the_page(run, capfd):
    page = run[0] / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert call(capfd, "report", run[0]) == f"{page}\n"
    assert page.read_bytes() == before


def test_export_is_a_model_that_sample_reads(run, capfd, tmp_path):
    for iteration in (0, 1):
        flags = (f"--run={run[0]}", "--arm=rationalisation", f"--iteration={iteration}", f"--out={tmp_path / 'model'}")
        assert call(capfd, "export", *flags) == f"{tmp_path / 'model'}\n"  # the second one replaces the first
        text = call(capfd, "sample", f"--model={tmp_path / 'model'}", "--prompt=1+1=", "--max-new-tokens=3")
        assert text.startswith("1+1=")


def test_the_table_of_loops_fits_80_columns():
    groups = {f"accuracy/{g}": 0.5 for g in range(1, 6)}
    row = {"accuracy": 0.5, "accuracy_low": 0.4, **groups, "hinted_accuracy": 0.5, "kept": 10_000, "rationalised": 10_000,
           "valid_kept": 0.5, "seconds_train": 5000.0}  # fmt: skip
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))
    show_table(console, "arm", loop_rows([{**row, "iteration": n} for n in (9, 10)]))
    lines = console.export_text().splitlines()
    assert lines[1].split() == [
        "loop",
        "accuracy",
        "acc/3",
        "acc/4",
        "acc/5",
        "hinted",
        "kept",
        "rationalised",
        "valid",
        "time",
    ]
    assert lines[-1].split() == [
        "10",
        "0.500",
        "0.500",
        "0.500",
        "0.500",
        "0.500",
        "10,000",
        "10,000",
        "0.500",
        "1.4",
        "h",
    ]


def test_the_table_of_loops_leaves_out_what_is_not_measured():
    base = {"iteration": 0, "accuracy": 0.5, "accuracy/gsm8k": 0.5}
    rows = loop_rows(
        [base, {**base, "iteration": 1, "kept": 3, "rationalised": 0, "valid_kept": None, "seconds_train": 90}]
    )
    assert rows[1] == {"loop": 1, "accuracy": 0.5, "kept": 3, "time": "90 s"}
    assert list(rows[0]) == list(rows[1])


def test_overrides_take_the_type_of_what_they_replace():
    flags = ["--config.train.lr=1", "--config.train.batch_size", "4", "--config.train.packed=yes", "--config.name=3",
             "--config.evaluate.hinted", "--config.loop.k=4", "--config.task.pool.1=5", "--config.mesh=data=-1,fsdp=1",
             "--config.loop.max_epochs=None", "--config.sample.x={[]:1}", f"--config.sample.y={'-' * 9999}1"]  # fmt: skip
    config = read_config(SUMS, parse_overrides(flags))
    assert (config.train.lr, type(config.train.lr)) == (1.0, float)
    assert (config.train.batch_size, config.train.packed, config.name) == (4, True, "3")
    assert (config.evaluate.hinted, config.loop.k, config.task.pool["1"]) == (True, 4, 5)
    assert config.mesh == "data=-1,fsdp=1" and config.loop.max_epochs is None
    assert (config.sample.x, len(config.sample.y)) == ("{[]:1}", 10_000)  # no literals: texts
    assert config.is_locked
