"""Report sections of a STaR run, each made from a `Run`; None where a run has no data for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qstar.report import frames
from qstar.report.frames import group_label, percent
from qstar.report.markup import Safe, join, table, tag
from qstar.report.pieces import (
    COLOURS,
    VERDICT_COLOURS,
    arm_name,
    arm_title,
    card,
    details,
    grid,
    loop_name,
    loop_title,
    measures,
    note,
    plain,
    section,
    status_chip,
    value_cell,
    whole_percent,
)
from qstar.report.plots import Line, legend, line_chart, stacked_bars
from qstar.report.rationales import OUTCOMES, Row, without
from qstar.report.run import Arm, Run


def summary(run: Run) -> Safe:
    """One row per arm: where it stands, and its accuracy before and after."""
    shown = list(dict.fromkeys([frames.hardest(run), ""]))
    head = ["arm"]
    for group in shown:
        head += [f"{group_label(run, group)}: base", "now"]
    head += ["loops", "status"]
    rows = []
    for arm in run.arms:
        row: list[Any] = [arm_name(run, arm)]
        for group in shown:
            line = frames.curve(arm, "accuracy", group)
            row += [value_cell(line, 0), value_cell(line, -1)] if line.loops else ["–", "–"]
        rows.append([*row, max((r["iteration"] for r in arm.iterations), default=0), status_chip(arm)])
    return table(head, rows, class_="summary") if rows else note("No arm has started yet.")


def stopped(run: Run) -> Safe | None:
    """Why arms stopped before their last loop, and what is still to come."""
    lines = [
        tag(
            "p",
            tag("b", f"Arm {arm.name or run.method} stopped: "),
            arm.reason or "no reason was written down.",
        )
        for arm in run.arms
        if arm.status == "stopped"
    ]
    waiting = [arm.name or run.method for arm in run.arms if arm.status == "running"]
    if waiting or not run.arms:
        what = f" ({', '.join(waiting)})" if any(waiting) else ""
        lines.append(
            tag(
                "p",
                tag("b", "This run is not finished"),
                f"{what}: it is still going on, or was interrupted. Make the report again to see more.",
            )
        )
    return tag("div", *lines, class_="notice") if lines else None


def loop_section(run: Run) -> Safe | None:
    """The method in five steps, with the numbers of the arm that rationalises (or the first with a loop)."""
    arms = [arm for arm in run.arms if arm.loops]
    if run.method != "star":
        return None
    arm = next((arm for arm in arms if arm.rationalises), arms[0] if arms else None)
    steps = [
        tag("li", tag("b", name), tag("p", text or _fine_tuned(run, arm)), *_loop_numbers(arm, make))
        for name, text, make in _STEPS
    ]
    whose = f" The numbers are those of the arm “{arm.name or run.method}”." if arm else ""
    intro = note(
        "STaR (Self-Taught Reasoner; Zelikman et al. 2022, arXiv 2203.14465) teaches a model to reason from "
        "its own answers. Beyond the worked examples that start it off, nobody writes rationales for it: "
        "it is only told whether a final answer is right." + whose
    )
    return section("loop", "How the loop works", intro, tag("ol", *steps, class_="steps"), _example(run))


def _fine_tuned(run: Run, arm: Arm | None) -> str:
    """What is trained, and on what, as far as the config tells."""
    config = dict(run.config.get("loop") or {})
    if arm is not None and isinstance(run.config.get("arms"), Mapping):
        config.update(run.config["arms"].get(arm.name) or {})
    starts = {"base": "The base model is trained anew", "previous": "The newest model is trained further"}
    share = config.get("seed_share") or 0.0
    gold = f" {percent(share)} of every batch are worked examples that the base was trained on." if share else ""
    solutions = " and on the data's own solutions" if config.get("include_sft_data") else ""
    return f"{starts.get(config.get('restart'), 'A model is trained')} on what was kept{solutions}.{gold}"


def _loop_numbers(arm: Arm | None, make: Callable[[Row], str | None]) -> list[Safe]:
    rows = [] if arm is None else [arm.loops[0], arm.loops[-1]][: len(arm.loops)]
    numbers = [(row["iteration"], make(row)) for row in rows]
    return [tag("p", tag("span", f"loop {loop}"), text, class_="number") for loop, text in numbers if text]


def _count(row: Row, key: str) -> str | None:
    return None if row.get(key) is None else f"{row[key]:,}"


def _told(text: str, *keys: str) -> Callable[[Row], str | None]:
    """`text` with the row's counts filled in, None if one of them is missing."""
    return lambda row: (
        text.format(*(_count(row, k) for k in keys)) if all(row.get(k) is not None for k in keys) else None
    )


_STEPS = (
    (
        "Sample",
        "The newest model tries every problem of the loop: a rationale first, then an answer.",
        _told("{} attempts", "attempted"),
    ),
    (
        "Keep",
        "Attempts whose final answer is right become training data.",
        _told("{} right, {} kept", "solved", "kept"),
    ),
    (
        "Rationalise",
        "Where it failed, it tries again with the answer given as a hint. If it then gets there, the "
        "rationale is kept too, and the hint is removed from the prompt that is trained on.",
        lambda row: (
            _told("{} of {} failures explained", "rationalised", "hinted_attempted")(row)
            if row.get("hinted_attempted")
            else "none tried"
        ),
    ),
    (
        "Fine-tune",
        "",  # depends on the config
        _told("{} rows, {} updates", "trained_rows", "train_steps"),
    ),
    (
        "Repeat",
        "The new model does the sampling of the next loop.",
        lambda row: f"{percent(row['accuracy'])} of held-out problems" if row.get("accuracy") is not None else None,
    ),
)


def _example(run: Run) -> Safe | None:
    """One rationalised attempt of the first loop: what the model saw, what it wrote, what is trained on."""
    rows = [
        row
        for arm in run.arms
        for a in list(arm.attempts.values())[:1]
        for row in a.shown
        if row.get("verdict") == "rationalised" and row.get("hint")
    ]
    group = frames.hardest(run)
    rows.sort(key=lambda row: (row.get("group") != group, row.get("valid") is False, len(row["completion"])))
    if not rows:
        return None
    row = rows[0]
    bare = without(row["prompt"], row["hint"])
    facts = [
        ("shown", tag("pre", marked(row["prompt"], row["hint"]))),
        ("wrote", tag("pre", row["completion"])),
        ("trained on", tag("pre", bare, tag("b", row["completion"]))),
    ]
    items = (join([tag("dt", name), tag("dd", value)]) for name, value in facts)
    return tag(
        "figure",
        tag(
            "figcaption",
            f"A rationalisation from loop {row['iteration']} of this run: the hint is "
            "marked; the model is trained on the part in bold.",
        ),
        tag("dl", *items),
        class_="example",
    )


def marked(prompt: str, spans: Sequence[Sequence[int]]) -> Safe:
    """A prompt with its hint marked."""
    parts: list[Any] = []
    at = 0
    for start, end in spans:
        parts += [prompt[at:start], tag("mark", prompt[start:end])]
        at = end
    return join([*parts, prompt[at:]])


def accuracy_section(run: Run) -> Safe | None:
    """Accuracy by loop, a line per group, a chart per arm; the paper's Figure 4."""
    arms = [arm for arm in run.arms if frames.curve(arm, "accuracy").loops]
    if not arms:
        return None
    charts = [card(arm_title(run, arm), _accuracy_chart(run, arm)) for arm in arms]
    names = frames.groups(run) or [""]
    hinted = any(frames.curve(arm, "hinted_accuracy", group).loops for arm in arms for group in names)
    held_out = next((counted[""].total for arm in arms for counted in arm.answers.values() if "" in counted), None)
    about = f"Greedy answers on {held_out:,} held-out problems" if held_out else "Greedy answers on held-out problems"
    text = (
        f"{about}, without hints, after every loop; loop 0 is the base model. Bands are 95% bootstrap "
        "intervals over problems: they say nothing about other random seeds, and have no width where every "
        "answer is right or wrong."
    )
    if hinted:
        text += (
            " Dashed: the same model when it is shown the answer as a hint, which is not a result but shows "
            "whether rationalisation can work."
        )
    return section(
        "accuracy",
        "Accuracy by loop",
        note(text),
        grid(charts),
        _accuracy_table(run, arms, names),
        _test_table(run),
    )


def _accuracy_chart(run: Run, arm: Arm) -> Safe:
    lines = []
    for number, group in enumerate(frames.groups(run) or [""]):
        colour = f"var(--c{number % COLOURS})"
        name = group_label(run, group)
        plain = frames.curve(arm, "accuracy", group)
        hinted = frames.curve(arm, "hinted_accuracy", group)
        if plain.loops:
            lines.append(Line(name, plain.loops, plain.values, colour, plain.low, plain.high, shape=number))
        if hinted.loops:
            label = f"{group or 'all'}, hinted"
            lines.append(
                Line(
                    f"{name}, with the hint",
                    hinted.loops,
                    hinted.values,
                    colour,
                    dashed=True,
                    label=label,
                    shape=number,
                )
            )
    return line_chart(
        lines,
        title=f"Accuracy by outer loop, {arm_title(run, arm)}",
        x_label="outer loop",
        y_format=whole_percent,
        y_range=(0.0, 1.0),
        x_name=loop_name,
    )


def _accuracy_table(run: Run, arms: Sequence[Arm], names: Sequence[str]) -> Safe:
    rows = []
    for arm in arms:
        for group in names:
            for metric, label in (("accuracy", ""), ("hinted_accuracy", ", with the hint")):
                line = frames.curve(arm, metric, group)
                by_loop = {loop: value_cell(line, at) for at, loop in enumerate(line.loops)}
                if by_loop:
                    rows.append((arm_name(run, arm), group_label(run, group) + label, by_loop))
    loops = sorted({loop for *_, by_loop in rows for loop in by_loop})
    cells = [[arm, group, *(by_loop.get(loop, "–") for loop in loops)] for arm, group, by_loop in rows]
    return details("The same numbers as a table", table(["arm", "problems", *map(loop_title, loops)], cells))


def _test_table(run: Run) -> Safe | None:
    rows = [
        [arm_name(run, arm), row["iteration"], key.replace("_", " "), _test_value(row, key)]
        for arm in run.arms
        for row in arm.test
        for key in measures(row)
        if not re.search(r"_(low|high)\b", key)
    ]
    if not rows:
        return None
    head = ["arm", "model of loop", "measure", "value"]
    return join([tag("h3", "On the test split"), table(head, rows)])


def _test_value(row: Row, key: str) -> Any:
    metric, _, group = key.partition("/")
    if row[key] is None or not (metric.startswith("accuracy") or "@" in metric):
        return plain(row[key], key)
    return value_cell(frames.curve(Arm("", [row]), metric, group), 0)


def outcome_section(run: Run) -> Safe | None:
    """What became of the problems of every loop, and why attempts were rejected."""
    arms = [arm for arm in run.arms if frames.outcomes(arm)]
    if not arms:
        return None
    parts: list[Any] = [
        note(
            "Every problem of a loop counts once: kept (right without help), rationalised (right with the "
            "hint), or rejected (neither). Only the first two are trained on."
        ),
        legend(VERDICT_COLOURS),
    ]
    for group in dict.fromkeys(["", frames.hardest(run)]):
        with_data = [arm for arm in arms if frames.outcomes(arm, group)]
        charts = [
            card(f"{arm_title(run, arm)} · {group_label(run, group)}", _outcome_chart(run, arm, group))
            for arm in with_data
        ]
        parts.append(grid(charts))
    parts.append(_outcome_table(run, arms))
    reasons = [_reasons(run, arm) for arm in arms if frames.rejections(arm)]
    if reasons:
        parts += [
            tag("h3", "Why attempts were rejected"),
            note("Attempts, not problems: one that failed without and with the hint counts twice."),
            *reasons,
        ]
    return section("kept", "What was kept", *parts)


def _outcome_chart(run: Run, arm: Arm, group: str) -> Safe:
    columns = []
    for loop, counts in frames.outcomes(arm, group).items():
        total = sum(counts.values())
        columns.append((str(loop), [counts[name] / total for name in OUTCOMES]))
    return stacked_bars(
        columns,
        VERDICT_COLOURS,
        y_format=whole_percent,
        y_max=1.0,
        x_label="outer loop",
        title=f"Shares kept, rationalised and rejected by loop, {arm_title(run, arm)}",
    )


def _outcome_table(run: Run, arms: Sequence[Arm]) -> Safe:
    rows = []
    for arm in arms:
        for group in dict.fromkeys(["", *frames.groups(run)]):
            for loop, counts in frames.outcomes(arm, group).items():
                numbers = [f"{counts[name]:,}" for name in OUTCOMES]
                rows.append([arm_name(run, arm), loop_title(loop), group_label(run, group), *numbers])
    return details("The same in problems", table(["arm", "loop", "problems", *OUTCOMES], rows))


def _reasons(run: Run, arm: Arm) -> Safe:
    found = frames.rejections(arm)
    loops = sorted({loop for counts in found.values() for loop in counts})
    most = max(count for counts in found.values() for count in counts.values())
    rows = [
        [reason.replace("_", " "), *(_heat(counts.get(loop, 0), most) for loop in loops)]
        for reason, counts in found.items()
    ]
    return table([arm_title(run, arm), *map(loop_title, loops)], rows)


def _heat(count: int, most: int) -> Safe:
    share = round(100 * count / most)
    return tag("td", f"{count:,}", class_="heat", style=f"--share:{share}%")


def audit_section(run: Run) -> Safe | None:
    """How often a right answer has right steps, and whether wrong answers began with miscopied operands."""
    names = (("valid_kept", "kept"), ("valid_rationalised", "rationalised"))
    charts = []
    for arm in run.arms:
        curves = [(name, frames.curve(arm, key)) for key, name in names]
        lines = [
            Line(name, c.loops, c.values, f"var(--{name})", c.low, c.high, shape=number)
            for number, (name, c) in enumerate(curves)
            if c.loops
        ]
        if lines:
            charts.append(
                card(
                    arm_title(run, arm),
                    line_chart(
                        lines,
                        title=f"Share of exactly right rationales by loop, {arm_title(run, arm)}",
                        x_label="outer loop",
                        y_format=whole_percent,
                        y_range=(0.0, 1.0),
                        x_name=loop_name,
                    ),
                )
            )
    copies = _copy_table(run)
    if not charts and copies is None:
        return None
    text = note(
        "A right answer may come from wrong steps. This task can check a rationale line by line: the "
        "share of kept and of rationalised ones in which every line is exactly right. The loop looks only at "
        "the final answer, unless the config filters by this check."
    )
    return section("audit", "Right for the right reason?", text if charts else None, grid(charts), copies)


def _copy_table(run: Run) -> Safe | None:
    group = frames.hardest(run)
    rows = []
    for arm in run.arms:
        for loop in arm.answers:
            counted = frames.answers(arm, loop, group)
            if counted and counted.restated:
                share = percent(counted.miscopied / counted.restated)
                rows.append(
                    [
                        arm_name(run, arm),
                        loop_title(loop),
                        f"{counted.wrong:,} of {counted.total:,}",
                        f"{counted.miscopied:,} of {counted.restated:,}",
                        share,
                    ]
                )
    if not rows:
        return None
    text = (
        "The scratchpad begins by restating the sum. Some wrong answers go wrong there: a digit is "
        "miscopied, and then the wrong numbers are added. That is a failure to copy, not to carry."
    )
    head = ["arm", "model after", "wrong answers", "of these, operands miscopied", "share"]
    return join(
        [
            tag("h3", f"Wrong answers that miscopy the operands · {group_label(run, group)}"),
            note(text),
            table(head, rows),
        ]
    )
