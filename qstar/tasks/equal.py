"""Equality of mathematical answers by math-verify, in a process that can be killed.

math-verify hands what a model wrote to SymPy, which may take for ever (`9**9**9`) or all memory. Its own time-outs
are alarms of the main thread, which neither stop C code nor work in other threads; so it runs next door.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from qstar.errors import UserError
from qstar.tasks.sandbox import codec

EQUAL = "equal"
DIFFERENT = "different"
UNPARSED = "unparsed"  # math-verify finds no expression in the answer
TIMEOUT = "timeout"
ERROR = "error"  # the process ended, most often for want of memory
REASONS = (EQUAL, DIFFERENT, UNPARSED, TIMEOUT, ERROR)


class Comparison(NamedTuple):
    """`equal` is `reason == EQUAL`; time-outs and errors are told from answers that differ."""

    equal: bool
    reason: str


def check_installed() -> None:
    """Raises UserError unless math-verify can be imported."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("the math task compares answers with math-verify: pip install 'qstar[eval]'")


class Comparer:
    """One process with math-verify, started by the first comparison and again after each that had to be killed.

    A context manager; safe to use from several threads, which take turns.
    """

    def __init__(self, *, timeout_s: float = 5.0, memory_mb: int = 2048):
        """`timeout_s`: wall time of one comparison. `memory_mb`: address space of the process, in MiB.

        Raises:
            UserError: math-verify is not installed, or the limits are not positive.
        """
        check_installed()
        if not (timeout_s > 0 and memory_mb > 0):
            raise UserError(f"timeout_s={timeout_s} and memory_mb={memory_mb} must be above 0")
        self.timeout_s, self.memory_mb = timeout_s, memory_mb
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = os.getpid()

    def compare(self, gold: str, answer: str) -> Comparison:
        """Compares two answers, each LaTeX without dollar signs or plain text."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                codec.send(self._process.stdin.fileno(), [gold, answer])
                reason = codec.receive(self._process.stdout.fileno(), time.monotonic() + self.timeout_s)
            except TimeoutError:
                reason = TIMEOUT
            except (codec.Closed, codec.TooLong, ValueError):
                reason = ERROR
            if reason in (TIMEOUT, ERROR):
                self._stop()
        return Comparison(reason == EQUAL, reason)

    def _start(self) -> None:
        self._stop()
        script = os.fspath(Path(__file__).with_name("sandbox") / "math_equal.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", script, str(self.memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            codec.receive(self._process.stdout.fileno(), time.monotonic() + 120)  # the import is not the answer's fault
        except (codec.Closed, TimeoutError, ValueError):
            self._stop()
            raise UserError("math-verify does not start: try `python -c 'import math_verify'`") from None

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            self._process = None

    def close(self) -> None:
        """Ends the process; does nothing in a fork of the one that started it."""
        if self._owner == os.getpid():
            with self._lock:
                self._stop()

    def __enter__(self) -> Comparer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def comparer(timeout_s: float = 5.0) -> Comparer:
    """The comparer that this process keeps, closed at exit."""
    return _comparer_of(os.getpid(), timeout_s)


@functools.cache
def _comparer_of(pid: int, timeout_s: float) -> Comparer:
    made = Comparer(timeout_s=timeout_s)
    atexit.register(made.close)
    return made
