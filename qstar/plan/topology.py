"""Slices to compile for without having them: chips and devices.

TPU slices are described to the TPU compiler of the package `libtpu`, which runs on any machine. `gpu` is the GPUs of this
machine. `h100:N`, `h200:N` and `cpu:N` are N simulated CPU devices with the chip's memory as the limit and its rates in the
bounds; temporaries and collectives are those of XLA's CPU compiler, a guide. `gpu:N` is `h100:N`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import jax

from qstar.distributed import SIMULATED, set_tpu_options
from qstar.errors import UserError, pip_install, require
from qstar.plan.slices import SHAPES, Slice, read_slice
from qstar.train.flops import PEAKS, peak

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip, by its maker's tables; bytes and seconds."""

    name: str
    hbm: float  # bytes that a program can use
    flops: float  # bfloat16, per second
    bandwidth: float  # of main memory
    links: float  # bytes per second that leave a chip over all its links at once, one way
    devices: int = 1  # of JAX per chip, which share its figures: those here are of one device


# hbm is what a program can use, not what is sold: a v5e has 16 GiB, of which the TPU compiler grants 15.75.
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, PEAKS["TPU v4"], 1.228e12, 2.7e11),
    "v5e": Chip("TPU v5e", 15.75 * GIB, PEAKS["TPU v5e"], 0.819e12, 1.8e11),
    "v5p": Chip("TPU v5p", 95.74 * GIB, PEAKS["TPU v5"], 2.765e12, 5.4e11),
    "v6e": Chip("TPU v6e", 31.25 * GIB, PEAKS["TPU v6"], 1.640e12, 3.6e11),
    # Two chiplets, each a device: 192 GiB, 7.37 TB/s and 2.307e15 FLOP/s a chip.
    "tpu7x": Chip("half a TPU7x", 94.75 * GIB, PEAKS["TPU7x"], 3.685e12, 2.7e11, devices=2),
    "h100": Chip("H100 80GB", 79.0 * GIB, PEAKS["H100"], 3.35e12, 4.5e11),
    "h200": Chip("H200 141GB", 139.0 * GIB, PEAKS["H200"], 4.8e12, 4.5e11),
    "cpu": Chip("simulated device", 4.0 * GIB, 1e11, 2e10, 1e10),
}
CHIPS["gpu"] = CHIPS["h100"]


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its name, its chip and as many devices to compile for."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    real: bool  # whether the compiler is that of the chip


def open_topology(name: str, hbm: float = 0.0) -> Topology:
    """Returns a slice to compile for, with `hbm` GiB per chip instead of the table's.

    Raises:
      UserError: an unknown slice, one that the compiler does not know, or no compiler for it.
    """
    asked = read_slice(name)
    if name == "gpu":
        found = jax.devices("gpu")
        chip, count = _chip_of(found[0]), len(found)
    else:
        chip = CHIPS[asked.kind]
        found = _tpu_devices(asked) if asked.kind in SHAPES else jax.devices("cpu")
        count = asked.chips * chip.devices
    if asked.simulated:
        more = f"set XLA_FLAGS={SIMULATED}={count}"
        require((len(found) >= count, f"--topology={name}: {len(found)} devices are there; {more}"))
    chip = dataclasses.replace(chip, hbm=hbm * GIB) if hbm else chip
    return Topology(name, chip, tuple(found[:count]), not asked.simulated)


def _chip_of(device: Any) -> Chip:
    """Returns the chip of a GPU of this machine; one whose rates are not in the table gets an H100's, and says so."""
    kind, stats = device.device_kind, device.memory_stats() or {}
    table = next((CHIPS[name] for name in ("h200", "h100") if name.upper() in kind), None)
    rates, name = table or CHIPS["h100"], kind if table else f"{kind} (at an H100's rates)"
    # The allocator's limit: by default three quarters of the memory are JAX's.
    hbm, flops = stats.get("bytes_limit", rates.hbm), peak(kind) or rates.flops
    return dataclasses.replace(rates, name=name, hbm=hbm, flops=flops)


def _tpu_devices(asked: Slice) -> Any:
    name = asked.name
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name}: needs the TPU compiler; {pip_install('plan')}")
    # There is no metadata server here; the other two only silence warnings.
    known = {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-4", "WORKER_HOSTNAMES": "localhost"}
    for key, value in known.items():
        os.environ.setdefault(f"TPU_{key}", value)
    set_tpu_options()
    from jax.experimental import topologies

    # By default a topology consists of whole hosts, which have several chips.
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if asked.chips == 1 else {}
    if asked.kind == "v4":
        # As JAX sees it on a v4: one device per chip. Without it libtpu describes the chip's two cores, half of it each.
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as e:  # noqa: BLE001  libtpu raises anything, also for a lock that another process holds
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        if "lockfile" in reason:
            raise UserError(f"--topology={name}: another process holds the TPU compiler; wait until it ends") from None
        raise UserError(f"--topology={name}: the TPU compiler does not take it ({reason})") from None
