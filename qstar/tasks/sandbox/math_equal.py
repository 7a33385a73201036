"""The process that compares mathematical answers for `qstar.tasks.equal`: pairs come in, verdicts go out.

python -P math_equal.py MEMORY_MB
"""

from __future__ import annotations

import logging
import os
import resource
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import codec  # noqa: E402


def main(memory_mb: int) -> None:
    """Serves until standard input is closed."""
    from math_verify import parse, verify

    sys.path.pop(0)
    logging.disable(logging.CRITICAL)  # it warns on every call that its own time-outs are off
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    top = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_mb << 20 if top == resource.RLIM_INFINITY else min(top, memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, top))
    codec.send(out, "ready")
    while True:
        try:
            gold, answer = codec.receive(0)
        except codec.Closed:
            return
        try:
            found = [parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
            same = bool(found[1]) and verify(*found, timeout_seconds=None)
            reason = "equal" if same else "different" if found[1] else "unparsed"
        except MemoryError:
            reason = "error"
        except Exception:  # what a model wrote makes the parser and SymPy raise anything; no such answer is right
            reason = "unparsed"
        codec.send(out, reason)


if __name__ == "__main__":
    main(int(sys.argv[1]))
