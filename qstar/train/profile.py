"""Profiling of a run: traces of chosen updates, recompiles, memory, MFU, and transfers between host and device."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from qstar.distributed import is_first
from qstar.errors import UserError
from qstar.train import flops

GUARDS = ("allow", "log", "disallow")


class Compiles:
    """A counter of XLA compilations."""

    def __init__(self) -> None:
        """Registers a listener, which JAX cannot remove: make one per process."""
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1


class Trace:
    """A profiler trace of updates `first` to `last` of the first process, counted from 1 over all its stages."""

    def __init__(self, span: str, folder: Path):
        """Args: span: "10:13", or "10" for one update. folder: TensorBoard's profile plugin and xprof read it.

        Raises:
          UserError: another text.
        """
        found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", span)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UserError(f"--profile={span} must be FIRST:LAST, updates counted from 1, e.g. 10:13")
        self.first, self.last, self.folder, self.done, self.open = first, last, folder, 0, False

    def begin(self) -> None:
        """Called before an update."""
        if self.done + 1 == self.first and is_first():
            jax.profiler.start_trace(str(self.folder))
            self.open = True

    def end(self, result: Any) -> None:
        """Called after an update. Waits for the last one, so that the trace includes the device's work."""
        self.done += 1
        if self.open and self.done == self.last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still open (of a run shorter than its span)."""
        if self.open:
            jax.profiler.stop_trace()
            self.open = False


# Of the process, not of a stage: a listener cannot be removed, and a trace counts the updates of all stages.
class _Process:
    compiles: Compiles | None = None
    trace: Trace | None = None


@contextlib.contextmanager
def tracing(span: str | None, folder: Path) -> Iterator[None]:
    """Traces the updates of `span` (`Trace`) inside the block; None traces nothing."""
    _Process.trace = Trace(span, folder) if span is not None else None
    try:
        yield
    finally:
        if _Process.trace is not None:
            _Process.trace.close()
        _Process.trace = None


class Watch:
    """Recompiles, FLOPs, memory and traces of the updates of one stage."""

    def __init__(self, flops_of: Callable[[Any], float] | None = None, transfer_guard: str = "allow"):
        """Args: flops_of: host batch -> FLOPs of its update. transfer_guard: of `GUARDS`, for implicit transfers."""
        self._guard, self._flops, self._of = transfer_guard, 0.0, flops_of
        self._warm: set[int] = set()
        self.recompiles = 0
        self._peak = flops.peak(jax.devices()[0].device_kind) if flops_of is not None else None
        _Process.compiles = self._compiles = _Process.compiles or Compiles()

    @contextlib.contextmanager
    def update(self, step: Any) -> Iterator[None]:
        """Around one update by `step`. Its first call is the warm-up; compilations of later ones are recompiles."""
        if _Process.trace is not None:
            _Process.trace.begin()
        before = self._compiles.count
        # Only implicit transfers are guarded: placing the batch is explicit, and passes.
        with jax.transfer_guard(self._guard):
            yield
        if id(step) in self._warm:
            self.recompiles += self._compiles.count - before
        self._warm.add(id(step))

    def after(self, batch: Any, result: Any) -> None:
        """After an update: batch of host arrays, result of the update."""
        if self._of is not None and self._peak is not None:
            self._flops += self._of(batch)
        if _Process.trace is not None:
            _Process.trace.end(result)

    def report(self, seconds: float) -> dict[str, float]:
        """Returns `recompiles` of the stage so far, `mfu` over the seconds since the last report, and `memory`."""
        found: dict[str, float] = {"recompiles": self.recompiles}
        if self._flops and self._peak:  # only where the device's peak is known
            found["mfu"] = self._flops / (seconds * jax.device_count() * self._peak)
            self._flops = 0.0
        return found | memory()


def memory() -> dict[str, float]:
    """Returns the GiB in use and at the peak on this process's fullest device; {} on a CPU, which has no statistics."""
    stats = [s for s in (d.memory_stats() for d in jax.local_devices()) if s]
    names = {"memory_gib": "bytes_in_use", "memory_peak_gib": "peak_bytes_in_use"}
    return {k: max(s[v] for s in stats) / 2**30 for k, v in names.items() if stats and all(v in s for s in stats)}
