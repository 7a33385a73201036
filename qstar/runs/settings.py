"""Config sections as frozen settings: every mistake in them is found here, before anything is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import typing
from collections.abc import Mapping
from typing import Any

from qstar.errors import Settings, UserError, bounded, check_type, require, unknown
from qstar.tasks.base import SPLITS

_TAKEN = ("base", "g_sft", "tensorboard")  # folders of a run that are no arms


@dataclasses.dataclass(frozen=True)
class Sections:
    """What every config has. The sections are read one by one, by those who use them."""

    method: str
    name: str
    seed: int
    mesh: str
    task: dict
    model: dict
    loop: dict
    arms: dict
    sample: dict
    train: dict
    evaluate: dict
    base: dict = dataclasses.field(default_factory=dict)
    rl: dict = dataclasses.field(default_factory=dict)
    gates: dict = dataclasses.field(default_factory=dict)
    log: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        require(
            (isinstance(self.task.get("name"), str), "task.name is missing; name a task, e.g. arithmetic"),
            (len(self.arms) > 0, "arms is empty; give at least one, e.g. {'star': {'preset': 'star'}}"),
        )
        for name, arm in self.arms.items():
            check_type(f"arms.{name}", arm, dict)
            fits = re.fullmatch(r"\w[\w.-]*", name) and name not in _TAKEN
            rule = f"use letters, digits and _, but not {' or '.join(_TAKEN)}"
            require((bool(fits), f"arms.{name} cannot be the name of a folder in the run; {rule}"))


@dataclasses.dataclass(frozen=True)
class Evaluation(Settings):
    """What the model of every loop is measured on. A config's `evaluate` section."""

    split: str = bounded("test", choices=SPLITS)
    limit: int = bounded(0, ge=0)  # first so many problems (0: all) of every split, the final test's too
    hinted: bool = False  # also with the answer as a hint


@dataclasses.dataclass(frozen=True)
class Gate:
    """A bound on a measurement of the base model. An entry of a config's `gates` section."""

    metric: str  # accuracy, hinted_accuracy or hinted_valid; with a group: accuracy/3
    why: str  # what it means when it does not hold
    min: float | None = None
    max: float | None = None
    stop: bool = True  # whether the run ends then
    NAMES: typing.ClassVar = ("accuracy", "hinted_accuracy", "hinted_valid")

    def __post_init__(self):
        names = self.NAMES
        known = self.metric.partition("/")[0] in names
        require(
            (known, f"metric={self.metric!r} is not one of {', '.join(names)}, or one of them with /GROUP"),
            (self.min is not None or self.max is not None, "min or max is missing; a gate needs a bound"),
        )


@dataclasses.dataclass(frozen=True)
class Log:
    """Where metrics go besides the run folder."""

    wandb: dict | None = None  # keyword arguments of `wandb.init`; empty: off

    def __post_init__(self):
        there = not self.wandb or importlib.util.find_spec("wandb") is not None
        require((there, "wandb is set, but wandb is not installed: `pip install 'qstar[log]'`, or leave it empty"))


def settings_from(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Returns a frozen settings dataclass from a config section.

    Args:
      where: the section's path in the config ("" for the config itself), for the messages. Those of the class'
        own checks begin with the field.

    Raises:
      UserError: a key the dataclass does not have or misses, a value of another type, or one that it refuses.
    """
    check_keys(cls, values, where)
    prefix = _prefix(where)
    for f in dataclasses.fields(cls):
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        require((not needed or f.name in values, f"{prefix}{f.name} is missing; set it in the config file"))
    try:
        return cls(**values)
    except UserError as e:
        raise UserError(f"{prefix}{e}") from None


def check_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Compares names and types of a section's values with the fields of a dataclass.

    Raises:
      UserError: an unknown key (the closest one is named), or a value of another type.
    """
    kinds = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in kinds:
            raise unknown(f"{_prefix(where)}{key}", key, sorted(kinds))
        check_type(f"{_prefix(where)}{key}", value, kinds[key])


def _prefix(where: str) -> str:
    return f"config.{where}." if where else "config."
