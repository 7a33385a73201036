"""D_pref: pairs of a right and a wrong solution of one problem, drawn from D_VER.

The paper takes them from the Cartesian product and says nothing of a limit; 50 solutions of a problem make up to 600 pairs,
and a few problems would outweigh all others. So each problem gives at most `per_problem` of them.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Iterable, Sequence

import numpy as np

from qstar.errors import require
from qstar.methods.buffers import Solution
from qstar.runs.rollouts import to_example
from qstar.tasks.base import Task, stable_rng
from qstar.text.packing import Example, pack_groups
from qstar.text.tokenizer import Tokenizer

NEGATIVES = ("parsed", "any")
WINNERS = ("sampled", "distinct")


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """How pairs are drawn. A config's `pairs` section."""

    per_problem: int = 16
    negatives: str = "parsed"  # "any": cut-off and unreadable ones, too; of those a verifier mainly learns the format
    winners: str = "sampled"  # right solutions as often as they were sampled; "distinct": all of them equally often
    repeats: int = 1  # a head (ORM, PRM) sees a solution as often as it was sampled, up to so many times

    def __post_init__(self):
        require(
            (self.per_problem >= 1, f"per_problem={self.per_problem} must be at least 1"),
            (self.negatives in NEGATIVES, f"negatives={self.negatives!r} is not one of {', '.join(NEGATIVES)}"),
            (self.winners in WINNERS, f"winners={self.winners!r} is not one of {', '.join(WINNERS)}"),
            (self.repeats >= 1, f"repeats={self.repeats} must be at least 1"),
        )


@dataclasses.dataclass(frozen=True)
class Pair:
    """A right and a wrong solution of one problem."""

    problem_id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_tokens: list[int] | None = None  # see `Solution.tokens`
    rejected_tokens: list[int] | None = None


def build_pairs(solutions: Iterable[Solution], settings: PairSettings, seed: int) -> list[Pair]:
    """Returns the pairs of every problem that has solutions of both kinds, problems in the order they first come.

    Drawn without replacement from the product, in rounds: in each every wrong solution occurs once, beside another right
    one than before. So all wrong ones have occurred before one occurs again. Which right one is drawn by how often each was
    sampled, which is how the paper's buffers, if they are multisets, would have it; with winners="distinct" they take turns.
    """
    right: dict[str, list[Solution]] = collections.defaultdict(list)
    wrong: dict[str, list[Solution]] = collections.defaultdict(list)
    for s in solutions:
        if s.correct:
            right[s.problem_id].append(s)
            wrong[s.problem_id]  # keeps the order of the problems
        elif settings.negatives == "any" or (s.parsed and not s.truncated):
            wrong[s.problem_id].append(s)
    pairs = []
    for problem, losers in wrong.items():
        winners = right.get(problem, [])
        rng = stable_rng("pairs", seed, problem)
        winners, losers = rng.sample(winners, len(winners)), rng.sample(losers, len(losers))
        orders = []  # of the right solutions, for every wrong one
        for i in range(min(len(losers), settings.per_problem) if winners else 0):
            turned = winners[i % len(winners) :] + winners[: i % len(winners)]
            orders.append(turned if settings.winners == "distinct" else _by_count(turned, rng))
        every = [(order[turn], losers[i]) for turn in range(len(winners)) for i, order in enumerate(orders)]
        pairs += [
            Pair(problem, c.prompt, c.completion, r.completion, c.tokens, r.tokens)
            for c, r in every[: settings.per_problem]
        ]
    return pairs


def _by_count(solutions: Sequence[Solution], rng: random.Random) -> list[Solution]:
    """A random order, drawn without replacement with chances in proportion to the counts."""
    # The smallest of exponential clocks with these rates rings first with just these chances.
    return sorted(solutions, key=lambda s: rng.expovariate(s.count))


def repeated(solutions: Iterable[Solution], settings: PairSettings) -> list[Solution]:
    """Returns what a head learns from: every solution as often as it was sampled, up to `repeats` times."""
    return [s for s in solutions for _ in range(min(s.count, settings.repeats))]


def pair_arrays(
    groups: Sequence[Sequence[Example]], reference: np.ndarray, length: int, packed: bool
) -> dict[str, np.ndarray]:
    """Returns host arrays of `types.Preference`, flat: those of its rows, `reference` [N, P, 2] and `weight` [N, P].

    Args:
      groups: (chosen, rejected) per pair. reference: [pairs, 2] float32, their log-probabilities under the reference.
      length: tokens of a row; a pair stands in one row whole.
    """
    rows, members = pack_groups(groups, length, packed=packed)
    there = members >= 0
    values = np.where(there[..., None], np.asarray(reference, np.float32)[members], 0).astype(np.float32)
    return {**rows, "reference": values, "weight": there.astype(np.float32)}


def graded_arrays(
    solutions: Sequence[Solution],
    tokenizer: Tokenizer,
    length: int,
    packed: bool,
    steps: Sequence[tuple[Sequence[int], Sequence[float]]] | None = None,
) -> dict[str, np.ndarray]:
    """Returns host arrays of `types.Graded`, flat: those of its rows, `labels` and `weight`, each [N, length].

    Args:
      steps: per solution, where its steps end (tokens of the completion) and how right each is: a PRM's labels. None is an
        ORM: every token of a completion, its EOS too, is labelled with whether the whole is right.
    """
    examples, labels, weights, learnt = [], [], [], []
    for i, s in enumerate(solutions):
        example = to_example(tokenizer, s.prompt, s.completion, s.tokens)
        P, C = len(example.prompt), len(example.completion)
        label, weight = np.full(P + C, float(s.correct)), np.r_[np.zeros(P), np.ones(C)]
        if steps is not None:
            ends, right = steps[i]
            weight[P:] = 0
            weight[P + np.asarray(ends, int)] = 1
            label[P + np.asarray(ends, int)] = right
        examples.append([example])
        labels.append([label])
        weights.append([weight])
        learnt.append([np.full(P + C, float(s.correct))])  # only right solutions are models of language
    extras = {"labels": labels, "weight": weights, "learnt": learnt}
    rows, _ = pack_groups(examples, length, packed=packed, extras=extras)
    rows["mask"] = rows["mask"] * rows.pop("learnt")
    return rows


def step_ends(task: Task, tokenizer: Tokenizer, example: Example, text: str) -> list[int]:
    """Returns the token of the completion in which each of `task.steps` ends, one per step; the last ends with EOS.

    Steps that end in one token share it (see `step_targets`).
    """
    head, ids = example.prompt, example.completion
    return [tokenizer.count(ids, text[:at], after=head) - 1 for at in task.steps(text)[:-1]] + [len(ids) - 1]


def step_targets(ends: Sequence[int], labels: Sequence[float]) -> tuple[list[int], list[float]]:
    """Returns the distinct tokens in which steps end and the label of each: that of the last step that ends there."""
    last = dict(zip(ends, labels, strict=True))
    return list(last), list(last.values())
