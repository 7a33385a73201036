"""Everything that a config names and that is not there, in one message: models, data files, task options, packages."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from qstar.data.sources import check_source
from qstar.errors import UserError, pip_install
from qstar.models.hf import read_config
from qstar.models.hub import resolve
from qstar.tasks.prompts import make_prompted

# Keys that name a model, and keys that name records.
_MODELS = ("model.path", "teacher.path", "guided.small", "guided.large.path")
_RECORDS = ("task.train", "task.test", "task.data", "data.source", "data.validation")
# Key that needs a package -> its import, and the extra that brings it. (A task names its own when it is made.)
_PACKAGES = {"log.wandb": ("wandb", "log"), "guided.large.url": ("openai", "endpoint")}


def check_present(config: dict[str, Any]) -> None:
    """Raises UserError with all that is missing, if it is more than one thing.

    A single one, and mistakes of other kinds, are left to the method, whose message says more.
    """
    faults = list(dict.fromkeys(_faults(config)))
    if len(faults) > 1:
        listed = "; ".join(f"({i}) {f}" for i, f in enumerate(faults, 1))
        raise UserError(f"{len(faults)} things are missing: {listed}")


def _faults(config: dict[str, Any]) -> Iterator[str]:
    for key in _MODELS:
        revision = _at(config, "model.revision") if key == "model.path" else None
        readable = lambda name, r=revision: read_config(resolve(name, r, weights=False))  # noqa: E731
        yield from _said(key, _at(config, key), readable)
    for key in _RECORDS:
        yield from _said(key, _at(config, key), check_source)
    options = dict(config.get("task") or {})
    # The tasks of LM-Guided CoT are not all tasks of `make_prompted`.
    if config.get("method") != "guided_cot" and isinstance(name := options.pop("name", None), str):
        yield from _said("task", name, functools.partial(make_prompted, options=options))
    for key, (module, extra) in _PACKAGES.items():
        if _at(config, key) and importlib.util.find_spec(module) is None:
            yield f"the package {module}: {pip_install(extra)}"


def _said(key: str, name: Any, look: Callable[[str], Any]) -> Iterator[str]:
    try:
        if isinstance(name, str) and name:
            look(name)
    except UserError as e:
        yield f"config.{key}: {e}"


def _at(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
