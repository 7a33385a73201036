"""Labels of a solution's steps by rollouts: from the end of each step the generator continues several times, and the
step is as right as the share of those that reach the right answer (Math-Shepherd, arXiv 2312.08935, soft estimation).

For tasks that cannot judge a step themselves (`Task.step_labels` is None).
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path

from qstar.methods.buffers import Solution
from qstar.models.model import Model
from qstar.runs.rollouts import SampleSettings, sample_rollouts
from qstar.tasks.base import Problem, Task


class Continued(Task):
    """A task whose problems are begun: `meta` holds the problem ("of") and the solution so far ("begun")."""

    def __init__(self, task: Task):
        self.task, self.name, self.stop = task, task.name, task.stop

    def prefix(self, hint: bool = False) -> str:
        return self.task.prefix(hint)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        return self.task.prompt(problem.meta["of"], hint) + problem.meta["begun"]

    def parse(self, completion: str) -> str | None:
        """The continuation itself: an answer is read off the whole, which only `correct` can put together."""
        return completion

    def correct(self, problem: Problem, answer: str | None) -> bool:
        return self.judged([problem], [answer])[0]

    def judged(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool]:
        texts = [p.meta["begun"] + a if a is not None else None for p, a in zip(problems, answers)]
        parsed = [self.task.parse(self.task.cut(text)) if text is not None else None for text in texts]
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
) -> list[list[float]]:
    """Returns per solution the label of each of its `task.steps`: the share of n continuations that are right.

    The last step has nothing after it: its label is whether the solution is right. Equal beginnings are continued once.
    FOLDER holds the continuations: killed at any point and called again, it ends with the same labels.
    """
    begun: dict[tuple[str, str], Problem] = {}
    for s in solutions:
        for end in task.steps(s.completion)[:-1]:
            key = s.problem_id, s.completion[:end]
            of = problems[s.problem_id]
            name = f"{s.problem_id}#{len(begun)}"
            begun.setdefault(key, Problem(name, of.question, of.gold, group=of.group, meta={"of": of, "begun": key[1]}))
    tried = sample_rollouts(
        generator, Continued(task), list(begun.values()), settings, k=n, hinted=False, iteration=0, seed=seed,
        folder=folder, stage="steps", few_shot=few_shot,
    )  # fmt: skip
    right: dict[str, int] = collections.Counter(r.problem_id for r in tried if r.correct)
    share = {key: right[p.id] / n for key, p in begun.items()}
    ends = [task.steps(s.completion)[:-1] for s in solutions]
    return [
        [*(share[s.problem_id, s.completion[:e]] for e in some), float(s.correct)] for s, some in zip(solutions, ends)
    ]
