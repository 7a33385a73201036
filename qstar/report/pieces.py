"""The parts that sections are put together from: cards, cells, chips, and how values are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qstar.report import frames
from qstar.report.frames import arm_label, percent
from qstar.report.markup import Safe, escape, join, tag
from qstar.report.rationales import OUTCOMES, Row
from qstar.report.run import Arm, Run

VERDICT_COLOURS = [(name, f"var(--{name})") for name in OUTCOMES]
STAGE_COLOURS = [(name, f"var(--c{number})") for number, name in enumerate(frames.STAGES)]
COLOURS = 7  # --c0 ... --c6 in the style sheet


def section(anchor: str, title: str, *children: Any) -> Safe:
    """A titled section that the table of contents can link to."""
    return tag("section", tag("h2", title), *children, id=anchor)


def note(*children: Any) -> Safe:
    """A paragraph of explanation."""
    return tag("p", *children, class_="note")


def grid(items: Sequence[Safe]) -> Safe | None:
    """Charts side by side where there is room."""
    return tag("div", *items, class_="grid") if items else None


def details(title: str, *children: Any) -> Safe:
    """Something that opens at a click."""
    return tag("details", tag("summary", title), *children)


def card(title: str, *children: Any) -> Safe:
    """A titled box around something."""
    return tag("figure", tag("figcaption", title), *children, class_="card")


def arm_title(run: Run, arm: Arm) -> str:
    """An arm's name with its meaning ("rat · with rationalisation"), once if both say the same."""
    label = arm_label(run, arm)
    return label if arm.name in ("", label) or _says_it(arm) else f"{arm.name} · {label}"


def arm_name(run: Run, arm: Arm) -> Safe:
    """An arm's title with the name in bold."""
    name, *label = arm_title(run, arm).split(" · ", 1)
    return join([tag("b", name), *(f" {text}" for text in label)])


def _says_it(arm: Arm) -> bool:
    return "rationali" in arm.name


def status_chip(arm: Arm) -> Safe:
    """Whether an arm is open, finished or stopped, in its colour."""
    kinds = {"finished": "ok", "stopped": "bad"}
    return tag("span", arm.status, class_=f"chip {kinds.get(arm.status, 'open')}")


def value_cell(line: frames.Curve, at: int) -> Safe:
    """A curve's value at a loop with its interval."""
    value, low, high = line.at(at)
    bounds = None if low is None else tag("small", f" {100 * low:.1f}–{100 * high:.1f}")
    return tag("span", percent(value), bounds, class_="value")


def plain(value: Any, key: str = "") -> Any:
    """A metric as table text: a dash for none, thousands with commas, seconds to a tenth."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if "seconds" in key else f"{value:.4g}"


def measures(row: Row) -> list[str]:
    """The keys of a metrics row that hold values."""
    return [key for key in row if key not in ("arm", "iteration", "stage", "step")]


def whole_percent(value: float) -> str:
    """A share in whole per cent, with a decimal next to 0 and 1."""
    return f"{100 * value:.1f}%" if 0 < value < 0.01 or 0.99 < value < 1 else f"{100 * value:.0f}%"


def loop_name(value: float) -> str:
    """A tick of the loop axis: loop 0 is the base."""
    return "base" if value == 0 else f"{value:g}"


def loop_title(loop: int) -> str:
    """A loop in running text."""
    return "base" if loop == 0 else f"loop {loop}"
