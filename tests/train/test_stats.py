"""pass@k, best-of-k, AUC and calibration against brute force; intervals and summaries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from qstar.train.stats import (
    Platt,
    auc,
    best_of_k,
    bootstrap_ci,
    brier,
    calibration,
    cross_fitted,
    expected_calibration_error,
    fit_platt,
    majority_at_k,
    mean_auc,
    pass_at_k,
    pooled_auc,
    summarise,
)

scored = st.lists(
    st.tuples(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 3.0, math.nan]), st.booleans()), min_size=1, max_size=8
)
random_cases = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_one(n):
    for c in range(n + 1):
        samples = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_limits():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3) == majority_at_k(["a"] * 3 + list("bcdefgh"), "a", 1)
    assert pass_at_k(10, 3, 8) == 1 and pass_at_k(10, 0, 10) == 0
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5)
    values = [pass_at_k(128, 5, k) for k in range(1, 129)]
    assert values == sorted(values)
    for bad in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="pass_at_k"):
            pass_at_k(*bad)


def test_the_bootstrap_interval_is_the_normal_one_for_many_problems():
    values = [1.0] * 300 + [0.0] * 200
    low, high = bootstrap_ci(values, resamples=2000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 500)
    assert low == pytest.approx(0.6 - half, abs=0.008) and high == pytest.approx(0.6 + half, abs=0.008)
    narrow = bootstrap_ci(values, level=0.5)
    assert low < narrow[0] < 0.6 < narrow[1] < high
    assert bootstrap_ci(values) == bootstrap_ci(values) != bootstrap_ci(values, seed=1)
    assert bootstrap_ci([1.0] * 9) == (1.0, 1.0) and all(map(math.isnan, bootstrap_ci([])))


@pytest.mark.parametrize("n", [1, 9, 300, 70_000])
def test_resamples_drawn_together_are_those_drawn_one_by_one(n):
    x, counts = np.random.default_rng(n).random(n), np.random.default_rng(1).integers(1, 9, n)
    rng = np.random.default_rng(3)
    drawn = [rng.integers(0, n, n) for _ in range(250)]
    means = [x[rows].mean() / counts[rows].mean() for rows in drawn]
    assert bootstrap_ci(x, counts=counts, resamples=250, seed=3) == tuple(
        np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    )


def test_a_summary_has_all_problems_and_every_group():
    values, groups = [1.0, 0.0, 1.0, 1.0], ["2", "2", "10", "10"]
    out = summarise("accuracy", values, groups)
    assert list(out)[::3] == ["accuracy", "accuracy/2", "accuracy/10"]  # 2 digits before 10
    assert (out["accuracy"], out["accuracy/2"], out["accuracy/10"]) == (0.75, 0.5, 1.0)
    assert out["accuracy_low"] <= 0.75 <= out["accuracy_high"] and out["accuracy_low/10"] == 1
    assert np.isnan(summarise("x", [], [])["x"])


@given(scored, st.integers(1, 8))
@random_cases
def test_best_of_k_is_the_mean_over_all_subsets_with_uniform_ties(samples, k):
    k = min(k, len(samples))
    scores = [-math.inf if math.isnan(s) else s for s, _ in samples]  # NaN comes last
    worth = []
    for subset in itertools.combinations(range(len(samples)), k):
        best = [samples[i][1] for i in subset if scores[i] == max(scores[j] for j in subset)]
        worth.append(sum(best) / len(best))
    found = best_of_k(*zip(*samples), k)
    assert found == pytest.approx(sum(worth) / len(worth), abs=1e-12)


@given(scored)
@random_cases
def test_limits_of_best_of_k(samples):
    scores, correct = map(list, zip(*samples))
    n, c = len(correct), sum(correct)
    answers = ["gold" if z else f"wrong {i}" for i, z in enumerate(correct)]
    assert best_of_k(scores, correct, 1) == pytest.approx(c / n) == pass_at_k(n, c, 1)
    assert majority_at_k(answers, "gold", 1) == pytest.approx(c / n)
    for k in range(1, n + 1):
        assert best_of_k(correct, correct, k) == pytest.approx(pass_at_k(n, c, k))  # an oracle
        assert best_of_k([7.0] * n, correct, k) == pytest.approx(c / n)  # no information
        assert best_of_k(scores, correct, k) <= pass_at_k(n, c, k) + 1e-12
    top = [
        z
        for s, z in zip(np.nan_to_num(scores, nan=-math.inf, neginf=-math.inf), correct)
        if s == np.fmax.reduce(scores) or np.isnan(scores).all()
    ]
    if len(top) == 1:
        assert best_of_k(scores, correct, n) == top[0]


def test_best_of_k_weights_are_those_printed_in_the_paper():
    weights = [best_of_k(range(10, 0, -1), np.eye(10)[i], 4) for i in range(10)]
    assert weights == pytest.approx([0.4, 0.2667, 0.1667, 0.0952, 0.0476, 0.0190, 0.0048, 0, 0, 0], abs=5e-5)
    assert sum(weights) == pytest.approx(1)


def test_random_scores_choose_as_well_as_chance():
    rng = np.random.default_rng(0)
    correct = np.broadcast_to(np.arange(128) < 40, (4000, 128))
    found = best_of_k(rng.random((4000, 128)), correct, 16)
    assert found.shape == (4000,) and found.mean() == pytest.approx(40 / 128, abs=4 * found.std() / 4000**0.5)
    assert found[7] == best_of_k(*(x[7] for x in (np.random.default_rng(0).random((4000, 128)), correct)), 16)


@pytest.mark.parametrize("bad", [([1.0], [True], 2), ([1.0], [True], 0), ([1.0, 2.0], [True], 1), ([], [], 1)])
def test_best_of_k_refuses(bad):
    with pytest.raises(ValueError):
        best_of_k(*bad)


@given(scored)
@random_cases
def test_auc_is_the_share_of_pairs_in_order(samples):
    finite = [(-math.inf if math.isnan(s) else s, z) for s, z in samples]
    pairs = [(a > b) + 0.5 * (a == b) for a, y in finite if y for b, z in finite if not z]
    found = auc(*zip(*samples))
    assert found == pytest.approx(sum(pairs) / len(pairs)) if pairs else math.isnan(found)


def test_auc_per_problem_forgives_what_the_pooled_one_does_not():
    scores, correct = [[2.0, 1.0], [12.0, 11.0], [5.0, 6.0]], [[1, 0], [1, 0], [1, 1]]
    assert mean_auc(scores, correct) == 1  # the last problem has one class only and does not count
    assert pooled_auc(scores, correct) == pytest.approx(5 / 8)
    assert math.isnan(mean_auc([[1.0]], [[True]])) and math.isnan(pooled_auc([[1.0]], [[True]]))
    assert math.isnan(pooled_auc([], [])) and math.isnan(mean_auc([], []))


@pytest.mark.parametrize("a, b, separable", [(0.02, 3.0, False), (4.0, -1.0, False), (1.0, 0.0, True)])
def test_platt_scaling_is_the_minimum_of_its_cross_entropy(a, b, separable):
    rng = np.random.default_rng(3)
    s = rng.normal(-b / a, 1.5 / a, 400)
    z = s > -b / a if separable else rng.random(400) < 1 / (1 + np.exp(-(a * s + b)))
    P, W = z.sum(), (~z).sum()
    target = np.where(z, (P + 1) / (P + 2), 1 / (W + 2))

    def loss(theta):
        logits = theta[0] * a * s + theta[1]  # a only makes the numbers similar
        return np.logaddexp(0, logits).sum() - target @ logits

    reference = minimize(loss, [1.0, 0.0], method="BFGS", options={"gtol": 1e-9}).x
    fitted = fit_platt(s, z)
    assert (fitted.slope / a, fitted.offset) == pytest.approx(tuple(reference), rel=1e-4, abs=1e-4)
    if not separable:
        assert fitted.slope == pytest.approx(a, rel=0.3)  # and it finds what made the data
    assert fitted([math.nan, math.inf, 0.0]) == pytest.approx([0, 1, 1 / (1 + math.exp(-fitted.offset))])


def test_platt_scaling_needs_both_classes_and_passes_over_infinite_scores():
    with pytest.raises(ValueError, match="2 correct and 0 wrong"):
        fit_platt([1.0, 2.0, -math.inf], [True, True, False])
    s, z = [0.0, 1.0, 2.0, 1.5], [False, False, True, True]
    assert fit_platt([*s, math.nan, -math.inf], [*z, True, False]) == fit_platt(s, z)
    assert Platt(0.0, 0.0)([math.nan, 5.0]) == pytest.approx([0.5, 0.5])


def test_calibration_of_a_calibrated_and_of_a_bragging_judge():
    rng = np.random.default_rng(0)
    p = rng.random(30_000)
    z = rng.random(30_000) < p
    assert expected_calibration_error(p, z) < 0.01 and brier(p, z) == pytest.approx(1 / 6, abs=0.005)
    assert expected_calibration_error(np.ones(100), np.arange(100) < 70) == pytest.approx(0.3)
    assert brier([1.0, 0.0, 0.5], [1, 1, 0]) == pytest.approx((0 + 1 + 0.25) / 3)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40, unique_by=lambda x: x[0]))
@random_cases
def test_calibration_error_by_bins_of_equal_mass(samples):
    ordered = sorted(samples, reverse=True)
    size, extra = divmod(len(ordered), min(15, len(ordered)))
    error, at = 0.0, 0
    for b in range(min(15, len(ordered))):
        part = ordered[at : at + size + (b < extra)]
        at += len(part)
        error += (
            len(part) / len(ordered) * abs(sum(z for _, z in part) / len(part) - sum(p for p, _ in part) / len(part))
        )
    assert expected_calibration_error(*zip(*samples)) == pytest.approx(error, abs=1e-12)


def test_calibration_error_does_not_depend_on_the_order_of_equal_probabilities():
    p = [0.5] * 40
    first, last = ([1] * 20 + [0] * 20), ([0] * 20 + [1] * 20)
    assert expected_calibration_error(p, first) == expected_calibration_error(p, last) == pytest.approx(0)


def test_cross_fitted_probabilities_come_from_the_other_half():
    rng = np.random.default_rng(1)
    scores = [rng.normal(0, 3, 200) for _ in range(6)]
    correct = [rng.random(200) < 1 / (1 + np.exp(-(2 * s - 1 if i % 2 else -s))) for i, s in enumerate(scores)]
    found = cross_fitted(scores, correct)
    halves = [fit_platt(np.concatenate(scores[h::2]), np.concatenate(correct[h::2])) for h in (0, 1)]
    assert halves[1].slope == pytest.approx(2, rel=0.2) and halves[0].slope == pytest.approx(-1, rel=0.2)
    for i, p in enumerate(found):
        np.testing.assert_allclose(p, halves[1 - i % 2](scores[i]))


def test_calibration_measures_fitted_scores_and_chances_as_they_are():
    rng = np.random.default_rng(2)
    chances = [rng.random(500) for _ in range(40)]
    correct = [rng.random(500) < c for c in chances]
    logits = [40 * np.log(c / (1 - c)) - 7 for c in chances]
    found = calibration(logits, correct)
    assert (
        found.keys() == {"ece", "brier"} and found["ece"] < 0.01 and found["brier"] == pytest.approx(1 / 6, abs=0.005)
    )
    raw = calibration([c**2 for c in chances], correct)
    assert raw["brier_raw"] > raw["brier"] and raw["ece_raw"] == pytest.approx(1 / 6, abs=0.01)  # mean of c - c^2
    assert calibration([[1.0, 2.0]], [[True, False]]) == {} == calibration([], [])  # nothing to fit a half on


def test_the_interval_of_a_mean_over_parts_is_that_of_a_ratio():
    """Rows of unequal length, the longer ones easier: the interval holds the mean over tokens, not the mean over rows."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, 300)
    sums = rng.binomial(counts, 0.2 + 0.015 * counts)
    point, low_high = sums.sum() / counts.sum(), bootstrap_ci(sums, counts=counts)
    assert low_high[0] < point < low_high[1] and low_high[0] > (sums / counts).mean()
    linear = np.sqrt(np.sum((sums - point * counts) ** 2)) / counts.sum()  # the delta method's standard error
    assert low_high == pytest.approx((point - 1.96 * linear, point + 1.96 * linear), abs=0.005)
    assert bootstrap_ci(sums / counts) == bootstrap_ci(sums / counts, counts=np.ones(300))
