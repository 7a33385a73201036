"""Majority votes against brute force over all subsets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar.sample.vote import majority, majority_at_k

answers = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8)


def brute_force(answers, gold, k):
    total, count = 0.0, 0
    for subset in itertools.combinations(answers, k):
        votes = [subset.count(a) for a in dict.fromkeys(subset) if a is not None]
        tied = [a for a in dict.fromkeys(subset) if a is not None and subset.count(a) == max(votes)]
        total += gold in tied and 1 / len(tied)
        count += 1
    return total / count


@given(answers, st.integers(1, 8))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_majority_at_k_is_the_mean_over_all_subsets(answers, k):
    k = min(k, len(answers))
    assert majority_at_k(answers, "a", k) == pytest.approx(brute_force(answers, "a", k), abs=1e-12)


@given(answers)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_majority_at_one_is_the_share_of_the_gold_answer(answers):
    assert majority_at_k(answers, "a", 1) == pytest.approx(answers.count("a") / len(answers))


def test_many_samples_do_not_overflow():
    answers = ["a"] * 70 + ["b"] * 40 + [None] * 18
    assert 0.99 < majority_at_k(answers, "a", 64) <= 1
    assert majority_at_k(answers, "b", 128) == 0


@pytest.mark.parametrize("k", [0, 3])
def test_k_must_lie_in_range(k):
    with pytest.raises(ValueError, match=f"k={k}"):
        majority_at_k(["a", "b"], "a", k)


def test_majority():
    assert majority(["a", "b", "b"]) == "b"
    assert majority([None, None, "a"]) == "a"  # None never votes
    assert majority([None, None]) is None and majority([]) is None
    assert majority(["b", "a", "a", "b"]) == "b"  # a tie: first seen
    assert majority(["b", "a", "a", "b"], [-9, -1, -1, -1]) == "a"  # a tie: larger summed log-probability
    assert majority(["b", "a", "a", "b"], [-1, -1, -1, -1]) == "b"  # still tied: first seen
    assert majority(["b", "b", "a"], [-50, -50, -1]) == "b"  # votes come first
    assert majority([None, "a", "b"], [0.0, -2, -1]) == "b"


@given(answers)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_majority_of_all_is_majority_at_n_unless_tied(answers):
    share = majority_at_k(answers, "a", len(answers))
    if share in (0.0, 1.0):
        assert (majority(answers) == "a") == (share == 1.0)
