"""The numbers behind the figures of a Quiet-STaR run, as plain lists: report and notebook draw the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qstar.report.frames import Curve, percent
from qstar.report.quiet.run import MAIN, QuietArm, QuietRun
from qstar.report.rationales import Row

ALL = "all"
_POINTS = 60  # of a smoothed training curve


def classes(run: QuietRun) -> list[str]:
    """The token classes in the corpus's order, `ALL` last; empty before the first evaluation."""
    named = [name for arm in run.arms for row in arm.evaluations for name in row.get("classes") or ()]
    keyed = [key.partition("/")[2] for arm in run.arms for row in arm.evaluations for key in row if "/" in key]
    found = list(dict.fromkeys(map(str, named + keyed)))
    return sorted(found, key=lambda name: name == ALL)


def focus(run: QuietRun) -> str:
    """The class that the headline is about: "hard" if there is one, else the one that the base predicts worst."""
    found = [name for name in classes(run) if name != ALL]
    if "hard" in found or not found:
        return "hard" if found else ALL
    first = [arm.evaluations[0] for arm in run.arms if arm.evaluations]
    worst = {name: max((row.get(f"nll_base/{name}") or 0.0 for row in first), default=0.0) for name in found}
    return max(found, key=lambda name: worst[name])


def class_label(name: str) -> str:
    """A class in running text: "hard tokens"."""
    name = name.replace("_", " ")
    return f"tokens that are {name}" if "(" in name else f"{name} tokens"


def main_arm(run: QuietRun) -> QuietArm | None:
    """The arm that the page opens with: one called as the method is, else the first that thinks, else the first."""
    named = [arm for name in MAIN for arm in run.arms if arm.name == name]
    return next(iter([*named, *(arm for arm in run.arms if arm.thinks), *run.arms]), None)


def spoken(row: Row, name: str, group: str) -> float | None:
    """A measure as the model speaks: with thoughts where it has them, else without."""
    value = row.get(f"{name}/{group}")
    return row.get(f"{name}_base/{group}") if value is None else value


def curve(arm: QuietArm, name: str, group: str) -> Curve:
    """A measure of the evaluations by step, with its 95% interval where all rows have one."""
    rows = [(row, spoken(row, name, group)) for row in arm.evaluations]
    rows = [(row, value) for row, value in rows if value is not None]
    bounds = [interval(row, name, group) for row, _ in rows]
    low, high = ([b[side] for b in bounds] if None not in bounds else [] for side in (0, 1))
    return Curve([int(row.get("step") or 0) for row, _ in rows], [value for _, value in rows], low, high)


def interval(row: Row, name: str, group: str) -> tuple[float, float] | None:
    """The 95% interval of what `spoken` gives, None where it is not known."""
    shown = name if row.get(f"{name}/{group}") is not None else f"{name}_base"
    low, high = (row.get(f"{shown}_{end}/{group}") for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def training(arm: QuietArm, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a measure of the "train" rows, neighbours averaged so that a trend can be seen."""
    pairs = [(row["step"], row[name]) for row in arm.train if row.get(name) is not None]
    size = -(-len(pairs) // _POINTS) or 1
    bins = [pairs[at : at + size] for at in range(0, len(pairs), size)]
    return [b[-1][0] for b in bins], [sum(v for _, v in b) / len(b) for b in bins]


def final(arm: QuietArm) -> Row:
    """The last evaluation, {} before the first."""
    return arm.evaluations[-1] if arm.evaluations else {}


def histogram(row: Row) -> tuple[list[float], list[float]] | None:
    """(edges [n+1], counts [n]) of the mixing weights of an evaluation, None without one."""
    found: Any = row.get("weight_histogram")
    if not isinstance(found, Mapping) or not found.get("counts") or not sum(found["counts"]):
        return None
    edges, counts = list(found.get("edges") or ()), list(found["counts"])
    return (edges, counts) if len(edges) == len(counts) + 1 else None


def headline(run: QuietRun) -> str:
    """The result in one sentence: the main arm with and without its thoughts at the end, and where the controls ended."""
    arm, group = main_arm(run), focus(run)
    line = curve(arm, "accuracy", group) if arm else Curve([], [], [], [])
    if not line.loops:
        return "No results yet: this run has not evaluated a model."
    subject = f"accuracy on {class_label(group)}"
    if line.loops[-1] == 0:
        return f"Before the first step, {subject} is {_value(line, 0)}. No step has been evaluated yet."
    text = f"With thoughts, {subject}" if arm.thinks else f"{subject[0].upper()}{subject[1:]}"
    without = curve(arm, "accuracy_base", group)
    if arm.thinks and without.loops and without.loops[-1] == line.loops[-1]:
        text += f" is {_value(line, -1)} after {line.loops[-1]:,} steps, and {_value(without, -1)} without them"
    elif len(line.loops) == 1:
        text += f" is {_value(line, -1)} after {line.loops[-1]:,} steps"
    else:
        text += f" went from {_value(line, 0)} to {_value(line, -1)} in {line.loops[-1]:,} steps"
    others = [curve(other, "accuracy", group) for other in run.arms if other is not arm]
    ends = sorted(other.values[-1] for other in others if other.loops and other.loops[-1] > 0)
    if ends:
        where = (
            percent(ends[0]) if percent(ends[0]) == percent(ends[-1]) else f"{percent(ends[0])} to {percent(ends[-1])}"
        )
        text += (
            f"; the other {len(ends)} arms ended at {where}" if len(ends) > 1 else f"; the other arm ended at {where}"
        )
    return text.replace("%)", "%, 95% interval)", 1) + "."


def _value(line: Curve, at: int) -> str:
    value, low, high = line.at(at)
    return percent(value) + ("" if low is None else f" ({100 * low:.1f}–{100 * high:.1f}%)")
