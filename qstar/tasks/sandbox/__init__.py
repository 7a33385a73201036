"""Sandbox: runs model-written Python against tests, in processes that it can neither leave nor influence.

Covered:

* **The program does not decide its verdict.** The tests run in another process, the judge. It asks the program's
  process to call a function, gets back a plain value (`sandbox.codec`) and compares it itself. Exiting with 0, patching
  `assert`, walking frames or returning an object that equals everything gains nothing: the program's process never held
  tests, expected values or the pipe of verdicts.
* **Passed means that all tests ran.** The tests ran to their end without an exception, and at least one assertion was
  reached. Tests without an assertion are refused.
* **Limits.** Wall clock, CPU time, address space, file size, threads and open files; seccomp refuses new processes. The
  program's process is killed after every verdict, the judge by a kernel timer if values make it hang.
* **Isolation.** No sockets, capabilities, access to other processes or signals to them, also not by way of the kernel.
  No file can be written, and only Python's library be read (`Sandbox.isolation` "landlock"); on kernels without Landlock
  no file can be opened ("seccomp"). Without seccomp, or on another system or processor than Linux on x86-64, no program
  is run.
* **Packages.** With `allow=("numpy",)` a package is imported before confinement, and its folder is readable. Numbers of
  numpy arrive as Python's, arrays as arrays.

Not covered: kernel bugs; timing; expected values returned by heart; weak tests. A program can read the host's name,
processors and memory, with "landlock" also Python's own `site-packages`. Programs that start processes, write files or
read standard input fail. Values travel by copy: a test does not see changes of its own argument, functions
cannot be passed to the program, and other objects (of its classes, iterators, views of a dict) can be created, called
and read, but equal nothing.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import functools
import importlib.util
import math
import os
import queue
import signal
import subprocess
import symtable
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from qstar.errors import UserError
from qstar.tasks.sandbox import codec

REASONS = {
    "passed": "every test ran and held",
    "wrong": "an assertion failed, or compared something that is no plain value",
    "error": "the program raised an exception or does not compile, or a test could not run",
    "timeout": "wall clock or CPU time",
    "memory": "the program ran out of its memory",
    "exited": "the program's process ended, by itself or by a signal, before the tests were through",
    "output": "what came back is too large, or is no answer",
    "untested": "no assertion was reached, though none failed",
}
# Nothing of the user's environment, and a fixed hash seed: sets have the same order in every run. The server forks, which
# numpy's threads would not survive.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
_GRACE = 5.0  # seconds beyond a job's limit after which its server counts as dead
# CPython 3.11 counts the depth of all threads' syntax trees in one place, and gives up (SystemError).
PARSING = threading.Lock()


class Verdict(NamedTuple):
    """The outcome of one program."""

    passed: bool  # all tests ran and held; the same as `reason == "passed"`
    reason: str  # one of REASONS
    seconds: float  # wall time of program and tests, without starting the processes
    detail: str = ""  # one line for people; the program's own messages may be in it


class Job(NamedTuple):
    """A program and its tests."""

    program: str  # Python source; its `__name__` is not "__main__"
    tests: str  # Python source that asserts; trusted
    names: tuple[str, ...] | None = None  # what the tests take from the program; None: see `needed_names`


def run_python(
    program: str, tests: str, *, timeout_s: float = 3.0, memory_mb: int = 256, allow: tuple[str, ...] = ()
) -> Verdict:
    """Runs a program (untrusted) against its tests (trusted), in a pool of workers that this process keeps.

    Args:
        timeout_s: wall time of program and tests together.
        memory_mb: address space that the program may take, in MiB, beyond that of the interpreter.
        allow: installed packages that the program and its tests may import, e.g. ("numpy",).

    Raises:
        ValueError: tests that do not parse or assert nothing, or limits that are not positive.
        UserError: this machine cannot confine a program (it needs Linux on x86-64 with seccomp) or has no such package.
    """
    return pool(allow).run(Job(program, tests), timeout_s=timeout_s, memory_mb=memory_mb)


def pool(allow: Iterable[str] = ()) -> Sandbox:
    """This process's pool for these packages: one worker per CPU, started by the first call, closed at exit."""
    return of_this_process(Sandbox, allow=tuple(sorted(_packages(allow))))


def of_this_process(cls: Any, **options: Any) -> Any:
    """The object of this process with these options, closed at exit."""
    return _made(os.getpid(), cls, **options)


@functools.cache
def _made(pid: int, cls: Any, **options: Any) -> Any:
    # By pid: a fork must not use its parent's pipes.
    made = cls(**options)
    atexit.register(made.close)
    return made


@functools.lru_cache(maxsize=4096)
def needed_names(tests: str) -> tuple[str, ...]:
    """Global names that tests use and do not define; ValueError if they do not parse or assert nothing."""
    try:
        with PARSING:
            tree = ast.parse(tests)
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
        made, used = global_names(tests)
        # Finds more than the parser: a `return` outside a function.
        compile(tests, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests: not Python ({error})") from None
    if not asserts:
        raise ValueError("tests: assert nothing, so every program would pass")
    free = tuple(name for name in used if name not in made)
    # Built-ins stay Python's own, so that a program cannot replace the `set` or `sorted` of a comparison; unless the
    # tests need nothing else (a task that asks for a function called `sum`).
    return tuple(name for name in free if not hasattr(builtins, name)) or free


def global_names(code: str) -> tuple[dict[str, bool], list[str]]:
    """Global names that a module's code binds (with whether by `def` or `class`), and those that it reads, in order."""
    with PARSING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = [symtable.symtable(code, "code", "exec")]
    bound = {s.get_name(): s.is_namespace() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    read: dict[str, None] = {}
    for table in tables:
        tables.extend(table.get_children())
        top = table.get_type() == "module"
        read |= {s.get_name(): None for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return bound, list(read)


class Sandbox:
    """A pool of workers, each judging one program at a time. A context manager; safe to use from several threads."""

    def __init__(self, workers: int | None = None, *, isolation: str = "auto", allow: Iterable[str] = ()):
        """Starts `workers` (None: one per CPU); UserError if this machine cannot confine programs in that way."""
        if isolation not in ("auto", "landlock", "seccomp"):
            raise UserError(f"isolation={isolation!r} is not one of auto, landlock, seccomp")
        places = [_package_place(name) for name in _packages(allow)]
        # CPUs that this process may use: in a container fewer than the machine has.
        count = workers or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._owner = os.getpid()
        try:
            for _ in range(count):
                self._workers.append(_Worker(isolation, places))
                self._idle.put(self._workers[-1])
        # Also on Ctrl-C: the workers started so far have sessions of their own and would go on.
        except BaseException:
            self.close()
            raise

    @property
    def isolation(self) -> str:
        return self._workers[0].isolation

    def run(self, job: Job, *, timeout_s: float = 3.0, memory_mb: int = 256) -> Verdict:
        if not (0 < timeout_s < math.inf and memory_mb > 0):
            raise ValueError(f"timeout_s={timeout_s} and memory_mb={memory_mb} must be positive numbers")
        # Here, not in the judge: faulty tests are the caller's error, not a verdict on the program.
        names = needed_names(job.tests)
        limits = {"timeout_s": timeout_s, "memory_mb": int(memory_mb)}
        worker = self._idle.get()
        try:
            return worker.run({**job._asdict(), "names": names if job.names is None else job.names, **limits})
        finally:
            self._idle.put(worker)

    def run_many(self, jobs: Iterable[Job], *, timeout_s: float = 3.0, memory_mb: int = 256) -> list[Verdict]:
        run = functools.partial(self.run, timeout_s=timeout_s, memory_mb=memory_mb)
        # Threads suffice: each waits for a pipe, and the work is done in the workers.
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(run, jobs))

    def close(self) -> None:
        """Ends the workers and what they are judging. Does nothing in a fork of the process that made them."""
        if self._owner == os.getpid():
            for worker in self._workers:
                worker.stop()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _packages(allow: Iterable[str]) -> Iterable[str]:
    return (allow,) if isinstance(allow, str) else allow  # not its letters


def _package_place(name: str) -> str:
    """The folder of an installed package, or the file of one that is a single module."""
    # find_spec does not import a top-level package; a dotted name would import its parent.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    file = spec.origin if spec is not None and spec.has_location else None
    places = list(spec.submodule_search_locations or filter(None, [file])) if spec is not None else []
    if len(places) != 1:
        why = "is not an installed package (a top-level name such as numpy); install it, or leave it out"
        raise UserError(f"allow={name!r} {why}")
    return os.path.realpath(places[0])


class Helper:
    """A helper process of this package and the two pipes to it, which is started again after it had to be killed."""

    def __init__(self, script: str, *arguments: str, flags: Iterable[str] = (), env: Mapping[str, str], start_s: float):
        self._command = [sys.executable, *flags, "-P", os.fspath(Path(__file__).with_name(script))]
        self._arguments, self._env, self._start_s = arguments, env, start_s
        self._process: subprocess.Popen | None = None
        self._jobs = self._answers = -1

    def start(self) -> Any:
        """The first message of a new process; None if it did not start."""
        self.stop()
        jobs, self._jobs = os.pipe()
        self._answers, answers = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*self._command, str(jobs), str(answers), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(jobs, answers),
                env=self._env,
                # Ctrl-C is for the parent, which then ends its helpers.
                start_new_session=True,
            )
        # The child's ends: kept open here, they would hide its death, since no pipe would ever close.
        finally:
            os.close(jobs)
            os.close(answers)
        try:
            return codec.receive(self._answers, time.monotonic() + self._start_s)
        except (codec.Closed, TimeoutError, ValueError):
            self.stop()
            return None

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Ends the process (a server's judge dies with it, and the program with the judge)."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._process = None
        for fd in (self._jobs, self._answers):
            os.close(fd)


class _Worker(Helper):
    def __init__(self, isolation: str, places: list[str]):
        # -S and -s keep installed packages off the import path: programs get those of `allow` alone.
        super().__init__("server.py", isolation, *places, flags=("-S", "-s"), env=_ENVIRONMENT, start_s=60)
        self._start_server()

    def _start_server(self) -> None:
        answer = self.start() or {"refused": "its process did not start"}
        if "ready" not in answer:
            self.stop()
            raise UserError(f"model-written code cannot be run safely here: {answer['refused']}")
        self.isolation = answer["ready"]

    def run(self, order: dict) -> Verdict:
        began = time.monotonic()
        # It may have ended while it was idle, for instance for want of memory.
        if not self.running():
            self._start_server()
        try:
            codec.send(self._jobs, order)
            found, deadline = None, began + order["timeout_s"] + _GRACE
            while "end" not in (message := codec.receive(self._answers, deadline)):
                found = message
        except codec.TooLong as error:
            return self._broken("output", began, f"program and tests are too large: {error}")
        except TimeoutError:
            return self._broken("timeout", began, "the sandbox did not answer")
        except codec.Closed:
            return self._broken("exited", began, "the sandbox ended")
        if found is None:  # the judge itself was ended: by its timer, or by the kernel for want of memory
            timer = message["end"] == -signal.SIGALRM
            return self._broken("timeout" if timer else "output", began, f"the judge ended with {message['end']}")
        return Verdict(found["reason"] == "passed", **found)

    def _broken(self, reason: str, began: float, detail: str) -> Verdict:
        # What the server would still send belongs to this job: only a new one may take the next.
        self.stop()
        return Verdict(False, reason, time.monotonic() - began, detail)
