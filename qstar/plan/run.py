"""`qstar plan`: all programs of a config on one slice or several, and the search for a layout that fits."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from qstar.mesh import AXES, make_mesh
from qstar.plan import advise, show
from qstar.plan.cases import Assumed, named, programs
from qstar.plan.program import Plan, compile_program
from qstar.plan.topology import Topology, open_topology


@contextlib.contextmanager
def settled(quick: bool = True) -> Iterator[None]:
    """Sets JAX up for compiling what is never run: no cache, and (quick) as little optimisation as the compiler takes, which
    makes temporaries an upper figure: 5.70 instead of 5.60 GiB for a 7B step, in a quarter of the time."""
    wanted = {"jax_enable_compilation_cache": False}
    if quick:
        wanted |= dict.fromkeys(("jax_exec_time_optimization_effort", "jax_memory_fitting_effort"), -1.0)
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def plan(
    config: Any, topology: Topology, assumed: Assumed, only: str = "", say: Any = print, keep: str = ""
) -> list[Plan]:
    """Compiles the programs of a config whose names hold `only` (which some must); tells of each as it is done."""
    out = []
    for program in named(programs(config, topology.devices, assumed), only):
        out.append(compile_program(program, topology, functools.partial(_write, keep, len(out)) if keep else None))
        say("\n".join(show.lines(out[-1], topology)))
    return out


def _write(folder: str, number: int, text: str) -> None:
    Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
    (Path(folder).expanduser() / f"program_{number}.txt").write_text(text, encoding="utf-8")


def mesh_text(config: Any, topology: Topology) -> str:
    """Returns the mesh with all its numbers, e.g. "fsdp=16"."""
    mesh = make_mesh(config.mesh, list(topology.devices))
    return ",".join(f"{a}={mesh.shape[a]}" for a in AXES if mesh.shape[a] > 1) or "data=1"


def main(config: Any, names: Sequence[str], assumed: Assumed, *, only: str = "", hbm: float = 0.0, as_json: bool = False,
         quick: bool = True, rows_per_chip: int = 0, keep: str = "") -> int:  # fmt: skip
    """Plans a config on every slice named. Returns the exit code: 1 if something does not fit.

    Args:
      rows_per_chip: of a (micro-)batch, instead of the config's batch size: for weak scaling over several slices.
      keep: a folder for the compiled texts.
    """
    quiet = lambda _: None  # noqa: E731
    say = quiet if as_json else lambda text: print(text, flush=True)
    found, fits = [], True
    for name in names:
        topology = open_topology(name, hbm)
        mesh = make_mesh(config.mesh, list(topology.devices))
        text, began = mesh_text(config, topology), time.perf_counter()
        if rows_per_chip:
            config.train.batch_size = (
                rows_per_chip * mesh.size // mesh.shape["tensor"] * config.train.get("accumulate", 1)
            )
        chip = topology.chip
        say(f"{config.get('name', 'run')} on {name}: {len(topology.devices)} x {chip.name}, mesh {text}")
        if not topology.real:
            say("    compiled for a CPU: memory and collectives are those of another compiler, a guide only")
        with settled(quick):
            plans = plan(config, topology, assumed, only, say, keep)
        advice = [line for p in plans if not p.fits for line in advise.advice(p, mesh, config)]
        for line in advice:
            say(line)
        fits &= all(p.fits for p in plans)
        say(f"{'fits' if all(p.fits for p in plans) else 'does not fit'}; {time.perf_counter() - began:.0f} s in all\n")
        found.append(show.as_json(plans, topology, text, advice))
    if len(names) > 1:
        say(show.comparison(found))
    if as_json:
        print(json.dumps(found[0] if len(found) == 1 else found))
    return 0 if fits else 1
