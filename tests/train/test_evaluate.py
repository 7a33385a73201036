"""pass@k, intervals and summaries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from qstar.train.evaluate import bootstrap_ci, majority_at_k, pass_at_k, summarise


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


def test_a_summary_has_all_problems_and_every_group():
    values, groups = [1.0, 0.0, 1.0, 1.0], ["2", "2", "10", "10"]
    out = summarise("accuracy", values, groups)
    assert list(out)[::3] == ["accuracy", "accuracy/2", "accuracy/10"]  # 2 digits before 10
    assert (out["accuracy"], out["accuracy/2"], out["accuracy/10"]) == (0.75, 0.5, 1.0)
    assert out["accuracy_low"] <= 0.75 <= out["accuracy_high"] and out["accuracy_low/10"] == 1
    assert np.isnan(summarise("x", [], [])["x"])
