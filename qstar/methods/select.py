"""Selection of one of k solutions: scorers, votes, and the accuracy of each rule for every k.

    greedy             the solution decoded without sampling
    majority           the answer that most solutions give                                        self-consistency
    weighted_majority  the same, each vote weighed by its score
    best_of_k          the solution with the best score: a verifier's, the writer's own, a judge's            V-STaR
    top_m_vote         the majority among the m best scored                                    Cobbe et al. 2021

A scorer is any `f(prompts, [completions of each]) -> [N, n]`: `verifier.score` with a verifier, or `llm_judge`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qstar.errors import unknown
from qstar.sample.vote import (
    best_of,
    majority,
    over_subsets,
    ranking,
    right_shares,
    top_m_vote,
    voted_right_at_k,
    weighted_majority,
)
from qstar.tasks.base import stable_rng
from qstar.train.stats import (
    best_of_k,
    bootstrap_ci,
    calibration,
    mean_auc,
    pass_at_k,
    pooled_auc,
    weighted_majority_at_k,
)

Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]
RULES = ("greedy", "majority", "weighted_majority", "best_of_k", "top_m_vote")
SUBSETS = 200  # drawn to measure the rules that have no closed form


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The n solutions of one problem."""

    answers: Sequence[str | None]  # what each votes for (`Task.ballots`); None: unreadable or cut off
    correct: Sequence[bool]
    scores: Mapping[str, Sequence[float]]  # scorer -> one per solution
    group: str = ""


def choose(
    rule: str, answers: Sequence[str | None], scores: Sequence[float] | None = None, *, m: int = 4
) -> int | None:
    """Returns the index of the solution that a rule takes, or None where no solution has an answer (or there is none).

    Args:
      rule: one of RULES; "greedy" takes the first.
      scores: larger is better; without them the votes count alone. Of the solutions with the winning answer the best scored
        is taken. For weighted votes see `weights`.

    Raises:
      UserError: no such rule.
    """
    if rule not in RULES:
        raise unknown(f"selection rule {rule!r}", rule, RULES)
    if rule == "greedy":
        return 0 if answers else None
    order = ranking(scores) if scores is not None else list(range(len(answers)))
    scores = [0.0] * len(answers) if scores is None else scores
    if rule == "best_of_k":
        return best_of(scores)
    if rule == "majority":
        won = majority(answers, [0.0 if math.isnan(s) else s for s in scores])
    elif rule == "weighted_majority":
        won = weighted_majority(answers, weights(scores))
    else:
        won = top_m_vote(answers, scores, m)
    return next((i for i in order if answers[i] == won), None) if won is not None else None


def are_chances(scores: Sequence[float]) -> bool:
    """Whether scores are chances (all of the finite ones in [0, 1]) and not log-likelihoods."""
    return all(0 <= s <= 1 for s in scores if math.isfinite(s))


def weights(scores: Sequence[float], chances: bool | None = None) -> list[float]:
    """Returns positive weights of votes: chances as they are, log-likelihoods as exp(s - max).

    Args:
      chances: which of the two; None: see `are_chances`. A measurement decides once per scorer, over all problems.
    """
    finite = [s for s in scores if math.isfinite(s)]
    if not finite:
        return [1.0] * len(scores)
    if are_chances(finite) if chances is None else chances:
        return [s if math.isfinite(s) else 0.0 for s in scores]
    top = max(finite)
    return [math.exp(s - top) if math.isfinite(s) else 0.0 for s in scores]


def llm_judge(ask: Callable[[list[str]], list[str]], template: str | None = None, best: float = 10.0) -> Scorer:
    """Makes a scorer of any model that answers prompts: LLM as a judge (arXiv 2306.05685), one answer at a time.

    One by one there is no order to be biased by; leanings to length and to the judge's own style stay.

    Args:
      ask: texts -> the judge's replies. template: with {prompt} and {completion}; the grade is the last number of a reply.
      best: the best grade; the worst is 0.

    Returns:
      A scorer of chances, grade / best within [0, 1]; NaN, which comes last, where a reply holds no number.
    """
    template = template or _JUDGE

    def scorer(prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> np.ndarray:
        texts = [template.format(prompt=p, completion=c) for p, cs in zip(prompts, completions) for c in cs]
        grades = [re.findall(r"-?\d+(?:\.\d+)?", reply) for reply in ask(texts)]
        flat = [float(found[-1]) if found else math.nan for found in grades]
        return np.clip(np.array(flat, np.float32) / best, 0.0, 1.0).reshape(len(prompts), -1)

    return scorer


_JUDGE = (
    "Judge the solution of the problem below. Look for the first mistake, if there is one, and then grade how "
    "likely the solution is right with a number from 0 to 10 on the last line.\n\n"
    "Problem:\n{prompt}\n\nSolution:\n{completion}\n\nGrade:"
)


# ------------------------------------------------------------------------------------------------------ measuring


def ks_for(n: int) -> list[int]:
    """Returns 1, 2, 4, ... up to n."""
    return [2**i for i in range(n.bit_length()) if 2**i <= n]


def curves(problems: Sequence[Candidates], ks: Sequence[int], *, m: int = 4) -> dict[str, dict[int, list[float]]]:
    """Returns rule -> k -> the chance to be right of each problem, from subsets of k of its n solutions.

    Rules: `pass`, `majority`, and for every scorer S: `best/S`, `weighted/S`, `top{m}/S`. The first three are exact
    expectations over subsets; the last two are means over 200 random ones where there are more.
    """
    out: dict[str, dict[int, list[float]]] = {"pass": {}, "majority": {}}
    scorers = list(problems[0].scores) if problems else []
    chances = {name: all(are_chances(p.scores[name]) for p in problems) for name in scorers}
    for k in ks:
        out["pass"][k] = [pass_at_k(len(p.correct), sum(p.correct), k) for p in problems]
        out["majority"][k] = [voted_right_at_k(p.answers, p.correct, k) for p in problems]
        for name in scorers:
            out.setdefault(f"best/{name}", {})[k] = [best_of_k(p.scores[name], p.correct, k) for p in problems]
            voted = [_voted(p, name, k, m, chances[name]) for p in problems]
            for rule in voted[0]:
                out.setdefault(f"{rule}/{name}", {})[k] = [v[rule] for v in voted]
    return out


def _voted(p: Candidates, name: str, k: int, m: int, chances: bool) -> dict[str, float]:
    """Weighted and top-m votes of one problem."""
    ballot, shares, scores = (
        p.answers,
        right_shares(p.answers, p.correct),
        np.nan_to_num(np.asarray(p.scores[name], float), nan=-np.inf),
    )
    names = sorted({a for a in ballot if a is not None})
    right = np.array([shares.get(name, 0.0) for name in names])
    votes = np.array([[a == name for name in names] for a in ballot], float).reshape(len(ballot), len(names))

    def top(rows: np.ndarray) -> np.ndarray:
        order = np.argsort(-scores[rows], axis=1, kind="stable")[:, :m]
        return _right_share(votes[np.take_along_axis(rows, order, axis=1)].sum(axis=1), right)

    n = len(ballot)
    votes_of = weights(p.scores[name], chances)
    weighted = sum(
        share * weighted_majority_at_k(ballot, votes_of, a, k, trials=SUBSETS)[0] for a, share in shares.items()
    )
    return {"weighted": weighted, f"top{m}": over_subsets(top, n, k, trials=SUBSETS)[0]}


def _right_share(votes: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How much of each vote [S, answers] right answers win; ties are shared. `right`: see `right_shares`."""
    if not right.any():
        return np.zeros(len(votes))
    top = votes.max(axis=1, keepdims=True)
    winners = (votes >= top) & (top > 0)
    return winners @ right / np.maximum(winners.sum(axis=1), 1)


def summary(values: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, dict[str, list[float]]]:
    """Returns rule -> {k: [mean, low, high]} of `curves`, with the 95% bootstrap interval over problems."""
    return {
        rule: {str(k): [float(np.mean(v)), *bootstrap_ci(v)] for k, v in by_k.items()} for rule, by_k in values.items()
    }


def quality(problems: Sequence[Candidates], values: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, Any]:
    """Returns what each scorer is worth beyond its curve, by name of the scorer.

    `auc` (mean over problems) and `auc_pooled`, None where no problem has both classes; `calibration`, see
    `train.evaluate.calibration`; `regret`: k -> [mean, low, high] of pass@k - best-of-k, what a perfect choice would add.

    Args:
      values: the `curves` of these problems.
    """
    right = [p.correct for p in problems]
    out: dict[str, Any] = {"auc": {}, "auc_pooled": {}, "calibration": {}, "regret": {}}
    for name in problems[0].scores if problems else ():
        scores = [p.scores[name] for p in problems]
        out["auc"][name] = _number(mean_auc(scores, right))
        out["auc_pooled"][name] = _number(pooled_auc(scores, right))
        out["calibration"][name] = calibration(scores, right)
        best = values[f"best/{name}"]
        out["regret"][name] = {str(k): difference(values["pass"][k], best[k]) for k in best}
    return out


def auc_by_fault(problems: Sequence[Candidates], faults: Sequence[Sequence[str | None]]) -> dict[str, dict[str, Any]]:
    """Returns for every kind of mistake how well each scorer tells right samples from wrong ones of that kind alone.

    Args:
      faults: per problem and sample, the kind of its first mistake; None does not count.

    Returns:
      kind -> {"samples": wrong ones of the kind, "problems": with right ones beside them, "auc": {scorer: mean over
      those problems}}, the commonest first. One that a verifier tells no better than chance is one that it cannot see.
    """
    counted = collections.Counter(
        f for p, some in zip(problems, faults) for f, right in zip(some, p.correct) if f and not right
    )
    out = {}
    for kind, count in sorted(counted.items(), key=lambda item: (-item[1], item[0])):
        kept = [[i for i, f in enumerate(some) if p.correct[i] or f == kind] for p, some in zip(problems, faults)]
        both = [(p, at) for p, at in zip(problems, kept) if len({bool(p.correct[i]) for i in at}) == 2]
        areas = {
            name: mean_auc(
                [[p.scores[name][i] for i in at] for p, at in both], [[p.correct[i] for i in at] for p, at in both]
            )
            for name in problems[0].scores
        }
        out[kind] = {"samples": count, "problems": len(both), "auc": {name: _number(a) for name, a in areas.items()}}
    return out


def _number(x: float) -> float | None:
    """x, or None for NaN, which JSON does not have."""
    return None if math.isnan(x) else x


def difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Returns [mean, low, high] of a - b over the same problems: a paired 95% bootstrap interval."""
    d = np.asarray(a, float) - np.asarray(b, float)
    return [float(d.mean()), *bootstrap_ci(d)]


def random_scores(problem: str, n: int) -> list[float]:
    """Returns scores that mean nothing, the same in every run."""
    rng = stable_rng("random scores", problem)
    return [rng.random() for _ in range(n)]
