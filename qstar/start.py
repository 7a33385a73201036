"""Start of JAX: the platform, the compilation cache, and the C allocator."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from qstar import distributed
from qstar.errors import UserError


def start_jax(device: str = "auto", *, several: bool = False) -> None:
    """Chooses the platform and switches the persistent compilation cache on. Called before anything imports jax.

    With `several`, waits for the other processes of the run, if the environment speaks of any (`processes.process_info`).

    Raises:
      UserError: the device is not there; another process did not come.
    """
    platform = {"auto": "", "gpu": "cuda"}.get(device, device)
    if platform:
        os.environ["JAX_PLATFORMS"] = platform
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "qstar" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    accelerators = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerators:
        keep_freed_memory()
    here = distributed.process_info(os.environ, device) if several else None
    if here is not None and here.count > 1:
        distributed.join(here)
    import jax

    try:
        found = jax.devices()[0].platform
    except (RuntimeError, AssertionError) as e:  # the latter, silently, where JAX has no plugin for the platform
        reason = next(iter(str(e).splitlines()), "no plugin for it")
        raise UserError(f"--device={device}: JAX finds none ({reason}); install its extra or use cpu") from None
    if device not in ("auto", found):  # called from a program that has started jax already
        raise UserError(f"--device={device}: JAX has started on {found} already; name the device first")


def start_plan(topologies: Iterable[str]) -> None:
    """`start_jax` for slices that are described by name: on the CPU, with as many simulated devices as `cpu:N` and `gpu:N`
    need, or on this machine's GPUs for `gpu`.

    Raises:
      UserError: `gpu`, and there is none.
    """
    named = [t.partition(":") for t in topologies]
    counts = [int(n or 8) for kind, _, n in named if kind in ("cpu", "gpu") and (n or "8").isdecimal()]
    if counts and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flag = f"--xla_force_host_platform_device_count={max(counts)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        os.environ.setdefault("PJRT_NPROC", "16")
    if ("gpu", "", "") not in named:
        return start_jax("cpu")
    try:
        start_jax("gpu")
    except UserError:
        raise UserError(
            "--topology=gpu: JAX finds no GPU here; run it where there is one, with 'qstar[cuda]' installed, or give a number"
            " (gpu:8) for simulated devices with a GPU's memory, which are a guide only"
        ) from None


def keep_freed_memory() -> None:
    """Makes the C allocator keep freed memory instead of handing it back to the system.

    XLA's CPU runtime allocates the temporaries of every call anew. Handed back in between, each of their pages faults
    again: 200,000 faults in a train step of a 20M model, 15% of its time. One arena, or other threads' blocks would
    not count. Where there is no glibc nothing happens.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 2**30), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(name, value)
