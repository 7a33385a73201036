"""metrics.jsonl: rows survive kills, numbers that are none become null."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from qstar.train.metrics import Writer, read, show_table


@pytest.fixture
def folder(tmp_path):
    writer = Writer(tmp_path)
    writer.write(stage="train", step=1, arm="a", iteration=1, loss=3.0)
    writer.write(
        stage="train", step=2, arm="a", iteration=1, loss=float("nan"), grad_norm=float("inf"), accuracy=0.5
    )
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
    losses = [
        (r["arm"], r["iteration"], r["step"], r.get("loss")) for r in read(folder) if r["stage"] == "train"
    ]
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
