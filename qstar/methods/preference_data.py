"""Training data of V-STaR: sets of labelled solutions, preference pairs, and labels of steps.

    D_GEN   correct solutions, on which the generator is trained
    D_VER   correct and incorrect solutions, on which verifiers are trained
    D_pref  pairs of a correct and an incorrect solution of one problem, drawn from D_VER, for DPO

D_GEN and D_VER are keyed by (problem, completion up to white space, label); a repeated solution only raises a `count`.
The counts matter: of a problem's correct solutions the valid ones are sampled most often, while most of the distinct ones
reach the answer over a wrong step.

Deviations from the papers:
1. V-STaR takes D_pref from the whole product of correct and incorrect solutions. 50 solutions of a problem make up to
   600 pairs, so that few problems would outweigh the others: here each problem gives at most `per_problem` pairs.
2. Tasks without a step audit label steps by rollouts, as Math-Shepherd does (arXiv 2312.08935, soft estimation).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange

from qstar.data.sources import read_jsonl
from qstar.errors import Settings, bounded
from qstar.models.model import Model
from qstar.runs.folder import cached_jsonl
from qstar.runs.rollouts import SampleSettings, sample_rollouts, text_key, to_example
from qstar.tasks.base import Problem, Task, stable_rng
from qstar.text.packing import Example, pack_groups
from qstar.text.tokenizer import Tokenizer
from qstar.types import Rollout


@dataclasses.dataclass(frozen=True)
class PairSettings(Settings):
    """Sampling of training data for verifiers from D_VER. A config's `pairs` section."""

    per_problem: int = bounded(16, ge=1)
    # "any" admits truncated and unparsed solutions; from those a verifier mainly learns the format
    negatives: str = bounded("parsed", choices=("parsed", "any"))
    # "sampled" draws correct solutions in proportion to their counts, "distinct" all equally often
    winners: str = bounded("sampled", choices=("sampled", "distinct"))
    repeats: int = bounded(1, ge=1)  # ORM and PRM train on a solution `count` times, but at most so often


# ------------------------------------------------------------------------------------------------ labelled solutions


@dataclasses.dataclass(frozen=True)
class Solution:
    """One labelled solution: a row of d_gen/ and d_ver/."""

    problem_id: str
    prompt: str
    completion: str
    correct: bool
    parsed: bool  # whether an answer was found
    truncated: bool
    source: str  # "human" or "model"
    iteration: int  # in which it was found; 0 for human solutions
    group: str = ""
    count: int = 1  # how often it was sampled (human solutions: 1)
    tokens: list[int] | None = None  # as first sampled, see `Rollout`; None for human solutions

    @property
    def key(self) -> tuple[str, str, bool]:
        """Solutions of equal key are duplicates."""
        # White space can decide: the indentation of a program, line ends up to the token limit.
        return *text_key(self), self.correct


def human_solutions(task: Task, problems: Iterable[Problem]) -> list[Solution]:
    """Returns D_SFT: the gold solutions of the problems that have one."""
    made = lambda p, text: Solution(p.id, task.prompt(p), text, True, True, False, "human", 0, p.group)  # noqa: E731
    return [made(p, text) for p in problems if (text := task.solution(p)) is not None]


def sampled_solutions(rollouts: Iterable[Rollout]) -> list[Solution]:
    """Returns the rollouts that were sampled without hints as solutions, in order."""
    # A hinted solution would be labelled correct for an answer that stood in its prompt.
    shared = ("problem_id", "prompt", "completion", "correct", "truncated", "iteration", "group", "tokens")
    return [
        Solution(**{name: getattr(r, name) for name in shared}, parsed=r.answer is not None, source="model")
        for r in rollouts
        if not r.hinted
    ]


def add_to_buffer(folder: Path, n: int, solutions: Iterable[Solution]) -> list[Solution]:
    """Writes iteration n's solutions to FOLDER/iter_NNN.jsonl, unless it exists; returns those of 0 .. n in order."""
    cached_jsonl(folder / f"iter_{n:03d}.jsonl", lambda: [dataclasses.asdict(s) for s in merge_duplicates(solutions)])
    return merge_duplicates(read_buffer(folder, range(n + 1)))


def read_buffer(folder: Path, iterations: Iterable[int]) -> list[Solution]:
    """Returns the solutions of some iterations in order, repeated ones as often as they were found."""
    files = [folder / f"iter_{m:03d}.jsonl" for m in iterations]
    return [Solution(**row) for file in files if file.exists() for row in read_jsonl(file)]


def merge_duplicates(solutions: Iterable[Solution]) -> list[Solution]:
    """Returns the first record of each distinct solution, with the sum of the counts."""
    first: dict[tuple[str, str, bool], Solution] = {}
    total: dict[tuple[str, str, bool], int] = collections.Counter()
    for s in solutions:
        first.setdefault(s.key, s)
        total[s.key] += s.count
    return [dataclasses.replace(s, count=total[key]) for key, s in first.items()]


def most_sampled(solutions: Sequence[Solution], cap: int | None) -> list[Solution]:
    """Returns at most `cap` solutions per problem (None: all), those of the largest counts, in their original order."""
    kept: dict[str, list[int]] = collections.defaultdict(list)
    # The sort is stable: of equal counts the first found stays.
    for i in sorted(range(len(solutions)), key=lambda i: -solutions[i].count):
        kept[solutions[i].problem_id].append(i)
    return [solutions[i] for i in sorted(i for indices in kept.values() for i in indices[:cap])]


def count_solutions(solutions: Sequence[Solution]) -> dict[str, int]:
    """Returns the metrics of a buffer; `mixed_problems` have both a correct and an incorrect solution."""
    by_label = [{s.problem_id for s in solutions if s.correct == label} for label in (True, False)]
    return {
        "solutions": len(solutions),
        "correct": sum(s.correct for s in solutions),
        "incorrect": sum(not s.correct for s in solutions),
        "human": sum(s.source == "human" for s in solutions),
        "mixed_problems": len(set.intersection(*by_label)),
    }


def repeat_by_count(solutions: Iterable[Solution], settings: PairSettings) -> list[Solution]:
    """Returns the training data of an ORM or PRM: each solution as often as it was sampled, at most `repeats` times."""
    return [s for s in solutions for _ in range(min(s.count, settings.repeats))]


# -------------------------------------------------------------------------------------------------- preference pairs


@dataclasses.dataclass(frozen=True)
class Pair:
    """A correct and an incorrect solution of one problem: a row of verifiers/dpo/iter_NNN/pairs.jsonl."""

    problem_id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_tokens: list[int] | None = None  # see `Solution.tokens`
    rejected_tokens: list[int] | None = None


def build_pairs(solutions: Iterable[Solution], settings: PairSettings, seed: int) -> list[Pair]:
    """Returns D_pref: pairs of every problem with solutions of both kinds, problems in order of their first solution.

    Correct ones are drawn in proportion to their counts, or (winners="distinct") in turn.
    """
    correct: dict[str, list[Solution]] = collections.defaultdict(list)
    incorrect: dict[str, list[Solution]] = collections.defaultdict(list)
    for s in solutions:
        if s.correct:
            correct[s.problem_id].append(s)
            # An empty entry of the defaultdict keeps the problems in order of their first solution.
            incorrect[s.problem_id]
        elif settings.negatives == "any" or (s.parsed and not s.truncated):
            incorrect[s.problem_id].append(s)
    pairs = []
    for problem, losers in incorrect.items():
        winners = correct[problem]
        # A generator per problem: its pairs stay the same when solutions of other problems are added.
        rng = stable_rng("pairs", seed, problem)
        winners, losers = rng.sample(winners, len(winners)), rng.sample(losers, len(losers))
        orders = []  # for every incorrect solution, its correct ones by round
        for i in range(min(len(losers), settings.per_problem) if winners else 0):
            # Rotated, so that the incorrect solutions of one round stand beside different correct ones.
            order = winners[i % len(winners) :] + winners[: i % len(winners)]
            if settings.winners == "sampled":
                # Of exponential clocks with these rates, the first to ring is distributed in proportion to the counts.
                order = sorted(order, key=lambda s: rng.expovariate(s.count))
            orders.append(order)
        # Round by round: the cap cuts the last rounds, and every incorrect solution occurs before any occurs again.
        product = [(order[r], losers[i]) for r in range(len(winners)) for i, order in enumerate(orders)]
        for c, r in product[: settings.per_problem]:
            pairs.append(Pair(problem, c.prompt, c.completion, r.completion, c.tokens, r.tokens))
    return pairs


def pair_arrays(
    groups: Sequence[Sequence[Example]], reference: np.ndarray, length: int, packed: bool
) -> dict[str, np.ndarray]:
    """Returns the host arrays of `types.Preference`, flat: its rows, `reference` [B, X, 2] and `weight` [B, X].

    `groups`: (chosen, rejected) per pair, never split over rows; `reference`: float32 [pairs, 2], log-probabilities
    under the reference; `length`: tokens per row.
    """
    rows, members = pack_groups(groups, length, packed=packed)
    exists = members >= 0  # [B, X]; -1 pads rows that hold fewer pairs
    # A missing pair's index -1 reads the last pair; `where` discards it.
    values = np.where(rearrange(exists, "b x -> b x 1"), np.asarray(reference, np.float32)[members], 0)
    return {**rows, "reference": values.astype(np.float32), "weight": exists.astype(np.float32)}


# ------------------------------------------------------------------------------------------- labels of tokens and steps


def graded_arrays(
    solutions: Sequence[Solution],
    tokenizer: Tokenizer,
    length: int,
    packed: bool,
    steps: Sequence[tuple[Sequence[int], Sequence[float]]] | None = None,
) -> dict[str, np.ndarray]:
    """Returns the host arrays of `types.Graded`, flat: those of its rows, and `labels` and `weight`, [B, T] float32.

    `steps`: for a PRM, per solution, the tokens of the completion in which its steps end, and the label of each. None:
    an ORM, every token of a completion, EOS included, is labelled with the correctness of the whole.
    """
    examples, labels, weights, lm_mask = [], [], [], []
    for i, s in enumerate(solutions):
        example = to_example(tokenizer, s.prompt, s.completion, s.tokens)
        P, C = len(example.prompt), len(example.completion)
        label, weight = np.full(P + C, float(s.correct)), np.r_[np.zeros(P), np.ones(C)]
        if steps is not None:
            ends = P + np.asarray(steps[i][0], int)
            # A PRM is trained at the ends of steps alone: between them no label is defined.
            weight[P:] = 0
            weight[ends], label[ends] = 1, steps[i][1]
        examples.append([example])
        labels.append([label])
        weights.append([weight])
        lm_mask.append([np.full(P + C, float(s.correct))])  # the language-model loss is of correct solutions only
    extras = {"labels": labels, "weight": weights, "lm_mask": lm_mask}
    rows, _ = pack_groups(examples, length, packed=packed, extras=extras)
    rows["mask"] = rows["mask"] * rows.pop("lm_mask")
    return rows


def step_ends(steps: Callable[[str], list[int]], tokenizer: Tokenizer, example: Example, text: str) -> list[int]:
    """Returns the token of the completion in which each step ends, the last with EOS. `steps`: see `Task.steps`."""
    head, ids = example.prompt, example.completion
    return [tokenizer.count(ids, text[:at], after=head) - 1 for at in steps(text)[:-1]] + [len(ids) - 1]


def step_targets(ends: Sequence[int], labels: Sequence[float]) -> tuple[list[int], list[float]]:
    """Returns the distinct tokens in which steps end, each with the label of the last step that ends there."""
    # Tokenizers merge line ends, so that several steps may end in one token.
    last = dict(zip(ends, labels, strict=True))
    return list(last), list(last.values())


class ContinuationTask(Task):
    """A task of continuing solutions: `meta` holds the original problem ("of") and the partial solution ("prefix")."""

    def __init__(self, task: Task):
        self.task, self.name, self.stop, self.opening = task, task.name, task.stop, task.opening
        self.opens_thinking = task.opens_thinking

    def prefix(self, hint: bool = False) -> str:
        return self.task.prefix(hint)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        return self.task.prompt(problem.meta["of"], hint) + problem.meta["prefix"]

    def answered_part(self, completion: str) -> str | None:
        return self.task.answered_part(completion)

    def parse(self, completion: str) -> str | None:
        return completion  # the answer is read in `judged`, from the partial solution and its continuation together

    def judged(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool]:
        texts = [None if a is None else self.task.cut(p.meta["prefix"] + a) for p, a in zip(problems, answers)]
        parsed = [None if text is None else self.task.parse(text) for text in texts]
        return self.task.judged([p.meta["of"] for p in problems], parsed)


def rollout_labels(
    generator: Model,
    task: Task,
    problems: dict[str, Problem],
    solutions: Sequence[Solution],
    settings: SampleSettings,
    *,
    n: int,
    seed: int,
    folder: Path,
    few_shot: bool = True,
) -> dict[tuple[str, str, bool], list[float]]:
    """Returns by key of each solution the labels of its `task.steps`: shares of n continuations that are correct."""
    # Nothing follows the last step: its label is the correctness of the solution, without continuations.
    ends = [task.steps(s.completion)[:-1] for s in solutions]
    partial: dict[tuple[str, str], Problem] = {}
    for s, positions in zip(solutions, ends):
        of = problems[s.problem_id]
        for end in positions:
            text = s.completion[:end]
            made = Problem(
                f"{of.id}#{len(partial)}", of.question, of.gold, group=of.group, meta={"of": of, "prefix": text}
            )
            # Samples of one problem share first steps: equal prefixes are continued once.
            partial.setdefault((of.id, text), made)
    rollouts = sample_rollouts(
        generator, ContinuationTask(task), list(partial.values()), settings, k=n, hinted=False, iteration=0, seed=seed,
        folder=folder, stage="steps", few_shot=few_shot,
    )  # fmt: skip
    correct = collections.Counter(r.problem_id for r in rollouts if r.correct)
    share = {key: correct[p.id] / n for key, p in partial.items()}
    return {
        s.key: [*(share[s.problem_id, s.completion[:end]] for end in positions), float(s.correct)]
        for s, positions in zip(solutions, ends)
    }
