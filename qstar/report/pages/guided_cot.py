"""The page of a LM-Guided CoT run: accuracy per arm, filters, RL, costs and rationales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from qstar.report import charts, render, stats
from qstar.report.charts import Card
from qstar.report.pages import rl
from qstar.report.read import Run, read_dict

SHOWN = 12  # rationales per arm
COLUMNS = {"quality": "aspects", "gold_chain": "gold chain", "first_hop": "first hop", "em": "EM", "f1": "F1",
           "includes": "inclusion", "coverage": "coverage", "self_consistency": "self-consistency"}  # fmt: skip


@dataclass(frozen=True)
class Guided:
    """The files of a LM-Guided CoT run that other runs do not have."""

    fixed: Mapping[str, list[int]]  # arms without a student -> whether each question is answered right
    arms: Mapping[str, list[Mapping[str, Any]]]  # arm -> an evaluation per student
    buffers: Mapping[str, list[Mapping[str, Any]]]  # arm -> what its filter kept, per student
    results: Mapping[str, Any]
    costs: Mapping[str, Mapping[str, float]]


def read_guided(run: Run) -> Guided:
    """Reads those files, of which a running run lacks some; raises UserError if one is broken."""
    evaluated, kept = _by_arm(run.folder, "evaluation.json"), _by_arm(run.folder, "buffer.json")
    # The order of the config; folders of arms that it no longer names come first.
    order = [name for name in run.config.get("arms") or () if name in evaluated]
    names = [*(name for name in evaluated if name not in order), *order]
    large = run.folder / "large"
    return Guided(
        fixed=read_dict(large / "fixed_arms.json"),
        arms={name: evaluated[name] for name in names},
        buffers={name: kept[name] for name in names if name in kept},
        results=read_dict(run.folder / "results.json"),
        costs=read_dict(large / "costs.json"),
    )


def _by_arm(folder: Path, file: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted(folder.glob(f"student_*/*/{file}")):
        found.setdefault(path.parent.name, []).append(read_dict(path))
    return found


def page(run: Run) -> str:
    """The page as text."""
    guided = read_guided(run)
    measured = {key for each in guided.arms.values() for found in each for key in found}
    return render.page(
        "guided_cot.html.j2",
        run=run,
        guided=guided,
        kept=next((b[0] for b in guided.buffers.values() if b[0].get("filter") == "em"), None),
        accuracy_card=accuracy_card(guided),
        columns={key: title for key, title in COLUMNS.items() if key in measured},
        reinforcement_cards=rl.cards(run),
        shown=SHOWN,
    )


def accuracy_card(guided: Guided) -> Card | None:
    """Percent right of all arms, the highest first; those without a student in grey."""
    bars = [(name, stats.right(found), "var(--rejected)") for name, found in guided.fixed.items()]
    bars += [
        (stats.label(name), fmean(found["accuracy"] for found in each), charts.series(0))
        for name, each in guided.arms.items()
    ]
    if not bars:
        return None
    bars.sort(key=lambda bar: -bar[1])
    chart = charts.horizontal_bars(bars, title="Right answers per arm", x_max=100.0, x_format=lambda v: f"{v:.1f}%")
    colours = [("guided by a student", charts.series(0)), ("without a student", "var(--rejected)")]
    return Card("Right answers of the large model", chart, "", colours)
