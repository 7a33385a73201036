"""D_GEN and D_VER of V-STaR: sets of solutions with where they come from, as JSONL beside the run's rationales.

    D_GEN  right solutions: what the generator is trained on
    D_VER  right and wrong ones: what the verifier is trained on

Both are keyed by (problem, completion up to white space): a solution that is found again stays the one it was, and only its
`count` grows. The counts matter. Where a problem has one valid solution and many that reach the right answer over a wrong
step, the valid one is found over and over, and a set without counts comes to hold mostly the others.

The file of an iteration holds what that iteration found, and is its own done-marker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from qstar.data.sources import read_jsonl
from qstar.runs.folder import cached_jsonl
from qstar.tasks.base import Problem, Task
from qstar.types import Rollout


@dataclasses.dataclass(frozen=True)
class Solution:
    """One labelled solution."""

    problem_id: str
    prompt: str
    completion: str
    correct: bool
    parsed: bool  # whether an answer could be read
    truncated: bool
    source: str  # "human" or "model"
    iteration: int  # that found it; 0 for human ones
    group: str = ""
    count: int = 1  # how often it was sampled (a human solution: 1)
    tokens: list[int] | None = None  # as first sampled, see `Rollout`; None of human ones

    @property
    def key(self) -> tuple[str, str]:
        """What makes two solutions the same."""
        return self.problem_id, " ".join(self.completion.split())


def human(task: Task, problems: Iterable[Problem]) -> list[Solution]:
    """Returns D_SFT: the gold solutions of the problems that have one."""
    texts = [(p, task.solution(p)) for p in problems]
    return [
        Solution(p.id, task.prompt(p), text, True, True, False, "human", 0, p.group)
        for p, text in texts
        if text is not None
    ]


def sampled(rollouts: Iterable[Rollout]) -> list[Solution]:
    """Returns attempts without hints as solutions, in order."""
    return [
        Solution(
            r.problem_id,
            r.prompt,
            r.completion,
            r.correct,
            r.answer is not None,
            r.truncated,
            "model",
            r.iteration,
            r.group,
            tokens=r.tokens,
        )
        for r in rollouts
        if not r.hinted
    ]


class Buffer:
    """One growing set on disk: FOLDER/iter_NNN.jsonl."""

    def __init__(self, folder: Path):
        """Opens the folder (created with the first file)."""
        self.folder = folder

    def add(self, n: int, solutions: Iterable[Solution]) -> list[Solution]:
        """Adds what iteration n found, once, and returns the whole set up to n, oldest first."""
        cached_jsonl(self._file(n), lambda: [dataclasses.asdict(s) for s in merged(solutions)])
        return self.upto(n)

    def upto(self, n: int) -> list[Solution]:
        """Returns what iterations 0 .. n found, each with how often it was sampled in all."""
        files = [self._file(m) for m in range(n + 1)]
        return merged(Solution(**row) for file in files if file.exists() for row in read_jsonl(file))

    def _file(self, n: int) -> Path:
        return self.folder / f"iter_{n:03d}.jsonl"


def merged(solutions: Iterable[Solution]) -> list[Solution]:
    """Returns each distinct solution as it first was, with the sum of the counts."""
    first: dict[tuple[str, str], Solution] = {}
    total: dict[tuple[str, str], int] = {}
    for s in solutions:
        first.setdefault(s.key, s)
        total[s.key] = total.get(s.key, 0) + s.count
    return [dataclasses.replace(s, count=total[key]) for key, s in first.items()]


def most_sampled(solutions: Sequence[Solution], cap: int | None) -> list[Solution]:
    """Returns at most `cap` solutions of every problem (None: all), those with the largest counts; the order stays."""
    if cap is None:
        return list(solutions)
    kept: dict[str, list[int]] = {}
    for i in sorted(range(len(solutions)), key=lambda i: -solutions[i].count):  # stable: the first found of equal ones
        kept.setdefault(solutions[i].problem_id, []).append(i)
    return [solutions[i] for i in sorted(i for indices in kept.values() for i in indices[:cap])]


def counts(solutions: Sequence[Solution]) -> dict[str, int]:
    """Returns how many there are: in all, right, wrong, human, and problems with both a right and a wrong one."""
    right, wrong = ({s.problem_id for s in solutions if s.correct == side} for side in (True, False))
    return {
        "solutions": len(solutions),
        "correct": sum(s.correct for s in solutions),
        "incorrect": sum(not s.correct for s in solutions),
        "human": sum(s.source == "human" for s in solutions),
        "mixed_problems": len(right & wrong),
    }
