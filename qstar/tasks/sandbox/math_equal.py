"""The helper process that compares mathematical answers for `qstar.tasks.math`: pairs come in, verdicts go out.

python -P math_equal.py JOBS ANSWERS MEMORY_MB

A script of its own, so that it starts without importing qstar.
"""

from __future__ import annotations

import logging
import os
import resource
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import codec  # noqa: E402


def main(jobs: int, answers: int, memory_mb: int) -> None:
    """Serves until the pipe of jobs is closed."""
    from math_verify import parse, verify

    sys.path.pop(0)
    # math-verify warns on every call that its own time-outs are off.
    logging.disable(logging.CRITICAL)
    top = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_mb << 20 if top == resource.RLIM_INFINITY else min(top, memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, top))
    codec.send(answers, "ready")
    while True:
        try:
            gold, answer = codec.receive(jobs)
        except codec.Closed:
            return
        try:
            # Its time-outs are alarms, which do not stop C code; the parent kills this process instead.
            found = [parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
            same = bool(found[1]) and verify(*found, timeout_seconds=None)
            reason = "equal" if same else "different" if found[1] else "unparsed"
        except MemoryError:
            reason = "error"
        # A model's text makes the parser and SymPy raise anything; no such answer is right.
        except Exception:
            reason = "unparsed"
        codec.send(answers, reason)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
