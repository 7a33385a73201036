"""Run context of V-STaR: D_SFT, preference pairs, the verifiers' settings, and how selection is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from qstar.errors import Settings, bounded
from qstar.methods import star
from qstar.methods.preference_data import PairSettings
from qstar.methods.verifier import VerifierSettings
from qstar.runs.context import RunContext
from qstar.runs.settings import Gate, Sections, settings_from


@dataclasses.dataclass(frozen=True)
class VSections(Sections):
    """The sections of a V-STaR config."""

    sft: dict = dataclasses.field(default_factory=dict)
    pairs: dict = dataclasses.field(default_factory=dict)
    rpo: dict = dataclasses.field(default_factory=dict)
    dpo: dict = dataclasses.field(default_factory=dict)
    orm: dict = dataclasses.field(default_factory=dict)
    prm: dict = dataclasses.field(default_factory=dict)
    select: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Supervision(Settings):
    """D_SFT. A config's `sft` section."""

    problems: int | None = bounded(None, ge=1)  # with human solutions; None: all of the training set
    steps: str = "epochs:2:0"  # of G_SFT (2 epochs on GSM8K, 3 on MBPP)

    def __post_init__(self) -> None:
        super().__post_init__()
        star.steps_for(self.steps, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Selecting(Settings):
    """How the last generator is sampled to measure selection. A config's `select` section."""

    samples: int = bounded(128, ge=0)  # N per problem
    temperature: float = bounded(0.7, ge=0)
    limit: int = bounded(0, ge=0)  # first so many problems (0: all)
    m: int = bounded(4, ge=1)  # of the top-m vote


@dataclasses.dataclass(frozen=True)
class SampledGate(Gate):
    """A bound on what samples of G_SFT are like, on validation problems."""

    NAMES: ClassVar = ("pass@1", "pass@16", "majority@16")


@dataclasses.dataclass
class VStarContext(RunContext):
    """One V-STaR run."""

    SECTIONS: ClassVar = VSections
    GATE: ClassVar = SampledGate
    sft: Supervision = None
    pairs: PairSettings = None
    rpo: VerifierSettings = None  # of a generator
    dpo: VerifierSettings = None
    orm: VerifierSettings = None
    prm: VerifierSettings = None
    select: Selecting = None

    @classmethod
    def make(cls, config: Any, workdir: Path, console: Console) -> VStarContext:
        """Reads a config; all that can be wrong in it is found here, before anything is written."""
        ctx = super().make(config, workdir, console)
        kinds = {"sft": Supervision, "pairs": PairSettings, "select": Selecting}
        kinds |= dict.fromkeys(("rpo", "dpo", "orm", "prm"), VerifierSettings)
        for name, kind in kinds.items():
            values = config.get(name)
            setattr(ctx, name, settings_from(kind, values.to_dict() if values else {}, name))
        return ctx

    @property
    def few_shot(self) -> str:
        """The few-shot text in front of training rows, where the config's `loop` says so."""
        return self.task.prefix() if self.config.loop.get("few_shot_in_train") else ""
