"""The page of a `qstar evaluate` with samples: a chart over k of every way to choose, beside its cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qstar.report import shell
from qstar.report.frames import percent
from qstar.report.markup import tag
from qstar.report.pieces import note, section
from qstar.report.selection import rule_chart, rule_name, rule_table, shown_ks

_CURVE = re.compile(r"(pass|majority|best|weighted|top\d+)@(\d+)(?::(\w+))?")
_WORTH = ("auc", "auc_pooled", "ece", "brier", "ece_raw", "brier_raw")


def curves_of(result: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Returns rule -> k -> [mean, low, high] of the flat result of `methods.evaluation.evaluate_model`."""
    out: dict[str, dict[str, list[float]]] = {}
    for key, value in result.items():
        bound = key.endswith(("_low", "_high")) and key.rpartition("_")[0] in result
        if not bound and (match := _CURVE.fullmatch(key)):
            rule = match[1] + (f"/{match[3]}" if match[3] else "")
            bounds = [result[f"{key}_{side}"] for side in ("low", "high")]
            out.setdefault(rule, {})[match[2]] = [value, *bounds]
    return out


def worth_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what `report.selection.rule_table` tells of scorers, from the same flat result."""
    out: dict[str, dict[str, Any]] = {"auc": {}, "auc_pooled": {}, "calibration": {}, "regret": {}}
    for key, value in result.items():
        name, _, scorer = key.partition(":")
        if name in _WORTH and scorer:
            if name.startswith("auc"):
                out[name][scorer] = value
            else:
                out["calibration"].setdefault(scorer, {})[name] = value
        if name.startswith("regret@") and not key.endswith(("_low", "_high")):
            bounds = [result[f"{key}_{side}"] for side in ("low", "high")]
            out["regret"].setdefault(scorer, {})[name.partition("@")[2]] = [value, *bounds]
    return out


def curve_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a table: per rule its chances for some k with their intervals, its scorer's AUC and ECE."""
    curves, worth = curves_of(result), worth_of(result)
    shown = shown_ks(curves)
    rows = []
    for rule, by_k in curves.items():
        values = {f"k={k}": "{:.3f} ({:.3f}-{:.3f})".format(*by_k[k]) for k in shown}
        way, _, scorer = rule.partition("/")
        fits = worth["calibration"].get(scorer, {}) if way == "best" else {}
        rows.append({"rule": rule, **values, "AUC": worth["auc"].get(scorer) if fits else None, "ECE": fits.get("ece")})
    return rows


def evaluation_page(title: str, result: Mapping[str, Any], samples: int) -> str:
    """The page as text.

    Args:
      result: of `evaluate_model`, with `samples` per problem.
    """
    curves = curves_of(result)
    drawn = ["pass", "majority", *(rule for rule in curves if rule.startswith("best/"))]
    found = {"curves": curves, "problems": result["problems"], "samples": samples}
    top = max(curves["pass"], key=int)
    text = ", ".join(f"{rule_name(rule)} {percent(curves[rule][top][0])}" for rule in drawn)
    said = f"Greedily {percent(result['accuracy'])} of {result['problems']:,} problems; with {top} samples {text}."
    header = [tag("h1", title), tag("p", said, class_="headline")]
    explained = note(
        "Chance that the chosen solution is right, over all subsets of k of the samples of each problem, with 95% intervals "
        "over problems. Regret is what a perfect choice would add; ECE and Brier are those of the chance to be right after "
        "Platt scaling, fitted on the other half of the problems."
    )
    every = [*drawn, *(rule for rule in curves if rule not in drawn)]
    parts = [section("curves", "Choosing one of k", explained, rule_chart(title, found, drawn))]
    parts.append(section("numbers", "Numbers", rule_table(curves, worth_of(result), every)))
    return shell.document(title, header, parts)


def write_evaluation(folder: Path, title: str, result: Mapping[str, Any], samples: int) -> Path:
    """Writes FOLDER/curves.html, all at once, and returns its path."""
    path = folder / "curves.html"
    shell.write(path, evaluation_page(title, result, samples))
    return path
