"""A program of a run with abstract arguments, and its plan: what the compiled program needs of each chip."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from qstar.plan import hlo
from qstar.plan.repeated import repeated
from qstar.plan.topology import GIB, Topology


@dataclasses.dataclass(frozen=True)
class Program:
    """A program before it is compiled."""

    name: str
    lower: Callable[[], Any]  # -> jax.stages.Lowered
    parts: dict[str, Any]  # name -> abstract arguments with their shardings: parameters, optimiser, cache, batch
    resident: dict[str, Any]  # name -> abstract arrays that are alive beside it
    flops: float  # that the mathematics needs, on all chips together
    rule: str  # how they were counted
    steps: int = 1  # of a loop that ends on data
    tokens: int = 0  # in the rows that one run trains on, or that it samples; on all chips
    rollouts: int = 0  # that one run starts or samples
    least: int = 0  # lower bound of its temporaries, bytes per chip: for a search, before anything is compiled


@dataclasses.dataclass
class Plan:
    """Needs of one program per chip: bytes, FLOPs, seconds."""

    name: str
    fits: bool
    parts: dict[str, int]
    resident: dict[str, int]
    activations: int  # temporaries of the program; as far as known where it does not fit
    peak: int  # all of these together
    hbm: int
    flops: float = 0.0  # executed
    needed: float = 0.0  # that the mathematics needs
    tokens: int = 0  # these two: see `Program`
    rollouts: int = 0
    traffic: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    mfu: float = 0.0
    compile_seconds: float = 0.0  # wall time
    compile_cpu_seconds: float = 0.0  # of all threads
    compiled: bool = False
    rule: str = ""
    notes: tuple[str, ...] = ()  # of products that chips compute more than once

    @property
    def seconds(self) -> float:
        """Lower bound of the time of one run."""
        return max(self.times.values(), default=0.0)


def local_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of abstract arrays on one device."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if isinstance(x.sharding, NamedSharding) else x.shape
        # An upper bound: a key of `rbg` has 16 bytes, one of threefry2x32 has 8.
        size = 16 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        total += math.prod(shape) * size
    return total


def temporaries(memory: Any) -> int:
    """Returns the bytes that a compiled program needs beside its arguments; `memory`: its `memory_analysis()`."""
    # Donated arguments become results in place; the other results need memory of their own.
    return memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)


def compile_program(program: Program, topology: Topology, keep: Callable[[str], Any] | None = None) -> Plan:
    """Compiles a program for a slice and reads the result; `keep` is called with the compiled text."""
    parts = {k: local_bytes(v) for k, v in program.parts.items()}
    resident = {k: local_bytes(v) for k, v in program.resident.items()}
    arguments, kept_bytes, hbm = sum(parts.values()), sum(resident.values()), int(topology.chip.hbm)
    plan = Plan(program.name, False, parts, resident, 0, arguments + kept_bytes, hbm, rule=program.rule)
    plan.needed = program.flops / len(topology.devices)
    plan.tokens, plan.rollouts = program.tokens, program.rollouts
    # Compilation is slow, and activations could only add to the arguments.
    if plan.peak > hbm:
        return plan
    # The CPU time of all threads, too: wall time depends on what else the machine does.
    began, worked = time.perf_counter(), time.process_time()
    compiled, message = None, ""
    try:
        lowered = program.lower()
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        # A TPU compiler refuses a program that needs more than the memory; that is an answer, not an error.
        message = str(e)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
    plan.compile_seconds, plan.compile_cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    if compiled is None:
        plan.activations = max(_exhausted(message) - arguments, hbm - arguments)
        plan.peak = arguments + kept_bytes + plan.activations
        return plan
    plan.compiled = True
    memory = compiled.memory_analysis()
    plan.activations = temporaries(memory)
    plan.peak = memory.argument_size_in_bytes + kept_bytes + plan.activations
    plan.fits = plan.peak <= hbm
    text = compiled.as_text()
    if keep is not None:
        keep(text)
    costs, chip = hlo.Program(text, program.steps).costs(), topology.chip
    source = lowered.as_text(dialect="hlo", debug_info=True)
    plan.notes += repeated(source, costs, len(topology.devices), program.steps)
    plan.flops, plan.traffic = costs.flops, costs.bytes
    plan.collectives = {k: {"count": c.count, "bytes": c.bytes} for k, c in sorted(costs.collectives.items())}
    sent = sum(c.bytes for c in costs.collectives.values())
    flops, traffic, links = costs.flops / chip.flops, costs.bytes / chip.bandwidth, sent / chip.links
    # The largest of the three is a lower bound of the time: it holds if the other two overlap with it entirely.
    plan.times = {"compute": flops, "memory": traffic, "links": links}
    plan.mfu = plan.needed / chip.flops / plan.seconds if plan.seconds else 0.0
    return plan


def _exhausted(message: str) -> int:
    # A TPU compiler's message: `Used 28.05G of 15.75G hbm`.
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    return int(float(found[1]) * scale[found[2]]) if found else 0
