"""Search for the cheapest layout of a config that fits on a slice: mesh, rematerialisation and micro-batches.

Layouts are ordered by their known cost and compiled in this order until one fits. What cannot fit by arithmetic alone
is not compiled: arguments, what the run keeps beside them, gradients, and what the forward pass keeps of plain rows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qstar.plan.cases import named, programs
from qstar.plan.program import Plan, compile_program, local_bytes
from qstar.plan.run import Options, as_json, compile_settings, lines, seconds, size
from qstar.plan.steps import NO_ADAPTERS, Assumed
from qstar.plan.topology import Topology, open_topology


class Layout(NamedTuple):
    """A mesh, rematerialisation and number of micro-batches."""

    mesh: str
    remat: str
    accumulate: int

    def apply(self, config: Any) -> Any:
        """Returns a copy of the config with this layout."""
        c = config.copy_and_resolve_references().unlock()
        c.mesh = self.mesh
        if "model" in c and self.remat:
            c.model.remat = self.remat
        c.train.accumulate = self.accumulate
        return c

    @property
    def flags(self) -> str:
        """The layout as flags."""
        remat = f" --config.model.remat={self.remat}" if self.remat else ""
        return f"--config.mesh={self.mesh}{remat} --config.train.accumulate={self.accumulate}"


def layouts(config: Any, chips: int) -> list[Layout]:
    """Returns the layouts of a config on a number of chips, the cheapest first."""
    rows = config.train.get("batch_size", 1)
    remats = ("none", "block") if config.get("model") and "remat" in config.model else ("",)
    powers = [2**i for i in range(int(math.log2(chips)) + 1)]
    out = []
    for tensor in (t for t in powers if chips % t == 0 and t <= 16):
        for fsdp in (f for f in powers if chips // tensor % f == 0):
            data = chips // tensor // fsdp
            for remat in remats:
                for accumulate in (a for a in (1, 2, 4, 8, 16) if rows % a == 0):
                    # Worst are rows that do not divide over the chips (each then computes all of them), then tensor
                    # parallelism (it exchanges activations in every layer), then recomputation, then more
                    # micro-batches (parameters are gathered once for each).
                    wasted = rows // accumulate % (data * fsdp) != 0
                    cost = (wasted, tensor, remat == "block", accumulate, fsdp)
                    out.append((cost, Layout(f"data={data},fsdp={fsdp},tensor={tensor}", remat, accumulate)))
    return [layout for _, layout in sorted(out, key=lambda pair: pair[0])]


def tried(config: Any, topology: Topology, assumed: Assumed, only: str) -> Iterator[tuple[Layout, list[Plan]]]:
    """Yields layouts up to the first that fits, with the plans of their programs; [] where arithmetic rules one out."""
    too_large: list[Layout] = []
    waiting = layouts(config, len(topology.devices))
    while waiting:
        layout = waiting.pop(0)
        if any(same_but_larger(layout, other) for other in too_large):
            yield layout, []
            continue
        plans = []
        found = [p for p in programs(layout.apply(config), topology.devices, assumed) if only in p.name]
        if any(local_bytes({**p.parts, **p.resident}) + p.least > topology.chip.hbm for p in found):
            yield layout, []
            continue
        for program in found:
            plans.append(compile_program(program, topology))
            if not plans[-1].fits:
                too_large.append(layout)
                break
        yield layout, plans
        if all(p.fits for p in plans):
            # Reading what was kept may take longer than computing it again; only compiled programs show it.
            waiting = [layout._replace(remat="block")] if layout.remat == "none" else []


def same_but_larger(layout: Layout, other: Layout) -> bool:
    """Returns whether a layout keeps at least as many activations as another one, on the same mesh."""
    order = ("", "block", "none")
    more = order.index(layout.remat) >= order.index(other.remat)
    return layout.mesh == other.mesh and more and layout.accumulate <= other.accumulate


def main(config: Any, names: Sequence[str], assumed: Assumed, options: Options) -> int:
    """Searches on every slice named. Returns the exit code: 1 where nothing fits."""
    say, out = options.say, []
    for topology in [open_topology(name, options.hbm) for name in names]:
        name, began = topology.name, time.perf_counter()
        best: tuple[Layout, list[Plan]] | None = None
        ruled_out = 0
        with compile_settings(options.quick):
            # Only for its UserError: with an `only` that matches nothing, every layout would count as ruled out.
            named(programs(config, topology.devices, assumed), options.only)
            for layout, plans in tried(config, topology, assumed, options.only):
                if not plans:
                    ruled_out += 1
                    continue
                worst = max(plans, key=lambda p: p.peak)
                good, took = all(p.fits for p in plans), sum(p.seconds for p in plans)
                if good and (best is None or took < sum(p.seconds for p in best[1])):
                    best = layout, plans
                verdict = f"fits, at best {seconds(took)}" if good else f"{worst.name} does not fit"
                say(f"{layout.flags}: {verdict}, {size(worst.peak)} of {size(worst.hbm)} per chip")
        say(f"{ruled_out} layouts were ruled out by arithmetic; {time.perf_counter() - began:.0f} s in all")
        if best is None:
            lora = "" if config.method in NO_ADAPTERS else ", or LoRA (train.lora_rank=16)"
            advice = [f"no layout fits; take a larger slice{lora}"]
            say(f"{name}: {advice[0]}\n")
            out.append(as_json([], topology, "", advice) | {"fits": False})
            continue
        say("\n".join(line for p in best[1] for line in lines(p)))
        say(f"{name}: {best[0].flags}\n")
        out.append(as_json(best[1], topology, best[0].mesh, [best[0].flags]))
    if options.as_json:
        print(json.dumps(out[0] if len(out) == 1 else out))
    return 0 if all(found["fits"] for found in out) else 1
