"""Reads the folder of a Quiet-STaR run, finished or not, into plain dataclasses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qstar.report.rationales import Row
from qstar.report.run import read_config, read_dict
from qstar.train import metrics

_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")
MAIN = ("quiet_star", "full", "quiet", "thoughts")  # names of the arm that is the method itself
_STAGES = ("train", "evaluation", "alarm")


@dataclass(frozen=True)
class QuietArm:
    """One way of training (thoughts, or a control).

    Attributes:
        name: as in the metrics.
        train: the rows of stage "train", by step.
        evaluations: the rows of stage "evaluation", by step; step 0 is the base model.
        alarms: the rows of stage "alarm", by step.
        thoughts: step -> file of texts with their thoughts; see `texts.read_texts`.
        status: "finished", "stopped", "running", or "" where the run does not say.
        reason: why it stopped, else "".
    """

    name: str
    train: Sequence[Row] = ()
    evaluations: Sequence[Row] = ()
    alarms: Sequence[Row] = ()
    thoughts: Mapping[int, Path] = field(default_factory=dict)
    status: str = ""
    reason: str = ""

    @property
    def thinks(self) -> bool:
        """Whether anything was measured with thoughts."""
        return bool(self.thoughts) or any(key.startswith("nll/") for row in self.evaluations for key in row)

    @property
    def label(self) -> str:
        """The name as it is written in running text."""
        return self.name.replace("_", " ") or "quiet star"


@dataclass(frozen=True)
class QuietRun:
    """All that a run's folder tells, but for checkpoints. Missing files leave empty fields."""

    folder: Path
    name: str
    method: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)  # the config with presets and defaults filled in
    gates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arms: Sequence[QuietArm] = ()
    base_train: Sequence[Row] = ()  # the training of a from-scratch base


def read_quiet_run(folder: str | os.PathLike) -> QuietRun:
    """Reads a Quiet-STaR run's folder, which may still be written to. Thoughts are only listed.

    Raises:
        UserError: the folder is missing or not a run's, or one of its files is broken; each is named.
    """
    folder, config = read_config(folder)
    rows = metrics.read(folder)
    names = _arm_names(folder, config, rows)
    return QuietRun(
        folder=folder,
        name=str(config.get("name") or folder.resolve().name),
        method=str(config["method"]),
        config=config,
        environment=read_dict(folder / "environment.json"),
        resolved=read_dict(folder / "resolved.json"),
        gates=read_dict(folder / "base" / "gates.json"),
        arms=[_read_arm(folder, name, rows) for name in names],
        base_train=_stage([row for row in rows if row.get("arm", "") not in names], "train"),
    )


def _arm_names(folder: Path, config: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Names of arms: the method's own, those of the config, others with results as they appear, then folders."""
    names = [str(name) for name in config.get("arms") or ()]
    names += [str(row.get("arm", "")) for row in rows if row["stage"] in ("evaluation", "alarm")]
    names += [p.parent.name for p in sorted(folder.glob("*/thoughts"))]
    distinct = list(dict.fromkeys(names))
    bases = {"base"} if "base" in distinct and len(distinct) > 1 else set()  # measured as step 0 of every arm
    return sorted((name for name in distinct if name not in bases), key=lambda name: name not in MAIN)


def _read_arm(folder: Path, name: str, rows: Sequence[Row]) -> QuietArm:
    mine = [row for row in rows if row.get("arm", "") == name]
    status = read_dict(folder / name / "status.json")
    found = [(_STEP_FILE.fullmatch(path.name), path) for path in (folder / name / "thoughts").glob("step_*.jsonl")]
    return QuietArm(
        name,
        *(_stage(mine, stage) for stage in _STAGES),
        thoughts=dict(sorted((int(match[1]), path) for match, path in found if match)),
        status=str(status.get("status") or ""),
        reason=str(status.get("reason") or ""),
    )


def _stage(rows: Sequence[Row], stage: str) -> list[Row]:
    """Rows of one stage by step, whatever the order in which a resumed run wrote them."""
    return sorted((row for row in rows if row["stage"] == stage), key=lambda row: row.get("step") or 0)
