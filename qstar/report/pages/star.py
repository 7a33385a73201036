"""The page of a run whose iterations are evaluated on held-out problems: STaR, V-STaR, reinforcement learning."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qstar.report import charts, render, stats
from qstar.report.charts import Card, Line
from qstar.report.pages import browser, rl, v_star
from qstar.report.rationales import OUTCOMES, Row, without
from qstar.report.read import Arm, Run

VERDICTS = [(name, f"var(--{name})") for name in OUTCOMES]
_FACTS = {  # step of the method -> its counts, from the rows of the first and the last loop
    "Sample": ("{:,} attempts", "attempted"),
    "Keep": ("{:,} right, {:,} kept", "solved", "kept"),
    "Rationalise": ("{:,} of {:,} failures explained", "rationalised", "hinted_attempted"),
    "Fine-tune": ("{:,} rows, {:,} updates", "trained_rows", "train_steps"),
    "Repeat": ("{:.1%} of held-out problems", "accuracy"),
}


def page(run: Run) -> str:
    """The page as text."""
    looped = [arm for arm in run.arms if arm.loops]
    arm = next((arm for arm in looped if arm.rationalises), looped[0] if looped else None)
    group = stats.hardest(run)
    row = _example(run, group) if run.method == "star" else None
    judged = [
        a for a in run.arms if run.method != "rl" and stats.outcomes(a)
    ]  # answers of an evaluation have no verdict
    return render.page(
        "star.html.j2",
        title=run.name,
        run=run,
        status=run.status,
        headline=stats.headline(run),
        unit=stats.unit(run),
        hardest=group,
        names=lambda iterations: [stats.iteration_name(run, n) for n in iterations],
        arm=arm,
        facts=_facts(arm),
        fine_tuned=_fine_tuned(run, arm),
        example=row,
        bare=without(row["prompt"], row["hint"]) if row else "",
        selections=v_star.selections(run),
        held_out=next((found[""].total for a in run.arms for found in a.answers.values() if "" in found), None),
        hinted=any("hinted_accuracy" in key for a in run.arms for found in a.stage("iteration") for key in found),
        accuracy_cards=[accuracy_card(run, a) for a in run.arms if stats.curve(a, "accuracy").x],
        tests=list(_tests(run)),
        verdicts=VERDICTS,
        outcome_cards=[
            [outcome_card(run, a, g) for a in judged if stats.outcomes(a, g)]
            for g in dict.fromkeys(["", group])
            if judged
        ],
        audit_cards=[card for a in run.arms if (card := audit_card(run, a))],
        copies=[
            (a, n, found)
            for a in run.arms
            for n in a.answers
            if (found := stats.answers(a, n, group)) and found.restated
        ],
        reinforcement_cards=rl.cards(run),
        embedded=browser.embedded(run),
        training_cards=[*loss_cards(run, f"updates, all {stats.unit(run)}s one after the other"), *_seconds(run)],
        number_tables=[
            (stats.arm_title(run, a), [stats.iteration_name(run, r["iteration"]) for r in rows], rows)
            for a in run.arms
            if (rows := a.stage("iteration"))
        ],
    )


def _facts(arm: Arm | None) -> dict[str, list[tuple[int, str]]]:
    rows = [] if arm is None else [arm.loops[0], arm.loops[-1]][: len(arm.loops)]
    facts = {
        step: [
            (row["iteration"], text.format(*(row[key] for key in keys)))
            for row in rows
            if all(row.get(key) is not None for key in keys)
        ]
        for step, (text, *keys) in _FACTS.items()
    }
    if not any(row.get("hinted_attempted") for row in rows):
        facts["Rationalise"] = [(row["iteration"], "none tried") for row in rows]
    return facts


def _fine_tuned(run: Run, arm: Arm | None) -> str:
    """What is trained, and on what, as the config says."""
    config = dict(run.config.get("loop") or {})
    if arm is not None and isinstance(run.config.get("arms"), Mapping):
        config.update(run.config["arms"].get(arm.name) or {})
    starts = {"base": "The base model is trained anew", "previous": "The newest model is trained further"}
    share = config.get("seed_share") or 0.0
    gold = f" {stats.percent(share)} of every batch are worked examples that the base was trained on." if share else ""
    solutions = " and on the data's own solutions" if config.get("include_sft_data") else ""
    return f"{starts.get(config.get('restart', ''), 'A model is trained')} on what was kept{solutions}.{gold}"


def _example(run: Run, group: str) -> Row | None:
    """A rationalised attempt of the first loop: short, of the hardest group, with right steps, if there is one."""
    first = [list(arm.attempts.values())[0].shown for arm in run.arms if arm.attempts]
    rows = [r for shown in first for r in shown if r.get("verdict") == "rationalised" and r.get("hint")]
    rows.sort(key=lambda row: (row.get("group") != group, row.get("valid") is False, len(row["completion"])))
    return rows[0] if rows else None


def _tests(run: Run) -> Iterable[tuple[Arm, Row, str, Any]]:
    """(arm, row, key, (value, low, high) of a share or None) of the results on the test split."""
    for arm in run.arms:
        for row in arm.stage("test"):
            for key in row:
                metric, _, group = key.partition("/")
                if key in ("arm", "iteration", "stage", "step") or re.search(r"_(low|high)\b", key):
                    continue
                share = row[key] is not None and (metric.startswith("accuracy") or "@" in metric)
                yield arm, row, key, stats.curve(Arm("", {"iteration": [row]}), metric, group).at(0) if share else None


# -------------------------------------------------------------------------------------------------------------- charts


def _by_iteration(run: Run, title: str, lines: list[Line], what: str) -> Card:
    axis = {"y_format": stats.whole_percent, "y_range": (0.0, 1.0), "x_label": f"{stats.unit(run)}s"}
    name = lambda n: "base" if n == 0 else f"{n:g}"  # noqa: E731
    return Card(title, charts.line_chart(lines, title=f"{what} by {stats.unit(run)}, {title}", x_name=name, **axis))


def accuracy_card(run: Run, arm: Arm) -> Card:
    """A line per group, and one with the hint: the paper's Figure 4."""
    lines = []
    for number, group in enumerate(stats.groups(run) or [""]):
        name = stats.group_label(run, group)
        plain, hinted = stats.curve(arm, "accuracy", group), stats.curve(arm, "hinted_accuracy", group)
        if plain.x:
            lines.append(Line(name, *plain[:2], charts.series(number), *plain[2:], shape=number))
        if hinted.x:
            short = {"label": f"{group or 'all'}, hinted", "dashed": True, "shape": number}
            lines.append(Line(f"{name}, with the hint", *hinted[:2], charts.series(number), **short))
    return _by_iteration(run, stats.arm_title(run, arm), lines, "Accuracy")


def outcome_card(run: Run, arm: Arm, group: str) -> Card:
    """Shares of the problems that were kept, rationalised and rejected."""
    columns = []
    for n, counts in stats.outcomes(arm, group).items():
        columns.append((str(n), [counts[name] / sum(counts.values()) for name in OUTCOMES]))
    title = f"{stats.arm_title(run, arm)} · {stats.group_label(run, group)}"
    about = f"Shares kept, rationalised and rejected by {stats.unit(run)}, {title}"
    axis = {"x_label": stats.unit(run), "y_format": stats.whole_percent, "y_max": 1.0}
    return Card(title, charts.stacked_bars(columns, VERDICTS, title=about, **axis))


def audit_card(run: Run, arm: Arm) -> Card | None:
    """How often a right answer has right steps."""
    curves = [(name, stats.curve(arm, f"valid_{name}")) for name in OUTCOMES[:2]]
    lines = [
        Line(name, *line[:2], f"var(--{name})", *line[2:], shape=number)
        for number, (name, line) in enumerate(curves)
        if line.x
    ]
    return _by_iteration(run, stats.arm_title(run, arm), lines, "Share of exactly right rationales") if lines else None


def loss_cards(run: Run, x_label: str) -> list[Card]:
    """Training loss by update: of the base, and of every arm."""
    arms = [(stats.arm_label(run, arm), arm.stage("train")) for arm in run.arms]
    cards = []
    for title, named, label in (("the base", [("base", run.base_train)], "updates"), ("the arms", arms, x_label)):
        lines = []
        for number, (name, rows) in enumerate(named):
            steps, values = stats.losses(rows)
            if steps:
                lines.append(Line(name, steps, values, charts.series(number), marks=len(steps) == 1))
        if lines:
            title, axis = f"Training loss · {title}", {"y_format": lambda v: f"{v:g}", "x_name": lambda v: f"{v:,.0f}"}
            cards.append(Card(title, charts.line_chart(lines, title=title, x_label=label, **axis)))
    return cards


def _seconds(run: Run) -> Iterable[Card]:
    stages = [(name, charts.series(number)) for number, name in enumerate(stats.STAGES)]
    if run.method == "rl":  # its rows hold the seconds of the whole training
        return
    timed = {stats.arm_title(run, arm): found for arm in run.arms if (found := stats.seconds(arm))}
    highest = max((sum(s.values()) for found in timed.values() for s in found.values()), default=0.0)
    for title, found in timed.items():
        columns = [(str(n), list(values.values())) for n, values in found.items()]
        axis = {"x_label": stats.unit(run), "y_format": lambda v: f"{v:.0f} s", "y_max": highest}
        chart = charts.stacked_bars(columns, stages, title=f"Seconds per stage by {stats.unit(run)}, {title}", **axis)
        used = [part for number, part in enumerate(stages) if any(values[number] for _, values in columns)]
        total = sum(sum(values) for _, values in columns)
        yield Card(f"Seconds per {stats.unit(run)} · {title}", chart, f"{total:,.0f} s in all.", used)
