"""Rewards of LM-Guided CoT: aspects of a rationale's quality, and whether the frozen answerer is correct with it.

    S = weight_acc R_acc + weight_asp sum_k w_k a_k / sum_k w_k        (2404.03414 names both parts; the weights are ours)

The aspects never see the gold answer. R_acc is the official EM or F1, or inclusion, of the answerer's greedy answer. A
rationale that is nothing but the answer it led to earns no R_acc while the guard is on, and is counted either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qstar.errors import require
from qstar.methods.answerer import Answer, Answerer
from qstar.methods.reinforce import RewardOutput
from qstar.tasks.aspects import ASPECTS, View, bare_answer, chosen
from qstar.tasks.qa_metrics import answer_score, includes

METRICS = ("em", "f1", "includes")


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """A config's `rewards` section."""

    accuracy: float = 1.0  # weight of R_acc; 0: the answerer is never asked
    aspect: float = 1.0  # weight of the aspects' weighted mean; 0: aspects are only logged
    aspects: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(ASPECTS, 1.0))
    metric: str = "em"
    guard: bool = True  # a rationale that is just the answer earns no R_acc

    def __post_init__(self):
        require(
            (self.accuracy >= 0, f"accuracy={self.accuracy} must be 0 or more"),
            (self.aspect >= 0, f"aspect={self.aspect} must be 0 or more"),
            (self.accuracy + self.aspect > 0, "accuracy and aspect are both 0: there is nothing to reward"),
            (self.metric in METRICS, f"metric={self.metric!r} is not one of {', '.join(METRICS)}"),
            (all(w >= 0 for w in self.aspects.values()), "aspects: a weight below 0; leave the aspect out, or use 0"),
            (not self.aspect or any(chosen(self.aspects)), "aspects: none weighs anything, but aspect is above 0"),
        )


def versions(settings: RewardSettings) -> dict[str, str]:
    """Returns the version of every aspect in use: what a recorded number was measured by."""
    return {n: a.version for n, (a, _) in chosen(settings.aspects).items()}


def rationale_scores(
    settings: RewardSettings,
    views: Sequence[View],
    prompts: Sequence[str],
    golds: Sequence[str],
    answerer: Answerer | None,
) -> tuple[RewardOutput, list[Answer]]:
    """Scores rationales.

    Args:
      views: what the aspects see. prompts: what the answerer is asked, with the rationale in it. golds: right answers.

    Returns:
      The scores with their parts (`accuracy`, `aspect`, `aspect/NAME`, `bare`), and the answers.
    """
    used = chosen(settings.aspects)
    parts: dict[str, Any] = {f"aspect/{n}": np.asarray([a(v) for v in views], np.float32) for n, (a, _) in used.items()}
    weights = np.asarray([w for _, w in used.values()], np.float32)
    mean = np.zeros(len(views), np.float32)
    if len(used):
        mean = weights @ np.stack([parts[f"aspect/{n}"] for n in used]) / weights.sum()
    answers = answerer.answer(prompts) if settings.accuracy and answerer is not None else []
    right = np.zeros(len(views), np.float32)
    bare = np.zeros(len(views), np.float32)
    for i, (view, answer, gold) in enumerate(zip(views, answers, golds)):
        right[i] = task_score(answer.text, gold, settings.metric)
        bare[i] = bare_answer(view.rationale, answer.text)
    if settings.guard:
        right = right * (1.0 - bare)
    scores = settings.accuracy * right + settings.aspect * mean
    return RewardOutput(scores.astype(np.float32), {"accuracy": right, "aspect": mean, "bare": bare, **parts}), answers


def task_score(answer: str, gold: str, metric: str) -> float:
    """Returns EM, F1 or inclusion of an answer, in [0, 1]."""
    if metric == "includes":
        return float(includes(answer, gold))
    score = answer_score(answer, gold)
    return score.em if metric == "em" else score.f1
