"""Rewards and evaluation of rationales in LM-Guided CoT.

    S = w_acc R_acc + w_asp sum_k w_k a_k / sum_k w_k

arXiv 2404.03414 names both parts of the reward; the weights are ours. The aspects a_k never read the gold answer. R_acc
is the official EM or F1, or inclusion, of the answerer's greedy answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qstar.errors import Settings, bounded, require
from qstar.methods.answerer import Answer, Answerer
from qstar.methods.reinforce import RewardOutput
from qstar.sample.vote import majority
from qstar.tasks.aspects import ASPECTS, View, bare_answer
from qstar.tasks.qa_metrics import answer_score, includes

METRICS = ("em", "f1", "includes")


@dataclasses.dataclass(frozen=True)
class RewardSettings(Settings):
    """The weights of the reward."""

    accuracy: float = bounded(1.0, ge=0)  # of R_acc; at 0 the answerer is not called
    aspect: float = bounded(1.0, ge=0)  # of the aspects' weighted mean; at 0 aspects are only logged
    aspects: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(ASPECTS, 1.0))
    metric: str = bounded("em", choices=METRICS)
    reject_bare_answers: bool = True  # no R_acc for a rationale that is just the answer

    def __post_init__(self):
        super().__post_init__()
        require(
            (self.accuracy + self.aspect > 0, "accuracy and aspect are both 0: there is nothing to reward"),
            (all(w >= 0 for w in self.aspects.values()), "aspects: a weight below 0; leave the aspect out, or use 0"),
            (not self.aspect or any(self.aspects.values()), "aspects: all weights are 0, but aspect is above 0"),
        )


def rationale_scores(
    settings: RewardSettings,
    views: Sequence[View],
    prompts: Sequence[str],
    golds: Sequence[str],
    answerer: Answerer | None,
) -> tuple[RewardOutput, list[Answer]]:
    """Returns scores with their parts (`accuracy`, `aspect`, `aspect/NAME`, `bare_answer`), and the answers.

    Args:
      views: inputs of the aspects. prompts: the answerer's, with the rationale in them. golds: correct answers.
    """
    used = {name: weight for name, weight in settings.aspects.items() if weight}
    parts: dict[str, Any] = {f"aspect/{n}": np.asarray([ASPECTS[n](v) for v in views], np.float32) for n in used}
    weights = np.asarray([*used.values()], np.float32)
    # Zero weights may leave no aspect. The mean of the others is in [0, 1], as R_acc is, for any number of aspects.
    mean = np.zeros(len(views), np.float32)
    if used:
        mean = weights @ np.stack([parts[f"aspect/{n}"] for n in used]) / weights.sum()
    # Without R_acc there is no call of the answerer, the most expensive part of a reward.
    answers = answerer.answer(prompts) if settings.accuracy and answerer is not None else []
    correct, bare = np.zeros((2, len(views)), np.float32)
    for i, (view, answer, gold) in enumerate(zip(views, answers, golds)):
        correct[i] = task_score(answer.text, gold, settings.metric)
        bare[i] = bare_answer(view.rationale, answer.text)
    if settings.reject_bare_answers:
        # With accuracy alone as reward, stating the answer without reasons would be optimal.
        correct = correct * (1.0 - bare)
    scores = (settings.accuracy * correct + settings.aspect * mean).astype(np.float32)
    return RewardOutput(scores, {"accuracy": correct, "aspect": mean, "bare_answer": bare, **parts}), answers


def task_score(answer: str, gold: str, metric: str) -> float:
    """Returns EM, F1 or inclusion of an answer, in [0, 1]."""
    if metric == "includes":
        return float(includes(answer, gold))
    score = answer_score(answer, gold)
    return score.em if metric == "em" else score.f1


def percent(values: Any) -> float:
    """Returns the mean of values in [0, 1] as a percentage."""
    return 100.0 * float(np.mean(values))


def vote_accuracy(answers: np.ndarray, logprobs: np.ndarray, gold: np.ndarray) -> float:
    """Returns the accuracy in percent of a majority vote over n answers [questions, n]; ties by log-probability."""
    chosen = [majority([str(a) for a in row], p) for row, p in zip(answers.tolist(), logprobs.tolist())]
    return percent([c == str(g) for c, g in zip(chosen, gold.tolist())])


def best_of_n(correct: np.ndarray, ratings: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, float]:
    """Returns the accuracy of choosing one of n sampled rationales per question by its rating.

    Args:
      correct: [questions, n], whether the answer with the rationale is correct. ratings: name -> [questions, n].

    Returns:
      In percent: "random" (the mean), "oracle" (any is correct), "best/NAME" per rating. "correlation/NAME": the mean
      over questions of the correlation of rating and correctness, where both vary; "varied/NAME": the share of these.
    """
    correct = np.asarray(correct, float)
    # Random ties: ratings repeat within a question, and the first of equal ones would be no fair choice.
    ties = np.random.default_rng(seed).random(correct.shape)
    out = {"random": percent(correct), "oracle": percent(correct.max(axis=1))}
    for name, rating in ratings.items():
        rating = np.asarray(rating, float)
        best = np.lexsort((ties, rating), axis=1)[:, -1:]
        out[f"best/{name}"] = percent(np.take_along_axis(correct, best, axis=1))
        # Centred per question, or the difficulty of questions would correlate ratings and correctness.
        a, b = rating - rating.mean(axis=1, keepdims=True), correct - correct.mean(axis=1, keepdims=True)
        spread = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
        varied = spread > 1e-9
        each = (a * b).sum(axis=1)[varied] / spread[varied]
        out[f"correlation/{name}"] = float(each.mean()) if varied.any() else 0.0
        out[f"varied/{name}"] = percent(varied)
    return out
