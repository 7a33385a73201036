"""Judges model-written Python by its tests, in processes that it can neither leave nor talk into a good verdict.

What is promised, and by what:

* **The verdict is not the program's to give.** The tests run in another process, the judge. It asks the program's
  process to call this function with these arguments, gets back a plain value (`sandbox.codec`: numbers, text,
  containers of exact built-in types) and compares it itself. A program that exits with 0, prints "passed", patches
  `assert`, `sys` or `builtins`, walks the frames of its interpreter, writes to its file descriptors or returns an object
  that equals everything has nothing to patch: the process it lives in holds neither tests, nor expected values, nor
  a pipe on which a verdict travels. It is forked before the tests are read.
* **Passed means that all tests ran.** The tests ran to their end without an exception, and at least one assertion
  was really reached. Files of tests without an assertion are refused.
* **Nothing outlives its limit.** Wall clock, CPU time, address space, file size, threads and open files are limited; new
  processes are refused by seccomp; the program's process is killed with its namespace after every verdict, and its
  judge by a timer of the kernel if values make it hang.
* **Nothing gets out.** No sockets, no other process in reach, no capabilities, and no signal to any process but the
  program's own, be it sent by the kernel (owners of descriptors, leases, terminals). The file system is Python's library,
  read-only, and an empty scratch folder of 16 MiB in memory: `Verifier.isolation` is "namespaces". Where the system
  does not allow user namespaces (many containers), nothing can be written, and the library is all that can be read
  ("landlock"); on kernels without Landlock no file can be opened, and programs import what was imported before them,
  some 80 modules ("seccomp"). Without seccomp, on other systems and processors, no program is run.
* **Packages are lent, not trusted.** With `allow=("numpy",)` an installed package is imported before a program is locked
  in, and its folder can be read; all of the above holds as without it. Numbers of numpy arrive as Python's, arrays as arrays.

What is not covered: with "landlock" and "seccomp" a program can read the host's name and how many processors and how much
memory there are, with "landlock" also what is installed in the `site-packages` of Python's own library (not those of a
virtual environment). Programs that start processes (`multiprocessing`, `subprocess`) or read standard input, which is
empty, fail in each of them.

What is not promised: a program that knows the problem can still return the expected values by heart, and tests that
are too weak pass wrong programs, here as anywhere. A bug of the kernel is a way out. Timing can be observed. Values
travel by copy: a test that looks at its own argument after the call sees it unchanged, functions cannot be handed to the
program, and objects of the program's classes can be created, called, read and passed back, but equal nothing.
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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from qstar.errors import UserError
from qstar.tasks.sandbox import codec

PASSED = "passed"  # every test ran and held
WRONG = "wrong"  # an assertion failed, or compared something that is no plain value
ERROR = "error"  # the program raised an exception or does not compile, or a test could not run
TIMEOUT = "timeout"  # wall clock or CPU time
MEMORY = "memory"  # the program ran out of its memory
EXITED = "exited"  # the program's process ended, by itself or by a signal, before the tests were through
OUTPUT = "output"  # what came back is too large, or is no answer
UNTESTED = "untested"  # no assertion was reached, though none failed
REASONS = (PASSED, WRONG, ERROR, TIMEOUT, MEMORY, EXITED, OUTPUT, UNTESTED)

_SERVER = Path(__file__).with_name("sandbox") / "server.py"
# Nothing of ours; sets in the same order every time; and no threads of numpy's, which would keep the server from namespaces.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
_GRACE = 5.0  # seconds beyond a job's limit after which its server is taken for dead


class Verdict(NamedTuple):
    """What became of one program.

    Attributes:
        passed: all tests ran and held; the same as `reason == PASSED`.
        reason: one of REASONS.
        seconds: wall time of program and tests, without starting the processes.
        detail: one line for people; what the program says of itself may be in it.
    """

    passed: bool
    reason: str
    seconds: float
    detail: str = ""


class Job(NamedTuple):
    """A program and its tests.

    Attributes:
        program: Python source. Its `__name__` is not "__main__".
        tests: Python source that asserts; trusted.
        names: what the tests take from the program; None: see `needed_names`.
    """

    program: str
    tests: str
    names: tuple[str, ...] | None = None


def run_python(
    program: str, tests: str, *, timeout_s: float = 3.0, memory_mb: int = 256, allow: tuple[str, ...] = ()
) -> Verdict:
    """Runs a program and judges it by its tests, in a pool of workers that this process keeps.

    Args:
        program: Python source, written by anyone.
        tests: Python source that asserts, written by someone trusted; it uses names that the program defines.
        timeout_s: wall time of program and tests together.
        memory_mb: address space that the program may take, in MiB, beyond that of the interpreter.
        allow: installed packages that the program and its tests may import, e.g. ("numpy",).

    Raises:
        ValueError: tests that do not parse or assert nothing, or limits that are not positive.
        UserError: this machine has no way to lock a program in (Linux on x86-64 with seccomp is needed), or has no such
            package.
    """
    return pool(allow).run(Job(program, tests), timeout_s=timeout_s, memory_mb=memory_mb)


def pool(allow: Iterable[str] = ()) -> Verifier:
    """The pool that this process keeps for these packages: one worker per CPU, started by the first call, closed at exit."""
    return _pool_of(os.getpid(), tuple(sorted(allow)))  # a fork must not talk into its parent's pipes


@functools.cache
def _pool_of(pid: int, allow: tuple[str, ...]) -> Verifier:
    verifier = Verifier(allow=allow)
    atexit.register(verifier.close)
    return verifier


PARSING = (
    threading.Lock()
)  # CPython 3.11 counts the depth of all threads' trees in one place, and gives up (SystemError)


@functools.lru_cache(maxsize=4096)
def needed_names(tests: str) -> tuple[str, ...]:
    """The global names that tests use and do not make themselves: what they need from the program.

    Names of built-ins are Python's own, even if the program has defined them anew, so that it cannot lend its `set`
    or `sorted` to the comparison; unless the tests name nothing else (a task that asks for a function called `sum`).

    Raises:
        ValueError: the tests do not parse, or assert nothing.
    """
    try:
        with PARSING:
            tree = ast.parse(tests)
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
        tables = [symtable.symtable(tests, "tests", "exec")]
        compile(tests, "tests", "exec", dont_inherit=True)  # finds more than the parser: a `return` outside a function
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests: not Python ({error})") from None
    if not asserts:
        raise ValueError("tests: assert nothing, so every program would pass")
    made = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    used: dict[str, None] = {}
    for table in tables:
        tables.extend(table.get_children())
        top = table.get_type() == "module"
        used |= {s.get_name(): None for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    free = tuple(name for name in used if name not in made)
    return tuple(name for name in free if not hasattr(builtins, name)) or free


class Verifier:
    """A pool of workers, each judging one program at a time. A context manager; safe to use from several threads."""

    def __init__(self, workers: int | None = None, *, isolation: str = "auto", allow: Iterable[str] = ()):
        """`workers`: one per CPU when None. `isolation`: "auto", or the one to insist on (see the module). `allow`: installed
        packages that programs and tests may import; those that they import themselves have to be named, too.

        Raises:
            UserError: this machine cannot lock programs in, or not in that way, or lacks a package.
        """
        if isolation not in ("auto", "namespaces", "landlock", "seccomp"):
            raise UserError(f"isolation={isolation!r} is not one of auto, namespaces, landlock, seccomp")
        folders = [_package_folder(name) for name in allow]
        count = workers or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._owner = os.getpid()
        try:
            for _ in range(count):
                self._workers.append(_Worker(isolation, folders))
                self._idle.put(self._workers[-1])
        except BaseException:
            self.close()
            raise

    @property
    def isolation(self) -> str:
        """How programs are locked in: "namespaces", "landlock" or "seccomp"."""
        return self._workers[0].isolation

    def run(self, job: Job, *, timeout_s: float = 3.0, memory_mb: int = 256) -> Verdict:
        """Judges one program; see `run_python`."""
        if not (0 < timeout_s < math.inf and memory_mb > 0):
            raise ValueError(f"timeout_s={timeout_s} and memory_mb={memory_mb} must be positive numbers")
        names = needed_names(job.tests)  # also finds what is wrong with the tests
        order = {
            "program": job.program,
            "tests": job.tests,
            "names": names if job.names is None else job.names,
            "timeout_s": timeout_s,
            "memory_mb": int(memory_mb),
        }
        worker = self._idle.get()
        try:
            return worker.run(order)
        finally:
            self._idle.put(worker)

    def run_many(self, jobs: Iterable[Job], *, timeout_s: float = 3.0, memory_mb: int = 256) -> list[Verdict]:
        """Judges programs, as many at a time as there are workers; verdicts in the order of the jobs."""
        run = functools.partial(self.run, timeout_s=timeout_s, memory_mb=memory_mb)
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(run, jobs))

    def close(self) -> None:
        """Ends the workers; what they are judging ends with them. Does nothing in a fork of the process that made them."""
        if self._owner == os.getpid():
            for worker in self._workers:
                worker.stop()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _package_folder(name: str) -> str:
    """The folder of an installed package; it is not imported here.

    Raises:
        UserError: there is none of this name.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if len(places) != 1:
        why = "is not an installed package (a top-level name such as numpy); install it, or leave it out"
        raise UserError(f"allow={name!r} {why}")
    return os.path.realpath(places[0])


class _Worker:
    """One server process and the two pipes to it."""

    def __init__(self, isolation: str, folders: list[str]):
        self._wanted, self._folders, self._process = isolation, folders, None
        self._start()

    def run(self, order: dict) -> Verdict:
        began = time.monotonic()
        if self._process is None or self._process.poll() is not None:  # ended while it was idle
            self.stop()
            self._start()
        try:
            codec.send(self._jobs, order)
        except codec.TooLong as error:
            return Verdict(False, OUTPUT, 0.0, f"program and tests are too large: {error}")
        except codec.Closed:
            return self._broken(EXITED, began, "the sandbox ended")
        found, deadline = None, began + order["timeout_s"] + _GRACE
        try:
            while "end" not in (message := codec.receive(self._verdicts, deadline)):
                found = message
        except TimeoutError:
            return self._broken(TIMEOUT, began, "the sandbox did not answer")
        except codec.Closed:
            return self._broken(EXITED, began, "the sandbox ended")
        if found is None:  # the judge itself was ended: by its timer, or by the kernel for want of memory
            timer = message["end"] == -signal.SIGALRM
            return self._broken(TIMEOUT if timer else OUTPUT, began, f"the judge ended with {message['end']}")
        return Verdict(found["reason"] == PASSED, found["reason"], found["seconds"], found["detail"])

    def _broken(self, reason: str, began: float, detail: str) -> Verdict:
        self.stop()
        return Verdict(False, reason, time.monotonic() - began, detail)

    def _start(self) -> None:
        jobs, self._jobs = os.pipe()
        self._verdicts, verdicts = os.pipe()
        arguments = [str(jobs), str(verdicts), self._wanted, *self._folders]
        command = [sys.executable, "-S", "-s", "-P", os.fspath(_SERVER), *arguments]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(jobs, verdicts),
                env=_ENVIRONMENT,
                start_new_session=True,  # a Ctrl-C is for us
            )
        finally:
            os.close(jobs)
            os.close(verdicts)
        try:
            answer = codec.receive(self._verdicts, time.monotonic() + 60)
        except (codec.Closed, TimeoutError):
            answer = {"refused": "its process did not start"}
        if "ready" not in answer:
            self.stop()
            raise UserError(f"model-written code cannot be run safely here: {answer['refused']}")
        self.isolation = answer["ready"]

    def stop(self) -> None:
        """Ends the server; its judge dies with it, and the program with the judge."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._process = None
        for fd in (self._jobs, self._verdicts):
            os.close(fd)
