"""Report section of reinforcement learning: score, its parts, divergence from the reference and entropy by update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qstar.report.markup import Safe
from qstar.report.pieces import COLOURS, card, grid, note, section
from qstar.report.plots import Line, line_chart
from qstar.report.rationales import Row

ABOUT = (
    "What the policy was paid, how far it went from the model it started from (nats per response; a divergence that runs "
    "away is the first sign of a reward being gamed), and how much it still tries out (entropy, nats per token)."
)
CURVES = (
    ("score", "Score of the responses"),
    ("kl", "Divergence from the reference"),
    ("entropy", "Entropy of the policy"),
)
PARTS = "reward/"
LATE = ("clip_fraction", "approx_kl", "value_loss", "ended", "length")  # shown where they ever leave their first value


def reinforce_section(rows: Sequence[Row]) -> Safe | None:
    """Curves of the rows of stage "rl": a line per arm; one chart per arm for what its score is made of."""
    arms = by_arm(rows)
    if not arms:
        return None
    charts = [_chart(title, key, {name: mine for name, mine in arms.items()}) for key, title in CURVES]
    for name, mine in arms.items():
        keys = [k for k in mine[-1] if k.startswith(PARTS)]
        lines = {k.removeprefix(PARTS): [(r["step"], r[k]) for r in mine if r.get(k) is not None] for k in keys}
        charts.append(_card(f"What the score is made of · {name}", lines))
    for key in LATE:
        if any(abs(r.get(key, 0) - mine[0].get(key, 0)) > 1e-6 for mine in arms.values() for r in mine):
            charts.append(_chart({"value_loss": "Loss of the critic", "approx_kl": "Nats per token from the rollouts' policy",
                                  "clip_fraction": "Share of clipped tokens", "ended": "Share that ended by themselves",
                                  "length": "Tokens per response"}[key], key, arms))  # fmt: skip
    return section("reinforcement", "Reinforcement learning", note(ABOUT), grid([c for c in charts if c]))


def by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of stage "rl" by arm (and student, where there are several), the newest of each update."""
    mine = [r for r in rows if r.get("stage") == "rl"]
    several = len({r.get("student", 0) for r in mine}) > 1
    found: dict[str, dict[int, Row]] = {}
    for r in mine:
        name = f"{r['arm']} ({r['student']})" if several else r["arm"]
        found.setdefault(name, {})[r["step"]] = r  # a resumed run writes some updates again
    return {name: [steps[s] for s in sorted(steps)] for name, steps in found.items()}


def _chart(title: str, key: str, arms: dict[str, list[Row]]) -> Safe | None:
    return _card(title, {n: [(r["step"], r[key]) for r in mine if r.get(key) is not None] for n, mine in arms.items()})


def _card(title: str, series: dict[str, list[tuple[Any, Any]]]) -> Safe | None:
    lines = [
        Line(name, *zip(*points), f"var(--c{number % COLOURS})", marks=len(points) == 1, dashed=number >= COLOURS)
        for number, (name, points) in enumerate(series.items())
        if any(y for _, y in points)
    ]
    if not lines:
        return None
    low, high = min(min(line.y) for line in lines), max(max(line.y) for line in lines)
    low = low if low < 0 or low > 0.5 * high else 0.0  # what moves only near the top is shown there
    chart = line_chart(lines, title=title, x_label="updates", y_format=lambda v: f"{v:g}",
                       y_range=(low, high) if low < high else None)  # fmt: skip
    return card(title, chart)
