"""`qstar plan`: compiles all programs of a config for each slice named, prints what they need and what would help."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qstar.errors import UserError
from qstar.mesh import AXES, make_mesh
from qstar.plan import totals
from qstar.plan.cases import named, programs
from qstar.plan.program import Plan, compile_program
from qstar.plan.steps import NO_ADAPTERS, Assumed
from qstar.plan.topology import CHIPS, Topology, open_topology


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of `qstar plan`."""

    only: str = ""  # part of the names of the programs
    hbm: float = 0.0  # GiB per chip, instead of the chip's
    as_json: bool = False
    quick: bool = True  # compile with little optimisation
    rows_per_chip: int = 0  # of a (micro-)batch, instead of the config's batch size: weak scaling over several slices
    keep: Path | None = None  # folder for the compiled texts

    def say(self, text: str) -> None:
        """Prints a line, unless the output is JSON."""
        if not self.as_json:
            print(text, flush=True)


def main(config: Any, names: Sequence[str], assumed: Assumed, options: Options) -> int:
    """Plans a config on every slice named. Returns the exit code: 1 if a program does not fit."""
    found, say = [], options.say
    if options.keep is not None:
        make_folder(options.keep)
    # All are opened first: what is wrong with the last is found before the first is compiled for.
    for topology in [open_topology(name, options.hbm) for name in names]:
        name = topology.name
        mesh = make_mesh(config.mesh, list(topology.devices))
        text = ",".join(f"{a}={mesh.shape[a]}" for a in AXES if mesh.shape[a] > 1) or "data=1"
        began = time.perf_counter()
        if options.rows_per_chip:
            # The chips of a tensor axis share their rows.
            rows = options.rows_per_chip * mesh.size // mesh.shape["tensor"]
            config.train.batch_size = rows * config.train.get("accumulate", 1)
        say(f"{config.get('name', 'run')} on {name}: {len(topology.devices)} x {topology.chip.name}, mesh {text}")
        if not topology.real:
            what = "no compiler for it is here, so programs are" if topology.chip != CHIPS["cpu"] else "programs are"
            say(f"    {what} compiled for a CPU: memory and collectives are those of another compiler, a guide only")
        plans = []
        with compile_settings(options.quick):
            for i, program in enumerate(named(programs(config, topology.devices, assumed), options.only)):
                file = f"{name.replace(':', '_')}_program_{i}.txt"
                keep = functools.partial((options.keep / file).write_text, encoding="utf-8") if options.keep else None
                plans.append(compile_program(program, topology, keep))
                say("\n".join(lines(plans[-1])))
        cost = totals.lines(plans, config, assumed, topology)
        help_ = [line for p in plans if not p.fits for line in advice(p, mesh, config)]
        fits = all(p.fits for p in plans)
        verdict = f"{'fits' if fits else 'does not fit'}; {time.perf_counter() - began:.0f} s in all\n"
        say("\n".join([*cost, *help_, verdict]))
        found.append(as_json(plans, topology, text, help_) | {"cost": cost})
    if len(names) > 1:
        say(comparison(found))
    if options.as_json:
        print(json.dumps(found[0] if len(found) == 1 else found))
    return 0 if all(plan["fits"] for plan in found) else 1


@contextlib.contextmanager
def compile_settings(quick: bool = True) -> Iterator[None]:
    """Configures JAX to compile what never runs: no cache and, if `quick`, as little optimisation as possible."""
    # Little optimisation makes temporaries an upper bound: 5.70 instead of 5.60 GiB for a 7B step, in a quarter of the
    # time.
    wanted: dict[str, Any] = {"jax_enable_compilation_cache": False}
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


def make_folder(folder: Path) -> None:
    """Makes the folder of the compiled texts; raises UserError, before a compilation is paid for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--hlo={folder}: cannot be made ({e.strerror}); name another folder") from None


# ---------------------------------------------------------------------------------------------------------- output


def size(n: float) -> str:
    """Returns bytes with a unit of 10^3, 10^6 ...: 1.5 GB, as chips are sold and papers count."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} B"


def seconds(t: float) -> str:
    """Returns a time in s or ms."""
    return f"{t:.3g} s" if t >= 1 else f"{1e3 * t:.3g} ms"


def lines(plan: Plan) -> list[str]:
    """Returns the description of one program."""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    rows = {**plan.parts, "activations" if plan.compiled else "activations, at least": plan.activations}
    out = [f"{plan.name}: {verdict}, {size(plan.peak)} of {size(plan.hbm)} per chip", f"    {_sizes(rows)}"]
    if any(plan.resident.values()):
        out.append(f"    kept beside it: {_sizes(plan.resident)}")
    if plan.compiled:
        sent = [f"{k} {size(c['bytes'])} in {c['count']:.0f}" for k, c in plan.collectives.items() if c["bytes"]]
        rate = f" · at most {plan.tokens / plan.seconds:,.0f} tokens per second" if plan.tokens and plan.seconds else ""
        which = max(plan.times, key=lambda k: plan.times[k])
        each = ", ".join(f"{k} {seconds(t)}" for k, t in plan.times.items())
        out += [
            f"    collectives: {' · '.join(sent) or 'none'}",
            f"    {plan.flops:.3g} FLOPs, {plan.needed:.3g} needed ({plan.rule}) · memory traffic {size(plan.traffic)}",
            f"    at best {seconds(plan.seconds)} ({which}; {each}) · MFU at most {100 * plan.mfu:.0f}%{rate}",
            f"    compiled in {plan.compile_seconds:.0f} s, {plan.compile_cpu_seconds:.0f} of a CPU",
        ]
    return out + [f"    note: {note}" for note in plan.notes]


def _sizes(rows: dict[str, int]) -> str:
    return " · ".join(f"{name} {size(n)}" for name, n in rows.items() if n)


def as_json(plans: list[Plan], topology: Topology, mesh: str, advice: list[str]) -> dict[str, Any]:
    """Returns everything as plain values; sizes in bytes, per chip."""
    return {
        "topology": topology.name,
        "chips": len(topology.devices) // topology.chip.devices,
        "chip": dataclasses.asdict(topology.chip),
        "mesh": mesh,
        "fits": all(p.fits for p in plans),
        "programs": [dataclasses.asdict(p) | {"seconds_at_best": p.seconds} for p in plans],
        "advice": advice,
    }


def comparison(found: list[dict[str, Any]]) -> str:
    """Returns a table with a line per program and slice, which shows how it scales."""
    rows = [("slice", "chips", "program", "per chip", "activations", "collectives", "at best", "MFU")]
    for plan in found:
        for p in plan["programs"]:
            sizes = [size(n) for n in (p["peak"], p["activations"], sum(c["bytes"] for c in p["collectives"].values()))]
            speed = (seconds(p["seconds_at_best"]), f"{100 * p['mfu']:.0f}%")
            rows.append((plan["topology"], str(plan["chips"]), p["name"], *sizes, *speed))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows)


# ---------------------------------------------------------------------------------------------------------- advice


def advice(plan: Plan, mesh: Mesh, config: Any) -> list[str]:
    """Returns lines on a program that does not fit: its largest part, and what would help by arithmetic alone."""
    # No compilation: it could take minutes for each suggestion. `qstar plan --search` compiles them.
    parts = {**plan.parts, **plan.resident, "activations": plan.activations}
    name = max(parts, key=lambda k: parts[k])
    title = {"optimiser": "optimiser state", "cache": "KV cache"}.get(name, name)
    over, train = plan.peak - plan.hbm, config.get("train", {})
    out = [f"{plan.name}: {title} {size(parts[name])} of {size(plan.hbm)} per chip, {size(over)} too much in all"]
    chips, tensor = mesh.size, mesh.shape["tensor"]
    split = mesh.shape["fsdp"] * tensor
    sharded = sum(plan.parts.get(k, 0) for k in ("parameters", "optimiser")) + sum(plan.resident.values())
    # What fsdp does not split further: activations, cache and batch.
    rest = plan.peak - sharded
    if split < chips:
        left = sharded * split // chips + rest
        known = "" if plan.activations else ", before activations"
        verdict = f"fits{known}" if left <= plan.hbm else f"still {size(left - plan.hbm)} too much"
        out.append(f"fsdp={chips // tensor} would hold {size(left)} per chip ({verdict})")
    if plan.hbm > rest and sharded > 0:
        need = 2 ** math.ceil(math.log2(max(1, sharded * split / (plan.hbm - rest))))
        what = f"{need} of these chips with fsdp={need} would hold parameters and optimiser beside what else there is"
        out += [what] if need > chips else []
    updates = bool(plan.parts.get("optimiser"))
    if updates and not train.get("lora_rank") and config.get("method") not in NO_ADAPTERS:
        out.append("train.lora_rank=16 would leave next to no optimiser state and float32 masters")
    if updates and plan.activations > plan.hbm // 4:
        if config.get("model", {}).get("remat", "none") != "block":
            out.append("model.remat=block would keep the blocks' inputs alone")
        batch = train.get("batch_size", 1)
        if batch // train.get("accumulate", 1) > chips // tensor:
            most = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= chips // tensor)
            out.append(f"train.accumulate={most} would run one row per chip at a time")
        out.append(f"tensor={2 * tensor} would split the activations of heads and MLP once more")
    if plan.name.startswith("sampling") and plan.activations + plan.parts.get("cache", 0) > plan.hbm // 4:
        fewer = "fewer rows side by side (sample.slots, of guided_cot's large model guided.large.slots)"
        out.append(f"{fewer} take less of both")
    return out
