"""D_GEN and D_VER of V-STaR: sets of solutions with where they come from, as JSONL beside the run's rationales.

    D_GEN  right solutions: what the generator is trained on
    D_VER  right and wrong ones: what the verifier is trained on

Both are keyed by (problem, completion up to white space), so a solution that is found again stays the one it was. The file
of an iteration holds what is new in it, and is its own done-marker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qstar.data.sources import read_jsonl
from qstar.methods.run_folder import once
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
        """Adds iteration n's new solutions, once, and returns the whole set up to n, oldest first."""
        before = self.upto(n - 1)
        seen = {s.key for s in before}

        def make() -> list[dict[str, Any]]:
            new: dict[tuple[str, str], Solution] = {}
            for s in solutions:
                if s.key not in seen:
                    new.setdefault(s.key, s)
            return [dataclasses.asdict(s) for s in new.values()]

        return before + [Solution(**row) for row in once(self._file(n), make)]

    def upto(self, n: int) -> list[Solution]:
        """Returns what iterations 0 .. n added."""
        return [Solution(**row) for m in range(n + 1) if self._file(m).exists() for row in read_jsonl(self._file(m))]

    def _file(self, n: int) -> Path:
        return self.folder / f"iter_{n:03d}.jsonl"


def counts(solutions: Sequence[Solution]) -> dict[str, int]:
    """Returns how many there are: in all, right, wrong, human, and problems with both a right and a wrong one."""
    right, wrong = ({s.problem_id for s in solutions if s.correct == side} for side in (True, False))
    return {
        "solutions": len(solutions),
        "right": sum(s.correct for s in solutions),
        "wrong": sum(not s.correct for s in solutions),
        "human": sum(s.source == "human" for s in solutions),
        "mixed_problems": len(right & wrong),
    }
