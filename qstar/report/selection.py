"""How well one of k solutions is chosen: a V-STaR run's curves over k, its verifiers' AUC, and what they gain."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qstar.report.markup import Safe, table, tag
from qstar.report.pieces import COLOURS, card, grid, note, section, whole_percent
from qstar.report.plots import Line, line_chart
from qstar.report.run import Run, read_dict

_FILE = re.compile(r"iter_(\d+)\.json")
NAMES = {
    "pass": "any of k (ceiling)",
    "majority": "majority vote",
    "best/own": "own log-probability",
    "best/sft": "log-probability of G_SFT",
    "best/dpo": "V-STaR verifier (DPO)",
    "best/own+dpo": "own + DPO",
    "best/dpo_logratio": "DPO, log-ratio",
    "best/dpo_mean_logp": "DPO, per token",
    "best/orm": "ORM",
    "best/prm_min": "PRM, least step",
    "best/prm_product": "PRM, product",
    "best/random": "random",
}
DRAWN = ("pass", "majority", "best/own", "best/dpo", "best/own+dpo", "best/orm", "best/prm_min", "best/random")


def read_selections(folder: Path, arm: str) -> dict[int, Mapping[str, Any]]:
    """Returns iteration -> the content of selection/iter_NNN.json of an arm."""
    found = [(_FILE.fullmatch(p.name), p) for p in (folder / arm / "selection").glob("iter_*.json")]
    return {int(m[1]): read_dict(p) for m, p in sorted(found, key=lambda pair: pair[1].name) if m}


def selection_section(run: Run) -> Safe | None:
    """A chart and a table per arm, of its last iteration; None where nothing was measured."""
    arms = [(arm.name, read_selections(run.folder, arm.name)) for arm in run.arms]
    arms = [(name, found) for name, found in arms if found]
    if not arms:
        return None
    parts: list[Safe | None] = [grid([_chart(name, found[max(found)]) for name, found in arms])]
    for name, found in arms:
        parts += [tag("h3", name), _table(found[max(found)]), _gains(found[max(found)]), _by_iteration(found)]
    return section(
        "selection",
        "Choosing one of k",
        note(
            "Chance that the chosen solution is right, over all subsets of k of the samples of each held-out problem; "
            "intervals of 95% over problems. Of equal scores one is taken at random."
        ),
        *parts,
    )


def _chart(name: str, found: Mapping[str, Any]) -> Safe:
    lines = []
    for number, rule in enumerate(r for r in DRAWN if r in found["curves"]):
        by_k = sorted((int(k), v) for k, v in found["curves"][rule].items())
        xs, means, lows, highs = [math.log2(k) for k, _ in by_k], *zip(*(v for _, v in by_k))
        band = rule in ("majority", "best/dpo")
        lines.append(
            Line(
                NAMES[rule],
                xs,
                means,
                f"var(--c{number % COLOURS})",
                low=lows if band else (),
                high=highs if band else (),
                dashed=rule in ("pass", "best/random"),
                shape=number,
            )
        )
    chart = line_chart(
        lines,
        title=f"Chance to be right by the number of samples, {name}",
        x_label="samples k to choose from",
        y_format=whole_percent,
        y_range=(0.0, 1.0),
        x_name=lambda x: f"{2**x:g}",
    )
    return card(
        f"Best of k · {name}", chart, note(f"{found['problems']} problems, {found['samples']} samples of each.")
    )


def _table(found: Mapping[str, Any]) -> Safe:
    ks = [k for k in found["curves"]["pass"] if k in ("1", "4", "16", "64")]
    rows = []
    for rule, name in NAMES.items():
        if rule in found["curves"]:
            scorer = rule.partition("/")[2]
            areas = [found[key].get(scorer) for key in ("auc", "auc_pooled")]
            shown = [_interval(found["curves"][rule][k]) for k in ks]
            rows.append([name, *shown, *("" if a is None else f"{a:.3f}" for a in areas)])
    return table(["rule", *(f"k = {k}" for k in ks), "AUC within problems", "AUC pooled"], rows)


def _gains(found: Mapping[str, Any]) -> Safe | None:
    key = next((k for k in found if k.startswith("gain@")), None)
    rows = [[name, _interval(values)] for name, values in (found[key] if key else {}).items()]
    return table([f"difference at k = {key.partition('@')[2]}, paired over problems", ""], rows) if rows else None


def _by_iteration(found: Mapping[int, Mapping[str, Any]]) -> Safe | None:
    if len(found) < 2:
        return None
    names = [s for s in found[max(found)]["auc"] if f"best/{s}" in NAMES]
    rows = [
        [str(n), *(f"{a:.3f}" if (a := one["auc"].get(s)) is not None else "" for s in names)]
        for n, one in found.items()
    ]
    return table(["AUC after iteration", *(NAMES[f"best/{s}"] for s in names)], rows)


def _interval(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"
