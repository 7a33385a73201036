"""Choosing one answer out of k samples, and how good the choice would be on average."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence


def majority(answers: Sequence[str | None], logprobs: Sequence[float] | None = None) -> str | None:
    """Returns the most frequent answer; None (unparsed) never votes. Ties: larger summed log-probability, then first seen.

    Source: self-consistency, arXiv 2203.11171.
    """
    votes: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for i, answer in enumerate(answers):
        if answer is not None:
            votes[answer][0] += 1
            votes[answer][1] += logprobs[i] if logprobs is not None else 0.0
    if not votes:
        return None
    best = max((count, score) for count, score in votes.values())
    return next(a for a, v in votes.items() if tuple(v) == best)


def majority_at_k(answers: Sequence[str | None], gold: str, k: int) -> float:
    """Returns the expected accuracy of majority voting over all subsets of k of the N samples, ties broken uniformly.

    Exact: a sum over the votes m that the gold answer may get, with a small dynamic programme over the other answers
    (state: votes used, answers tied at m). Cost O(N J k^2) for J distinct wrong answers.

    Raises:
      ValueError: k is not in 1..N.
    """
    N = len(answers)
    if not 1 <= k <= N:
        raise ValueError(f"k={k} is not in 1..{N}")
    counts = collections.Counter(a for a in answers if a is not None)
    g, unparsed = counts.pop(gold, 0), sum(a is None for a in answers)
    total = 0.0
    for m in range(1, min(g, k) + 1):
        ways = {(0, 0): 1}  # (votes of the others, how many of them tie at m) -> number of choices
        for v in counts.values():
            step: dict[tuple[int, int], int] = collections.defaultdict(int)
            for (used, ties), w in ways.items():
                for x in range(min(v, m, k - m - used) + 1):
                    step[used + x, ties + (x == m)] += w * math.comb(v, x)
            ways = step
        part = sum(w * math.comb(unparsed, k - m - used) / (1 + ties) for (used, ties), w in ways.items())
        total += math.comb(g, m) * part
    return total / math.comb(N, k)


def weighted_majority(answers: Sequence[str | None], weights: Sequence[float]) -> str | None:
    """Returns the answer with the largest sum of weights; None never votes, nor does a weight that is no number.

    Ties: the answer seen first.
    """
    votes: dict[str, float] = collections.defaultdict(float)
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] += 0.0 if math.isnan(weight) else weight
    return max(votes, key=votes.__getitem__) if votes else None


def best_of(scores: Sequence[float]) -> int | None:
    """Returns the index of the largest score, the first of equal ones; what is no number comes last. None of none."""
    ranked = ranking(scores)
    return ranked[0] if ranked else None


def ranking(scores: Sequence[float]) -> list[int]:
    """Returns the indices by falling score, equal ones in order; what is no number comes last."""
    return sorted(
        range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i] if scores[i] == scores[i] else 0)
    )


def top_m_vote(answers: Sequence[str | None], scores: Sequence[float], m: int) -> str | None:
    """Returns the majority's answer among the m best scored (Cobbe et al., section 4.3); ties: the better score.

    Raises:
      ValueError: m is not at least 1.
    """
    if m < 1:
        raise ValueError(f"m={m} must be at least 1")
    votes: dict[str, int] = collections.defaultdict(int)
    for i in ranking(scores)[:m]:
        if (answer := answers[i]) is not None:
            votes[answer] += 1
    return max(votes, key=votes.__getitem__) if votes else None  # the first of equal counts: the better scored
