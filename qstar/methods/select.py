"""Selection of one of k solutions: scorers, votes, and the accuracy of each rule for every k.

    greedy             the solution decoded without sampling
    majority           the most frequent answer                                   self-consistency, arXiv 2203.11171
    weighted_majority  the answer with the largest sum of scores                                    arXiv 2110.14168
    best_of_k          the solution with the best score                              V-STaR, arXiv 2402.06457
    top_m_vote         the majority among the m best-scored solutions       Cobbe et al., arXiv 2110.14168, section 4.3

A scorer is any `f(prompts, completions of each) -> [N, n]`, such as `verifier.score` with a verifier.

Deviation from V-STaR: expectations over subsets of k are exact where a closed form exists; weighted and top-m votes are
means over 200 random subsets (the paper: 256).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qstar.sample import vote
from qstar.train import stats

Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]
SUBSETS = 200  # random ones, for rules without a closed form: all C(n, k) would be too many


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The n solutions of one problem."""

    answers: Sequence[str | None]  # what each votes for (`Task.ballots`); None: unparsed or truncated
    correct: Sequence[bool]
    scores: Mapping[str, Sequence[float]]  # scorer -> one per solution
    group: str = ""


def are_probabilities(scores: Sequence[float]) -> bool:
    """Whether all finite scores lie in [0, 1], as opposed to log-likelihoods."""
    return all(0 <= s <= 1 for s in scores if math.isfinite(s))


def weights(scores: Sequence[float], probabilities: bool) -> list[float]:
    """Returns the weights of votes: probabilities unchanged, log-likelihoods as exp(s - max)."""
    finite = [s for s in scores if math.isfinite(s)]
    if not finite:
        return [1.0] * len(scores)
    if probabilities:
        return [s if math.isfinite(s) else 0.0 for s in scores]
    # Only ratios of weights matter, and without the shift exp underflows for solutions of a few hundred tokens.
    top = max(finite)
    return [math.exp(s - top) if math.isfinite(s) else 0.0 for s in scores]


# ------------------------------------------------------------------------------------------ accuracy as a function of k


def ks_for(n: int) -> list[int]:
    """Returns 1, 2, 4, ... up to n."""
    return [2**i for i in range(n.bit_length())]


def curves(problems: Sequence[Candidates], ks: Sequence[int], *, m: int = 4) -> dict[str, dict[int, list[float]]]:
    """Returns rule -> k -> the probability of a correct choice per problem, over subsets of k of its n solutions.

    Rules: `pass`, `majority`, and for every scorer S: `best/S`, `weighted/S`, `top{m}/S`.
    """
    out: dict[str, dict[int, list[float]]] = collections.defaultdict(dict)
    scorers = list(problems[0].scores) if problems else []
    # Decided once per scorer: log-likelihoods of a single problem may happen to lie in [0, 1].
    probabilities = {name: all(are_probabilities(p.scores[name]) for p in problems) for name in scorers}
    for k in ks:
        out["pass"][k] = [stats.pass_at_k(len(p.correct), sum(p.correct), k) for p in problems]
        out["majority"][k] = [vote.voted_right_at_k(p.answers, p.correct, k) for p in problems]
        for name in scorers:
            out[f"best/{name}"][k] = [float(stats.best_of_k(p.scores[name], p.correct, k)) for p in problems]
            out[f"weighted/{name}"][k] = [_weighted_vote(p, name, k, probabilities[name]) for p in problems]
            out[f"top{m}/{name}"][k] = [_top_m_vote(p, name, k, m) for p in problems]
    return dict(out)


def _weighted_vote(p: Candidates, name: str, k: int, probabilities: bool) -> float:
    votes = weights(p.scores[name], probabilities)
    shares = vote.right_shares(p.answers, p.correct)
    return sum(
        share * vote.weighted_majority_at_k(p.answers, votes, answer, k, trials=SUBSETS)[0]
        for answer, share in shares.items()
    )


def _top_m_vote(p: Candidates, name: str, k: int, m: int) -> float:
    shares = vote.right_shares(p.answers, p.correct)
    # A sample without a score ranks last.
    scores = np.nan_to_num(np.asarray(p.scores[name], float), nan=-np.inf)
    names = sorted({a for a in p.answers if a is not None})
    right = np.array([shares.get(answer, 0.0) for answer in names])
    votes = np.array([[a == answer for answer in names] for a in p.answers], float).reshape(len(p.answers), len(names))

    def accuracy(subsets: np.ndarray) -> np.ndarray:
        # Also where no sample has an answer at all: the maximum over an empty axis below would raise.
        if not right.any():
            return np.zeros(len(subsets))
        best = np.argsort(-scores[subsets], axis=1, kind="stable")[:, :m]
        counts = votes[np.take_along_axis(subsets, best, axis=1)].sum(axis=1)  # [subsets, answers]
        top = counts.max(axis=1, keepdims=True)
        # Ties are broken uniformly; where no sample has an answer (top = 0), nothing is chosen.
        winners = (counts >= top) & (top > 0)
        return winners @ right / np.maximum(winners.sum(axis=1), 1)

    return vote.over_subsets(accuracy, len(p.answers), k, trials=SUBSETS)[0]


def gain(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Returns [mean, low, high] of a - b over the same problems: see `train.stats.paired`."""
    # 1000 resamples: as recorded.
    low, mean, high = stats.paired(b, a, resamples=1000)
    return [mean, low, high]


# ------------------------------------------------------------------------------------------------ quality of scorers


def quality(problems: Sequence[Candidates], values: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, Any]:
    """Returns measures of each scorer, by its name.

    `auc` (mean over problems) and `auc_pooled`, None where no problem has both classes; `calibration`, see
    `train.stats.calibration`; `regret`: k -> [mean, low, high] of pass@k - best-of-k. `values`: the problems' `curves`.
    """
    correct = [p.correct for p in problems]
    out: dict[str, Any] = {"auc": {}, "auc_pooled": {}, "calibration": {}, "regret": {}}
    for name in problems[0].scores if problems else ():
        scores = [p.scores[name] for p in problems]
        out["auc"][name] = _none_if_nan(stats.mean_auc(scores, correct))
        out["auc_pooled"][name] = _none_if_nan(stats.pooled_auc(scores, correct))
        out["calibration"][name] = stats.calibration(scores, correct)
        best = values[f"best/{name}"]
        out["regret"][name] = {str(k): gain(values["pass"][k], best[k]) for k in best}
    return out


def auc_by_fault(problems: Sequence[Candidates], faults: Sequence[Sequence[str | None]]) -> dict[str, dict[str, Any]]:
    """Returns for every kind of mistake how well each scorer separates correct samples from those with that mistake.

    Args:
      faults: per problem and sample, the kind of its first mistake; None is left out.

    Returns:
      kind -> {"samples": incorrect ones of the kind, "problems": with correct ones beside them, "auc": {scorer: mean
      over those problems}}, the most frequent first. A scorer with an AUC of 1/2 does not detect that kind.
    """
    counted = collections.Counter(
        fault for p, some in zip(problems, faults) for fault, right in zip(some, p.correct) if fault and not right
    )
    out = {}
    for kind, count in sorted(counted.items(), key=lambda item: (-item[1], item[0])):
        kept = [[i for i, f in enumerate(some) if p.correct[i] or f == kind] for p, some in zip(problems, faults)]
        both = [(p, at) for p, at in zip(problems, kept) if len({bool(p.correct[i]) for i in at}) == 2]
        correct = [[p.correct[i] for i in at] for p, at in both]
        areas = {
            name: stats.mean_auc([[p.scores[name][i] for i in at] for p, at in both], correct)
            for name in problems[0].scores
        }
        out[kind] = {
            "samples": count,
            "problems": len(both),
            "auc": {name: _none_if_nan(area) for name, area in areas.items()},
        }
    return out


def _none_if_nan(x: float) -> float | None:  # JSON has no NaN
    return None if math.isnan(x) else x
