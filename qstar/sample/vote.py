"""Votes over k samples, and their expected accuracy over all subsets."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np


def majority(answers: Sequence[str | None], logprobs: Sequence[float] | None = None) -> str | None:
    """Returns the most frequent answer; None (unparsed) has no vote. Ties: larger summed logprob, then first seen.

    Source: self-consistency, arXiv 2203.11171.
    """
    votes: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for i, answer in enumerate(answers):
        if answer is not None:
            votes[answer][0] += 1
            votes[answer][1] += logprobs[i] if logprobs is not None else 0.0
    return max(votes, key=votes.__getitem__, default=None)  # of equal ones the first


def majority_at_k(answers: Sequence[str | None], gold: str, k: int) -> float:
    """Returns the expected accuracy of majority voting over all subsets of k of the N samples, ties broken uniformly.

    Raises:
      ValueError: k is not in 1..N.
    """
    N = len(answers)
    if not 1 <= k <= N:
        raise ValueError(f"k={k} is not in 1..{N}")
    counts = collections.Counter(a for a in answers if a is not None)
    g, others = counts.pop(gold, 0), sorted(counts.values())
    # Exact, without drawing subsets. For every number m of votes that the gold answer may get: the other answers get at
    # most m, and one that gets m ties. Answers that occur less often than m cannot tie and count together, as unparsed
    # ones do, so only N / m of them need the dynamic programme (state: votes used, answers tied at m): O(N^2 log N) in
    # all. Counts are carried as binomial probabilities of rate k / N, whose product is the count times a factor that
    # depends on k alone: nothing overflows.
    rate, total = k / N, 0.0
    for m in range(1, min(g, k) + 1):
        can_tie = [v for v in others if v >= m]
        tie_counts = np.zeros((k - m + 1, len(can_tie) + 1))  # [votes of the others, how many of them tie at m]
        tie_counts[0, 0] = 1.0
        for v in can_tie:
            chances, before = _binomial(v, rate), tie_counts
            tie_counts = before * chances[0]
            for x in range(1, min(m, k - m + 1)):
                tie_counts[x:] += before[:-x] * chances[x]
            if m <= k - m:
                tie_counts[m:, 1:] += before[:-m, :-1] * chances[m]
        rest = _binomial(N - g - sum(can_tie), rate)  # answers that cannot tie, and unparsed ones
        used = np.arange(max(0, k - m + 1 - len(rest)), k - m + 1)
        shared = tie_counts[used] @ (1.0 / np.arange(1, tie_counts.shape[1] + 1))
        total += _binomial(g, rate)[m] * float(shared @ rest[k - m - used])
    return min(1.0, total / float(_binomial(N, rate)[k]))  # rounding can reach 1 + 1e-13


def right_shares(answers: Sequence[str | None], correct: Sequence[bool]) -> dict[str, float]:
    """Returns, for each answer with a right sample, the share of its right samples (nearly always 1)."""
    counts = collections.Counter(a for a in answers if a is not None)
    right = collections.Counter(a for a, z in zip(answers, correct) if z and a is not None)
    return {a: n / counts[a] for a, n in right.items()}


def voted_right_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Returns `majority_at_k` where any number of answers may be right: the probability that a right one wins."""
    return sum(share * majority_at_k(answers, a, k) for a, share in right_shares(answers, correct).items())


def _binomial(n: int, rate: float) -> np.ndarray:
    # In logarithms, because the factorials overflow. At rate 1 (k = N) log(1 - rate) is -inf, and all mass is at n.
    if rate >= 1:
        return np.eye(1, n + 1, n)[0]
    log_factorial = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    x = np.arange(n + 1)
    log_ways = log_factorial[n] - log_factorial - log_factorial[::-1]
    return np.exp(log_ways + x * math.log(rate) + (n - x) * math.log1p(-rate))


def over_subsets(
    value: Callable[[np.ndarray], np.ndarray], n: int, k: int, *, trials: int = 256, seed: int = 0
) -> tuple[float, float]:
    """Returns the mean of a function of k out of n samples over all subsets, and the standard error of that mean.

    For choices that have no closed form. Exact (error 0) where there are no more than `trials` subsets; otherwise the
    mean over `trials` subsets drawn without replacement within each (V-STaR used 256, arXiv 2402.06457).

    Args:
      value: maps sample numbers [subsets, k] to the value of each subset.

    Raises:
      ValueError: k is not in 1..n, or trials is less than 2.
    """
    if not 1 <= k <= n or trials < 2:
        raise ValueError(f"over_subsets(n={n}, k={k}, trials={trials}): needs 1 <= k <= n and at least 2 trials")
    if math.comb(n, k) <= trials:
        every = np.array(list(itertools.combinations(range(n), k)))
        return float(np.mean(value(every))), 0.0
    # The k smallest of n random numbers are a subset without replacement, for all trials in one call.
    drawn = np.random.default_rng(seed).random((trials, n)).argpartition(k - 1, axis=1)[:, :k]
    worth = np.asarray(value(drawn), np.float64)
    return float(worth.mean()), float(worth.std(ddof=1) / math.sqrt(trials))


def weighted_majority_at_k(
    answers: Sequence[str | None], weights: Sequence[float], gold: str, k: int, *, trials: int = 256, seed: int = 0
) -> tuple[float, float]:
    """Returns the expected accuracy of a vote in which sample i of k has `weights[i]` votes, and its standard error.

    Ties are broken uniformly, None has no vote, NaN weighs 0. See `over_subsets` for when it is exact. Weights are 0 or
    more: probabilities, not log-probabilities.

    Raises:
      ValueError: as `over_subsets`; not one weight per answer; a negative or infinite weight.
    """
    # `nan_to_num` would make infinity a large number: it stays infinite, and is refused below.
    w = np.nan_to_num(np.asarray(weights, np.float64), nan=0.0, posinf=math.inf)
    if w.shape != (len(answers),) or not (np.isfinite(w) & (w >= 0)).all():
        raise ValueError(f"weights: {len(answers)} finite numbers of 0 or more are needed, one per answer")
    names = list(dict.fromkeys(a for a in answers if a is not None))
    if gold not in names:
        return over_subsets(lambda rows: np.zeros(len(rows)), len(answers), k, trials=trials)
    code = np.array([len(names) if a is None else names.index(a) for a in answers])

    def share(rows: np.ndarray) -> np.ndarray:
        votes = np.full((len(rows), len(names) + 1), -1.0)  # -1: not among the subset's answers
        at = (np.arange(len(rows))[:, None], code[rows])
        votes[at] = 0.0
        np.add.at(votes, at, w[rows])
        votes = votes[:, :-1]
        top = votes.max(axis=1, keepdims=True)
        # Sums of the same weights in another order differ in the last digits: they are ties as well.
        tied = (votes >= top - 1e-12 * np.abs(top)) & (votes >= 0)
        return tied[:, names.index(gold)] / np.maximum(tied.sum(axis=1), 1)

    return over_subsets(share, len(answers), k, trials=trials, seed=seed)
