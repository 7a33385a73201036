"""Reinforcement learning on a page: curves by update, first and last numbers, and the logged completions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qstar.data.sources import read_jsonl
from qstar.report import charts, stats
from qstar.report.charts import Card
from qstar.report.pages.browser import fitting, shortened
from qstar.report.rationales import Row
from qstar.report.read import Run

COMPLETION_BYTES = 1_500_000  # of JSON on a page, before it is packed
UPDATES = 40  # of an arm whose completions a page holds, spaced evenly
COLUMNS = ("arm", "update", "group", "sample", "prompt", "completion", "answer", "gold", "score", "advantage", "kl",
           "rewards", "n_tokens", "truncated")  # fmt: skip
NUMBERS = {  # of the first and the last logged update
    "score": ("score", "{:.3f}"),
    "kl": ("divergence, nats", "{:.2f}"),
    "clip_fraction": ("clipped tokens", "{:.1%}"),
    "length": ("tokens", "{:.0f}"),
    "truncated": ("cut off", "{:.0%}"),
    "groups_without_signal": ("no signal", "{:.0%}"),
}
CURVES = {
    "score": "Score of the responses",
    "kl": "Divergence from the reference, nats per response",
    "entropy": "Entropy of the policy, nats per token",
    "groups_without_signal": "Share of groups without signal: all their scores are equal",
}
LATE = {  # shown where they ever leave their first value
    "clip_fraction": "Share of clipped tokens",
    "approx_kl": "Nats per token from the rollouts' policy",
    "value_loss": "Loss of the critic",
    "truncated": "Share cut off at the length limit",
    "length": "Tokens per response",
}


def cards(run: Run) -> list[Card]:
    """A line per arm in every chart, and per arm one chart of what its score is made of."""
    arms = by_arm(run.rows)
    drawn = [_card(title, arms, key) for key, title in CURVES.items()]
    for name, rows in arms.items():
        keys = [key for key in rows[-1] if key.startswith("reward/")]
        title = f"Parts of the score, without weights, and correctness · {name}"
        drawn.append(_card(title, dict.fromkeys(keys, rows)))
    for key, title in LATE.items():
        if any(abs((r.get(key) or 0) - (rows[0].get(key) or 0)) > 1e-6 for rows in arms.values() for r in rows):
            drawn.append(_card(title, arms, key))
    return [card for card in drawn if card]


def by_arm(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of stage "rl" by label of their arm (and student, where there are several), by update."""
    mine = [_with_truncated(r) for r in rows if r.get("stage") == "rl"]
    several = len({r.get("student", 0) for r in mine}) > 1
    found: dict[str, dict[int, Row]] = {}
    for r in mine:
        name = stats.label(r["arm"]) + (f" ({r['student']})" if several else "")
        # A resumed run repeats the updates since its last checkpoint: the later row replaces the earlier.
        found.setdefault(name, {})[r["step"]] = r
    return {name: [steps[s] for s in sorted(steps)] for name, steps in found.items()}


def _with_truncated(row: Row) -> Row:
    return row if row.get("ended") is None else {**row, "truncated": 1.0 - row["ended"]}


def summary(run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: an arm's numbers at its first and last logged update, and its held-out accuracy."""
    rows = []
    for arm in run.arms:
        logged = [_with_truncated(r) for r in arm.stage("rl")]
        if not logged:
            continue
        accuracy = stats.metric(arm, "accuracy")
        ends = [stats.percent(accuracy.values[i]) for i in (0, -1)] if accuracy.x else []
        cells = [stats.arm_title(run, arm), f"{logged[0]['step']:,} → {logged[-1]['step']:,}", " → ".join(ends) or "–"]
        for key, (_, form) in NUMBERS.items():
            values = [r[key] for r in (logged[0], logged[-1]) if r.get(key) is not None]
            cells.append(" → ".join(form.format(v) for v in values) or "–")
        rows.append(cells)
    return ["arm", "updates", "held-out accuracy", *(title for title, _ in NUMBERS.values())], rows


def embedded(run: Run) -> dict[str, Any]:
    """The completions of at most `UPDATES` updates of each arm, as far as there is room: what browser.js reads."""
    files = []
    for arm in run.arms:
        updates = sorted(arm.completions)
        places = np.unique(np.linspace(0, len(updates) - 1, min(UPDATES, len(updates))).round().astype(int))
        files += [(arm, arm.completions[updates[i]]) for i in places]
    parts = [[_values({**row, "arm": arm.name}) for row in read_jsonl(path)] for arm, path in files]
    titles = {arm.name: stats.arm_title(run, arm) for arm in run.arms}
    logged = sum(len(arm.completions) for arm in run.arms)
    rows = fitting(parts, COMPLETION_BYTES)
    return {"columns": COLUMNS, "arms": titles, "rows": rows, "files": len(files), "logged": logged}


def _values(row: Row) -> list[Any]:
    prompt, completion = shortened(row)
    return [{**row, "prompt": prompt, "completion": completion}.get(key) for key in COLUMNS]


def _card(title: str, arms: Mapping[str, Sequence[Row]], key: str = "") -> Card | None:
    # Without `key` the names are keys: of the parts of a score.
    named: list[tuple[str, Sequence[Sequence[float]]]] = []
    for name, rows in arms.items():
        curve = stats.curve(rows, "step", functools.partial(stats.row_point, key=key or name))
        named.append((name.removeprefix("reward/"), curve if any(curve.values) else ((), ())))
    ys = [y for _, (_, values, *_) in named for y in values]
    low, high = min(ys, default=0.0), max(ys, default=0.0)
    # From 0, unless the curve moves only in the upper half, where its changes would be too small.
    low = low if low < 0 or low > 0.5 * high else 0.0
    y_range = (low, high) if low < high else None
    return charts.series_card(title, named, x_label="updates", y_format="{:g}".format, y_range=y_range)
