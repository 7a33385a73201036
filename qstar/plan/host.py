"""Peak memory of a run in one process on the CPUs of this machine, from its compiled programs, without weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from qstar.errors import UserError, require
from qstar.files import flatten
from qstar.mesh import make_mesh
from qstar.models.hub import resolve
from qstar.plan.cases import BASE, programs
from qstar.plan.program import local_bytes, temporaries
from qstar.plan.steps import NO_ADAPTERS, Assumed, Case, abstract_model

# Resident memory of a process, in bytes: Python, JAX, transformers, orbax, data, and programs that are not planned. Seen:
# 0.97 GiB at the peak of star_gsm8k:smoke, of which 0.13 are arrays and 0.24 the compiler's.
IMPORTS = 620 * 2**20


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program and what is alive while it runs, in bytes."""

    name: str
    parts: dict[str, int]  # arguments, what is kept beside them, activations

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The phases of a run and the memory of the process besides them, in bytes."""

    phases: tuple[Phase, ...]
    process: int  # interpreter, libraries, compiler, executables

    @property
    def peak(self) -> int:
        return self.process + max((p.total for p in self.phases), default=0)


def estimate(config: Any, assumed: Assumed, *, compiled: bool = True) -> Estimate:
    """Returns the estimate of a config; without `compiled` activations are a lower bound, and it takes no seconds.

    Raises UserError: see `cases.programs`.
    """
    device, before = jax.devices()[:1], resident()
    found = []
    for program in programs(config, device, assumed):
        parts = {k: local_bytes(v) for k, v in {**program.parts, **program.resident}.items()}
        # Beside the model that samples or trains there is the one of the loop before; V-STaR also keeps G_SFT.
        loops = config.method == "v_star" or config.get("loop", {}).get("n_iters", 2) > 1
        later = loops or program.name.startswith("sampling")
        if config.method in ("star", "v_star", "rl") and later and program.name != BASE:
            parts["the model before"] = _model_bytes(config, device)
        needed = temporaries(program.lower().compile().memory_analysis()) if compiled else program.least
        found.append(Phase(program.name, {**parts, "activations": needed}))
    # The compiler's own memory is not given back to the system: the run needs as much.
    return Estimate(tuple(found), IMPORTS + (max(0, resident() - before) if compiled else 0))


def _model_bytes(config: Any, device: Any) -> int:
    case = Case(config, make_mesh(config.mesh, list(device)), Assumed())
    return local_bytes(abstract_model(case, case.section("model")).params)


def resident() -> int:
    """Returns the resident memory of this process in bytes, 0 where the system does not say."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def machine() -> int:
    """Returns the memory that a process may have, in bytes: the machine's, or less in a container."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(limit).read_text()))
    return found


# ---------------------------------------------------------------------------------------------------------- refusal

# Changes that lower the memory, as functions of the config; each is tried alone, then with those before it.
_CHANGES: tuple[Callable[[Any], dict[str, Any]], ...] = (
    lambda c: {"model.dtype": "bfloat16"},
    lambda c: {"train.accumulate": c.get("train", {}).get("batch_size", 1)},
    lambda c: {} if c.method in NO_ADAPTERS else {"train.lora_rank": 16},
    lambda c: {"sample.slots": 16},
    lambda c: {"train.batch_size": 1, "train.accumulate": 1},
)


def check_memory(config: Any) -> None:
    """Raises UserError, with what would fit, if the estimate of a run exceeds the memory of this machine.

    Small models are not looked at, and a run that by arithmetic takes less than a quarter of the memory is not compiled.
    Nothing is checked on accelerators, whose allocators report it, with several processes, and for configs that
    `qstar plan` does not take.
    """
    if jax.default_backend() != "cpu" or jax.process_count() > 1 or stored(config) < machine() / 200:
        return
    # A lower bound: short prompts, no prefix.
    assumed, line = Assumed(prompt=16), ""
    # The plan assumes a config without mistakes; its method reports them.
    with contextlib.suppress(UserError, AttributeError, KeyError, TypeError, ValueError):
        low, limit = estimate(config, assumed, compiled=False), machine()
        if low.peak < limit / 4:
            return
        found = low if low.peak > limit else estimate(config, assumed)
        line = refusal(config, assumed, found, found.peak - low.peak, limit) if found.peak > limit else ""
    require((not line, line))


def stored(config: Any) -> float:
    """Returns the bytes of the weights that a config names; infinity for a model whose weights are not here yet."""
    guided = config.get("guided", {})
    names = (config.get("model", {}).get("path"), guided.get("small"), (guided.get("large") or {}).get("path"))
    total = 0.0
    for name in names:
        # A model that is missing is reported by the method; the generated world's models are sections of sizes.
        if not isinstance(name, str) or not name:
            continue
        with contextlib.suppress(UserError):
            folder = resolve(name, weights=False)
            sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
            total += sum(sizes) if sizes or not folder.is_dir() else math.inf
    return total


def refusal(config: Any, assumed: Assumed, found: Estimate, activations: int, limit: int) -> str:
    """Returns the line on an estimate above `limit`: the largest phase, its parts, and changes that would fit."""
    phase = max(found.phases, key=lambda p: p.total)
    parts = sorted(phase.parts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {n / 1e9:.1f} GB" for name, n in parts[:3])
    need = f"needs about {found.peak / 1e9:.1f} GB, and this machine has {limit / 1e9:.1f} GB"
    fits = changes_that_fit(config, assumed, activations, limit)
    advice = "take a smaller model, or a machine with more memory"
    advice = f"it would fit with {'; or with '.join(fits)}" if fits else advice
    return f"memory: the run {need} ({phase.name}: {shown}); {advice}; --memory=ignore starts it all the same"


def changes_that_fit(config: Any, assumed: Assumed, activations: int, limit: int) -> list[str]:
    """Returns changes of the config, as flags, with which the estimate is below `limit`, the smallest ones first.

    `activations`: bytes of the unchanged config that arithmetic does not count; they shrink with the rows at a time.
    """
    fits: list[str] = []
    together: dict[str, Any] = {}
    given = flatten(config.to_dict())
    for change in _CHANGES:
        values = {k: v for k, v in change(config).items() if given.get(k) != v}
        for tried in (values, {**together, **values}):
            need = _with(config, assumed, tried, activations) if values else None
            if need is not None and need < limit:
                flags = " ".join(f"--config.{key}={value}" for key, value in tried.items())
                fits.append(f"{flags} ({need / 1e9:.1f} GB)")
                break
        together |= values
    return fits[:3]


def _with(config: Any, assumed: Assumed, changes: dict[str, Any], activations: int) -> int | None:
    changed = config.copy_and_resolve_references().unlock()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if section not in config:
            return None
        with changed[section].ignore_type():
            changed[section][name] = value

    def rows(c: Any) -> float:
        train = c.get("train", {})
        return train.get("batch_size", 1) / train.get("accumulate", 1)

    try:
        return estimate(changed, assumed, compiled=False).peak + int(activations * rows(changed) / rows(config))
    except UserError:  # not of this method or model
        return None
