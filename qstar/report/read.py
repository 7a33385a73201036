"""Readers of run folders, finished or not: config, environment, metrics, the files of every arm, lists of folders."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qstar.errors import UserError
from qstar.files import as_path, read_json
from qstar.report.rationales import Answers, Attempts, Row, read_answers, read_attempts
from qstar.runs.access import is_running, read_run_config
from qstar.train import metrics

MAIN = ("quiet_star", "full", "quiet", "thoughts")  # Quiet-STaR arms that are the method itself: first on the page
SHOWN = 600  # rationales per arm and iteration that a page shows at most


@dataclass(frozen=True)
class Arm:
    """One arm of a run.

    Attributes:
      name: as in the metrics; "" for the only arm of a run that names none.
      rows: stage -> rows of the metrics, by iteration and step. Iteration 0 is the base model.
      attempts: iteration -> its rationales, counted and sampled.
      answers: iteration -> group -> greedy answers on held-out problems, counted.
      answer_files: iteration -> the file of these answers.
      thoughts: step -> file of texts with their thoughts; see `thoughts.read_texts`.
      completions: update of RL -> file of its responses with rewards and advantages; see `pages.rl.embedded`.
      status: "finished", "stopped", "running" (also of an interrupted run), or "" where the method does not record it.
      reason: why the arm stopped, else "".
    """

    name: str
    rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    attempts: Mapping[int, Attempts] = field(default_factory=dict)
    answers: Mapping[int, Mapping[str, Answers]] = field(default_factory=dict)
    answer_files: Mapping[int, Path] = field(default_factory=dict)
    thoughts: Mapping[int, Path] = field(default_factory=dict)
    completions: Mapping[int, Path] = field(default_factory=dict)
    status: str = "running"
    reason: str = ""

    def stage(self, name: str) -> Sequence[Row]:
        """The rows of one stage."""
        return self.rows.get(name, ())

    @property
    def loops(self) -> list[Row]:
        """The rows of finished iterations, without that of the base model."""
        return [row for row in self.stage("iteration") if row["iteration"] > 0]

    @property
    def rationalises(self) -> bool | None:
        """Whether any attempt was made with a hint; None before the first iteration."""
        seen = any(kind.hinted for attempts in self.attempts.values() for kind in attempts.counts)
        counted = any(row.get("hinted_attempted") or row.get("rationalised") for row in self.loops)
        return seen or counted if self.loops or self.attempts else None

    @property
    def thinks(self) -> bool:
        """Whether anything was measured with thoughts."""
        return bool(self.thoughts) or any(key.startswith("nll/") for row in self.stage("evaluation") for key in row)


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, without checkpoints. Missing files leave empty fields."""

    folder: Path
    name: str
    method: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)  # the config with presets and defaults filled in
    gates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arms: Sequence[Arm] = ()
    base_train: Sequence[Row] = ()  # training of a from-scratch base
    rows: Sequence[Row] = ()  # all metrics
    refresh: int = 0  # seconds after which its page reloads itself; 0: never

    @functools.cached_property
    def status(self) -> str:
        """ "running" while a process holds the folder's lock, else "done", "interrupted" or "failed" as it noted."""
        if is_running(self.folder):
            return "running"
        if outcome := self.environment.get("outcome"):
            return str(outcome)
        # Killed, or written before outcomes were noted.
        killed = "started" in self.environment and not self.environment.get("ended")
        return "interrupted" if killed or "running" in {arm.status for arm in self.arms} or not self.arms else "done"


def read_run(folder: str | os.PathLike, *, rollouts: bool = True) -> Run:
    """Reads a run's folder, which may still be written to.

    Args:
      rollouts: whether to read rationales and answers, which takes most of the time.

    Raises:
      UserError: the folder is missing or not a run's, or one of its files is broken; each is named.
    """
    folder, config = read_config(folder)
    rows, resolved, method = metrics.read(folder), read_dict(folder / "resolved.json"), str(config["method"])
    names = _arm_names(folder, config, rows)
    arms = [_read_arm(folder, method, name, rows, resolved, rollouts) for name in names]
    gates = (read_dict(folder / where / "gates.json") for where in ("base", "g_sft", "large"))
    return Run(
        folder=folder,
        name=str(config.get("name") or folder.resolve().name),
        method=method,
        config=config,
        environment=read_dict(folder / "environment.json"),
        resolved=resolved,
        gates={name: gate for found in gates for name, gate in found.items()},
        # The arm without rationalisation is the comparison, the arm called as the method the result.
        arms=sorted(arms, key=lambda arm: (arm.rationalises is False, arm.name not in MAIN)),
        base_train=_sorted(row for row in rows if row["arm"] not in names and row["stage"] == "train"),
        rows=rows,
    )


def read_config(folder: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """A run's folder and its config. Raises UserError if the folder is missing or not a run's."""
    folder = as_path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the --workdir of a `qstar train`")
    if "method" not in read_dict(folder / "config.json"):
        raise UserError(
            f'{folder}: not the folder of a run (no config.json with a "method" in it); '
            "give the --workdir of a `qstar train`"
        )
    return folder, read_run_config(folder, "")


def find_runs(root: Path) -> Iterator[Path]:
    """The run folders among a folder, its folders, and theirs (those of a sweep), in the order of their names."""
    level = [root]
    for _ in range(3):
        below = []
        for folder in level:
            # A config.json of a model has no method.
            if b'"method"' in _content(folder / "config.json"):
                yield folder
            else:
                # A folder of somebody else's may be unreadable: the others are listed.
                with contextlib.suppress(OSError):
                    below += [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()]
        level = sorted(below)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _arm_names(folder: Path, config: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    # From three places: arms of the config may not have begun, and rows and folders may hold others.
    names = [str(name) for name in config.get("arms") or ()]
    names += [row["arm"] for row in rows if row["stage"] in ("iteration", "test", "evaluation", "alarm")]
    parts = ("rationales", "evaluation", "thoughts", "status.json")
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        if any((place / part).exists() for part in parts):
            names.append("" if place == folder else place.name)
    distinct = list(dict.fromkeys(names))
    # The base is measured as iteration 0 of every arm; alone, it is the only arm.
    bases = {"base"} if "base" in distinct and len(distinct) > 1 else set()
    return [name for name in distinct if name not in bases]


def _read_arm(
    folder: Path, method: str, name: str, rows: Sequence[Row], resolved: Mapping[str, Any], rollouts: bool
) -> Arm:
    home, mine = folder / name, [row for row in rows if row["arm"] == name]
    # RL evaluates by round, but trains by update: rounds are converted, so that both share the axis of updates.
    at = _rounds(mine, resolved, name) if method == "rl" else {}
    mine = [{**row, "iteration": at.get(row["iteration"], row["iteration"])} for row in mine]
    answered = {at.get(n, n): path for n, path in numbered(home / "evaluation", "iter_*.jsonl")}
    # Responses of RL have rewards and no verdicts (`completions`): attempts are the answers of its evaluations.
    written = answered if method == "rl" else dict(numbered(home / "rationales", "iter_*.jsonl"))
    status = read_dict(home / "status.json")
    return Arm(
        name=name,
        rows={stage: _sorted(r for r in mine if r["stage"] == stage) for stage in {r["stage"] for r in mine}},
        attempts={n: read_attempts(path, SHOWN) for n, path in written.items()} if rollouts else {},
        answers={n: read_answers(path) for n, path in answered.items()} if rollouts else {},
        answer_files=answered,
        thoughts=dict(numbered(home / "thoughts", "step_*.jsonl")),
        completions=dict(numbered(home / "completions", "update_*.jsonl")),
        status=str(status.get("status") or ("" if method in ("quiet_star", "guided_cot") else "running")),
        reason=str(status.get("reason") or ""),
    )


def _rounds(rows: Sequence[Row], resolved: Mapping[str, Any], name: str) -> dict[int, int]:
    try:
        updates, rounds = resolved["arms"][name]["train"]["updates"], resolved["loop"]["rounds"]
    except (KeyError, TypeError):
        return {}
    # A run that is not finished has made fewer updates than its config says.
    done = max((row.get("updates") or 0 for row in rows), default=0) or updates
    return {n: min(math.ceil(updates * n / rounds), done) for n in range(rounds + 1)}


def _sorted(rows: Any) -> list[Row]:
    # A resumed run may have written its rows in another order.
    return sorted(rows, key=lambda row: (row["iteration"], row["step"] or 0))


def numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """(N, path) of the files that a pattern with one star names, where a number stands for the star."""
    # The glob alone would take a file with any text in place of the number.
    name = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    found = [(name.fullmatch(path.name), path) for path in folder.glob(pattern)]
    return sorted((int(match[1]), path) for match, path in found if match)


def read_dict(path: Path) -> dict[str, Any]:
    """The JSON object of a file, {} if there is none."""
    return read_json(path, "delete the file or mend it") if path.is_file() else {}
