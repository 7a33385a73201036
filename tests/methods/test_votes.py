"""A vote is over what was written: neither tests nor the right answer decide which answers are one."""

import json

import pytest

from qstar.methods.select import Candidates, curves
from qstar.methods.v_star_eval import candidates
from qstar.runs.evaluate import many
from qstar.tasks import make_task
from qstar.types import Rollout


def rollouts(task, answers, right):
    keep = dict(problem_id="p", iteration=0, hinted=False, group="", prompt="", completion="", gold="", verdict="", reason="",
                truncated=False, valid=None, logprob=0.0, n_tokens=1)  # fmt: skip
    return [Rollout(sample=i, answer=a, correct=z, **keep) for i, (a, z) in enumerate(zip(answers, right))]


@pytest.fixture
def mbpp(tmp_path):
    row = {"task_id": 11, "text": "Square.", "code": "def f(x): return x * x", "test_list": ["assert f(3) == 9"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row))
    return make_task("mbpp", data=str(tmp_path / "mbpp.jsonl"))


def test_programs_vote_by_their_text_and_not_by_the_hidden_tests(mbpp):
    (problem,) = mbpp.problems("test")
    programs = ["def f(x): return x * x", "def f(x): return x ** 2", *(f"def f(x): return x - {i}" for i in range(14))]
    right = mbpp.judged([problem] * 16, programs)
    assert sum(right) == 2
    rows = rollouts(mbpp, programs, right)
    assert many(rows, 16, mbpp.ballots)["majority@16"] == pytest.approx(2 / 16)
    found = curves([candidates(rows, {"s": [1.0] * 16}, mbpp.ballots)], [16], m=16)
    for rule in ("majority", "weighted/s", "top16/s"):
        assert found[rule][16] == pytest.approx([2 / 16])
    same = ["def f(x): return x*x", "def f(x):\n    # squares\n    return x * x", *programs[2:]]
    assert many(rollouts(mbpp, same, right), 16, mbpp.ballots)["majority@16"] == 1.0  # two of one text


def test_an_answer_that_is_right_in_part_counts_in_part():
    found = curves([Candidates(["a", "a", "a", "b"], [True, True, False, False], {})], [4])
    assert found["majority"][4] == pytest.approx([2 / 3])
