"""The training loop: a generator of `Progress`, with resume, preemption and a guard against divergence.

for at in fit(state, step_at, batch_at, lr_at, steps=1000, checkpoints=Checkpoints(folder)):
    print(at.step, at.metrics["loss"])
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qstar import distributed, preemption
from qstar.errors import TrainingFailed
from qstar.mesh import put_global_batch
from qstar.train.checkpoint import Checkpoints
from qstar.train.profile import Watch
from qstar.train.state import TrainState


class Diverged(TrainingFailed):
    """Too many updates in a row were not finite. The parameters are still the last good ones."""


class Progress(NamedTuple):
    """The state of a run after an update. `state` is donated to the next step: copy what must outlive it."""

    step: int
    state: TrainState
    metrics: dict[str, float]  # means since the last Progress (`skipped`: a sum), seconds per step, tokens per second
    save: Callable[[], None] = lambda: None  # saves a checkpoint of this step, unless there is one

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Wraps the caller's long work between updates: SIGTERM interrupts it, and the state is saved."""
        try:
            with preemption.released():
                yield
        except preemption.Preempted:
            self.save()
            raise preemption.Preempted(_saved(self.step)) from None


def fit(
    state: TrainState,
    step_at: Callable[[int], Callable[..., tuple[TrainState, dict[str, jax.Array]]]],
    batch_at: Callable[..., Any],
    lr_at: Callable[[int], Any],
    *,
    steps: int,
    mesh: Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    save_every: int = 0,
    log_every: int = 50,
    max_bad: int = 20,
    watch: Watch | None = None,
    on_policy: bool = False,
    place: Callable[[Any], Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Iterator[Progress]:
    """Runs updates 0 .. steps-1, yielding every `log_every` of them, at the end, and where it resumes.

    With `checkpoints`, a run that was killed resumes from the newest one, and ends with the same bits.

    Args:
      step_at: the update of a step (from `make_step`).
      batch_at: the pytree of host arrays of a step: all rows, in every process (a pure function of the step).
      lr_at: learning rate of a step.
      save_every: steps between checkpoints (0: only at the end, if `checkpoints` is given).
      max_bad: stop after this many skipped (not finite) updates in a row.
      on_policy: `batch_at` is given the state, too, and may sample from its parameters.
      place: puts (batch, learning rate) on the devices (default: every process has the whole batch).
      extra: values of the caller's own that change on the way, saved with the checkpoints (JSON).

    Raises:
      Diverged: after saving the last good state; also at the end, if nothing was learnt (see `_Fit.require_learnt`).
      Preempted: SIGTERM was received; the state is saved.
    """
    run = _Fit(state, steps, checkpoints, save_every, log_every, max_bad, {} if extra is None else extra)
    place = place or functools.partial(put_global_batch, mesh=mesh)
    # SIGTERM waits for the end of an update, when the state can be saved.
    with preemption.defer():
        yield from run.resume()
        yield from run.updates(step_at, batch_at, lr_at, place, watch or Watch(), on_policy)


class _Fit:
    """The mutable state of one call of `fit`."""

    def __init__(self, state, steps, checkpoints, save_every, log_every, max_bad, extra):
        self.state, self.steps, self.checkpoints, self.extra = state, steps, checkpoints, extra
        self.save_every, self.log_every, self.max_bad = save_every, log_every, max_bad
        self.window: list[dict[str, Any]] = []  # metrics since the last Progress
        self.bad = self.learnt = self.first = 0  # skipped updates in a row; updates that learnt something; done before
        self.since, self.before = time.perf_counter(), 0.0  # seconds of the window in the process before

    def resume(self) -> Iterator[Progress]:
        kept = self.checkpoints.resume(self.state) if self.checkpoints is not None else None
        if kept is not None:
            self.state, record, self.first = kept
            self.window, self.bad = record.get("window", []), record.get("bad", 0)
            self.learnt = record.get("learnt", self.first)
            # The window's time before the kill counts: seconds per step are those of all its updates.
            self.before = record.get("seconds", 0.0)
            self.extra.update(record.get("extra", {}))
        if self.bad >= self.max_bad:  # the run had diverged before
            raise Diverged(_not_finite(self.bad, self.first))
        if self.first >= self.steps:
            self.require_learnt(self.first)
            means = _means(self.window, self.before) if self.window else {}
            yield Progress(self.first, self.state, means)
        elif self.first:
            yield Progress(self.first, self.state, {})

    def updates(self, step_at, batch_at, lr_at, place, watch, on_policy) -> Iterator[Progress]:
        counted = len(self.window)  # entries of the window that `count` has read
        self.since = time.perf_counter()
        others = True  # whether other programs ran since the last update
        for step in range(self.first, self.steps):
            rows = batch_at(step, self.state) if on_policy else batch_at(step)
            update = step_at(step)
            arrays = rows, np.float32(lr_at(step))
            if others:
                # On a CPU the copies of a checkpoint and the temporaries of the update would need memory at once.
                if jax.default_backend() == "cpu":
                    self.wait()
                distributed.return_freed_memory()
            with watch.update(update):  # nothing in here waits for the device
                self.state, metrics = update(self.state, *place(arrays))
            watch.after(rows, metrics)
            self.window.append(metrics)
            done = step + 1
            stopping = preemption.should_stop()
            ends, logs = done == self.steps, done % self.log_every == 0
            saves = ends or stopping or (self.save_every and done % self.save_every == 0)
            others = on_policy or logs or saves
            if logs or saves:
                # The only wait for the device, which has run behind the host until here.
                self.window = [{k: float(v) for k, v in row.items()} for row in jax.device_get(self.window)]
                longest, counted = self.count(self.window[counted:]), len(self.window)
                if longest >= self.max_bad:
                    self.bad = longest
                    self.save(done, again=not logs)
                    self.wait()
                    raise Diverged(_not_finite(longest, done))
                if saves:
                    # The last window is saved as well: a run that resumes at its end yields the same means again.
                    self.save(done, again=not logs or ends)
                if ends:
                    self.require_learnt(done)
                if logs or ends:
                    seconds = time.perf_counter() - self.since
                    # `watch` has no FLOPs from before the resume.
                    means = _means(self.window, seconds + self.before) | watch.report(seconds)
                    self.window, counted, self.since, self.before = [], 0, time.perf_counter(), 0.0
                    yield Progress(done, self.state, means, functools.partial(self.save_now, done))
                    self.since = time.perf_counter()  # the caller's time does not count
            if stopping:  # after the last update, too: what follows may take longer than there is time
                self.wait()
                raise preemption.Preempted(*() if self.checkpoints is None else (_saved(done),))
        self.wait()

    def count(self, metrics: list[dict[str, float]]) -> int:
        # Returns the longest run of skipped updates, which may begin in the window before and end within this one.
        longest = self.bad
        for m in metrics:
            # Of a step of RL, which is several updates, `skipped` is the share of them.
            self.bad = self.bad + 1 if m["skipped"] >= 1 else 0
            longest = max(longest, self.bad)
            self.learnt += m["skipped"] < 1 and m.get("tokens", 1.0) > 0
        return longest

    def require_learnt(self, done: int) -> None:
        # A run that learnt nothing, or whose last mean is over skipped updates alone, would otherwise look finished.
        why = ""
        if not self.learnt:
            why = f"none of {done} updates was finite and had a token to learn from; check the data and the first model"
        elif len(self.window) > 1 and all(m["skipped"] >= 1 for m in self.window):  # a single one may be by chance
            why = _not_finite(len(self.window), done)
        if done and why:
            self.wait()
            raise Diverged(why)

    def save(self, done: int, *, again: bool) -> None:
        # With `again` the metrics since the last Progress are saved, so that a resumed run reports the same means.
        if self.checkpoints is None:
            return
        window, seconds = (self.window, time.perf_counter() - self.since + self.before) if again else ([], 0.0)
        record = {"window": window, "bad": self.bad, "learnt": self.learnt, "seconds": seconds, "extra": self.extra}
        self.checkpoints.save(done, self.state, record)

    def save_now(self, done: int) -> None:
        self.save(done, again=False)
        self.wait()

    def wait(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.wait()


def _saved(done: int) -> str:
    return f"saved after update {done}"


def _not_finite(updates: int, done: int) -> str:
    return f"{updates} updates in a row were not finite, up to step {done}; lower the learning rate"


def _means(window: list[dict[str, float]], seconds: float) -> dict[str, float]:
    # One skipped update would make the window's mean NaN or infinite.
    finite = [m for m in window if not m["skipped"]] or window
    means = {k: float(np.mean([m[k] for m in finite])) for k in window[0]}
    means["skipped"] = float(np.sum([m["skipped"] for m in window]))
    means["seconds_per_step"] = seconds / len(window)
    if "tokens" in means:
        means["tokens_per_second"] = sum(m["tokens"] for m in window) / seconds
    return means
