"""`qstar bench`: speed beside other programs."""

from __future__ import annotations

import importlib

from qstar.flags import Parser

BENCHES = ("generate", "quiet_star", "rl", "train")  # modules of qstar.bench


def main(argv: list[str]) -> int:
    """qstar bench generate | quiet_star | rl | train [--json]"""
    p = Parser("bench", "Measures qstar beside what it could be replaced by, on this machine, in turn.")
    p.add_argument("what", choices=BENCHES)
    p.switch("--json", "JSON instead of a table")
    p.switch("--quick", "one repetition of small sizes")
    a = p.parse_args(argv)
    # Both sides of a comparison run in processes of their own; this one does not start JAX.
    importlib.import_module(f"qstar.bench.{a.what}").main(as_json=a.json, quick=a.quick, device=a.device)
    return 0
