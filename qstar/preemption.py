"""Graceful preemption: SIGTERM, which schedulers send before they take a machine away, saves and ends with exit code 0.

While a model trains, the current update is finished and saved; elsewhere the run ends at once, since finished stages
are on disk. A second SIGTERM, or `QSTAR_STOP_SECONDS` (default: 240) after the first, ends the process immediately.
In a run of several processes JAX listens instead, and all of them stop after the same update or at the same stage file.
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

from qstar.errors import UserError, seconds_of

SECONDS = 240
_EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class Preempted(BaseException):
    """SIGTERM requested the end of the run."""

    # A BaseException, like KeyboardInterrupt: a handler `except Exception` on the way must not swallow it.
    def __init__(self, saved: str = ""):
        """`saved` says what was, beside finished stages."""
        super().__init__(saved)
        self.saved = saved


class _State:
    requested = False  # SIGTERM has come
    acknowledged = False  # and the deferring code has seen it
    over = False  # the run is at its end: SIGTERM changes nothing any more
    deferred = 0  # depth of `defer`: the caller will read `should_stop`
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
    seconds: float = SECONDS
    with contextlib.suppress(UserError):  # `qstar` has refused a wrong value before
        seconds = seconds_of("QSTAR_STOP_SECONDS", SECONDS)
    _State.requested, _State.acknowledged, _State.deferred, _State.over = False, False, 0, False
    # The handler runs between two bytecodes of the main thread, which may be compiling for minutes. So the signal itself
    # writes into a pipe, which a thread reads that enforces the time limit.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    old_pipe = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    old = signal.signal(signal.SIGTERM, _on_sigterm)
    threading.Thread(target=_keep_time, args=(ours, seconds), daemon=True, name="qstar-stop").start()
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
    # What JAX's callback of the garbage collector raises is printed and lost: `check` raises it later.
    lost = frame is not None and frame.f_code.co_name == "_xla_gc_callback"
    if not _State.deferred and not _State.over and not lost:
        _State.acknowledged = True
        raise Preempted


def over() -> None:
    """Marks the run as finished: a SIGTERM from now on does not change the exit code of a success."""
    _State.over = True


def _keep_time(pipe: socket.socket, seconds: float) -> None:
    requested = False
    with pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], seconds if requested else None)
            numbers = pipe.recv(64) if ready else b""
            if ready and not numbers:
                return
            # Several signals may arrive in one read; a timeout counts as a second request.
            for _ in range(numbers.count(signal.SIGTERM) if ready else 1):
                if requested:
                    why = "second SIGTERM" if ready else f"not done after {seconds:g} s"
                    os.write(2, f"qstar: ends at once ({why}); the last checkpoint stays\n".encode())
                    os._exit(_EXIT_CODE)
                requested = True


def _before_fork() -> None:
    # Blocked until `_in_child`: a SIGTERM to a child with its parent's handler and pipe would stop the parent.
    _State.forking.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _State.forking.blocked)


def _in_child() -> None:
    # A forked child (a worker of a pool) ends by SIGTERM as usual, and does not write into its parent's pipe.
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


@contextlib.contextmanager
def defer() -> Iterator[None]:
    """Inside the block SIGTERM only makes `should_stop` true: the caller polls it, saves, and raises `Preempted`."""
    _State.deferred += 1
    try:
        yield
    finally:
        _State.deferred -= 1
    # The signal came after the last poll: without this, the run would go on until the time limit ends it.
    if _State.requested and not _State.acknowledged and not _State.deferred:
        raise Preempted


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Inside a block of `defer`: SIGTERM raises `Preempted` at once, for long work such as a measurement."""
    if should_stop():
        raise Preempted
    depth, _State.deferred = _State.deferred, 0
    try:
        yield
    finally:
        _State.deferred = depth


def check() -> None:
    """Raises `Preempted` if a stop was requested and is not deferred. All processes call it at the same places."""
    # Needed with several processes, where no signal interrupts, and where a library has swallowed the exception.
    if not _State.deferred and should_stop():
        raise Preempted


def should_stop() -> bool:
    """Whether to save and stop now. Of several processes, each calls it after each update and gets the same answer."""
    jax = sys.modules.get("jax")
    if jax is None or jax.process_count() == 1:
        _State.acknowledged = _State.requested
        return _State.requested
    from jax.experimental import multihost_utils

    # The counts must be equal on all processes: JAX's coordination service agrees on one that no process has passed.
    _State.polls += 1
    return multihost_utils.reached_preemption_sync_point(_State.polls)


def exit_code() -> int:
    """Returns the exit code of a preempted run that was saved: `QSTAR_STOPPED_CODE`, else 0."""
    # A scheduler may take 0 for done and not start the run again.
    return int(os.environ.get("QSTAR_STOPPED_CODE") or 0)
