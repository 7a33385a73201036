"""The samples of a V-STaR run as its scorers rank them: the same solutions, in the order of the verifier and of another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qstar.data.sources import read_jsonl
from qstar.report.markup import Safe, tag
from qstar.report.pieces import note

CASES = ("the first alone is right", "the second alone is right", "both are right", "both are wrong")


class Ranked(NamedTuple):
    """A distinct solution of a problem, in the eyes of one scorer."""

    completion: str
    score: float
    correct: bool
    count: int  # how often it was sampled


class Case(NamedTuple):
    """One problem: what two scorers put first."""

    kind: str  # one of CASES
    problem_id: str
    prompt: str
    gold: str
    orders: Mapping[str, Sequence[Ranked]]  # scorer -> solutions, best first


def read_cases(folder: Path, arm: str, n: int, scorers: tuple[str, str], each: int = 2, top: int = 4) -> list[Case]:
    """Returns up to `each` problems of every kind of CASES, the first ones, with both scorers' `top` solutions.

    Empty where the run has kept no samples and scores of iteration n, or not of both scorers.
    """
    home = folder / arm / "selection"
    scored = home / f"scores_{n:03d}.jsonl"
    rows = [r for file in sorted(home.glob(f"samples_{n:03d}_*.jsonl")) for r in read_jsonl(file)]
    values = read_jsonl(scored) if scored.exists() else []
    if len(rows) != len(values) or not rows or not set(scorers) <= set(values[0]):
        return []
    by_problem: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for row, value in zip(rows, values):
        by_problem.setdefault(row["problem_id"], []).append((row, value))
    kept: dict[str, list[Case]] = {kind: [] for kind in CASES}
    for problem, pairs in by_problem.items():
        orders = {scorer: _order(pairs, scorer)[:top] for scorer in scorers}
        first, second = (orders[scorer][0].correct for scorer in scorers)
        kind = CASES[{(True, False): 0, (False, True): 1, (True, True): 2, (False, False): 3}[first, second]]
        if len(kept[kind]) < each and len(orders[scorers[0]]) > 1:
            kept[kind].append(Case(kind, problem, pairs[0][0]["prompt"], pairs[0][0]["gold"], orders))
    return [case for cases in kept.values() for case in cases]


def _order(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], scorer: str) -> list[Ranked]:
    """The distinct solutions of a problem, by falling score of their first sample."""
    found: dict[str, Ranked] = {}
    for row, value in pairs:
        there = found.get(row["completion"])
        score = value[scorer] if value[scorer] is not None else -math.inf
        count = there.count + 1 if there else 1
        found[row["completion"]] = (
            there._replace(count=count) if there else Ranked(row["completion"], score, row["correct"], 1)
        )
    return sorted(found.values(), key=lambda r: -r.score)


def cases_section(cases: Sequence[Case], names: Mapping[str, str]) -> Safe | None:
    """The cases side by side, a column per scorer. `names`: scorer -> what it is called."""
    if not cases:
        return None
    parts = [note("Distinct solutions of a problem in the order of two scorers, with how often each was sampled.")]
    for case in cases:
        columns = [_column(names.get(scorer, scorer), order) for scorer, order in case.orders.items()]
        title = tag("summary", tag("code", case.prompt.strip()[-200:]), f" right answer {case.gold}: {case.kind}")
        parts.append(tag("details", title, tag("div", *columns, class_="grid"), open=case.kind == CASES[0]))
    return tag("div", *parts)


def _column(name: str, order: Sequence[Ranked]) -> Safe:
    items = [
        tag(
            "li",
            tag("span", "right" if r.correct else "wrong", class_=f"chip {'ok' if r.correct else 'bad'}"),
            tag(
                "span", f" {r.score:.3g}, sampled {r.count} times" if r.count > 1 else f" {r.score:.3g}", class_="soft"
            ),
            tag("pre", r.completion),
        )
        for r in order
    ]
    return tag("div", tag("b", name), tag("ol", *items))
