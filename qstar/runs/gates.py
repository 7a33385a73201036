"""Gates: bounds on what a base model can do, checked before any arm is paid for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qstar import distributed
from qstar.errors import UserError
from qstar.runs.folder import once_json
from qstar.runs.settings import Gate
from qstar.train.metrics import show_table


def check_gates(console: Any, folder: Path, gates: dict[str, Gate], measure: Callable[[], dict[str, float]]) -> None:
    """Compares what `measure` finds ({metric: value}) with the gates, once: FOLDER/gates.json; prints a table.

    A gate reads e.g. {"metric": "hinted_accuracy/3", "min": 0.6, "why": ..., "stop": True}.

    Raises:
      UserError: a gate with stop=True does not hold.
    """
    if not gates:
        return
    found = once_json(folder / "gates.json", lambda: _compare(gates, measure()))
    rows = [
        {"gate": k, "value": g["value"], "limit": g["limit"], "holds": "yes" if g["ok"] else "NO"}
        for k, g in found.items()
    ]
    if distributed.is_first():
        show_table(console, "gates of the base", rows)
    failed = [(k, g) for k, g in found.items() if not g["ok"] and gates[k].stop]
    if failed:
        name, g = failed[0]
        raise UserError(f"gate {name}: {g['metric']} is {g['value']:.3f}, wanted {g['limit']}: {g['why']}")


def _compare(gates: dict[str, Gate], values: dict[str, float]) -> dict[str, Any]:
    """Returns {gate: {metric, value, limit, ok, why}}."""
    out = {}
    for name, gate in gates.items():
        value = values[gate.metric]
        low, high = -math.inf if gate.min is None else gate.min, math.inf if gate.max is None else gate.max
        bounds = {"at least": gate.min, "at most": gate.max}
        limit = ", ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        ok = bool(low <= value <= high)
        out[name] = {"metric": gate.metric, "value": value, "limit": limit, "ok": ok, "why": gate.why}
    return out
