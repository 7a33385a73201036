"""Reads the folder of a run, finished or not, into plain dataclasses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qstar.errors import UserError
from qstar.files import parse_json, read
from qstar.report.rationales import Answers, Attempts, Row, read_answers, read_attempts
from qstar.train import metrics

_LOOP_FILE = re.compile(r"iter_(\d+)\.jsonl")


@dataclass(frozen=True)
class Arm:
    """One way of running the loop (with rationalisation, without...).

    Attributes:
        name: as in the metrics; "" for the only arm of a run that names none.
        iterations: the rows of stage "iteration", by outer loop; loop 0 is the base model.
        train: the rows of stage "train", by (iteration, step).
        test: the rows of stage "test".
        attempts: outer loop -> its rationales, counted and sampled.
        answers: outer loop -> group -> its greedy answers on held-out problems, counted.
        status: "finished", "stopped" or "running" (which includes a run that was interrupted).
        reason: why it stopped, else "".
    """

    name: str
    iterations: Sequence[Row] = ()
    train: Sequence[Row] = ()
    test: Sequence[Row] = ()
    attempts: Mapping[int, Attempts] = field(default_factory=dict)
    answers: Mapping[int, Mapping[str, Answers]] = field(default_factory=dict)
    status: str = "running"
    reason: str = ""

    @property
    def loops(self) -> list[Row]:
        """The rows of finished outer loops, without that of the base model."""
        return [row for row in self.iterations if row["iteration"] > 0]

    @property
    def rationalises(self) -> bool | None:
        """Whether any attempt was made with a hint; None before the first loop."""
        seen = any(kind.hinted for attempts in self.attempts.values() for kind in attempts.counts)
        counted = any(row.get("hinted_attempted") or row.get("rationalised") for row in self.loops)
        return seen or counted if self.loops or self.attempts else None


@dataclass(frozen=True)
class Run:
    """All that a run's folder tells, but for checkpoints. Missing files leave empty fields."""

    folder: Path
    name: str
    method: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)  # the config with presets and defaults filled in
    gates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arms: Sequence[Arm] = ()
    base_train: Sequence[Row] = ()  # the training of a from-scratch base

    @property
    def status(self) -> str:
        """All arms together: "running" while one does, else "stopped" if one was, else "finished"."""
        states = {arm.status for arm in self.arms} or {"running"}
        return next(state for state in ("running", "stopped", "finished") if state in states)


def read_run(folder: str | os.PathLike, *, cap: int = 600) -> Run:
    """Reads a run's folder, which may still be written to.

    Args:
        folder: the --workdir of a `qstar train`.
        cap: rationales kept per arm and outer loop; their counts are always those of all.

    Raises:
        UserError: the folder is missing or not a run's, or one of its files is broken; each is named.
    """
    folder, config = read_config(folder)
    rows = metrics.read(folder)
    names = _arm_names(folder, config, rows)
    arms = [_read_arm(folder, name, rows, cap) for name in names]
    return Run(
        folder=folder,
        name=str(config.get("name") or folder.resolve().name),
        method=str(config["method"]),
        config=config,
        environment=read_dict(folder / "environment.json"),
        resolved=read_dict(folder / "resolved.json"),
        gates={k: v for where in ("base", "g_sft") for k, v in read_dict(folder / where / "gates.json").items()},
        arms=sorted(arms, key=lambda arm: arm.rationalises is False),  # the arm without is the comparison
        base_train=_stage([row for row in rows if row["arm"] not in names], "train"),
    )


def read_config(folder: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """A run's folder and its config, which says by its method what else is in the folder.

    Raises:
        UserError: the folder is missing or not a run's.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the --workdir of a `qstar train`")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "method" not in config:
        raise UserError(
            f'{folder}: not the folder of a run (no config.json with a "method" in it); '
            "give the --workdir of a `qstar train`"
        )
    return folder, config


def _arm_names(folder: Path, config: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Names of arms: those of the config, then others with results in the order they appear, then folders."""
    names = [str(name) for name in config.get("arms") or ()]
    names += [row["arm"] for row in rows if row["stage"] in ("iteration", "test")]
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    for place in places:
        if any((place / part).exists() for part in ("rationales", "evaluation", "status.json")):
            names.append("" if place == folder else place.name)
    distinct = list(dict.fromkeys(names))
    bases = {"base"} if "base" in distinct and len(distinct) > 1 else set()  # evaluated as loop 0 of every arm
    return [name for name in distinct if name not in bases]


def _read_arm(folder: Path, name: str, rows: Sequence[Row], cap: int) -> Arm:
    mine = [row for row in rows if row["arm"] == name]
    status = read_dict(folder / name / "status.json")
    return Arm(
        name=name,
        iterations=_stage(mine, "iteration"),
        train=_stage(mine, "train"),
        test=_stage(mine, "test"),
        attempts={loop: read_attempts(path, cap) for loop, path in _loop_files(folder / name / "rationales")},
        answers={loop: read_answers(path) for loop, path in _loop_files(folder / name / "evaluation")},
        status=str(status.get("status") or "running"),
        reason=str(status.get("reason") or ""),
    )


def _stage(rows: Sequence[Row], stage: str) -> list[Row]:
    """Rows of one stage by loop and step, whatever the order in which a resumed run wrote them."""
    chosen = [row for row in rows if row["stage"] == stage]
    return sorted(chosen, key=lambda row: (row["iteration"], row["step"] or 0))


def _loop_files(folder: Path) -> list[tuple[int, Path]]:
    found = [(_LOOP_FILE.fullmatch(path.name), path) for path in folder.glob("iter_*.jsonl")]
    return sorted((int(match[1]), path) for match, path in found if match)


def read_dict(path: Path) -> dict[str, Any]:
    """The JSON object of a file, {} if there is none."""
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, not an object; delete the file or mend it")
    return value or {}


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is none."""
    if not path.is_file():
        return None
    try:
        return parse_json(read(path), f"{path}")
    except UserError as error:
        raise UserError(f"{error}; delete the file or mend it") from None
