"""The training loop: a generator you can read, not a framework of callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qstar import stop
from qstar.mesh import put_whole_batch
from qstar.train.checkpoint import Checkpoints
from qstar.train.profile import Watch
from qstar.train.state import TrainState


class Diverged(RuntimeError):
    """Too many updates in a row were not finite. The parameters are still the last good ones."""


class Progress(NamedTuple):
    """Where a run stands. `state` is donated to the next step: copy what must outlive it."""

    step: int
    state: TrainState
    metrics: dict[str, float]  # means over the steps since the last Progress; seconds and tokens per second with them


def fit(
    state: TrainState,
    step_at: Callable[[int], Callable[..., tuple[TrainState, dict[str, jax.Array]]]],
    batch_at: Callable[[int], Any],
    lr_at: Callable[[int], Any],
    *,
    steps: int,
    mesh: Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    save_every: int = 0,
    log_every: int = 50,
    max_bad: int = 20,
    watch: Watch | None = None,
) -> Iterator[Progress]:
    """Runs updates `state.step .. steps-1`, yielding every `log_every` of them and at the end, and where it resumes.

    With `checkpoints`, a run that was killed goes on from the newest one, and ends with the very same bits: the batch
    of step s is `batch_at(s)`, and the key of step s is folded from the state's. The metrics since the last Progress
    are kept with the checkpoint, so that their means are the same, too.

    Args:
      step_at: the update of a step (from `make_step`; one and the same, unless shapes change on the way).
      batch_at: the pytree of host arrays of a step: all rows, in every process (a pure function of the step).
      lr_at: the learning rate of a step (an optax schedule).
      save_every: steps between checkpoints (0: only at the end, if `checkpoints` is given).
      max_bad: stop after this many skipped (not finite) updates in a row.
      watch: counts recompiles, FLOPs and memory, traces, and guards transfers (default: one that only counts).

    Raises:
      Diverged: after saving the last good state.
      Stopped: the process was told to end (SIGTERM), after saving where it is.
    """
    with stop.held():
        watch = watch or Watch()
        yield from _fit(
            state, step_at, batch_at, lr_at, steps, mesh, checkpoints, save_every, log_every, max_bad, watch
        )


def _fit(state, step_at, batch_at, lr_at, steps, mesh, checkpoints, save_every, log_every, max_bad, watch):
    window: list[dict[str, Any]] = []
    bad, since = 0, time.perf_counter()
    kept = checkpoints.resume(state) if checkpoints is not None else None
    if kept is not None:
        state, record, _ = kept
        window, bad, since = record.get("window", []), record.get("bad", 0), since - record.get("seconds", 0.0)
    first, checked = int(state.step), len(window)
    if bad >= max_bad:  # it had diverged before
        raise Diverged(f"{bad} updates in a row were not finite, up to step {first}; lower the learning rate")
    if first >= steps:
        yield Progress(first, state, _means(window, time.perf_counter() - since) if window else {})
        return
    if first:
        yield Progress(first, state, {})
    for step in range(first, steps):
        rows, update = batch_at(step), step_at(step)
        arrays = rows, np.float32(lr_at(step))
        with watch.update(update):  # nothing in here waits for the device
            state, metrics = update(state, *put_whole_batch(arrays, mesh))
        watch.after(rows, metrics)
        window.append(metrics)
        done = step + 1
        stopping = stop.asked()
        saving = checkpoints is not None and (done == steps or stopping or (save_every and done % save_every == 0))
        if done % log_every == 0 or done == steps or saving:
            host = _floats(window)  # the only wait; the device has run ahead of the host until here
            bad, longest = _runs_of_bad(bad, [m["skipped"] for m in host[checked:]])
            checked = len(host)
            diverged = longest >= max_bad
            told = done % log_every == 0 and done < steps  # a yield follows; only the last one is made again
            record = {
                "window": [] if told else host,
                "bad": longest if diverged else bad,
                "seconds": 0.0 if told else time.perf_counter() - since,
            }
            if diverged:
                if checkpoints is not None:
                    checkpoints.save(done, state, record)
                    checkpoints.wait()
                raise Diverged(
                    f"{longest} updates in a row were not finite, up to step {done}; lower the learning rate"
                )
            if saving:
                checkpoints.save(done, state, record)
            if done % log_every == 0 or done == steps:
                now = time.perf_counter()
                yield Progress(done, state, _means(host, now - since) | watch.report(now - since))
                window, checked, since = [], 0, time.perf_counter()
        if stopping:  # after the last update, too: what follows may take longer than there is time
            if checkpoints is not None:
                checkpoints.wait()
            raise stop.Stopped
    if checkpoints is not None:
        checkpoints.wait()


def _runs_of_bad(run: int, skipped: list[float]) -> tuple[int, int]:
    """Returns how long the run of skipped updates at the end is, and the longest one (the first goes on from `run`)."""
    longest = run
    for flag in skipped:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return run, longest


def _floats(window: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in metrics.items()} for metrics in jax.device_get(window)]


def _means(host: list[dict[str, float]], seconds: float) -> dict[str, float]:
    means = {k: float(np.mean([m[k] for m in host])) for k in host[0]}
    means["skipped"] = float(np.sum([m["skipped"] for m in host]))
    means["seconds_per_step"] = seconds / len(host)
    if "tokens" in means:
        means["tokens_per_second"] = means["tokens"] * len(host) / seconds
    return means
