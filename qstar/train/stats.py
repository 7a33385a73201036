"""Evaluation statistics: pass@k, majority@k, best-of-k, a verifier's quality, intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from qstar.sample.vote import majority_at_k as majority_at_k


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the chance that k of n samples, c of them correct, hold a correct one: 1 - C(n-c, k) / C(n, k).

    Source: the unbiased estimator of arXiv 2107.03374, equation 1.

    Raises:
      ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}): needs 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def best_of_k(scores: ArrayLike, correct: ArrayLike, k: int) -> float | np.ndarray:
    """Returns the expected accuracy of the best-scored of k out of N samples, over all subsets, ties broken uniformly.

    Duplicates among the samples stay in: they are part of what is estimated.

    Args:
      scores: [..., N], larger is better; NaN counts as -inf, so it comes last.
      correct: [..., N] bool, or any value of a sample.
      k: 1..N.

    Raises:
      ValueError: shapes differ, no sample, or k is not in 1..N.
    """
    s, z = _pair(scores, correct)
    N = s.shape[-1]
    if not 1 <= k <= N:
        raise ValueError(f"best_of_k: k={k} is not in 1..{N}")
    # With scores in falling order, the best of a subset is sample i with probability C(N-i-1, k-1) / C(N, k), for
    # i in 0..N-k (arXiv 2402.06457, equation 3, whose sum ends one term early). The weights follow from w_0 = k / N and
    # w_{i+1} = w_i (N-i-k) / (N-i-1), without large binomials.
    i = np.arange(N - 1)
    weights = np.cumprod(np.concatenate([[k / N], np.maximum(N - i - k, 0) / (N - i - 1)]))
    rows = zip(s.reshape(-1, N), z.reshape(-1, N))
    found = np.array([weights @ _shared_by_ties(*row) for row in rows]).reshape(s.shape[:-1])
    return found if found.ndim else float(found)


def _pair(scores: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    s, z = np.asarray(scores, np.float64), np.asarray(correct, np.float64)
    if s.shape != z.shape or not s.ndim or not s.shape[-1]:
        raise ValueError(f"scores {s.shape} and correct {z.shape} must have one shape [..., N], N of at least 1")
    return np.where(np.isnan(s), -np.inf, s), z


def _shared_by_ties(s: np.ndarray, z: np.ndarray) -> np.ndarray:
    # Samples of equal score all get the mean over them: the expectation over a random order of the tied ones.
    _, group, size = np.unique(-s, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group, weights=z) / size, size)


def auc(scores: ArrayLike, correct: ArrayLike) -> float:
    """Returns P(score of a correct sample > of a wrong one) + P(equal) / 2. [N], [N] -> 0..1, NaN without both classes.

    NaN scores count as -inf.
    """
    # Not scikit-learn's `roc_auc_score`, which refuses the -inf and NaN scores of samples without an answer.
    s, z = _pair(scores, correct)
    z = z.astype(bool)
    wrong = np.sort(s[~z])
    if not z.any() or not len(wrong):
        return math.nan
    below, up_to = (np.searchsorted(wrong, s[z], side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(wrong)))


def mean_auc(scores: Sequence[ArrayLike], correct: Sequence[ArrayLike]) -> float:
    """Returns the mean of `auc` over the problems that have both classes (NaN if none has), as selection needs it."""
    values = [auc(s, z) for s, z in zip(scores, correct, strict=True)]
    values = [v for v in values if not math.isnan(v)]
    return float(np.mean(values)) if values else math.nan


def pooled_auc(scores: Sequence[ArrayLike], correct: Sequence[ArrayLike]) -> float:
    """Returns `auc` of all problems' samples together, which also measures which problems are hard."""
    return auc(_join(scores), _join(correct)) if len(scores) else math.nan


class Platt(NamedTuple):
    """Probability of being correct as a function of the score s: sigmoid(slope * s + offset)."""

    slope: float
    offset: float

    def __call__(self, scores: ArrayLike) -> np.ndarray:
        """Probabilities, float64 of the shape of `scores`; a NaN score is treated as -inf."""
        s = np.asarray(scores, np.float64)
        with np.errstate(invalid="ignore"):
            logits = self.slope * np.where(np.isnan(s), -np.inf, s)
        # tanh does not overflow where exp does. A slope of 0 times -inf is NaN, and means 0.
        return 0.5 * (1 + np.tanh(0.5 * (np.where(np.isnan(logits), 0.0, logits) + self.offset)))


def fit_platt(scores: ArrayLike, correct: ArrayLike) -> Platt:
    """Fits probabilities to scores that have no probability scale (DPO), on a split that is not evaluated on.

    Raises:
      ValueError: shapes differ, or one of the classes has no finite score.
    """
    s, z = (x.ravel() for x in _pair(scores, correct))
    # The score of a sample without an answer is not finite, and has no place on a fitted slope.
    s, z = s[np.isfinite(s)], z[np.isfinite(s)].astype(bool)
    P, W = int(z.sum()), int((~z).sum())
    if not P or not W:
        raise ValueError(f"fit_platt: {P} correct and {W} wrong samples; needs both")
    # Platt (1999): targets within (0, 1), not labels, keep the slope finite where the scores separate the classes.
    target = np.where(z, (P + 1) / (P + 2), 1 / (W + 2))
    mean, scale = s.mean(), s.std() or 1.0
    X = np.stack([(s - mean) / scale, np.ones(len(s))], axis=1)  # standardised, so that one step size fits all scores
    theta, loss = np.zeros(2), math.inf
    for _ in range(100):  # Newton's method, the step halved where the loss would rise
        p = 0.5 * (1 + np.tanh(0.5 * X @ theta))
        gradient = X.T @ (p - target)
        # 1e-12: the matrix is singular where all scores are equal.
        step = np.linalg.solve((X.T * (p * (1 - p))) @ X + 1e-12 * np.eye(2), gradient)
        while (new := _cross_entropy(X @ (theta - step), target)) > loss and np.abs(step).max() > 1e-12:
            step = step / 2
        theta, loss = theta - step, new
        if np.abs(step).max() < 1e-10:
            break
    return Platt(float(theta[0] / scale), float(theta[1] - theta[0] * mean / scale))


def _cross_entropy(logits: np.ndarray, target: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - target * logits).sum())


def brier(probabilities: ArrayLike, correct: ArrayLike) -> float:
    """Returns the mean of (p - z)^2 over samples: 0 is perfect, p = 1/2 gives 1/4."""
    p, z = _pair(probabilities, correct)
    return float(np.mean((p - z) ** 2))


def expected_calibration_error(probabilities: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Returns the sum over bins of n_b / n |accuracy_b - confidence_b|, bins of equally many samples in order of p."""
    p, z = (x.ravel() for x in _pair(probabilities, correct))
    # Samples of equal probability share their mean correctness, so the value does not depend on their order.
    gaps = np.sort(p)[::-1] - _shared_by_ties(p, z)
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, min(bins, len(gaps)))) / len(gaps))


def cross_fitted(scores: Sequence[ArrayLike], correct: Sequence[ArrayLike]) -> list[np.ndarray]:
    """Returns probabilities per problem, by Platt scaling fitted on the other half of the problems (every second one).

    Raises:
      ValueError: a half lacks right or wrong samples; see `fit_platt`.
    """
    # Each half is scaled by the fit on the other one: a fit measured on its own samples would look calibrated.
    halves = [range(start, len(scores), 2) for start in (0, 1)]
    fits = [fit_platt(*(_join([xs[i] for i in half]) for xs in (scores, correct))) for half in reversed(halves)]
    return [fits[i % 2](s) for i, s in enumerate(scores)]


def _join(xs: Sequence[ArrayLike]) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in xs]) if len(xs) else np.zeros(0)


def calibration(scores: Sequence[ArrayLike], correct: Sequence[ArrayLike]) -> dict[str, float]:
    """Returns `ece` and `brier` of scores after `cross_fitted` Platt scaling.

    Where all scores are in [0, 1] (ORM, PRM), also `ece_raw` and `brier_raw` of the scores themselves. Empty where
    there is nothing to fit: a half of the problems without a right or without a wrong sample.
    """
    measures = {"ece": expected_calibration_error, "brier": brier}
    z, raw = _join(correct), _join(scores)
    try:
        fitted = np.concatenate(cross_fitted(scores, correct))
    except ValueError:
        return {}
    out = {name: float(f(fitted, z)) for name, f in measures.items()}
    if ((raw >= 0) & (raw <= 1)).all():
        out |= {f"{name}_raw": float(f(raw, z)) for name, f in measures.items()}
    return out


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    *,
    counts: Sequence[float] | np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean, resampling problems; (nan, nan) without values.

    Args:
      counts: parts per problem (tokens of a row); the interval is then that of sum(values) / sum(counts).
    """
    x = np.asarray(values, np.float64)
    if not len(x):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)  # not `scipy.stats.bootstrap`: recorded runs drew these resamples
    n = np.ones(len(x)) if counts is None else np.asarray(counts, np.float64)
    at_once = max(1, 2**16 // len(x))  # many resamples per call: of small arrays, one by one, most is numpy's overhead
    drawn = (rng.integers(0, len(x), (min(at_once, resamples - i), len(x))) for i in range(0, resamples, at_once))
    means = np.concatenate([x[rows].mean(axis=1) / n[rows].mean(axis=1) for rows in drawn])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(prefix: str, values: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """Returns `prefix`, `prefix_low`, `prefix_high` (95% interval) over all problems, and per group: `prefix/3`..."""
    out: dict[str, float] = {}
    for group in ["", *sorted(set(groups), key=lambda g: (len(g), g))]:
        mine = [v for v, g in zip(values, groups) if g == group or not group]
        name = f"/{group}" if group else ""
        low, high = bootstrap_ci(mine)
        mean = float(np.mean(mine)) if mine else math.nan
        out.update({f"{prefix}{name}": mean, f"{prefix}_low{name}": low, f"{prefix}_high{name}": high})
    return out


def paired(before: Sequence[float], after: Sequence[float], resamples: int = 2000) -> tuple[float, float, float]:
    """Returns (low, difference, high) of mean(after - before) over the same questions, with its 95% bootstrap interval.

    The interval is over questions, not over trained models.
    """
    # Paired: the difficulty of a question, which both share, cancels.
    each = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    low, high = bootstrap_ci(each, resamples=resamples)
    return low, float(each.mean()), high
