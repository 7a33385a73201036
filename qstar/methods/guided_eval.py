"""Rewards of rationales in LM-Guided CoT, and measures of answers.

    S = w_acc R_acc + w_asp sum_k w_k a_k / sum_k w_k

arXiv 2404.03414 names both parts of the reward; the weights are ours. The aspects a_k never read the gold answer. R_acc
is the official EM or F1, or inclusion, of the answerer's greedy answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qstar.methods.reinforce import RewardOutput
from qstar.tasks.qa_metrics import answer_score, includes

if TYPE_CHECKING:
    from qstar.methods.guided_cot import GuidedConfig

METRICS = ("em", "f1", "includes")


def reward(
    arm: GuidedConfig,
    correct: np.ndarray,
    bare: np.ndarray,
    aspects: Mapping[str, np.ndarray],
    weights: Sequence[float] | None = None,
) -> RewardOutput:
    """Returns S of N rationales, with its parts by name (`accuracy`, `aspect`, `bare_answer` and those of `aspects`).

    Args:
      arm: w_acc and w_asp, and whether a bare answer earns R_acc. correct: [N] float32, R_acc.
      bare: [N] float32, 1 for a rationale that is only the answer. aspects: a_k, each [N] float32.
      weights: w_k of the aspects, above 0; None: equal.
    """
    if arm.reject_bare_answers:
        # With accuracy alone as reward, stating the answer without reasons would be optimal.
        correct = correct * (1.0 - bare)
    # The mean is in [0, 1], as R_acc is, for any number of aspects.
    w = np.ones(len(aspects), np.float32) if weights is None else np.asarray(weights, np.float32)
    aspect = w @ np.stack(list(aspects.values())) / w.sum()
    scores = (arm.accuracy_weight * correct + arm.aspect_weight * aspect).astype(np.float32)
    return RewardOutput(scores, {"accuracy": correct, "aspect": aspect, "bare_answer": bare, **aspects})


def task_score(answer: str, gold: str, metric: str) -> float:
    """Returns EM, F1 or inclusion of an answer, in [0, 1]."""
    if metric == "includes":
        return float(includes(answer, gold))
    score = answer_score(answer, gold)
    return score.em if metric == "em" else score.f1


def example(question: str, rationale: str, answer: str, gold: str, correct: Any, notes: list[str]) -> dict[str, Any]:
    """Returns a test question with its answer as evaluation.json keeps it for the report."""
    texts = {"question": question, "rationale": rationale, "answer": answer, "gold": gold}
    return {**texts, "correct": bool(correct), "notes": notes}


def percent(values: Any) -> float:
    """Returns the mean of values in [0, 1] as a percentage."""
    return 100.0 * float(np.mean(values))
