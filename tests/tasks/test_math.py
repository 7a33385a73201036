"""MATH: boxed answers, their normal form, equality by math-verify next door, and V-STaR's subset."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time

import pytest

from qstar.errors import UserError
from qstar.tasks import make_task
from qstar.tasks.math import Comparer, boxed, comparer, in_v_star_subset, normal

ROW = {"problem": "What is $1 + 1$?", "solution": "It is $\\boxed{2}.$", "level": "Level 1", "type": "Prealgebra"}


@pytest.fixture
def make(tmp_path):
    def build(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({**ROW, **row}) for row in rows or [{}]))
        return make_task("math", train=str(path), test=str(path), **options)

    return build


@pytest.fixture(scope="module")
def real(shared):
    folder = shared("data/math")
    return make_task("math", train=str(folder / "test_minus_math500.jsonl"), test=str(folder / "math500.jsonl"))


@pytest.mark.parametrize(
    "text, inside",
    [
        ("so $\\boxed{5}$", "5"),
        ("first \\boxed{1}, then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ 1, 2 \\right\\}}", "\\left\\{ 1, 2 \\right\\}"),
        ("\\fbox{7}", "7"),
        ("\\boxed 5", "5"),
        ("\\boxed  {x}", "x"),
        ("\\boxed{\\text{a } b}", "\\text{a } b"),
        ("\\boxed{1", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_last_box(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    "ways",
    [
        ["\\frac{1}{2}", "\\dfrac{1}{2}", "\\tfrac12", "\\frac12", " \\frac{1}2 ", "\\frac 1 2."],
        ["1000", "1,000", "\\$1000", "$1,000", "1000\\%"],
        ["0.5", ".5"],
        ["(3,\\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\!\\frac{\\pi}2)"],
        ["90", "90^\\circ", "90^{\\circ}"],
        ["\\sin x", "\\sin  x"],
        ["\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"],
    ],
)
def test_ways_to_write_an_answer_have_one_normal_form(ways):
    assert len({normal(way) for way in ways}) == 1
    assert normal(normal(ways[0])) == normal(ways[0])


@pytest.mark.parametrize(
    "one, other", [("1,2", "12"), ("\\sin x", "\\sinx"), ("-1", "1"), ("1,00", "100"), ("[1,2]", "(1,2)")]
)
def test_different_answers_keep_apart(one, other):
    assert normal(one) != normal(other)


@pytest.mark.parametrize(
    "gold, answer, equal",
    [
        ("\\frac{1}{2}", "0.5", True),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("5", "x=5", True),
        ("1,2", "2,1", True),
        ("[1,2)", "(1,2)", False),
        ("\\frac{1}{2}", "0.6", False),
        ("12", "1,2", False),
        ("p-q", "q-p", False),
    ],
)
def test_equality_of_expressions(make, gold, answer, equal):
    task = make({"solution": f"\\boxed{{{gold}}}"})
    problem = task.problems("test")[0]
    completion = f" Thus $\\boxed{{{answer}}}$."
    assert task.correct(problem, task.parse(completion)) is equal
    assert task.correct(problem, task.parse(task.solution(problem)))


def test_an_answer_that_takes_for_ever_is_killed_and_counted_apart():
    with contextlib.closing(Comparer(timeout_s=1.0)) as comparer:
        assert comparer.compare("\\frac{1}{2}", "0.5") == "equal"
        began = time.monotonic()
        assert comparer.compare("2", "9^{9^{9^{9}}}") == "timeout" and time.monotonic() - began < 5
        assert comparer.compare("2", "3") == "different"  # a new process
        assert comparer.compare("2", "") == "unparsed"
        os.kill(comparer._process.pid, 9)
        comparer._process.wait()
        assert comparer.compare("2", "2") == "equal"
        found = []
        ask = lambda i: found.append(comparer.compare(str(i), str(i)))  # noqa: E731
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == ["equal"] * 8
        process = comparer._process
    assert process.poll() is not None


def test_every_published_answer_is_right_and_the_next_one_is_wrong(real):
    problems = real.problems("test")
    assert len(problems) == 500 and sum(len(real.problems(s)) for s in ("train", "val")) == 4500
    assert all(real.correct(p, real.parse(real.solution(p))) for p in problems)
    pairs = [(p, q.gold) for p, q in zip(problems, problems[1:]) if p.gold != q.gold]
    assert [(p.gold, g) for p, g in pairs if real.correct(p, g)] == [("5", "x=5")]  # which is right


def test_golds_agree_with_the_answers_that_math500_prints(real, shared):
    with open(shared("data/math/math500.jsonl"), encoding="utf-8") as file:
        printed = [json.loads(line)["answer"] for line in file]
    assert [p.meta["written"] for p in real.problems("test")] == printed


def test_math_verify_finds_the_golds_equal_to_themselves(real):
    """The share of normal forms that math-verify reads as the published answer: what a wrong normal form would lower."""
    problems = real.problems("test")
    found = [comparer().compare(p.meta["written"], p.gold) == "equal" for p in problems]
    assert sum(found) >= 498, [p.meta["written"] for p, same in zip(problems, found) if not same]


def test_v_stars_subset(make, shared):
    rows = [
        {},
        {"type": "Geometry"},
        {"level": "Level 2"},
        {"level": 1, "type": "Number Theory", "problem": "Half of 5?", "solution": "\\boxed{2.5}"},
        {"problem": "What is $\\frac{4}{2}$?"},
        {"solution": "\\boxed{\\text{east}}"},
        {"solution": "\\boxed{x+1}"},
    ]
    task = make(*({**r, "problem": f"{r.get('problem', ROW['problem'])} {i}"} for i, r in enumerate(rows)))
    assert [in_v_star_subset(p) for p in task.problems("test")] == [True, False, False, True, False, False, False]
    folder = shared("data/math")
    files = {"train": str(folder / "test_minus_math500.jsonl"), "test": str(folder / "math500.jsonl")}
    task = make_task("math", subset="v_star", **files)
    assert sum(len(task.problems(s)) for s in ("train", "val", "test")) == 155  # the paper has 150


def test_the_format_of_gsm8k_for_models_that_were_trained_on_it(make):
    task = make(format="gsm8k")
    problem = task.problems("test")[0]
    assert task.prompt(problem) == "Q: What is $1 + 1$?\nA:"
    assert task.prompt(problem, hint=True) == "Q: What is $1 + 1$? (2)\nA:"
    assert task.parse(task.solution(problem)) == "2"
    assert task.correct(problem, task.parse(" one and one\n#### 2.00 apples\n")) and task.parse("\\boxed{2}") == "2"
    assert task.parse("The answer is 2.") == task.parse("#### 2\n#### ") == task.parse("\\boxed{3}\n#### 2") == "2"
    assert not task.correct(problem, task.parse("#### 3")) and not task.correct(problem, None)
    assert task.cut(" so\n#### 2\nand on") == " so\n#### 2"


def test_prompts_and_hints(make):
    task = make()
    problem = task.problems("test")[0]
    assert task.prompt(problem) == "Problem:\nWhat is $1 + 1$?\n\nSolution:"
    assert task.prompt(problem, hint=True) == "Problem:\nWhat is $1 + 1$? (2)\n\nSolution:"
    assert task.solution(problem) == " It is $\\boxed{2}.$"
    assert task.cut(" It is 2.\nProblem:\nnext") == " It is 2."


@pytest.mark.parametrize(
    "change, what",
    [
        ({"solution": "no box"}, "no \\boxed answer"),
        ({"level": "hard"}, "'level' is 'hard'"),
        ({"type": 3}, "'subject' is missing or not text"),
        ({"problem": None}, "'problem' is missing or not text"),
    ],
)
def test_bad_records_are_named(make, change, what):
    with pytest.raises(UserError) as error:
        make(change).problems("test")
    assert "rows.jsonl:1" in str(error.value) and what in str(error.value)
