"""The cheapest layout of a config that fits on a slice: mesh, rematerialisation and micro-batches are varied.

Layouts are ordered by what they are known to cost, and compiled in this order until one fits: rows that do not divide over
the chips (each chip then computes all of them) are worst, then tensor parallelism (it exchanges activations in every layer),
then recomputation, then more micro-batches (parameters are gathered once for each). What cannot fit by arithmetic alone is
not compiled: arguments, what the run keeps beside them, gradients, and what the forward pass keeps of plain rows.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qstar.plan import show
from qstar.plan.cases import Assumed, named, programs
from qstar.plan.program import Plan, compile_program, local_bytes
from qstar.plan.run import settled
from qstar.plan.topology import Topology, open_topology


class Layout(NamedTuple):
    """One way to run a config."""

    mesh: str
    remat: str
    accumulate: int

    def apply(self, config: Any) -> Any:
        """Returns a copy of the config with it."""
        c = config.copy_and_resolve_references().unlock()
        c.mesh = self.mesh
        if "model" in c and self.remat:
            c.model.remat = self.remat
        c.train.accumulate = self.accumulate
        return c

    @property
    def flags(self) -> str:
        """How to say so on the command line."""
        remat = f" --config.model.remat={self.remat}" if self.remat else ""
        return f"--config.mesh={self.mesh}{remat} --config.train.accumulate={self.accumulate}"


def layouts(config: Any, chips: int) -> list[Layout]:
    """Returns the layouts of a config on so many chips, the cheapest first."""
    rows = config.train.get("batch_size", 1)
    remats = ("none", "block") if config.get("model") and "remat" in config.model else ("",)
    powers = [2**i for i in range(int(math.log2(chips)) + 1)]
    out = []
    for tensor in (t for t in powers if chips % t == 0 and t <= 16):
        for fsdp in (f for f in powers if chips // tensor % f == 0):
            data = chips // tensor // fsdp
            for remat in remats:
                for accumulate in (a for a in (1, 2, 4, 8, 16) if rows % a == 0):
                    wasted = rows // accumulate % (data * fsdp) != 0
                    cost = (wasted, tensor, remat == "block", accumulate, fsdp)
                    out.append((cost, Layout(f"data={data},fsdp={fsdp},tensor={tensor}", remat, accumulate)))
    return [layout for _, layout in sorted(out, key=lambda pair: pair[0])]


def tried(config: Any, topology: Topology, assumed: Assumed, only: str) -> Iterator[tuple[Layout, list[Plan]]]:
    """Yields every layout up to the first that fits: without plans where arithmetic rules it out, else with its programs up
    to the first that does not fit. Where it fits without rematerialisation, it follows with: reading what was kept may take
    longer than computing it again, and only compiled programs tell."""
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
            waiting = [layout._replace(remat="block")] if layout.remat == "none" else []


def same_but_larger(layout: Layout, other: Layout) -> bool:
    """Whether a layout keeps at least as many activations as another one, on the same mesh."""
    order = ("", "block", "none")
    more = order.index(layout.remat) >= order.index(other.remat)
    return layout.mesh == other.mesh and more and layout.accumulate <= other.accumulate


def main(config: Any, names: Sequence[str], assumed: Assumed, *, only: str = "", hbm: float = 0.0, as_json: bool = False,
         quick: bool = True, **_: Any) -> int:  # fmt: skip
    """Searches on every slice named. Returns the exit code: 1 where nothing fits.

    Raises:
      UserError: no program's name holds `only`.
    """
    say = (lambda _: None) if as_json else functools.partial(print, flush=True)
    fits, out = True, []
    for name in names:
        topology = open_topology(name, hbm)
        best, ruled_out, began = None, 0, time.perf_counter()
        with settled(quick):
            named(programs(config, topology.devices, assumed), only)
            for layout, plans in tried(config, topology, assumed, only):
                if not plans:
                    ruled_out += 1
                    continue
                worst = max(plans, key=lambda p: p.peak)
                good, took = all(p.fits for p in plans), sum(p.seconds for p in plans)
                if good and (best is None or took < sum(p.seconds for p in best[1])):
                    best = layout, plans
                verdict = f"fits, at best {show.seconds(took)}" if good else f"{worst.name} does not fit"
                say(f"{layout.flags}: {verdict}, {show.size(worst.peak)} of {show.size(worst.hbm)} per chip")
        fits &= best is not None
        say(f"{ruled_out} layouts were ruled out by arithmetic; {time.perf_counter() - began:.0f} s in all")
        if best is None:
            say(f"{name}: no layout fits; take a larger slice, or LoRA (train.lora_rank=16)\n")
            continue
        say("\n".join(line for p in best[1] for line in show.lines(p, topology)))
        say(f"{name}: {best[0].flags}\n")
        out.append(show.as_json(best[1], topology, best[0].mesh, [best[0].flags]))
    if as_json:
        print(json.dumps(out))
    return 0 if fits else 1
