"""Choosing one of k solutions, and the expected value of every rule, against all subsets counted one by one."""

import functools
import itertools
import json
import math

import numpy as np
import pytest

from qstar.methods import select
from qstar.methods.select import Candidates, curves
from qstar.methods.v_star_eval import candidates
from qstar.runs.evaluate import many
from qstar.tasks import make_task
from qstar.train.stats import auc
from qstar.types import Rollout

NAN = math.nan


def test_chances_weigh_as_they_are_and_likelihoods_by_their_exponential():
    assert select.weights([0.2, 1.0, NAN], True) == [0.2, 1.0, 0.0]
    assert select.weights([-700.0, -701.0], False) == pytest.approx([1.0, math.exp(-1)])
    assert select.weights([NAN, NAN], True) == [1.0, 1.0]


def brute(problem, k, win):
    """The mean over all subsets of k."""
    found = [win(list(s)) for s in itertools.combinations(range(len(problem.answers)), k)]
    return sum(found) / len(found)


def share(values, correct):
    """How often a uniform choice among the largest is right."""
    top = [c for v, c in zip(values, correct) if v == max(values)]
    return sum(top) / len(top)


@pytest.fixture(scope="module")
def problems():
    rng = np.random.default_rng(1)
    out = []
    for _ in range(6):
        correct = rng.random(8) < 0.4
        answers = ["right" if c else rng.choice([None, "x", "y"], p=[0.2, 0.5, 0.3]) for c in correct]
        scores = {"v": rng.integers(0, 4, 8).astype(float), "logp": rng.normal(-9, 1, 8)}
        out.append(Candidates(answers, correct.tolist(), scores))
    return out


def test_best_of_k_is_the_mean_over_all_subsets(problems):
    found = curves(problems, [1, 2, 4, 8])
    for k, p in itertools.product([1, 2, 4, 8], range(len(problems))):
        c = problems[p]
        for name in ("v", "logp"):
            exact = brute(c, k, lambda s: share([c.scores[name][i] for i in s], [c.correct[i] for i in s]))  # noqa: B023
            assert found[f"best/{name}"][k][p] == pytest.approx(exact)
        assert found["pass"][k][p] == pytest.approx(brute(c, k, lambda s: any(c.correct[i] for i in s)))  # noqa: B023
        assert found["majority"][1][p] == pytest.approx(np.mean(c.correct))


def test_votes_by_score_are_near_the_mean_over_all_subsets(problems):
    k, m = 4, 2
    found = curves(problems, [k, 8], m=m)

    def weighted(c, s):
        votes = {}
        for i in s:
            if c.answers[i] is not None:
                votes[c.answers[i]] = votes.get(c.answers[i], 0) + math.exp(c.scores["logp"][i])
        return bool(votes) and max(votes, key=votes.get) == "right"

    def top(c, s):
        best = sorted(s, key=lambda i: -c.scores["logp"][i])[:m]
        votes = [c.answers[i] for i in best if c.answers[i] is not None]
        counts = {a: votes.count(a) for a in votes}
        return share(list(counts.values()), [a == "right" for a in counts]) if votes else 0.0

    for rule, win in (("weighted", weighted), (f"top{m}", top)):
        ours = [found[f"{rule}/logp"][k][i] for i in range(len(problems))]
        exact = [brute(c, k, functools.partial(win, c)) for c in problems]
        np.testing.assert_allclose(ours, exact, atol=0.13)  # 200 of 70 subsets, drawn
        assert np.mean(ours) == pytest.approx(np.mean(exact), abs=0.04)
        assert found[f"{rule}/logp"][8][0] == pytest.approx(
            brute(problems[0], 8, lambda s, win=win: win(problems[0], s))
        )


def test_weights_of_votes_are_of_one_kind_for_all_problems_of_a_scorer():
    """A judge's grades are chances; log-likelihoods that happen to lie in [0, 1] for one problem stay log-likelihoods."""
    answers, correct = ["1", "2", "2", "2"], [True, False, False, False]
    ratio = [1.0, 0.0, 0.0, 0.0]  # as chances 1 against 0; as log-likelihoods e against 3
    odd = select.Candidates(answers, correct, {"logratio": ratio})
    other = select.Candidates(answers, correct, {"logratio": [-3.0, -1.0, -2.0, 2.0]})
    assert select.curves([odd], [4])["weighted/logratio"][4] == [1.0]
    assert select.curves([odd, other], [4])["weighted/logratio"][4][0] == 0.0


def test_a_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    gain, low, high = select.gain(hard + 0.05, hard)
    assert gain == pytest.approx(0.05) and low == pytest.approx(0.05) and high == pytest.approx(0.05)


def test_what_a_scorer_is_worth(problems):
    found = select.quality(problems, values := curves(problems, [1, 4]))
    for name in ("v", "logp"):
        areas = [auc(p.scores[name], p.correct) for p in problems]
        assert found["auc"][name] == pytest.approx(np.nanmean(areas))
        regret = np.subtract(values["pass"][4], values[f"best/{name}"][4])
        assert found["regret"][name]["4"][0] == pytest.approx(regret.mean()) and found["regret"][name]["1"][
            0
        ] == pytest.approx(0)
        flat = [
            np.concatenate([np.asarray(x, float) for x in xs])
            for xs in zip(*((p.scores[name], p.correct) for p in problems))
        ]
        assert found["auc_pooled"][name] == pytest.approx(auc(*flat))
        assert found["calibration"][name].keys() == {"ece", "brier"}
    nothing = [Candidates(["right"] * 2, [True] * 2, {"v": [1.0, 2.0]})]
    assert select.quality(nothing, curves(nothing, [1]))["auc"] == {"v": None}


def test_auc_by_the_kind_of_mistake_sets_aside_the_other_kinds():
    """The scorer sees skipped lines and is blind to wrong digits."""
    one = Candidates(["right", "x", "y", "z"], [True, False, False, False], {"v": [2.0, 2.0, 0.0, 2.0]})
    two = Candidates(["right", "x"], [True, False], {"v": [0.0, -1.0]})
    found = select.auc_by_fault([one, two], [[None, "digit", "line", None], [None, "line"]])
    assert found == {"line": {"samples": 2, "problems": 2, "auc": {"v": 1.0}},
                     "digit": {"samples": 1, "problems": 1, "auc": {"v": 0.5}}}  # fmt: skip
    assert list(found) == ["line", "digit"]


# ------------------------------------------------------------------ a vote is over what was written, not over its correctness


def rollouts_of(task, answers, right):
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
    rows = rollouts_of(mbpp, programs, right)
    assert many(rows, 16, mbpp.ballots)["majority@16"] == pytest.approx(2 / 16)
    found = curves([candidates(rows, {"s": [1.0] * 16}, mbpp.ballots)], [16], m=16)
    for rule in ("majority", "weighted/s", "top16/s"):
        assert found[rule][16] == pytest.approx([2 / 16])
    same = ["def f(x): return x*x", "def f(x):\n    # squares\n    return x * x", *programs[2:]]
    assert many(rollouts_of(mbpp, same, right), 16, mbpp.ballots)["majority@16"] == 1.0  # two of one text


def test_an_answer_that_is_right_in_part_counts_in_part():
    found = curves([Candidates(["a", "a", "a", "b"], [True, True, False, False], {})], [4])
    assert found["majority"][4] == pytest.approx([2 / 3])


def test_a_solution_without_a_score_comes_last_and_weighs_nothing():
    found = curves([Candidates(["b", "a"], [False, True], {"v": [NAN, 0.5]})], [2], m=1)
    assert [found[rule][2] for rule in ("best/v", "top1/v", "weighted/v")] == [[1.0]] * 3
