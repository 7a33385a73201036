"""Report section of selection: a V-STaR run's curves over k, its verifiers' AUC, and their gains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qstar.report.markup import Safe, table, tag
from qstar.report.pieces import COLOURS, card, grid, note, section, whole_percent
from qstar.report.plots import Line, line_chart
from qstar.report.ranking import Case, cases_section, read_cases
from qstar.report.run import Run, read_dict

_FILE = re.compile(r"iter_(\d+)\.json")
NAMES = {
    "pass": "any of k (ceiling)",
    "majority": "majority vote",
    "best/generator": "own log-probability",
    "best/sft": "log-probability of G_SFT",
    "best/dpo": "V-STaR verifier (DPO)",
    "best/generator+dpo": "own + DPO",
    "best/dpo_logratio": "DPO, log-ratio",
    "best/dpo_mean_logp": "DPO, per token",
    "best/orm": "ORM",
    "best/prm_min": "PRM, least step",
    "best/prm_product": "PRM, product",
    "best/random": "random",
}
SCORERS = {rule.removeprefix("best/"): name for rule, name in NAMES.items() if rule.startswith("best/")}
DRAWN = ("pass", "majority", *(f"best/{s}" for s in ("generator", "dpo", "generator+dpo", "orm", "prm_min", "random")))


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
    parts: list[Safe | None] = [grid([rule_chart(name, found[max(found)]) for name, found in arms])]
    for name, found in arms:
        last = found[max(found)]
        parts += [
            tag("h3", name),
            tag("p", headline(last)),
            rule_table(last["curves"], last),
            _gains(last),
            _by_fault(last),
        ]
        parts += [*_by_iteration(name, found), cases_section(_cases(run.folder, name, found), SCORERS)]
    return section(
        "selection",
        "Choosing one of k",
        note(
            "Chance that the chosen solution is right, over all subsets of k of the samples of each held-out problem; "
            "intervals of 95% over problems. Of equal scores one is taken at random. Regret is what a perfect choice would "
            "add; ECE and Brier are those of the chance to be right that Platt scaling makes of a score, fitted on the "
            "other half of the problems (in brackets: of the score as it is, where it is a chance itself)."
        ),
        *parts,
    )


def headline(found: Mapping[str, Any]) -> str:
    """What the best verifier is worth, in one sentence: its best of 16 (or of all) beside a vote and one sample."""
    curves = found["curves"]
    k = "16" if "16" in curves["pass"] else max(curves["pass"], key=int)
    verifier = next((r for r in ("best/dpo", "best/prm_min", "best/orm") if r in curves), "best/generator")
    parts = [f"{rule_name(r)} {_interval(curves[r][k])}" for r in (verifier, "majority")]
    one, ceiling = curves["pass"]["1"][0], curves["pass"][k][0]
    return f"Right with {k} samples: {parts[0]}; {parts[1]}; one sample {one:.3f}, any of {k} {ceiling:.3f}."


def rule_chart(name: str, found: Mapping[str, Any], drawn: Sequence[str] = DRAWN) -> Safe:
    """The curves of rules over k with their intervals.

    Args:
      found: `curves` (rule -> k -> [mean, low, high]), `problems` and `samples`. drawn: the rules, of which those that
        are there are drawn.
    """
    lines = []
    for number, rule in enumerate(r for r in drawn if r in found["curves"]):
        by_k = sorted((int(k), v) for k, v in found["curves"][rule].items())
        xs, means, lows, highs = [math.log2(k) for k, _ in by_k], *zip(*(v for _, v in by_k))
        dashed = rule in ("pass", "best/random")
        bounds = {} if dashed else {"low": lows, "high": highs}  # the ceiling and the floor are no competitors
        lines.append(
            Line(rule_name(rule), xs, means, f"var(--c{number % COLOURS})", dashed=dashed, shape=number, **bounds)
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


def rule_name(rule: str) -> str:
    """What a rule is called: `best/NAME` of an unknown scorer is its name."""
    way, _, scorer = rule.partition("/")
    return NAMES.get(rule) or (scorer if way == "best" else f"{way} vote by {SCORERS.get(scorer, scorer)}")


def rule_table(curves: Mapping[str, Any], worth: Mapping[str, Any], rules: Sequence[str] = ()) -> Safe:
    """A row per rule: its values for some k, and its scorer's AUC, regret and calibration.

    Args:
      worth: `auc`, `auc_pooled`, `regret`, `calibration`, each by scorer; what is missing stays empty.
      rules: those of NAMES where empty.
    """
    ks = shown_ks(curves)
    at = "16" if "16" in ks else ks[-1]
    rows = []
    for rule in (r for r in (rules or NAMES) if r in curves):
        way, _, scorer = rule.partition("/")
        cells = [_value(curves[rule][k]) for k in ks]
        if way == "best":
            fits = worth.get("calibration", {}).get(scorer, {})
            regret = worth.get("regret", {}).get(scorer, {}).get(at)
            cells += [*(_number(worth.get(key, {}).get(scorer)) for key in ("auc", "auc_pooled"))]
            cells += [_value(regret) if regret else "", _with_raw(fits, "ece"), _with_raw(fits, "brier")]
        rows.append([rule_name(rule), *cells, *[""] * (len(ks) + 5 - len(cells))])
    head = [
        "rule",
        *(f"k = {k}" for k in ks),
        "AUC in problems",
        "pooled",
        f"regret at k = {at}",
        "ECE",
        "Brier",
    ]
    return table(head, rows)


def shown_ks(curves: Mapping[str, Any]) -> list[str]:
    """The k that a table has room for: all of four, else 1, 4, 16 and 64."""
    every = sorted(curves["pass"], key=int)
    return every if len(every) <= 4 else [k for k in every if k in ("1", "4", "16", "64")]


def _value(values: Sequence[float]) -> Safe:
    """A mean with its interval in small print, on one line."""
    mean, low, high = values
    return tag("span", f"{mean:.3f}", tag("small", f" {low:.3f}–{high:.3f}"), class_="value")


def _with_raw(fits: Mapping[str, float], key: str) -> str:
    return _number(fits.get(key)) + (f" ({fits[f'{key}_raw']:.3f})" if f"{key}_raw" in fits else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _by_fault(found: Mapping[str, Any]) -> Safe | None:
    """How well each scorer tells right solutions from those that first go wrong in one way."""
    kinds = found.get("auc_by_fault") or {}
    names = [s for s in found["auc"] if f"best/{s}" in NAMES and s != "random"]
    total = sum(kind["samples"] for kind in kinds.values())
    rows = [
        [name, f"{kind['samples']:,} ({kind['samples'] / total:.1%})", *(_number(kind["auc"].get(s)) for s in names)]
        for name, kind in kinds.items()
    ]
    head = ["AUC by first mistake", "wrong samples", *(SCORERS[s] for s in names)]
    return table(head, rows) if rows else None


def _gains(found: Mapping[str, Any]) -> Safe | None:
    key = next((k for k in found if k.startswith("gain@")), None)
    rows = [[name, _interval(values)] for name, values in (found[key] if key else {}).items()]
    return table([f"difference at k = {key.partition('@')[2]}, paired over problems", ""], rows) if rows else None


def _by_iteration(arm: str, found: Mapping[int, Mapping[str, Any]]) -> list[Safe]:
    """AUC by iteration as a chart and a table, where verifiers were trained in several."""
    if len(found) < 2:
        return []
    names = [s for s in found[max(found)]["auc"] if f"best/{s}" in NAMES]
    rows = [[str(n), *(_number(one["auc"].get(s)) for s in names)] for n, one in found.items()]
    lines = []
    for number, scorer in enumerate(s for s in names if f"best/{s}" in DRAWN):
        there = [(n, one["auc"][scorer]) for n, one in found.items() if one["auc"].get(scorer) is not None]
        if there:
            lines.append(Line(SCORERS[scorer], *map(list, zip(*there)), f"var(--c{number % COLOURS})", shape=number))
    low = min((y for line in lines for y in line.y), default=0.5)
    title = f"AUC within problems by iteration, {arm}"
    chart = line_chart(
        lines, title=title, x_label="iteration", y_format=lambda y: f"{y:.2f}", y_range=(min(0.5, low), 1.0)
    )
    return [card(title, chart), table(["AUC after iteration", *(SCORERS[s] for s in names)], rows)]


def _cases(folder: Path, arm: str, found: Mapping[int, Mapping[str, Any]]) -> list[Case]:
    """The rationales of the last iteration, as its best verifier and the generator itself rank them."""
    verifier = next((s for s in ("dpo", "prm_min", "orm") if s in found[max(found)]["auc"]), None)
    return read_cases(folder, arm, max(found), (verifier, "generator")) if verifier else []


def _interval(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"
