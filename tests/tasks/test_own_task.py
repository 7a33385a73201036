"""Tasks of the user's own code: "file.py:Class" and "package.module:Class"."""

from __future__ import annotations

import copy
import pathlib
import pickle
import re
import subprocess
import sys

import pytest

from qstar.data import write_jsonl
from qstar.errors import UserError
from qstar.flags import Parser
from qstar.tasks import Task, make_task

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The example of the README, as it stands there.
README = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "class" in b)
BARE = """
from qstar.tasks import Problem

class Echo:
    def __init__(self, words: int = 3):
        self.words = words

    def problems(self, split):
        return [Problem(str(i), f"say {i}", str(i)) for i in range(self.words)]

    def prompt(self, problem, hint=False):
        return problem.question

    def parse(self, completion):
        return completion.strip() or None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(README)
    (tmp_path / "bare.py").write_text(BARE)
    write_jsonl(tmp_path / "rows.jsonl", [{"country": "France", "capital": "Paris"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_with_a_class_of_under_20_lines(folder):
    assert len(README.strip().splitlines()) < 20
    task = make_task("mine.py:Capitals", test="rows.jsonl")
    (problem,) = task.problems("test")
    assert (task.name, problem.id, problem.group) == ("Capitals", "Capitals-test-00000", "")
    assert task.prompt(problem, hint=True) == "The capital of France (paris) is"
    assert task.correct(problem, task.parse(" Paris."))
    with pytest.raises(
        UserError, match="option 'tset' is unknown .did you mean test..; there are bad_rows, train, test"
    ):
        make_task("mine.py:Capitals", tset="rows.jsonl")


def test_a_class_without_a_base_takes_the_rest_from_task(folder):
    task = make_task("bare.py:Echo", words=4)
    assert isinstance(task, Task) and len(task.pool(1, 0)) == 4 and task.name == "Echo"
    assert task.cut("x") == "x" and task.ballots(["1", None]) == ["1", None]


def test_an_option_of_a_base_class_has_another_default_in_a_subclass(folder):
    code = "from qstar.tasks.generic import Numeric\nclass Sums(Numeric):\n    question = 'country'\n    answer = 'capital'\n"
    (folder / "sums.py").write_text(code)
    write_jsonl(folder / "rows.jsonl", [{"country": "1+1?", "capital": 2}])
    (problem,) = make_task("sums.py:Sums", test="rows.jsonl").problems("test")
    assert (problem.question, problem.gold) == ("1+1?", "2")


@pytest.mark.parametrize(
    "spec, options", [("mine.py:Capitals", {"test": "rows.jsonl"}), ("bare.py:Echo", {"words": 2})]
)
def test_a_worker_loads_the_class_from_its_file(folder, spec, options):
    task = make_task(spec, **options)
    problems = task.problems("test")
    assert vars(copy.copy(task)) == vars(task) and type(copy.copy(task)) is type(task)
    (folder / "task.bin").write_bytes(pickle.dumps((task, problems)))
    code = f"import pickle; t, p = pickle.load(open({str(folder / 'task.bin')!r}, 'rb')); print(t.judged(p, [x.gold for x in p]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=100)
    assert done.stdout.strip() == str([True] * len(problems)), done.stderr


@pytest.mark.parametrize(
    "code, message",
    [
        ("class T:\n    pass\n", "T has no problems and no parse; a task has problems(split), or to_problem(record)"),
        ("T = 3\n", "T is of type int; it must be a class"),
        ("class T:\n    problems = parse = prompt = print\n    def __init__(self):\n        1 / 0\n", "task t.py:4: ZeroDivisionError"),
        ("from qstar.tasks import DatasetTask\nclass T(DatasetTask):\n    def parse(self, c): ...\n", "T has no to_problem;"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_class_is_one_line(folder, code, message):
    (folder / "t.py").write_text(code)
    with pytest.raises(UserError) as e:
        make_task("t.py:T")
    assert message in str(e.value) and "\n" not in str(e.value)


def test_an_exception_of_a_method_names_its_line(folder):
    (folder / "bare.py").write_text(BARE.replace("completion.strip() or None", "1 // (completion == 'x')"))
    task = make_task("bare.py:Echo")
    for made in (task, copy.copy(task)):
        assert made.parse("x") == 1
        with pytest.raises(UserError, match=r"^task /.*bare.py:15: ZeroDivisionError: .*; mend the file$"):
            made.parse("y")


def test_a_record_that_becomes_no_problem_is_named(folder):
    (folder / "mine.py").write_text(README.replace("return Problem(", "Problem("))
    with pytest.raises(UserError, match=r"rows.jsonl:1: to_problem returned None, not a Problem"):
        make_task("mine.py:Capitals", test="rows.jsonl").problems("test")


def parsed(*flags):
    parser = Parser("train", "")
    parser.config()
    return parser.parse_config(list(flags))[1]


def test_the_task_of_a_config_is_replaced_with_its_options(folder):
    config = parsed(
        *("--config=star_gsm8k:smoke", "--task=mine.py:Capitals", '--task-options={"test": "rows.jsonl"}'),
        "--config.task.train=rows.jsonl",
    )
    task = {"name": "mine.py:Capitals", "test": "rows.jsonl", "train": "rows.jsonl", "format": "plain"}
    assert config.task.to_dict() == task  # `hint` was an option of gsm8k; the form of prompts is the config's
    with pytest.raises(UserError, match="--task-options are of a --task"):
        parsed("--config=star_gsm8k:smoke", '--task-options={"test": "rows.jsonl"}')
    with pytest.raises(UserError, match="--task: a config of method 'quiet_star' has no task"):
        parsed("--config=quiet_star_tiny:smoke", "--task=gsm8k")
