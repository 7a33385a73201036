"""The page that compares runs: settings that differ, results with intervals, paired answers, and curves by metric."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qstar.data.sources import read_jsonl
from qstar.report import charts, render, stats
from qstar.report.charts import Card
from qstar.report.pages import rl
from qstar.report.rationales import Row
from qstar.report.read import Arm, Run, read_dict
from qstar.train.metrics import KEYS
from qstar.train.stats import bootstrap_ci, paired

Answers = Mapping[Any, float]  # problem -> whether its answer is right
# Metrics that the page opens with; those of a class or group, "accuracy/3", by the name before the slash.
SHOWN = {
    "iteration": ("accuracy", "solve_rate", "valid_kept"),
    "evaluation": ("accuracy", "nll", "weight"),
    "rl": ("score", "kl", "entropy"),
    "train": ("loss",),
}
SHARES = ("accuracy", "rate", "share", "valid", "fraction", "ended", "correct")  # words in names of metrics from 0 to 1
TITLES = {"solve_rate": "Attempts that are right", "valid_kept": "Kept rationales whose steps are right",
          "nll": "NLL, nats", "weight": "Mixing weight", **rl.CURVES}  # fmt: skip
AXES = {"iteration": "iterations", "evaluation": "steps", "rl": "updates", "train": "updates"}


class Side(NamedTuple):
    """An arm of one of the runs, with its name on the page."""

    title: str
    run: Run
    arm: Arm


def page(runs: Sequence[Run], refresh: int = 0) -> str:
    """The page as text."""
    names = distinct_names([run.folder for run in runs])
    sides = [
        Side(f"{name} · {stats.label(arm.name)}" if len(run.arms) > 1 else name, run, arm)
        for name, run in zip(names, runs)
        for arm in run.arms
    ]
    shared, partial = settings(runs)
    cards, further, single = curve_cards(sides)
    pairs, unpaired = paired_answers(sides)
    return render.page(
        "comparison.html.j2",
        title=" · ".join(names) if len(names) < 4 else f"{len(names)} runs",
        refresh=refresh,
        runs=list(zip(names, runs)),
        numbers=[(name, run, number) for name, run in zip(names, runs) for number in stats.numbers(run)],
        bars=bar_cards(names, runs),
        settings=shared,
        partial=partial,
        pairs=pairs,
        cards=cards,
        legend=[(side.title, charts.series(number)) for number, side in enumerate(sides)],
        further=further,
        caveats=[*_caveats(names, runs), *unpaired, *single],
    )


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell the folders apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def settings(runs: Sequence[Run]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows (key, value in each run) of settings that differ, and of those that only some runs have."""
    # Presets and defaults are filled in only in the resolved settings; those of the config stand in for what lacks there.
    flat = [dict(render.flatten(run.config)) | dict(render.flatten(run.resolved)) for run in runs]
    keys = list(dict.fromkeys(key for found in flat for key in found if not key.startswith(("log.", "name"))))
    shared: list[list[str]] = []
    partial: list[list[str]] = []
    for key in keys:
        values = [found.get(key, "–") for found in flat]
        if len(set(values)) > 1:
            (shared if all(key in found for found in flat) else partial).append([key, *values])
    return shared, partial


def bar_cards(names: Sequence[str], runs: Sequence[Run]) -> list[Card]:
    """The results of each measure as bars with their intervals, a colour per run."""
    found: dict[str, list[tuple[tuple[str, float, str], tuple[float | None, float | None]]]] = {}
    for place, (name, run) in enumerate(zip(names, runs)):
        for n in stats.numbers(run):
            arm = f" · {stats.label(n.arm)}" if len(run.arms) > 1 else ""
            found.setdefault(n.measure, []).append(((name + arm, n.value, charts.series(place)), (n.low, n.high)))
    cards = []
    for measure, pairs in found.items():
        bars, intervals = [bar for bar, _ in pairs], [ends for _, ends in pairs]
        chart = charts.horizontal_bars(bars, title=measure, x_max=1.0, x_format=stats.percent, intervals=intervals)
        cards += [Card(measure[0].upper() + measure[1:], chart)] if len(bars) > 1 else []
    return cards


# ------------------------------------------------------------------------------------------------------------- curves


def curve_cards(sides: Sequence[Side]) -> tuple[list[Card], list[Card], list[str]]:
    """Charts of the metrics that several runs have: the main ones, the further ones, and a sentence about the rest."""
    shown: list[Card] = []
    further: list[Card] = []
    lone = 0
    for stage, axis in AXES.items():
        # Loops of STaR and iterations of V-STaR are the same; RL's rows count updates.
        for updates in (False, True) if stage == "iteration" else (False,):
            mine = [s for s in sides if stage != "iteration" or (s.run.method == "rl") == updates]
            for key in _metrics(stage, mine):
                named = [(side.title, _points(side, stage, key) if side in mine else ((), ())) for side in sides]
                several = len({id(side.run) for side, (_, (x, *_)) in zip(sides, named) if x}) > 1
                if not several:
                    lone += 1
                    continue
                card = _card(mine[0].run, stage, key, named, "updates" if updates else axis)
                (shown if key.partition("/")[0] in SHOWN[stage] else further).append(card)
    what = "are metrics" if lone > 1 else "is a metric"
    return shown, further, [f"{lone} {what} of one run alone; the pages of the runs have all of them."] if lone else []


def _metrics(stage: str, sides: Iterable[Side]) -> list[str]:
    if stage == "train":
        return ["loss"]
    keys = dict.fromkeys(key for side in sides for row in side.arm.stage(stage) for key in row)
    ends = ("_low", "_high")
    return [k for k in keys if k not in KEYS and not k.partition("/")[0].endswith(ends) and not k.endswith(ends)]


def _points(side: Side, stage: str, key: str) -> Sequence[Sequence[float]]:
    # Of several students the first: their steps count from 0 each.
    rows = [row for row in side.arm.stage(stage) if not row.get("student")]
    if stage == "train":
        return stats.losses(rows)
    numbers = [row for row in rows if isinstance(row.get(key), (int, float))]
    return stats.curve(numbers, "iteration" if stage == "iteration" else "step", lambda row: stats.row_point(row, key))


def _card(run: Run, stage: str, key: str, named: Sequence[tuple[str, Sequence[Sequence[float]]]], axis: str) -> Card:
    name, _, group = key.partition("/")
    title = TITLES.get(name) or name.replace("_", " ")
    title = "Training loss" if stage == "train" else f"{title} · {stats.group_label(run, group)}" if group else title
    ys = [y for _, (_, values, *_) in named for y in values]
    share = any(word in name.split("_") for word in SHARES) and 0 <= min(ys) and max(ys) <= 1
    axes: dict[str, Any] = (
        {"y_format": stats.rounded_percent, "y_range": (0.0, 1.0)} if share else {"y_format": "{:g}".format}
    )
    card = charts.series_card(title[0].upper() + title[1:], named, marks=stage == "iteration", x_label=axis, **axes)
    assert card is not None
    return card


# ------------------------------------------------------------------------------------------------------------- answers


def paired_answers(sides: Sequence[Side]) -> tuple[list[list[Any]], list[str]]:
    """Differences of all arms from the first one on the problems that both answered, and sentences about the others.

    Returns:
      rows (from, to, (common problems, all), share right of each, (low, difference, high)), sentences.
    """
    found = [(side, answers(side)) for side in sides]
    first = next(((side, mine) for side, mine in found if mine), None)
    if first is None:
        return [], ["No run has recorded which problems it answered right, so that no difference is paired."]
    (reference, base), rows, without = first, [], []
    for side, mine in found:
        common = [problem for problem in base if problem in mine]
        if side is not reference and common:
            before, after = ([each[problem] for problem in common] for each in (base, mine))
            shares = [(sum(values) / len(values), *bootstrap_ci(values)) for values in (before, after)]
            counts = (len(common), len(base.keys() | mine.keys()))
            rows.append([reference.title, side.title, counts, *shares, paired(before, after)])
        elif side is not reference:
            why = "answered other problems" if mine else "has no answers by problem"
            without.append(f"{side.title} {why}: not paired with {reference.title}.")
    return rows, without


def answers(side: Side) -> Answers:
    """The last answers of an arm on the test split, or on that of its evaluations; {} where none are recorded."""
    run, arm = side.run, side.arm
    if run.method == "guided_cot":
        # Known by their number: the same in runs with the same questions.
        made = zlib.crc32(json.dumps([run.config.get(k) for k in ("guided", "task", "seed")], sort_keys=True).encode())
        files = sorted(run.folder.glob(f"student_*/{arm.name}/evaluation.json"))
        each = [read_dict(path).get("correct") or [] for path in files]
        return {(made, i): sum(values) / len(values) for i, values in enumerate(zip(*each))}
    test = run.folder / arm.name / "evaluation" / "test.jsonl"
    path = test if test.exists() else arm.answer_files[max(arm.answer_files)] if arm.answer_files else None
    rows: list[Row] = read_jsonl(path) if path else []
    return {(row.get("problem_id"), row.get("gold")): float(bool(row.get("correct"))) for row in rows}


def _caveats(names: Sequence[str], runs: Sequence[Run]) -> Iterable[str]:
    tasks = {run.method if run.method in ("quiet_star", "guided_cot") else stats.task_name(run) for run in runs}
    if len(tasks) > 1:
        yield "The runs answer different tasks, so that their accuracies are not those of the same questions."
    if len({run.method == "rl" for run in runs if run.method in ("star", "v_star", "rl")}) > 1:
        yield "RL counts updates, the other methods iterations of many updates: their curves share no axis."
    if len({run.environment.get("parameters") for run in runs}) > 1:
        yield "The models are of different size."
    for name, run in zip(names, runs):
        if run.status != "done":
            yield f"{name} is not done ({run.status}): its last results are shown."
