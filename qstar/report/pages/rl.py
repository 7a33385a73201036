"""Curves of reinforcement learning: score, its parts, divergence from the reference and entropy by update."""

from __future__ import annotations

from collections.abc import Iterable

from qstar.report import charts, stats
from qstar.report.charts import Card
from qstar.report.rationales import Row
from qstar.report.read import Run

CURVES = {
    "score": "Score of the responses",
    "kl": "Divergence from the reference, nats per response",
    "entropy": "Entropy of the policy, nats per token",
}
LATE = {  # shown where they ever leave their first value
    "clip_fraction": "Share of clipped tokens",
    "approx_kl": "Nats per token from the rollouts' policy",
    "value_loss": "Loss of the critic",
    "ended": "Share that ended by themselves",
    "length": "Tokens per response",
}
Series = dict[str, list[tuple[float, float]]]


def cards(run: Run) -> list[Card]:
    """A line per arm in every chart, and per arm one chart of what its score is made of."""
    arms = by_arm(run.rows)
    drawn = [_card(title, series(arms, key)) for key, title in CURVES.items()]
    for name, rows in arms.items():
        keys = [key for key in rows[-1] if key.startswith("reward/")]
        parts = {key.removeprefix("reward/"): _points(rows, key) for key in keys}
        drawn.append(_card(f"What the score is made of · {name}", parts))
    for key, title in LATE.items():
        if any(abs(r.get(key, 0) - rows[0].get(key, 0)) > 1e-6 for rows in arms.values() for r in rows):
            drawn.append(_card(title, series(arms, key)))
    return [card for card in drawn if card]


def by_arm(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of stage "rl" by label of their arm (and student, where there are several), by update."""
    mine = [r for r in rows if r.get("stage") == "rl"]
    several = len({r.get("student", 0) for r in mine}) > 1
    found: dict[str, dict[int, Row]] = {}
    for r in mine:
        name = stats.label(r["arm"]) + (f" ({r['student']})" if several else "")
        # A resumed run repeats the updates since its last checkpoint: the later row replaces the earlier.
        found.setdefault(name, {})[r["step"]] = r
    return {name: [steps[s] for s in sorted(steps)] for name, steps in found.items()}


def series(arms: dict[str, list[Row]], key: str) -> Series:
    """Arm -> (update, value) of a metric."""
    return {name: _points(rows, key) for name, rows in arms.items()}


def _points(rows: list[Row], key: str) -> list[tuple[float, float]]:
    return [(r["step"], r[key]) for r in rows if r.get(key) is not None]


def _card(title: str, found: Series) -> Card | None:
    named = [(name, list(zip(*points)) if any(y for _, y in points) else [(), ()]) for name, points in found.items()]
    ys = [y for _, (_, values) in named for y in values]
    low, high = min(ys, default=0.0), max(ys, default=0.0)
    # From 0, unless the curve moves only in the upper half, where its changes would be too small.
    low = low if low < 0 or low > 0.5 * high else 0.0
    y_range = (low, high) if low < high else None
    return charts.series_card(title, named, x_label="updates", y_format="{:g}".format, y_range=y_range)
