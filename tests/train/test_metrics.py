"""metrics.jsonl: rows survive kills, numbers that are none become null."""

from __future__ import annotations

import json
import sys
import types

import pytest
from rich.console import Console

from qstar.errors import UserError
from qstar.train.metrics import Writer, read, show_table


@pytest.fixture
def folder(tmp_path):
    writer = Writer(tmp_path)
    writer.write(stage="train", step=1, arm="a", iteration=1, loss=3.0)
    writer.write(stage="train", step=2, arm="a", iteration=1, loss=float("nan"), grad_norm=float("inf"), accuracy=0.5)
    writer.write(stage="train", step=1, arm="b", iteration=1, loss=2.0)
    writer.close()
    return tmp_path


def test_rows_come_back_and_nan_is_null(folder):
    assert read(folder) == [
        dict(arm="a", iteration=1, stage="train", step=1, loss=3.0),
        dict(arm="a", iteration=1, stage="train", step=2, loss=None, grad_norm=None, accuracy=0.5),
        dict(arm="b", iteration=1, stage="train", step=1, loss=2.0),
    ]
    text = (folder / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert {p.name for p in (folder / "tensorboard").iterdir()} == {"a", "b"}


def test_the_last_row_of_a_step_counts_as_after_a_resume(folder):
    writer = Writer(folder)
    writer.write(stage="train", step=1, arm="a", iteration=1, loss=2.5)
    writer.write(stage="evaluate", step=1, arm="a", iteration=1, accuracy=0.1)  # another stage is another row
    writer.write(stage="train", step=1, arm="a", iteration=2, loss=9.0)
    writer.close()
    losses = [(r["arm"], r["iteration"], r["step"], r.get("loss")) for r in read(folder) if r["stage"] == "train"]
    assert losses == [("a", 1, 2, None), ("b", 1, 1, 2.0), ("a", 1, 1, 2.5), ("a", 2, 1, 9.0)]


def test_a_half_written_line_is_skipped_and_does_not_swallow_the_next(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for cut in range(1, len(lines[-1])):
        path.write_text("\n".join([*lines[:-1], lines[-1][:cut]]))
        assert [r["arm"] for r in read(folder)] == ["a", "a"]
    writer = Writer(folder)
    writer.write(stage="train", step=3, arm="a", iteration=1, loss=1.0)
    writer.close()
    assert [r["step"] for r in read(folder)] == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 1.0


def test_no_file_no_rows(tmp_path):
    assert read(tmp_path) == []
    Writer(tmp_path).close()
    assert read(tmp_path) == []


def test_the_table_shows_what_is_missing_as_a_dash(capsys):
    console = Console(width=60)
    show_table(console, "title", [])
    show_table(
        console,
        "title",
        [{"loop": 1, "accuracy": None, "kept": 12345}, {"loop": 2, "accuracy": 0.25, "kept": 3}],
    )
    out = capsys.readouterr().out
    assert "title" in out and "12,345" in out and "0.250" in out and " - " in out


def test_rows_of_students_and_parts_are_kept_apart(tmp_path):
    """A run with several students and stages of several parts (LM-Guided CoT): none overwrites another's row."""
    for loss in (2.0, 1.0):  # written twice, as after a resume: the last one counts
        writer = Writer(tmp_path)
        for student in range(3):
            for stage in ("arm", "rl"):
                writer.write(stage=stage, step=0, arm="a", student=student, loss=loss + student)
        for part in ("small", "direct"):
            writer.write(stage="train", step=50, arm="student_0", part=part, loss=loss)
        writer.close()
    rows = read(tmp_path)
    assert [(r["student"], r["stage"], r["loss"]) for r in rows if r["arm"] == "a"] == [
        (student, stage, 1.0 + student) for student in range(3) for stage in ("arm", "rl")
    ]
    assert [(r["part"], r["loss"]) for r in rows if r["arm"] == "student_0"] == [("small", 1.0), ("direct", 1.0)]
    boards = {p.name for p in (tmp_path / "tensorboard").iterdir()}
    assert boards == {f"a_student_{n}" for n in range(3)} | {f"student_0_part_{p}" for p in ("small", "direct")}


# ---------------------------------------------------------------------------------------------------------- wandb


class Service:
    """A stand-in for the module `wandb`: runs by id, each with what it was given and the rows that it was sent."""

    def __init__(self):
        self.runs = {}

    def init(self, *, id, **options):
        run = self.runs.setdefault(id, types.SimpleNamespace(starts=[], rows=[], axes={}))
        run.starts.append(options)
        run.log = run.rows.append
        run.define_metric = lambda name, step_metric: run.axes.update({name: step_metric})
        run.finish = lambda: None
        return run


def test_wandb_gets_the_config_the_step_and_one_run_per_folder(tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    config = {"name": "sums", "train": {"lr": 0.1}, "log": {"wandb": {"project": "p"}}}
    for step in (10, 20):  # a run, and its resumption
        writer = Writer(tmp_path / "a", config)
        writer.write(stage="train", step=step, arm="star", iteration=2, loss=1.0)
        writer.write(stage="iteration", step=1, arm="star", iteration=1, accuracy=0.5)
        writer.close()
    ((name, run),) = service.runs.items()
    assert name and [s["config"] for s in run.starts] == [config, config]
    assert all(s["project"] == "p" and s["resume"] == "allow" for s in run.starts)
    assert run.axes == {"star/train/*": "star/train/step", "star/iteration/*": "star/iteration/step"}
    assert [r["star/train/step"] for r in run.rows if "star/train/loss" in r] == [10, 20]
    assert run.rows[0] == {"star/train/loss": 1.0, "star/train/step": 10, "star/train/iteration": 2}

    Writer(tmp_path / "b", config).close()
    assert len(service.runs) == 2  # another folder is another run
    Writer(tmp_path / "b", {**config, "log": {"wandb": {"id": "mine"}}}).close()
    assert "mine" in service.runs
    Writer(tmp_path / "c", {**config, "log": {"wandb": {}}}).close()
    assert len(service.runs) == 3 and not (tmp_path / "c" / "wandb_id.txt").exists()


def test_a_refusal_of_wandb_is_one_line(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("api_key not configured (no-tty).\n  call wandb.login()")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"config.log.wandb: .*api_key not configured .no-tty.*call wandb") as e:
        Writer(tmp_path, {"log": {"wandb": {"project": "p"}}})
    assert "\n" not in str(e.value)
