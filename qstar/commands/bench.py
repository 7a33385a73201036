"""`qstar bench`: speed beside other programs."""

from __future__ import annotations

import importlib
from typing import Any

from qstar.errors import require
from qstar.flags import Parser, integer

BENCHES = ("accelerator", "generate", "quiet_star", "rl", "train")  # modules of qstar.bench


def main(argv: list[str]) -> int:
    """qstar bench accelerator | generate | quiet_star | rl | train [--model=DIR] [--rounds=N] [--json]"""
    p = Parser("bench", "Measures qstar beside what it could be replaced by, on this machine, in turn.")
    p.add_argument("what", choices=BENCHES)
    p.flag("--model DIR", "for generate and train: this model instead of random ones of 20M parameters")
    p.switch("--json", "JSON instead of a table")
    p.switch("--quick", "one repetition of small sizes")
    p.flag("--rounds N", "for generate, rl and train: how often the two sides take turns (default: 3)", integer(1))
    a = p.parse_args(argv)
    options: dict[str, Any] = dict(as_json=a.json, quick=a.quick, device=a.device)
    if a.rounds:
        require((a.what in ("generate", "rl", "train"), f"bench: --rounds is not for {a.what}"))
        options |= {"rounds": a.rounds}
    if a.model:
        require((a.what in ("generate", "train"), f"bench: --model is for generate and train, not {a.what}"))
        from qstar.models.hub import resolve

        options |= {"model": str(resolve(a.model))}
    # Both sides of a comparison run in processes of their own; this one does not start JAX.
    importlib.import_module(f"qstar.bench.{a.what}").main(**options)
    return 0
