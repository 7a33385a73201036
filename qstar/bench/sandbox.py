"""Benchmark of the sandbox: programs per minute, beside a new unprotected interpreter for each program.

The programs are three short functions with three assertions each, as in MBPP, in turn, with one in ten that fails. "one at
a time" waits for each verdict, "pool" keeps all workers busy. The plain interpreter has no limits but a time-out,
believes the program's own exit status, and shows what starting Python alone costs.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qstar.bench.common import show
from qstar.tasks.verify import Job, Verifier

_PROGRAMS = (
    Job(
        "import re\ndef first_word(text):\n    found = re.search(r'\\w+', text)\n    return found.group() if found else ''",
        "assert first_word('a b') == 'a'\nassert first_word(' bc, d') == 'bc'\nassert first_word('') == ''",
    ),
    Job(
        "def primes(n):\n    return [p for p in range(2, n) if all(p % d for d in range(2, int(p ** 0.5) + 1))]",
        "assert primes(10) == [2, 3, 5, 7]\nassert primes(2) == []\nassert len(primes(1000)) == 168",
    ),
    Job(
        "from collections import Counter\ndef common(xs, k):\n    return [x for x, _ in Counter(xs).most_common(k)]",
        "assert common('aab', 1) == ['a']\nassert common([], 2) == []\nassert common([3, 3, 1], 2) == [3, 1]",
    ),
)
_WRONG = Job(_PROGRAMS[0].program, "assert first_word('a b') == 'b'")


def main(*, as_json: bool, quick: bool) -> None:
    """Prints programs per minute and the latency of a verdict, in milliseconds."""
    jobs = [_WRONG if i % 10 == 9 else _PROGRAMS[i % 3] for i in range(60 if quick else 600)]
    with Verifier() as pool:
        workers = len(pool._workers)
        sides: dict[str, tuple[Callable[[Job], bool], int]] = {
            "sandbox, one at a time": (lambda job: pool.run(job, timeout_s=30).passed, 1),
            "sandbox, pool": (lambda job: pool.run(job, timeout_s=30).passed, workers),
            "plain interpreter, one at a time": (_plain, 1),
            "plain interpreter, pool": (_plain, workers),
        }
        rounds = 1 if quick else 3
        spent: dict[str, list[float]] = {name: [] for name in sides}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):  # in turn, so that a busy minute of the machine hits all sides
            for name, (judge, threads) in sides.items():
                part = jobs if name.startswith("sandbox") else jobs[: max(20, len(jobs) // 4)]
                seconds, each = _measure(judge, part, threads)
                spent[name].append(seconds / len(part))
                times[name] += each
        rows = [_row(name, spent[name], times[name]) for name in sides]
        notes = {
            "isolation": pool.isolation,
            "workers": workers,
            "programs": rounds * len(jobs),
            "overhead of the sandbox over a plain interpreter, ms per program": round(
                rows[0]["median ms"] - rows[2]["median ms"], 2
            ),
            "load average": round(os.getloadavg()[0], 1),
        }
    show("Judging programs", rows, notes, as_json)


def _measure(judge: Callable[[Job], bool], jobs: list[Job], threads: int) -> tuple[float, list[float]]:
    def timed(job: Job) -> float:
        began = time.perf_counter()
        if judge(job) is (job is _WRONG):
            raise AssertionError(f"a verdict is wrong: {job}")
        return time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        each = list(pool.map(timed, jobs))
    return time.perf_counter() - began, each


def _plain(job: Job) -> bool:
    command = [sys.executable, "-I", "-S", "-c", f"{job.program}\n{job.tests}"]
    run = functools.partial(subprocess.run, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return run(command, stderr=subprocess.DEVNULL, timeout=30).returncode == 0


def _row(name: str, seconds: list[float], each: list[float]) -> dict[str, Any]:
    p50, p90, p99 = np.quantile(each, (0.5, 0.9, 0.99)) * 1000
    return {
        "side": name,
        "programs per minute": round(60 / float(np.median(seconds))),
        "median ms": round(p50, 2),
        "90% ms": round(p90, 2),
        "99% ms": round(p99, 2),
    }
