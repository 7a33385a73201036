"""Selection of one of k samples: a V-STaR run's scorers, and the page of a `qstar evaluate` with samples."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qstar.data.sources import read_jsonl
from qstar.report import charts, render, stats
from qstar.report.charts import Card, Line
from qstar.report.read import Run, numbered, read_dict

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
CASES = ("the first alone is right", "the second alone is right", "both are right", "both are wrong")
EACH, TOP = 2, 4  # problems of each of these kinds, and solutions of a problem, on a page
_CURVE = re.compile(r"(pass|majority|best|weighted|top\d+)@(\d+)(?::(\w+))?")
Found = Mapping[str, Any]


class Ranked(NamedTuple):
    """A distinct solution of a problem with the score of its first sample."""

    completion: str
    score: float
    correct: bool
    samples: int  # how often it was sampled


class Case(NamedTuple):
    """One problem with the first solutions of two scorers."""

    kind: int  # index into CASES
    prompt: str
    gold: str
    orders: Mapping[str, Sequence[Ranked]]  # scorer -> solutions, best first

    @property
    def title(self) -> str:
        """The kind in words, the scorers by their names."""
        first, second = (SCORERS.get(scorer, scorer) for scorer in self.orders)
        return CASES[self.kind].replace("the first", first).replace("the second", second)


def selections(run: Run) -> list[dict[str, Any]]:
    """What the page shows of every arm with a measured selection."""
    out = []
    for arm in run.arms:
        found, title = read_selections(run.folder, arm.name), stats.arm_title(run, arm)
        if found:
            last, scorer = found[max(found)], verifier(found[max(found)])
            cases = read_cases(run.folder, arm.name, max(found), (scorer, "generator")) if scorer else []
            cards = {"card": rule_card(title, last), "auc_card": auc_card(title, found) if len(found) > 1 else None}
            out.append({"title": title, "found": last, "iterations": found, "cases": cases, **cards})
    return out


def read_selections(folder: Path, arm: str) -> dict[int, Found]:
    """Iteration -> the content of selection/iter_NNN.json of an arm."""
    return {n: read_dict(path) for n, path in numbered(folder / arm / "selection", "iter_*.json")}


def verifier(found: Found) -> str | None:
    """The scorer that stands for the trained verifiers."""
    return next((s for s in ("dpo", "prm_min", "orm") if s in found["auc"]), None)


def headline(found: Found) -> str:
    """The best verifier's best of 16 (or of all) beside a vote and one sample, in one sentence."""
    curves = found["curves"]
    k = "16" if "16" in curves["pass"] else max(curves["pass"], key=int)
    best = next((r for r in ("best/dpo", "best/prm_min", "best/orm") if r in curves), "best/generator")
    verifier, vote = (
        f"{rule_name(r)} {{:.3f}} ({{:.3f}} to {{:.3f}})".format(*curves[r][k]) for r in (best, "majority")
    )
    one, ceiling = curves["pass"]["1"][0], curves["pass"][k][0]
    return f"Right with {k} samples: {verifier}; {vote}; one sample {one:.3f}, any of {k} {ceiling:.3f}."


def rule_name(rule: str) -> str:
    """What a rule is called: `best/NAME` of an unknown scorer is its name."""
    way, _, scorer = rule.partition("/")
    return NAMES.get(rule) or (scorer if way == "best" else f"{way} vote by {SCORERS.get(scorer, scorer)}")


def difference_name(name: str) -> str:
    """The name of a paired difference between two rules."""
    return " − ".join(map(rule_name, name.split(" - ")))


def rule_card(name: str, found: Found, drawn: Sequence[str] = DRAWN) -> Card:
    """The curves (rule -> k -> [mean, low, high]) of those of the `drawn` rules that were measured."""
    lines = []
    for number, rule in enumerate(r for r in drawn if r in found["curves"]):
        by_k = sorted((int(k), v) for k, v in found["curves"][rule].items())
        # log2: k doubles from point to point.
        xs, means, lows, highs = [math.log2(k) for k, _ in by_k], *zip(*(v for _, v in by_k))
        # The ceiling and the floor are no selection rules: dashed, without a band.
        bound = rule in ("pass", "best/random")
        bounds: dict[str, Any] = {} if bound else {"low": lows, "high": highs}
        lines.append(Line(rule_name(rule), xs, means, charts.series(number), dashed=bound, shape=number, **bounds))
    title = f"Chance to be right by the number of samples, {name}"
    axis: dict[str, Any] = {"x_label": "samples k to choose from", "y_format": stats.rounded_percent, "y_range": (0, 1)}
    chart = charts.line_chart(lines, title=title, x_name=lambda x: f"{2**x:g}", **axis)
    return Card(f"Best of k · {name}", chart, f"{found['problems']} problems, {found['samples']} samples of each.")


def shown_ks(curves: Found) -> list[str]:
    """The k that a table has room for: all of four, else 1, 4, 16 and 64."""
    every = sorted(curves["pass"], key=int)
    return every if len(every) <= 4 else [k for k in every if k in ("1", "4", "16", "64")]


def auc_card(title: str, found: Mapping[int, Found]) -> Card | None:
    """AUC within problems by iteration, a line per scorer; None without a number."""
    named = []
    for scorer in (s for s in found[max(found)]["auc"] if f"best/{s}" in DRAWN):
        known = {n: one["auc"][scorer] for n, one in found.items() if one["auc"].get(scorer) is not None}
        named.append((SCORERS[scorer], [list(known), list(known.values())]))
    # From 0.5, the AUC of a random score, or lower if a scorer is worse than that.
    low = min((y for _, (_, values) in named for y in values), default=0.5)
    axes: dict[str, Any] = {"x_label": "iteration", "y_format": "{:.2f}".format, "y_range": (min(0.5, low), 1.0)}
    return charts.series_card(f"AUC within problems by iteration, {title}", named, marks=True, **axes)


def read_cases(folder: Path, arm: str, n: int, scorers: tuple[str, str]) -> list[Case]:
    """Returns up to `EACH` problems of every kind of CASES, the first ones, with both scorers' first `TOP` solutions."""
    home = folder / arm / "selection"
    rows = [r for file in sorted(home.glob(f"samples_{n:03d}_*.jsonl")) for r in read_jsonl(file)]
    scores = home / f"scores_{n:03d}.jsonl"
    values = read_jsonl(scores) if scores.exists() else []
    # Samples and scores are joined by line; a run that was stopped in between has one without the other.
    if len(rows) != len(values) or not rows or not set(scorers) <= set(values[0]):
        return []
    by_problem: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for row, value in zip(rows, values):
        by_problem.setdefault(row["problem_id"], []).append((row, value))
    kept: list[list[Case]] = [[] for _ in CASES]
    for pairs in by_problem.values():
        orders = {scorer: _order(pairs, scorer)[:TOP] for scorer in scorers}
        first, second = (orders[scorer][0].correct for scorer in scorers)
        kind = [(True, False), (False, True), (True, True), (False, False)].index((first, second))
        # With a single distinct solution, there was nothing to select.
        if len(kept[kind]) < EACH and len(orders[scorers[0]]) > 1:
            kept[kind].append(Case(kind, pairs[0][0]["prompt"], pairs[0][0]["gold"], orders))
    return [case for cases in kept for case in cases]


def _order(pairs: Sequence[tuple[Found, Found]], scorer: str) -> list[Ranked]:
    # Samples with the same text are one solution, with the score of the first. Without a score, it comes last.
    found: dict[str, Ranked] = {}
    for row, value in pairs:
        text, score = row["completion"], value[scorer] if value[scorer] is not None else -math.inf
        old = found.get(text, Ranked(text, score, row["correct"], 0))
        found[text] = old._replace(samples=old.samples + 1)
    return sorted(found.values(), key=lambda ranked: -ranked.score)


# --------------------------------------------------------------------------------------- qstar evaluate --samples


def selection_of(result: Found) -> dict[str, dict[str, Any]]:
    """`curves` (rule -> k -> [mean, low, high]), `auc`, `regret` ... of the flat result of `runs.evaluate.evaluate_model`."""
    out: dict[str, dict[str, Any]] = {key: {} for key in ("curves", "auc", "auc_pooled", "calibration", "regret")}
    for key, value in result.items():
        name, _, scorer = key.partition(":")
        values = [value, *(result.get(f"{key}_{end}") for end in ("low", "high"))]
        # The ends of an interval are read with its mean.
        if key.endswith(("_low", "_high")) and key.rpartition("_")[0] in result:
            continue
        if match := _CURVE.fullmatch(key):
            out["curves"].setdefault(match[1] + (f"/{match[3]}" if match[3] else ""), {})[match[2]] = values
        elif name.startswith("regret@"):
            out["regret"].setdefault(scorer, {})[name.partition("@")[2]] = values
        elif scorer and name in ("auc", "auc_pooled"):
            out[name][scorer] = value
        elif scorer and name in ("ece", "brier", "ece_raw", "brier_raw"):
            out["calibration"].setdefault(scorer, {})[name] = value
    return out


def curve_rows(result: Found) -> list[dict[str, Any]]:
    """The rows of a terminal's table: per rule its chances for some k with their intervals, its scorer's AUC and ECE."""
    found, rows = selection_of(result), []
    for rule, by_k in found["curves"].items():
        values = {f"k={k}": "{:.3f} ({:.3f}-{:.3f})".format(*by_k[k]) for k in shown_ks(found["curves"])}
        way, _, scorer = rule.partition("/")
        fits = found["calibration"].get(scorer, {}) if way == "best" else {}
        rows.append({"rule": rule, **values, "AUC": found["auc"].get(scorer) if fits else None, "ECE": fits.get("ece")})
    return rows


def write_evaluation(folder: Path, title: str, result: Found, samples: int) -> Path:
    """Writes FOLDER/curves.html from the result of `evaluate_model` with `samples` per problem; returns its path."""
    found = selection_of(result) | {"problems": result["problems"], "samples": samples}
    curves = found["curves"]
    drawn = ["pass", "majority", *(rule for rule in curves if rule.startswith("best/"))]
    rules = [*drawn, *(rule for rule in curves if rule not in drawn)]
    values = {"title": title, "result": result, "found": found, "card": rule_card(title, found, drawn)}
    text = render.page("evaluation.html.j2", v=sys.modules[__name__], drawn=drawn, rules=rules, **values)
    render.write(folder / "curves.html", text)
    return folder / "curves.html"
