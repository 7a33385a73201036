"""MBPP and HumanEval: prompts as published, splits, programs out of completions, verdicts."""

from __future__ import annotations

import json
import pickle

import pytest

from qstar.errors import UserError
from qstar.tasks import make_task

SQUARE = {
    "task_id": 12,
    "text": "Write a function to square a number.",
    "code": "def square(x):\r\n  return x * x",
    "test_list": ["assert square(3) == 9", "assert square(0) == 0"],
    "test_setup_code": "",
}
DOUBLE = {
    "task_id": "HumanEval/7",
    "prompt": "from typing import List\n\n\ndef twice(x: int) -> int:\n    return 2 * x\n\n\n"
    'def double(xs: List[int]) -> List[int]:\n    """ Doubles. """\n',
    "canonical_solution": "    return [twice(x) for x in xs]\n",
    "test": "\n\ndef check(candidate):\n    assert candidate([1, 2]) == [twice(1), 4]\n    assert candidate([]) == []\n",
    "entry_point": "double",
}


@pytest.fixture
def mbpp(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    rows = [
        {**SQUARE, "task_id": n, "text": f"{SQUARE['text']} {n}"} for n in (2, 3, 4, 10, 11, 510, 511, 600, 601, 974)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return make_task("mbpp", data=str(path))


@pytest.fixture
def humaneval(tmp_path):
    def make(**options):
        path = tmp_path / "humaneval.jsonl"
        path.write_text(json.dumps(DOUBLE))
        return make_task("humaneval", data=str(path), **options)

    return make


def test_mbpp_is_split_by_number_as_published(mbpp):
    numbers = {s: [p.meta["number"] for p in mbpp.every(s)] for s in ("few_shot", "test", "val", "train")}
    assert numbers == {"few_shot": [2, 3, 4, 10], "test": [11, 510], "val": [511, 600], "train": [601, 974]}
    assert [p.id for p in mbpp.problems("test")] == ["mbpp-11", "mbpp-510"]


def test_mbpp_real_splits(shared):
    task = make_task("mbpp", data=str(shared("data/mbpp/mbpp.jsonl")))
    assert [len(task.every(s)) for s in ("few_shot", "test", "val", "train")] == [10, 500, 90, 374]
    assert task.prefix().count("[DONE]") == 3 and "similar elements" in task.prefix()


def test_the_prompt_is_that_of_the_paper(mbpp):
    problem = mbpp.problems("test")[0]
    head = "You are an expert Python programmer, and here is your task: Write a function to square a number. 11 "
    assert mbpp.prompt(problem) == (
        head + "Your code should pass these tests:\n\nassert square(3) == 9\nassert square(0) == 0\n[BEGIN]\n"
    )
    assert mbpp.solution(problem) == "def square(x):\n  return x * x"
    shots = mbpp.prefix().split("\n\nYou are")
    assert len(shots) == 3 and all(s.rstrip().endswith("  return x * x\n[DONE]") for s in shots)


@pytest.mark.parametrize(
    "completion, program",
    [
        ("def f(): pass\n[DONE]\nmore", "def f(): pass"),
        ("def f(): pass", "def f(): pass"),
        ("\n\n    x = 1\r\n    y = 2\n\n", "    x = 1\n    y = 2"),
        ("Sure:\n```python\ndef f(): pass\n```\nThis works.", "def f(): pass"),
        ("```\ndef f(): pass", "def f(): pass"),
        ("", None),
        ("\n[DONE]", None),
    ],
)
def test_programs_out_of_completions(mbpp, completion, program):
    assert mbpp.parse(completion) == program
    assert mbpp.parse(mbpp.cut(completion)) == program


def test_verdicts_tell_wrong_from_broken_and_slow(mbpp):
    mbpp.timeout_s = 1.0
    problem = mbpp.problems("test")[0]
    programs = ["def square(x): return x ** 2", "def square(x): return x", "def square(x): return y", "while 1: pass"]
    assert [v.reason for v in mbpp.verdicts([problem] * 4, programs)] == ["passed", "wrong", "error", "timeout"]
    assert [mbpp.correct(problem, p) for p in [*programs[:3], None]] == [True, False, False, False]
    assert mbpp.judged([problem] * 4, [programs[0], None, programs[1], programs[2]]) == [True, False, False, False]
    found = mbpp.verdicts([problem] * 3, programs[:1] * 3)
    assert found[0] is found[2] and found[0].passed


@pytest.mark.parametrize("template", ["mbpp", "completion"])
def test_humaneval_prompts_and_programs(humaneval, template):
    task = humaneval(template=template)
    (problem,) = task.problems("test")
    solution = task.solution(problem)
    assert task.correct(problem, task.parse(solution))
    if template == "completion":
        assert task.prompt(problem) == DOUBLE["prompt"] and solution == DOUBLE["canonical_solution"]
        assert task.parse("    return xs\n\ndef other(): pass") == "    return xs"
        assert task.correct(problem, task.parse("    return [x + x for x in xs]\nprint(double([1]))"))
    else:
        assert task.prompt(problem).startswith("You are an expert Python programmer, and here is your task: ")
        assert DOUBLE["prompt"].strip() in task.prompt(problem) and task.prompt(problem).endswith("\n[BEGIN]\n")
        assert task.correct(problem, "def double(xs): return [x + x for x in xs]")
        assert task.correct(problem, "def double(xs: List[int]): return xs + xs if not xs else [2 * x for x in xs]")


def test_helpers_of_a_prompt_belong_to_the_tests(humaneval):
    task = humaneval()
    (problem,) = task.problems("test")
    assert not task.correct(problem, "def twice(x): return 5\ndef double(xs): return [5, 4] if xs else []")


def test_humaneval_is_a_test_set(humaneval):
    with pytest.raises(UserError, match="no 'train' problems"):
        humaneval().problems("train")
    with pytest.raises(UserError, match="unknown split"):
        humaneval().problems("dev")


def test_there_are_no_hints_for_programs(mbpp, humaneval):
    for task in (mbpp, humaneval()):
        with pytest.raises(UserError, match="rationalize=False"):
            task.prompt(task.problems("test")[0], hint=True)


def test_tasks_can_be_pickled(mbpp, humaneval):
    for task in (mbpp, humaneval()):
        assert pickle.loads(pickle.dumps(task)).problems("test") == task.problems("test")


@pytest.mark.parametrize(
    "change, what",
    [
        ({"task_id": "x"}, "'task_id' is 'x'"),
        ({"task_id": 975}, "975"),
        ({"text": 3}, "'text' is of type int"),
        ({"test_list": []}, "'test_list' is not a list of assertions"),
        ({"test_list": ["assert ("]}, "tests: not Python"),
        ({"code": None}, "field 'code' is missing"),
    ],
)
def test_bad_mbpp_records_are_named(tmp_path, change, what):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**SQUARE, **change}))
    with pytest.raises(UserError, match="rows.jsonl:1: .*") as error:
        make_task("mbpp", data=str(path)).problems("test")
    assert what in str(error.value)


def test_a_task_that_stands_there_twice(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(SQUARE)}\n{json.dumps(SQUARE)}")
    with pytest.raises(UserError, match="twice"):
        make_task("mbpp", data=str(path)).problems("test")
