"""The page of a run whose iterations are evaluated on held-out problems: STaR, V-STaR, reinforcement learning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qstar.report import charts, render, stats
from qstar.report.charts import Card, Line
from qstar.report.pages import browser, rl, v_star
from qstar.report.rationales import OUTCOMES, Row, without
from qstar.report.read import Arm, Run

VERDICTS = [(name, f"var(--{name})") for name in OUTCOMES]


def page(run: Run) -> str:
    """The page as text."""
    looped = [arm for arm in run.arms if arm.loops]
    group = stats.hardest(run)
    judged = [arm for arm in run.arms if run.method != "rl" and stats.outcomes(arm)]
    shown = [
        [outcome_card(run, arm, g) for arm in judged if stats.outcomes(arm, g)] for g in dict.fromkeys(["", group])
    ]
    attempted = any(attempts.counts for arm in run.arms for attempts in arm.attempts.values())
    logged = rl.embedded(run)
    return render.page(
        "star.html.j2",
        run=run,
        arm=next((arm for arm in looped if arm.rationalises), looped[0] if looped else None),
        example=_example(run, group),
        without=without,
        v=v_star,
        selections=v_star.selections(run),
        accuracy_cards=[accuracy_card(run, arm) for arm in run.arms if stats.metric(arm, "accuracy").x],
        verdicts=VERDICTS,
        outcome_cards=[cards for cards in shown if cards],
        audit_cards=[card for arm in run.arms if (card := audit_card(run, arm))],
        reinforcement_cards=rl.cards(run),
        reinforcement_summary=rl.summary(run),
        completions=render.packed(logged) if logged["rows"] else "",
        attempts=render.packed(browser.embedded(run)) if attempted else "",
        training_cards=[*loss_cards(run, f"updates, all {stats.unit(run)}s one after the other"), *_seconds(run)],
    )


def _example(run: Run, group: str) -> Row | None:
    # A rationalised attempt of the first loop that shows the method best: of the hardest group, right steps, short.
    first = [list(arm.attempts.values())[0].shown for arm in run.arms if arm.attempts]
    rows = [r for shown in first for r in shown if r.get("verdict") == "rationalised" and r.get("hint")]
    best = lambda row: (row.get("group") != group, row.get("valid") is False, len(row["completion"]))  # noqa: E731
    return min(rows, key=best, default=None)


def _by_iteration(run: Run, title: str, lines: list[Line], what: str) -> Card:
    axis: dict[str, Any] = {"y_format": stats.rounded_percent, "y_range": (0.0, 1.0), "x_label": f"{stats.unit(run)}s"}
    name = lambda n: "base" if n == 0 else f"{n:g}"  # noqa: E731
    return Card(title, charts.line_chart(lines, title=f"{what} by {stats.unit(run)}, {title}", x_name=name, **axis))


def accuracy_card(run: Run, arm: Arm) -> Card:
    """Accuracy by iteration, a line per group, and one with the hint: Figure 4 of STaR."""
    lines = []
    for number, group in enumerate(stats.groups(run) or [""]):
        colour, name = charts.series(number), stats.group_label(run, group)
        plain, hinted = stats.metric(arm, "accuracy", group), stats.metric(arm, "hinted_accuracy", group)
        if plain.x:
            lines.append(Line(name, *plain[:2], colour, *plain[2:], shape=number))
        if hinted.x:
            lines.append(Line(f"{group or 'all'}, hinted", *hinted[:2], colour, dashed=True, shape=number))
    return _by_iteration(run, stats.arm_title(run, arm), lines, "Accuracy")


def outcome_card(run: Run, arm: Arm, group: str) -> Card:
    """Shares of the problems that were kept, rationalised and rejected."""
    found = stats.outcomes(arm, group)
    columns = [(str(n), [counts[name] / sum(counts.values()) for name in OUTCOMES]) for n, counts in found.items()]
    title = f"{stats.arm_title(run, arm)} · {stats.group_label(run, group)}"
    about = f"Shares kept, rationalised and rejected by {stats.unit(run)}, {title}"
    axis: dict[str, Any] = {"x_label": stats.unit(run), "y_format": stats.rounded_percent, "y_max": 1.0}
    return Card(title, charts.stacked_bars(columns, VERDICTS, title=about, **axis))


def audit_card(run: Run, arm: Arm) -> Card | None:
    """How often a right answer has right steps; None where the task cannot check them."""
    lines = []
    for number, name in enumerate(OUTCOMES[:2]):
        line = stats.metric(arm, f"valid_{name}")
        if line.x:
            lines.append(Line(name, *line[:2], f"var(--{name})", *line[2:], shape=number))
    return _by_iteration(run, stats.arm_title(run, arm), lines, "Share of exactly right rationales") if lines else None


def loss_cards(run: Run, x_label: str) -> list[Card]:
    """Training loss by update: of the base, and of every arm."""
    arms = [(stats.arm_label(run, arm), stats.losses(arm.stage("train"))) for arm in run.arms]
    # V-STaR trains G_SFT, too, which all arms start from.
    names = dict.fromkeys(row["arm"] for row in run.base_train)
    base = [(stats.label(n), stats.losses([r for r in run.base_train if r["arm"] == n])) for n in names]
    axes: dict[str, Any] = {"y_format": "{:g}".format, "x_name": "{:,.0f}".format}
    cards = [
        charts.series_card("Training loss · the base", base, x_label="updates", **axes),
        charts.series_card("Training loss · the arms", arms, x_label=x_label, **axes),
    ]
    return [card for card in cards if card]


def _seconds(run: Run) -> Iterable[Card]:
    # RL's rows hold the seconds of the whole training, not of an iteration.
    if run.method == "rl":
        return
    stages = [(name, charts.series(number)) for number, name in enumerate(stats.STAGES)]
    timed = {stats.arm_title(run, arm): found for arm in run.arms if (found := stats.seconds(arm))}
    # One scale for all arms, so that their bars can be compared.
    highest = max((sum(values) for found in timed.values() for values in found.values()), default=0.0)
    axis: dict[str, Any] = {"x_label": stats.unit(run), "y_format": "{:.0f} s".format, "y_max": highest}
    for title, found in timed.items():
        columns = [(str(n), values) for n, values in found.items()]
        chart = charts.stacked_bars(columns, stages, title=f"Seconds per stage by {stats.unit(run)}, {title}", **axis)
        used = [part for number, part in enumerate(stages) if any(values[number] for values in found.values())]
        total = sum(map(sum, found.values()))
        yield Card(f"Seconds per {stats.unit(run)} · {title}", chart, f"{total:,.0f} s in all.", used)
