"""Accuracy, pass@k, majority@k, and confidence intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qstar.sample.vote import majority_at_k

__all__ = ["bootstrap_ci", "majority_at_k", "pass_at_k", "summarise"]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the chance that k of n samples, c of them correct, hold a correct one: 1 - C(n-c, k) / C(n, k).

    Source: the unbiased estimator of arXiv 2107.03374, equation 1.

    Raises:
      ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}): needs 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_ci(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean, resampling problems (one value per problem).

    (nan, nan) without values.
    """
    x = np.asarray(values, np.float64)
    if not len(x):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = np.array([x[rng.integers(0, len(x), len(x))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(prefix: str, values: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """Returns `prefix`, `prefix_low`, `prefix_high` (95% interval) over all problems, and each per group: `prefix/3`..."""
    out: dict[str, float] = {}
    for group in ["", *sorted(set(groups), key=lambda g: (len(g), g))]:
        mine = [v for v, g in zip(values, groups) if g == group or not group]
        name = f"/{group}" if group else ""
        low, high = bootstrap_ci(mine)
        mean = float(np.mean(mine)) if mine else math.nan
        out.update({f"{prefix}{name}": mean, f"{prefix}_low{name}": low, f"{prefix}_high{name}": high})
    return out
