"""Sections of a config as frozen dataclasses, read and checked before a run writes anything."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from qstar.errors import Settings, bounded, check_type, pip_install, require, unknown, within
from qstar.runs.rollouts import SampleSettings
from qstar.runs.stages import TrainSettings, UpdateSettings
from qstar.tasks.base import SPLITS

# Folders of a run that are not arms: an arm of that name would write into them.
_TAKEN = ("base", "g_sft", "tensorboard")


@dataclasses.dataclass(frozen=True)
class Evaluation(Settings):
    """What the model of every loop is evaluated on. A config's `evaluate` section."""

    split: str = bounded("test", choices=SPLITS)
    limit: int = bounded(0, ge=0)  # number of problems (0: all) of every split, the final test included
    hinted: bool = False  # also with the answer as a hint


@dataclasses.dataclass(frozen=True)
class EpochSettings(UpdateSettings):
    """Settings of training on a fixed set of rows."""

    epochs: float = bounded(1.0, gt=0)
    steps: int = bounded(0, ge=0, note="0: as many as epochs says")

    def updates_for(self, rows: int) -> int:
        """Returns the number of updates on this number of rows."""
        return self.steps or max(1, round(self.epochs * rows / self.batch_size))


@dataclasses.dataclass(frozen=True)
class BaseSettings(TrainSettings):
    """How a from-scratch base model is trained. A config's `base` section."""

    steps: int = bounded(0, ge=0)


@dataclasses.dataclass(frozen=True)
class Gate:
    """A bound on a measurement of the base model. An entry of a config's `gates` section."""

    metric: str  # one of NAMES, or one of them with a group: accuracy/3
    why: str  # the conclusion if the bound is violated
    min: float | None = None
    max: float | None = None
    stop: bool = True  # whether a violation ends the run
    NAMES: ClassVar[tuple[str, ...]] = ("accuracy", "hinted_accuracy", "hinted_valid")

    def __post_init__(self) -> None:
        known = self.metric.partition("/")[0] in self.NAMES
        require(
            (known, f"metric={self.metric!r} is not one of {', '.join(self.NAMES)}, or one of them with /GROUP"),
            (self.min is not None or self.max is not None, "min or max is missing; a gate needs a bound"),
        )


@dataclasses.dataclass(frozen=True)
class Log:
    """Where metrics go besides the run folder. A config's `log` section."""

    wandb: dict | None = None  # keyword arguments of `wandb.init`; empty: off

    def __post_init__(self) -> None:
        # Found before the run starts, not at its first metrics row. `find_spec` does not import it.
        usable = not self.wandb or importlib.util.find_spec("wandb") is not None
        require((usable, f"wandb is set, but wandb is not installed: `{pip_install('log')}`, or leave it empty"))


# Keyword-only, because subclasses add fields without a default behind those that have one.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections(Settings):
    """The sections that every config has; each method adds its own in a subclass."""

    method: str
    name: str
    seed: int
    mesh: str
    arms: dict
    gates: dict[str, Gate] = dataclasses.field(default_factory=dict)
    log: Log = dataclasses.field(default_factory=Log)

    def __post_init__(self) -> None:
        super().__post_init__()
        require((len(self.arms) > 0, "arms is empty; give at least one, e.g. {'star': {'preset': 'star'}}"))
        for name, arm in self.arms.items():
            check_type(f"arms.{name}", arm, dict)
            # An arm's name is a folder of the run.
            fits = re.fullmatch(r"\w[\w.-]*", name) and name not in _TAKEN
            rule = f"use letters, digits and _, but not {' or '.join(_TAKEN)}"
            require((bool(fits), f"arms.{name} cannot be the name of a folder in the run; {rule}"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSections(Sections):
    """The sections of methods that sample solutions to a task's problems: STaR, V-STaR, RL."""

    task: dict
    model: dict
    loop: dict
    sample: SampleSettings
    train: TrainSettings
    evaluate: Evaluation
    base: BaseSettings = dataclasses.field(default_factory=BaseSettings)

    def __post_init__(self) -> None:
        require((isinstance(self.task.get("name"), str), "task.name is missing; name a task, e.g. arithmetic"))
        super().__post_init__()


def settings_from(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Returns a settings dataclass from a config section; fields that are settings are read the same way.

    `where`: the section's path in the config ("" for the config itself), for the messages. Raises UserError for a key
    that the dataclass does not have or misses, a value of another type, or one that it refuses.
    """
    values = check_keys(cls, values, where)
    # Not `field.type`, which is text under postponed annotations.
    prefix, kinds = _prefix(where), typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        require((not needed or f.name in values, f"{prefix}{f.name} is missing; set it in the config file"))
    read = {k: _read(kinds[k], v, f"{where}.{k}".strip(".")) for k, v in values.items()}
    with within(prefix):
        return cls(**read)


def arms_from(
    cls: type, config: Mapping[str, Any], section: str = "", presets: Mapping[str, Mapping[str, Any]] = {}
) -> dict[str, Any]:
    """Returns the settings of every arm: a section of the config, over it the arm's preset, over it the arm's own keys.

    `section`: its name, "" for none. `presets`: those that an arm's key `preset` can name ("star" by default); {}: arms
    have no such key. Raises UserError: see `settings_from`; an unknown preset.
    """
    under = config.get(section, {})
    if section:
        # Read by itself first, so that a mistake in it is reported there and not as one of an arm.
        settings_from(cls, under, section)
    out = {}
    for name, arm in config["arms"].items():
        own = dict(arm)
        preset = own.pop("preset", "star") if presets else ""
        if presets and str(preset) not in presets:
            raise unknown(f"config.arms.{name}.preset={preset!r}", str(preset), presets)
        out[name] = settings_from(cls, {**under, **presets.get(preset, {}), **own}, f"arms.{name}")
    return out


def _read(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        check_type(f"config.{where}", value, dict)
        return settings_from(kind, value, where)  # type: ignore[arg-type]
    if typing.get_origin(kind) is dict and typing.get_args(kind):
        return {name: _read(typing.get_args(kind)[1], entry, f"{where}.{name}") for name, entry in value.items()}
    return value


def check_keys(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the values, lists as tuples where a field is a tuple: config.json has made lists of them.

    Raises UserError for a key that a dataclass does not have (naming the closest), or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    out = {}
    for key, value in values.items():
        # Not left to the dataclass, whose TypeError names neither the config's path nor the closest key.
        if key not in kinds:
            raise unknown(f"{_prefix(where)}{key}", key, sorted(kinds))
        kind = dict if dataclasses.is_dataclass(kinds[key]) else kinds[key]
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        listed = isinstance(value, list) and any((typing.get_origin(o) or o) is tuple for o in options)
        out[key] = tuple(value) if listed else value
        check_type(f"{_prefix(where)}{key}", out[key], kind)
    return out


def narrowed(cls: type, settings: Any) -> Any:
    """Returns the settings of a base class `cls` that an object of a subclass holds."""
    # Settings are cache keys of compiled steps: a subclass's further fields would compile an equal step again.
    return cls(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(cls)})


def _prefix(where: str) -> str:
    return f"config.{where}." if where else "config."
