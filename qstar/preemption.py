"""Graceful preemption: SIGTERM, which schedulers send before they take a machine away, saves and ends with exit code 0.

While a model trains, the update at hand is finished and saved; anywhere else the run ends at once, for what its stages
have finished is on disk. A second SIGTERM, or `QSTAR_STOP_SECONDS` (default: 240) after the first, ends the process
whatever it is doing. In a run of several processes JAX listens instead, and all of them stop after the same update, or at
the same stage file.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator

SECONDS = 240
_EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class Preempted(BaseException):
    """The run was told to end. Like KeyboardInterrupt it is nobody's error, and passes through `except Exception`."""

    def __init__(self, saved: str = ""):
        """`saved` says what was, beside finished stages."""
        super().__init__(saved)
        self.saved = saved


class _State:
    requested = False  # SIGTERM has come
    acknowledged = False  # and who held it knows
    over = False  # the run is at its end: SIGTERM changes nothing any more
    deferred = 0  # depth of `defer`: somebody will look at `told`
    polls = 0  # of `should_stop` in a run of several processes
    forking = threading.local()  # per thread that forks: the signals it had blocked before


@contextlib.contextmanager
def listening(*, last: bool = False) -> Iterator[None]:
    """Turns SIGTERM into `Preempted` inside the block. Only the main thread can; in another nothing changes.

    Args:
      last: the process ends after the block, and SIGTERM is ignored from then on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.requested, _State.acknowledged, _State.deferred, _State.over = False, False, 0, False
    # The handler runs between two bytecodes of the main thread, which may be compiling for minutes. The pipe is written
    # by the signal itself, and read by a thread that can keep the time.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    old_pipe = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    old = signal.signal(signal.SIGTERM, _on_sigterm)
    threading.Thread(target=_keep_time, args=(ours,), daemon=True, name="qstar-stop").start()
    try:
        yield
    finally:
        _State.requested = _State.acknowledged = False
        after = old if old is not None else signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN if last else after)
        signal.set_wakeup_fd(old_pipe)
        theirs.close()  # ends the thread


def _on_sigterm(number, frame) -> None:
    _State.requested = True
    if not _State.deferred and not _State.over:
        _State.acknowledged = True
        raise Preempted


def over() -> None:
    """Tells that nothing is left to be saved: a SIGTERM in the last second does not turn success into something else."""
    _State.over = True


def _keep_time(pipe: socket.socket) -> None:
    seconds = float(os.environ.get("QSTAR_STOP_SECONDS") or SECONDS)
    requested = False
    with pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], seconds if requested else None)
            numbers = pipe.recv(64) if ready else b""
            if ready and not numbers:
                return
            for _ in range(numbers.count(signal.SIGTERM) if ready else 1):
                if requested:
                    why = "told again" if ready else f"not done after {seconds:g} s"
                    os.write(2, f"qstar: ends at once ({why}); the last checkpoint stays\n".encode())
                    os._exit(_EXIT_CODE)
                requested = True


def _before_fork() -> None:
    """No signal comes while a child still has its parent's handler and pipe: it waits until `_in_child` is done."""
    _State.forking.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _State.forking.blocked)


def _in_child() -> None:
    """A forked child (a worker of a pool) ends by SIGTERM as ever, and does not write into its parent's pipe."""
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


@contextlib.contextmanager
def defer() -> Iterator[None]:
    """Inside the block SIGTERM only makes `should_stop` true: the caller asks often, saves, and raises `Preempted`. If it
    came too late to be asked for, the end of the block raises it."""
    _State.deferred += 1
    try:
        yield
    finally:
        _State.deferred -= 1
    if _State.requested and not _State.acknowledged and not _State.deferred:
        raise Preempted


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Inside a block of `defer`: SIGTERM raises `Preempted` at once again, or now, if it has come already. For work that
    takes long and may be cut off, like a measurement between two updates."""
    if should_stop():
        raise Preempted
    depth, _State.deferred = _State.deferred, 0
    try:
        yield
    finally:
        _State.deferred = depth


def check() -> None:
    """Raises `Preempted` if the run was told to end and nobody holds it: in a run of several processes, where no signal
    interrupts, or where code of others has swallowed the exception. All processes call it at the same places."""
    if not _State.deferred and should_stop():
        raise Preempted


def should_stop() -> bool:
    """Whether to save and stop now. In a run of several processes: every process asks after each update, and all of them
    get the same answer (JAX's coordination service agrees on an update that none has passed)."""
    jax = sys.modules.get("jax")
    if jax is None or jax.process_count() == 1:
        _State.acknowledged = _State.requested
        return _State.requested
    from jax.experimental import multihost_utils

    _State.polls += 1
    return multihost_utils.reached_preemption_sync_point(_State.polls)


def exit_code() -> int:
    """Returns the exit code of a run that was told to end and saved: 0, or `QSTAR_STOPPED_CODE` for schedulers that would
    take 0 for done."""
    return int(os.environ.get("QSTAR_STOPPED_CODE") or 0)
