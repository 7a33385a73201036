"""The judge: the process that runs the tests, asks the program's process for values and compares them.

A judge never runs the program. It serves one program and ends. Its clock and its own limits hold whatever it receives.
"""

from __future__ import annotations

import ast
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import codec
import guest
import isolate

NO_JOB = 3  # exit status: the pipe of jobs is closed
_MEMORY = 1 << 30  # address space of a judge, in bytes, beyond what it starts with


class NotAValue(Exception):
    """A test compares an object that is no plain value, such as one of a class of the program."""


class Ended(BaseException):
    """The program cannot be asked any more; not an Exception, so that tests do not catch it by accident."""


class Guest:
    """The judge's connection to the program's process."""

    def __init__(self, fd: int, pid: int):
        self.fd, self.pid = fd, pid
        self.deadline = 0.0
        self.cpu_seconds = 0
        self.end: tuple[str, str] | None = None  # (reason, detail) once it no longer answers

    def start(self, job: dict[str, Any]) -> None:
        self.deadline = time.monotonic() + job["timeout_s"]
        self.cpu_seconds = int(job["timeout_s"]) + 2
        order = {"program": job["program"], "memory_mb": job["memory_mb"], "cpu_seconds": self.cpu_seconds}
        self._exchange(order)

    def ask(self, what: str, *args: Any) -> Any:
        """The program's answer, or its exception with an attribute `of_program`, or Ended if there is no answer."""
        return self._exchange([what, *(codec.encode(a, _number) for a in args)])

    def _exchange(self, message: Any) -> Any:
        if self.end:
            raise Ended
        try:
            codec.send(self.fd, message)
            kind, *rest = codec.receive(self.fd, self.deadline)
            if kind == "value":
                (data,) = rest
                return codec.decode(data, lambda number: Remote(self, number))
            if kind == "error":
                name, text = rest
                failure: Any = codec.exception(name, text)
                failure.of_program = True
            else:
                self._stop({"exit": "exited", "memory": "memory", "long": "output"}[kind], kind)
        except TimeoutError:
            self._stop("timeout", "")
        except codec.Closed:
            self._stop(*self._death())
        # All that arrives is untrusted: malformed data are a verdict on the program, never a failure of the judge.
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, MemoryError) as error:
            self._stop("output", f"not an answer: {type(error).__name__}")
        except codec.TooLong as error:
            self._stop("output", f"{error} where {codec.MAX_BYTES} are allowed")
        raise failure

    def _stop(self, reason: str, detail: str) -> None:
        self.end = (reason, detail)
        raise Ended

    def _death(self) -> tuple[str, str]:
        # The kernel's SIGKILL at the CPU limit looks like any other; only the time used shows it.
        _, status, used = os.wait4(self.pid, 0)
        self.pid = 0
        if used.ru_utime + used.ru_stime >= self.cpu_seconds:
            return "timeout", "CPU time"
        code = os.waitstatus_to_exitcode(status)
        return "exited", f"signal {-code}" if code < 0 else f"status {code}"

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


def _operation(what: str) -> Callable[..., Any]:
    return lambda self, *args: self._guest.ask(what, self, *args)


class Remote:
    """Proxy of an object of the program. What is read from it arrives as plain values; it equals nothing."""

    __slots__ = ("_guest", "_number")

    def __init__(self, guest: Guest, number: int):
        object.__setattr__(self, "_guest", guest)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._guest.ask("call", self, list(args), options)

    def __getattr__(self, name: str) -> Any:
        # These are Python's protocols (copying, pickling), which concern the proxy itself.
        if name.startswith("__"):
            raise AttributeError(name)
        return self._guest.ask("attribute", self, name)

    def __iter__(self) -> Any:
        iterator = self._guest.ask("iterate", self)
        if not isinstance(iterator, Remote):
            yield from iterator
            return
        while True:
            try:
                value = self._guest.ask("next", iterator)
            except StopIteration:
                return
            yield value

    def __bool__(self) -> bool:
        return self._guest.ask("truth", self) is True

    __getitem__, __setattr__ = _operation("item"), _operation("set")  # type: ignore[assignment]
    __len__, __str__ = _operation("length"), _operation("text")  # type: ignore[assignment]

    def _refuse(self, *_: Any) -> Any:
        raise NotAValue("only plain values can be compared, not iterators, views of a dict or objects of classes")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a test hands a {type(value).__name__} to the program, which cannot be sent")


class _Counted(ast.NodeTransformer):
    """Puts a call behind every assertion, so that one that was never reached does not count as passed."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        call = ast.Expr(ast.Call(ast.Name("__asserted__", ast.Load()), [], []))
        return [node, ast.fix_missing_locations(ast.copy_location(call, node))]


def verdict(program: Guest, job: dict[str, Any]) -> tuple[str, str]:
    """Runs the program and its tests: (reason, detail)."""
    passed_asserts: list[int] = []
    space: dict[str, Any] = {"__name__": "tests", "__asserted__": lambda: passed_asserts.append(1)}
    tests = compile(_Counted().visit(ast.parse(job["tests"])), "tests", "exec", dont_inherit=True, optimize=0)
    try:
        program.start(job)
        for name in job["names"]:
            try:
                space[name] = program.ask("name", name)
            # The program does not define it: a test that needs it fails by its NameError.
            except KeyError:
                pass
        exec(tests, space)
        reason, detail = ("passed", "") if passed_asserts else ("untested", "no assertion was reached")
    except BaseException as error:
        of_program = getattr(error, "of_program", False)
        wrong = isinstance(error, (AssertionError, NotAValue)) and not of_program
        if isinstance(error, MemoryError) and not of_program:
            reason, detail = "output", "more than the judge can hold"
        else:
            reason, detail = "wrong" if wrong else "error", f"{type(error).__name__}: {codec.message(error)}"
    return program.end or (reason, detail)


def run(jobs: int, verdicts: int, baseline: int, isolation: str) -> int:
    """Serves one job from the pipe `jobs` and writes its verdict to `verdicts`; returns the exit status."""
    ours, theirs = socket.socketpair()
    # The program's process comes first: it must never have had the job in its memory.
    pid = os.fork()
    if pid == 0:
        _become_guest(theirs.fileno(), baseline, isolation)
    theirs.close()
    program = Guest(ours.fileno(), pid)
    _give_up_powers()
    isolate.hide_memory()
    try:
        job = codec.receive(jobs)
    except codec.Closed:
        program.kill()
        return NO_JOB
    resource.setrlimit(resource.RLIMIT_AS, (baseline + _MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # SIGALRM ends the judge, and the program with it, even inside C code. It comes half a second after the deadline of
    # `Guest`, whose verdict has a better reason.
    signal.setitimer(signal.ITIMER_REAL, job["timeout_s"] + 0.5)
    # Tests that draw random numbers give the same verdict in every run.
    random.seed(0)
    began = time.monotonic()
    reason, detail = verdict(program, job)
    seconds = time.monotonic() - began
    signal.setitimer(signal.ITIMER_REAL, 0)
    program.kill()
    codec.send(verdicts, {"reason": reason, "seconds": seconds, "detail": detail[:500]})
    return 0


def _give_up_powers() -> None:
    isolate.drop_capabilities()
    isolate.die_with_parent()


def _become_guest(fd: int, baseline: int, isolation: str) -> None:
    status = 1
    try:
        os.dup2(fd, 3)
        # The server's standard input is /dev/null.
        os.dup2(0, 1)
        os.dup2(0, 2)
        # No pipe of the server or of the judge stays open: verdicts travel there.
        os.closerange(4, 256)
        random.seed(0)
        if isolation == "landlock":
            isolate.landlock(isolate.library_folders())
        _give_up_powers()
        isolate.seccomp(isolate.seccomp_filter(os.getpid(), isolation))
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        guest.live(3, baseline)
    except codec.Closed:
        status = 0
    finally:
        os._exit(status)
