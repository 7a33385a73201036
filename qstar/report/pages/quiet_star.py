"""The page of a Quiet-STaR run: results by token class, the viewer of thoughts, and curves of the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qstar.report import charts, render, stats, thoughts
from qstar.report.charts import Card
from qstar.report.pages.star import loss_cards
from qstar.report.rationales import Row
from qstar.report.read import Arm, Run

PAGE_BYTES = 6_000_000  # of packed thoughts in a page, all arms and steps together


def page(run: Run) -> str:
    """The page as text."""
    sizes = run.config.get("thoughts")
    index, packed = _viewer(run)
    group = stats.focus(run)
    return render.page(
        "quiet_star.html.j2",
        run=run,
        sizes=sizes if isinstance(sizes, Mapping) else {},
        alarms=[alarm for arm in run.arms for alarm in _alarms(arm)],
        arms=[(arm, stats.label(arm.name), stats.final(arm)) for arm in run.arms if arm.stage("evaluation")],
        focus=group,
        classes=stats.classes(run),
        index=index,
        packed=packed,
        colours=[(stats.label(arm.name), charts.series(number)) for number, arm in enumerate(run.arms)],
        curve_cards=curve_cards(run, group),
        weight_cards=weight_cards(run),
        training_cards=loss_cards(run, "steps"),
    )


def _viewer(run: Run) -> tuple[dict[str, Any] | None, list[str]]:
    # Blocks (the texts of one arm and step) are packed one by one: the script unpacks only the one that is shown.
    read = [(arm, step, thoughts.read_texts(path)) for arm in run.arms for step, path in arm.thoughts.items()]
    blocks = [block for block in read if block[2]]
    if not blocks:
        return None, []
    packed = [thoughts.pack(texts, PAGE_BYTES // len(blocks)) for *_, texts in blocks]
    main = stats.main_arm(run)
    # The page opens with the main arm's last step.
    opens = [number for number, (arm, *_) in enumerate(blocks) if arm is main] or [len(blocks) - 1]
    named = [
        {"arm": stats.label(arm.name), "step": step, "total": len(texts), "shown": shown}
        for (arm, step, texts), (_, shown) in zip(blocks, packed)
    ]
    # One scale for all blocks, so that colours of steps can be compared.
    scale = thoughts.scale([text for *_, texts in blocks for text in texts])
    return {"scale": scale, "opens": opens[-1], "blocks": named}, [text for text, _ in packed]


def _alarms(arm: Arm) -> list[tuple[str, Row, int]]:
    # An alarm repeats at every evaluation: only the last of a kind is shown. The kind is the text up to its colon;
    # numbers stand behind it.
    kinds: dict[str, list[Row]] = {}
    for row in arm.stage("alarm"):
        kinds.setdefault(str(row.get("text") or "no text").split(":")[0], []).append(row)
    return [(stats.label(arm.name), rows[-1], len(rows) - 1) for rows in kinds.values()]


def curve_cards(run: Run, group: str) -> list[Card]:
    """Accuracy, NLL, weights and correct thoughts by evaluation; rewards and advantages of the training."""
    tokens = stats.class_label(group)
    shares: dict[str, Any] = {"x_label": "step", "x_name": "{:,.0f}".format, "y_format": stats.rounded_percent}
    nats, shares = {**shares, "y_format": _signed}, {**shares, "y_range": (0.0, 1.0)}
    evaluated = lambda name: [(stats.label(a.name), stats.quiet_curve(a, name, group)) for a in run.arms]  # noqa: E731
    trained = lambda name: [(stats.label(a.name), stats.training(a, name)) for a in run.arms]  # noqa: E731
    cards = [
        charts.series_card(f"Accuracy on {tokens}", evaluated("accuracy"), marks=True, **shares),
        charts.series_card(f"NLL of {tokens}, nats", evaluated("nll"), marks=True, **nats),
        charts.series_card(f"Mixing weight at {tokens}", evaluated("weight"), marks=True, **nats),
        charts.series_card(f"Correct thoughts before {tokens}", evaluated("thought_accuracy"), marks=True, **shares),
        charts.series_card("Thoughts with a positive reward", trained("reward_positive"), **shares),
        charts.series_card("Mean size of the advantage, nats", trained("advantage"), **nats),
    ]
    return [card for card in cards if card]


def weight_cards(run: Run) -> list[Card]:
    """Histograms of the mixing weights at the last evaluation."""
    cards = []
    for number, arm in enumerate(run.arms):
        row, name = stats.final(arm), stats.label(arm.name)
        found = row.get("weight_histogram") or {}
        if any(found.get("counts", ())):
            title = f"Mixing weights, {name}, step {row['step']}"
            axis = {"title": title, "x_label": "weight of the thought", "colour": charts.series(number)}
            chart = charts.histogram(found["edges"], found["counts"], **axis)
            cards.append(Card(f"{name} · step {row['step']}", chart))
    return cards


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "−")
