"""Majority votes against brute force over all subsets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar.sample.vote import majority, majority_at_k, over_subsets, weighted_majority_at_k

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


def test_a_thousand_samples_agree_with_drawn_subsets():
    rng = np.random.default_rng(0)
    answers = [str(a) for a in np.abs(rng.normal(0, 8, 1000)).astype(int)]
    exact = majority_at_k(answers, "0", 32)
    drawn, error = weighted_majority_at_k(answers, np.ones(1000), "0", 32, trials=4000)
    assert 0 < error < 0.01 and abs(exact - drawn) < 4 * error


@given(answers, st.integers(1, 8), st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, math.nan]), min_size=8, max_size=8))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_weighted_majority_is_the_mean_over_all_subsets(answers, k, weights):
    k, weights = min(k, len(answers)), weights[: len(answers)]
    total = 0.0
    for subset in itertools.combinations(range(len(answers)), k):
        votes = {}
        for i in subset:
            if answers[i] is not None:
                votes[answers[i]] = votes.get(answers[i], 0) + (0 if math.isnan(weights[i]) else weights[i])
        tied = [a for a, v in votes.items() if v == max(votes.values())]
        total += "a" in tied and 1 / len(tied)
    found, error = weighted_majority_at_k(answers, weights, "a", k)
    assert error == 0 and found == pytest.approx(total / math.comb(len(answers), k), abs=1e-12)


@given(answers, st.integers(1, 8))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_equal_weights_are_no_weights(answers, k):
    k = min(k, len(answers))
    found, _ = weighted_majority_at_k(answers, [0.3] * len(answers), "a", k)
    assert found == pytest.approx(majority_at_k(answers, "a", k), abs=1e-12)


def test_drawn_subsets_hold_k_different_samples_each_equally_often():
    seen = []
    mean, error = over_subsets(lambda rows: (seen.append(rows), rows.sum(axis=1))[1], 20, 6, trials=3000, seed=1)
    rows = np.sort(seen[0], axis=1)
    assert rows.shape == (3000, 6) and (np.diff(rows, axis=1) > 0).all()
    assert abs(mean - 6 * 9.5) < 4 * error
    assert np.abs(np.bincount(rows.ravel()) / 3000 - 0.3).max() < 0.04
    assert over_subsets(lambda rows: rows[:, 0], 20, 6) == over_subsets(lambda rows: rows[:, 0], 20, 6)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, math.inf]])
def test_votes_are_finite_numbers_of_zero_or_more(weights):
    with pytest.raises(ValueError, match="weights"):
        weighted_majority_at_k(["a", "b"], weights, "a", 1)


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
