"""Every value of a config with the defaults and presets of its method, and where each comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from qstar.files import flatten
from qstar.methods import guided_cot, pairs, quiet_star, rl, star, v_star
from qstar.methods.quiet_data import QuietSections
from qstar.runs.settings import TaskSections, settings_from


class Value(NamedTuple):
    """A value and its source: default, preset NAME, config file, argument, or command line."""

    value: Any
    source: str


class _Layout(NamedTuple):
    sections: type
    arm: type  # of the settings of an arm
    below: str = ""  # the section that an arm's keys replace
    presets: Mapping[str, Mapping[str, Any]] = {}


LAYOUTS = {
    "star": _Layout(TaskSections, star.VariantConfig, "loop", star.PRESETS),
    "v_star": _Layout(v_star.VStarSections, v_star.VStarConfig, "loop", v_star.PRESETS),
    "rl": _Layout(rl.RLSections, rl.RewardedSettings, "rl"),
    "quiet_star": _Layout(QuietSections, quiet_star.QuietConfig),
    "guided_cot": _Layout(guided_cot.GuidedSections, guided_cot.GuidedConfig),
    **{name: _Layout(cls.SECTIONS, cls.TRAIN, "train") for name, cls in pairs.CONTEXTS.items()},
}


def resolved(config: Any, sources: Mapping[str, str]) -> dict[str, Value]:
    """Returns all values by dotted key, those of one section together.

    Args:
      config: a ConfigDict. sources: of each of its values, by dotted key (`flags.value_sources`).

    Raises UserError for a key or value that the method's settings refuse. Of a method without settings of this kind only
    the config's own values are returned.
    """
    given = {key: Value(value, sources[key]) for key, value in flatten(config.to_dict()).items()}
    layout = LAYOUTS.get(config.get("method"))
    if layout is None:
        return given
    found = dict(given)
    sections = vars(settings_from(layout.sections, config.to_dict(), ""))
    for section, value in sections.items():
        # A section that is read as a dict has no defaults.
        plain = [] if isinstance(value, dict) else [(section, value)]
        for key, part in _parts(section, value) if dataclasses.is_dataclass(value) else plain:
            found.setdefault(key, Value(part, "default"))
    for name in config.arms:
        found |= _arm(config, name, layout, given)
    order = {key: i for i, key in enumerate([*config, *sections])}
    names = {key: key.split(".") for key in found}
    return {
        k: found[k] for k in sorted(found, key=lambda k: (order[names[k][0]], names[k][1:2] * (names[k][0] == "arms")))
    }


def _arm(config: Any, name: str, layout: _Layout, given: Mapping[str, Value]) -> dict[str, Value]:
    own = config.arms[name].to_dict()
    preset = own.get("preset", "star") if layout.presets else ""
    known = {f.name for f in dataclasses.fields(layout.arm)}
    below = config[layout.below].to_dict() if layout.below and layout.below in config else {}
    values = {**below, **layout.presets.get(preset, {}), **{k: v for k, v in own.items() if k in known}}
    found = {}
    for key, value in _parts("", settings_from(layout.arm, values, f"arms.{name}")):
        full, last = f"arms.{name}.{key}", key.partition(".")[0]
        if last in own:
            continue
        source = f"preset {preset}" if last in layout.presets.get(preset, {}) else "default"
        if source == "default" and last in below:
            source = given[f"{layout.below}.{key}"].source
        found[full] = Value(value, source)
    return found


def _parts(name: str, settings: Any) -> list[tuple[str, Any]]:
    """Returns (dotted key, value) of a settings object, whose empty dicts are left out."""
    return [(f"{name}.{key}".strip("."), value) for key, value in vars(settings).items() if value != {}]
