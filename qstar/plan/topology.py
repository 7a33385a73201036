"""Slices to compile for without having them: chips and devices.

TPU slices are described to the TPU compiler of the package `libtpu`, which runs on any machine. `gpu` is the GPUs of this
machine. `h100:N`, `h200:N` and `cpu:N` are N simulated CPU devices with the chip's memory as the limit and its rates in the
bounds; temporaries and collectives are those of XLA's CPU compiler, a guide. `gpu:N` is `h100:N`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from qstar.errors import UserError, pip_install, require
from qstar.train.flops import PEAKS

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
    "v4": Chip("TPU v4", 32 * GIB, PEAKS["TPU v4"], 1.228e12, 2.7e11),
    "v5e": Chip("TPU v5e", 15.75 * GIB, PEAKS["TPU v5e"], 0.819e12, 1.8e11),
    "v5p": Chip("TPU v5p", 95.0 * GIB, PEAKS["TPU v5"], 2.765e12, 5.4e11),
    "v6e": Chip("TPU v6e", 31.25 * GIB, PEAKS["TPU v6"], 1.640e12, 3.6e11),
    # Two chiplets, each a device: 192 GB, 7.37 TB/s and 2.307e15 FLOP/s a chip. The compiler's grant is not known.
    "tpu7x": Chip("half a TPU7x", 89.0 * GIB, PEAKS["TPU7x"], 3.685e12, 2.7e11, devices=2),
    "h100": Chip("H100 80GB", 79.0 * GIB, PEAKS["H100"], 3.35e12, 4.5e11),
    "h200": Chip("H200 141GB", 139.0 * GIB, PEAKS["H200"], 4.8e12, 4.5e11),
    "cpu": Chip("simulated device", 4.0 * GIB, 1e11, 2e10, 1e10),
}
CHIPS["gpu"] = CHIPS["h100"]
SIMULATED = ("gpu", "h100", "h200", "cpu")  # NAME:COUNT
_SHAPES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # axes of a slice


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its name, its chip and as many devices to compile for."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    real: bool  # whether the compiler is that of the chip


def _read(name: str) -> tuple[str, int, str]:
    kind, _, shape = name.partition(":")
    if kind in SIMULATED and re.fullmatch(r"[1-9]\d{0,3}|", shape):
        return kind, int(shape or 8), shape
    if kind in _SHAPES and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) and shape.count("x") == _SHAPES[kind] - 1:
        return kind, math.prod(map(int, shape.split("x"))), shape
    forms = "v5e:4x4, v6e:2x4, v5p:2x2x2, v4:2x2x1, tpu7x:2x2x1, h100:8, h200:8 or cpu:8"
    raise UserError(f"--topology={name}: not a slice that is known here; give one like {forms}")


def open_topology(name: str, hbm: float = 0.0) -> Topology:
    """Returns a slice to compile for, with `hbm` GiB per chip instead of the table's.

    Raises:
      UserError: an unknown slice, one that the compiler does not know, or no compiler for it.
    """
    kind, count, shape = _read(name)
    chip = dataclasses.replace(CHIPS[kind], hbm=hbm * GIB) if hbm else CHIPS[kind]
    if kind in _SHAPES:
        return Topology(name, chip, _tpu_devices(name, count * chip.devices, shape), True)
    if name == "gpu":
        return Topology(name, chip, tuple(jax.devices("gpu")), True)
    found = jax.devices("cpu")
    more = f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
    require((len(found) >= count, f"--topology={name}: {len(found)} devices are there; {more}"))
    return Topology(name, chip, tuple(found[:count]), False)


def _tpu_devices(name: str, count: int, shape: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name}: needs the TPU compiler; {pip_install('plan')}")
    # There is no metadata server here; the other two only silence warnings.
    known = {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-4", "WORKER_HOSTNAMES": "localhost"}
    for key, value in known.items():
        os.environ.setdefault(f"TPU_{key}", value)
    from jax.experimental import topologies

    # By default a topology consists of whole hosts, which have several chips.
    options = {"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as e:  # noqa: BLE001  libtpu raises anything, also for a lock that another process holds
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        if "lockfile" in reason:
            raise UserError(f"--topology={name}: another process holds the TPU compiler; wait until it ends") from None
        raise UserError(f"--topology={name}: the TPU compiler does not take it ({reason})") from None
    return tuple(found[:count])
