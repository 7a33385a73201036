"""Run context of V-STaR: settings of D_SFT, preference pairs, verifiers and the evaluation of selection."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from qstar.errors import Settings, bounded
from qstar.methods import star
from qstar.methods.preference_data import PairSettings
from qstar.methods.verifier import VerifierSettings
from qstar.runs.context import RunContext
from qstar.runs.settings import Gate, TaskSections


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
    """How the last generator is sampled to evaluate selection. A config's `select` section."""

    samples: int = bounded(128, ge=0)  # N per problem; 0: no evaluation
    temperature: float = bounded(0.7, ge=0)
    limit: int = bounded(0, ge=0)  # first so many problems (0: all)
    m: int = bounded(4, ge=1)  # of the top-m vote


@dataclasses.dataclass(frozen=True)
class SampledGate(Gate):
    """A bound on samples of G_SFT on validation problems."""

    NAMES: ClassVar = ("pass@1", "pass@16", "majority@16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VStarSections(TaskSections):
    """The sections of a V-STaR config."""

    gates: dict[str, SampledGate] = dataclasses.field(default_factory=dict)
    sft: Supervision = dataclasses.field(default_factory=Supervision)
    pairs: PairSettings = dataclasses.field(default_factory=PairSettings)
    rpo: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)  # of a generator
    dpo: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)
    orm: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)
    prm: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)
    select: Selecting = dataclasses.field(default_factory=Selecting)


class VStarContext(RunContext):
    """One V-STaR run."""

    SECTIONS: ClassVar = VStarSections

    @property
    def few_shot(self) -> str:
        """The few-shot text in front of training rows, where the config's `loop` asks for it."""
        return self.task.prefix() if self.settings.loop.get("few_shot_in_train") else ""
