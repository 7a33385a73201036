"""The page of a Quiet-STaR run: its sections, in their order."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qstar.report import appendix, shell
from qstar.report.markup import Safe, join, table, tag
from qstar.report.pieces import COLOURS, card, details, grid, note, plain, section, whole_percent
from qstar.report.plots import Line, histogram, legend, line_chart
from qstar.report.quiet import frames
from qstar.report.quiet.run import QuietArm, QuietRun
from qstar.report.quiet.script import VIEWER_SCRIPT
from qstar.report.quiet.style import VIEWER_STYLE
from qstar.report.quiet.viewer import read_blocks, viewer_section
from qstar.report.rationales import Row

GATES = "Checked before thoughts are trained: a base that fails them has nothing to reinforce, or nothing to gain."
_LONGEST_LABEL = 16  # characters of an arm's name at the end of its line; the legend has all of it


def page(run: QuietRun) -> str:
    """The whole page as text."""
    parts = [
        result_section(run),
        viewer_section(run, read_blocks(run)),
        curve_section(run),
        weight_section(run),
        training_section(run),
        appendix.gates_section(run, GATES),
        numbers_section(run),
        appendix.config_section(run),
    ]
    header = [
        tag("h1", f"{run.name} · {run.method}"),
        tag("p", *_small_intervals(frames.headline(run)), class_="headline"),
        appendix.provenance(run.environment),
        _method(run),
        _alarms(run),
    ]
    return shell.document(run.name, header, parts, style=VIEWER_STYLE, script=VIEWER_SCRIPT)


def _small_intervals(text: str) -> list[Any]:
    pieces = re.split(r"( \([^)]*–[^)]*\))", text)
    return [tag("small", piece) if number % 2 else piece for number, piece in enumerate(pieces)]


def _method(run: QuietRun) -> Safe:
    """The method in three steps, with the sizes of the config where it tells them."""
    model = run.config.get("model")
    places = [run.config.get("thoughts"), model.get("thoughts") if isinstance(model, Mapping) else None]
    sizes = next((place for place in places if isinstance(place, Mapping)), {})
    length, passes = sizes.get("thought_tokens"), sizes.get("thoughts_per_position")
    details = [f"{length} tokens each" if length else "", f"{passes} thoughts per token" if passes else ""]
    steps = (
        ("Think", "After every token of a text the model writes short thoughts.", ", ".join(filter(None, details))),
        ("Talk", "A small head mixes the prediction after a thought into the one without; weight 0 ignores it.", ""),
        (
            "Learn",
            "A thought that made the true next token likelier than its siblings did becomes likelier itself.",
            "",
        ),
    )
    items = (
        tag("li", tag("b", name), tag("p", text), tag("p", facts, class_="soft") if facts else None)
        for name, text, facts in steps
    )
    return tag("ol", *items, class_="steps")


def _alarms(run: QuietRun) -> Safe | None:
    lines = [line for arm in run.arms for line in _alarms_of(arm)]
    lines += [
        tag("p", tag("b", f"Arm {arm.label} stopped: "), arm.reason or "no reason was written down.")
        for arm in run.arms
        if arm.status == "stopped"
    ]
    return tag("div", *lines, class_="notice") if lines else None


def _alarms_of(arm: QuietArm) -> list[Safe]:
    """One line per kind of alarm (its words up to the colon): the last of them, and at how many steps there was one."""
    kinds: dict[str, list[Row]] = {}
    for row in arm.alarms:
        kinds.setdefault(str(row.get("text") or "no text").split(":")[0], []).append(row)
    lines = []
    for rows in kinds.values():
        often = f" (and {len(rows) - 1}× before)" if len(rows) > 1 else ""
        head = f"Alarm · {arm.label}, step {rows[-1].get('step')}{often}: "
        lines.append(tag("p", tag("b", head), str(rows[-1].get("text") or "no text")))
    return lines


# --------------------------------------------------------------------------------------------------------- results


def result_section(run: QuietRun) -> Safe | None:
    """The last evaluation of every arm: the class that matters in full, then every class."""
    arms = [arm for arm in run.arms if arm.evaluations]
    if not arms:
        return None
    group = frames.focus(run)
    about = (
        f"Last evaluation of every arm on held-out text; {frames.class_label(group)} first, with thoughts as they are "
        "sampled, with greedy ones, with random tokens in place of the model's own (swapped: if the content of thoughts "
        "is what helps, the gain is gone), and without any (base). Right: thoughts that hold the true steps. Small "
        "numbers are 95% bootstrap intervals, which say nothing about other random seeds."
    )
    parts = [note(about), _main_table(arms, group)]
    if frames.classes(run)[1:]:
        text = "Accuracy, NLL in nats and what thoughts change about it, and w, the mean mixing weight."
        parts += [tag("h3", "Every class of tokens"), note(text), _class_table(run, arms)]
    return section("results", "What thoughts bring", *parts)


def _main_table(arms: Sequence[QuietArm], group: str) -> Safe:
    """The pilot's main table: a row per arm, columns without any number left out."""
    columns: list[tuple[str, Callable[[Row], Any]]] = [
        ("accuracy", lambda row: _interval(row, "accuracy", group)),
        ("greedy", lambda row: _share(row.get(f"accuracy_greedy/{group}"))),
        ("swapped", lambda row: _share(row.get(f"accuracy_swapped/{group}"))),
        ("base", lambda row: _share(row.get(f"accuracy_base/{group}"))),
        ("NLL", lambda row: _nats(frames.spoken(row, "nll", group))),
        ("NLL base", lambda row: _nats(row.get(f"nll_base/{group}"))),
        ("right", lambda row: _share(row.get(f"right/{group}"))),
        ("weight", lambda row: _nats(row.get(f"weight/{group}"))),
    ]
    rows = [(arm, frames.final(arm)) for arm in arms]
    cells = [[name, *(make(row) for _, row in rows)] for name, make in columns]
    cells = [column for column in cells if any(cell != "–" for cell in column[1:])]
    body = [
        [tag("b", arm.label, class_="value"), f"{row.get('step') or 0:,}", *(column[number + 1] for column in cells)]
        for number, (arm, row) in enumerate(rows)
    ]
    return table(["arm", "step", *(column[0] for column in cells)], body, class_="summary tight")


def _class_table(run: QuietRun, arms: Sequence[QuietArm]) -> Safe:
    """Accuracy, NLL with its change by thoughts, and mixing weight of every arm and class."""
    names = frames.classes(run)
    body = []
    for arm in arms:
        row = frames.final(arm)
        body.append([tag("b", arm.label, class_="value"), *(_class_cell(row, name) for name in names)])
    return table(["arm", *(name.replace("_", " ") for name in names)], body)


def _class_cell(row: Row, name: str) -> Any:
    nll, base = row.get(f"nll/{name}"), row.get(f"nll_base/{name}")
    if nll is None and base is None:
        return "–"
    details = f"NLL {_nats(base if nll is None else nll)}"
    gain = None
    if nll is not None and base is not None:
        change = f"{round(nll - base, 2) + 0.0:+.2f}".replace("-", "−")
        gain = tag("small", f" {change}", class_="up" if nll < base - 0.005 else "down" if nll > base + 0.005 else None)
    accuracy = _interval(row, "accuracy", name)
    weight = row.get(f"weight/{name}")
    mixed = None if weight is None else tag("small", f" · w {_nats(weight)}")
    return join([accuracy if accuracy != "–" else None, tag("div", details, gain, mixed, class_="value soft")])


def _interval(row: Row, name: str, group: str) -> Any:
    value = frames.spoken(row, name, group)
    if value is None:
        return "–"
    bounds = frames.interval(row, name, group)
    small = bounds and tag("small", f" {100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}")
    return tag("span", frames.percent(value), small, class_="value")


def _share(value: float | None) -> str:
    return frames.percent(value)


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0: no minus nought


# ---------------------------------------------------------------------------------------------------------- curves


def _colour(number: int) -> str:
    return f"var(--c{number % COLOURS})"


def _chart(
    run: QuietRun,
    title: str,
    points: Callable[[QuietArm], tuple[Sequence[float], ...]],
    y_format: Callable[[float], str],
    *,
    y_range: tuple[float, float] | None = None,
    marks: bool = True,
) -> Safe | None:
    """A line per arm that has the measure; `points` gives (steps, values) or (steps, values, low, high)."""
    lines = []
    for number, arm in enumerate(run.arms):
        steps, values, *bounds = points(arm)
        if steps:
            label = arm.label if len(arm.label) <= _LONGEST_LABEL else arm.label[: _LONGEST_LABEL - 1] + "…"
            lines.append(
                Line(arm.label, steps, values, _colour(number), *bounds, label=label, shape=number, marks=marks)
            )
    if not lines:
        return None
    least, most = (f(y for line in lines for y in (*line.y, *line.low, *line.high)) for f in (min, max))
    chart = line_chart(
        lines,
        title=title,
        x_label="step",
        y_format=y_format,
        y_range=y_range or (min(0.0, least), max(most, 1e-9)),
        x_name=lambda value: f"{value:,.0f}",
    )
    return card(title, chart)


def curve_section(run: QuietRun) -> Safe | None:
    """How accuracy, NLL, weights and thoughts moved while training."""
    group = frames.focus(run)
    tokens = frames.class_label(group)
    number = lambda value: f"{value:g}".replace("-", "−")  # noqa: E731
    measured = [
        (f"Accuracy on {tokens}", "accuracy", whole_percent, (0.0, 1.0)),
        (f"NLL of {tokens}, nats", "nll", number, None),
        (f"Mixing weight at {tokens}", "weight", number, None),
        (f"Right thoughts before {tokens}", "right", whole_percent, (0.0, 1.0)),
    ]
    charts = [
        _chart(run, title, lambda arm, name=name: frames.curve(arm, name, group), y_format, y_range=y_range)
        for title, name, y_format, y_range in measured
    ]
    trained = [
        ("Thoughts with a positive reward", "reward_positive", whole_percent, (0.0, 1.0)),
        ("Mean size of the advantage, nats", "advantage", number, None),
    ]
    charts += [
        _chart(run, title, lambda arm, name=name: frames.training(arm, name), y_format, y_range=y_range, marks=False)
        for title, name, y_format, y_range in trained
    ]
    charts = [chart for chart in charts if chart]
    if not charts:
        return None
    text = (
        "Step 0 is the base model. Accuracy, NLL, weight and right thoughts are of held-out text; rewards and advantages "
        "of training batches, neighbours averaged. An advantage near 0 means that all thoughts of a token are worth the "
        "same: nothing is learned from them any more."
    )
    colours = [(arm.label, _colour(number)) for number, arm in enumerate(run.arms)]
    return section("curves", "While training", note(text), legend(colours) if len(colours) > 1 else None, grid(charts))


def weight_section(run: QuietRun) -> Safe | None:
    """Histograms of the mixing weights at the last evaluation."""
    charts = []
    for number, arm in enumerate(run.arms):
        found = frames.histogram(frames.final(arm))
        if found:
            title = f"Mixing weights, {arm.label}, step {frames.final(arm).get('step')}"
            drawn = histogram(*found, title=title, x_label="weight of the thought", colour=_colour(number))
            charts.append(card(f"{arm.label} · step {frames.final(arm).get('step')}", drawn))
    if not charts:
        return None
    text = (
        "How much of the prediction after a thought is mixed in, over all positions; heights are logarithmic. A heap at 0 "
        "with a few far to the right is a model that knows where its thoughts are worth hearing."
    )
    return section("weights", "Mixing weights", note(text), grid(charts))


def training_section(run: QuietRun) -> Safe | None:
    """Training loss by step."""
    rows = [{"iteration": 0, **row} for row in run.base_train]  # the axis of losses counts outer loops; here is one
    named = [(arm.label, [{"iteration": 0, **row} for row in arm.train]) for arm in run.arms]
    charts = [
        appendix.loss_chart("Training loss · the base", [("base", rows)], "steps"),
        appendix.loss_chart("Training loss · all arms", named, "steps"),
    ]
    charts = [chart for chart in charts if chart]
    return section("training", "Training loss", grid(charts)) if charts else None


def numbers_section(run: QuietRun) -> Safe | None:
    """Every number of every evaluation, a table per arm."""
    tables = []
    for arm in run.arms:
        skipped = ("arm", "iteration", "stage", "step", "classes", "weight_histogram")
        keys = list(dict.fromkeys(key for row in arm.evaluations for key in row if key not in skipped))
        rows = [[key, *(plain(row.get(key), key) for row in arm.evaluations)] for key in keys]
        head = ["", *(f"step {row.get('step') or 0:,}" for row in arm.evaluations)]
        if rows:
            tables.append(details(f"All numbers · {arm.label}", table(head, rows)))
    return section("numbers", "All numbers", *tables) if tables else None
