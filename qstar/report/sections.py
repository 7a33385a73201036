"""The sections of a report, each from a `Run`; None where a run has nothing to show for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qstar.report import frames
from qstar.report.frames import arm_label, group_label, percent
from qstar.report.markup import Safe, escape, join, table, tag
from qstar.report.plots import Line, legend, line_chart, stacked_bars
from qstar.report.rationales import OUTCOMES, Row
from qstar.report.run import Arm, Run

VERDICT_COLOURS = [(name, f"var(--{name})") for name in OUTCOMES]
STAGE_COLOURS = [(name, f"var(--c{number})") for number, name in enumerate(frames.STAGES)]
COLOURS = 7  # --c0 ... --c6 in the style sheet


def section(anchor: str, title: str, *children: Any) -> Safe:
    """A titled section that the table of contents can link to."""
    return tag("section", tag("h2", title), *children, id=anchor)


def note(*children: Any) -> Safe:
    """A paragraph of explanation."""
    return tag("p", *children, class_="note")


def summary(run: Run) -> Safe:
    """One row per arm: where it stands, and its accuracy before and after."""
    shown = list(dict.fromkeys([frames.hardest(run), ""]))
    head = ["arm", "status", "loops"]
    for group in shown:
        head += [f"{group_label(run, group)}: base", f"{group_label(run, group)}: now"]
    rows = []
    for arm in run.arms:
        row = [_arm_name(run, arm), _status(arm), max((r["iteration"] for r in arm.iterations), default=0)]
        for group in shown:
            line = frames.curve(arm, "accuracy", group)
            row += [_value(line, 0), _value(line, -1)] if line.loops else ["–", "–"]
        rows.append(row)
    return table(head, rows, class_="summary") if rows else note("No arm has started yet.")


def stopped(run: Run) -> Safe | None:
    """Why arms stopped before their last loop, and what is still to come."""
    lines = [
        tag("p", tag("b", f"Arm {arm.name or run.method} stopped: "), arm.reason or "no reason was written down.")
        for arm in run.arms if arm.status == "stopped"
    ]
    waiting = [arm.name or run.method for arm in run.arms if arm.status == "running"]
    if waiting or not run.arms:
        what = f" ({', '.join(waiting)})" if any(waiting) else ""
        lines.append(tag("p", tag("b", "This run is not finished"), f"{what}: it is still going on, or was "
                         "interrupted. Make the report again to see more."))
    return tag("div", *lines, class_="notice") if lines else None


def loop_section(run: Run) -> Safe | None:
    """The method in five steps, told with the numbers of the arm that rationalises (or the first with a loop)."""
    arms = [arm for arm in run.arms if arm.loops]
    if run.method != "star":
        return None
    arm = next((arm for arm in arms if arm.rationalises), arms[0] if arms else None)
    steps = [tag("li", tag("b", name), tag("p", text), *_loop_numbers(arm, make)) for name, text, make in _STEPS]
    whose = f" The numbers are those of arm “{arm.name or run.method}”." if arm else ""
    intro = note(
        "STaR (Self-Taught Reasoner; Zelikman et al. 2022, arXiv 2203.14465) teaches a model to reason from its own "
        "answers. Nobody writes rationales for it: it is only told whether a final answer is right." + whose
    )
    return section("loop", "How the loop works", intro, tag("ol", *steps, class_="steps"), _example(run))


def _loop_numbers(arm: Arm | None, make: Callable[[Row], str | None]) -> list[Safe]:
    rows = [] if arm is None else [arm.loops[0], arm.loops[-1]][: len(arm.loops)]
    told = [(row["iteration"], make(row)) for row in rows]
    return [tag("p", tag("span", f"loop {loop}"), text, class_="number") for loop, text in told if text]


def _count(row: Row, key: str) -> str | None:
    return None if row.get(key) is None else f"{row[key]:,}"


def _told(text: str, *keys: str) -> Callable[[Row], str | None]:
    """`text` with the row's counts filled in, None if one of them is missing."""
    return lambda row: text.format(*(_count(row, k) for k in keys)) if all(row.get(k) is not None for k in keys) else None


_STEPS = (
    ("Sample", "The newest model tries every problem of the loop: a rationale first, then an answer.",
     _told("{} problems tried", "attempted")),
    ("Keep", "Attempts whose final answer is right become training data.",
     _told("{} right, {} kept", "solved", "kept")),
    ("Rationalise", "Where it failed, it tries again with the answer given as a hint. If it then gets there, the "
     "rationale is kept too, and the hint is removed from the prompt that is trained on.",
     lambda row: _told("{} of {} failures explained", "rationalised", "hinted_attempted")(row)
     if row.get("hinted_attempted") else "none tried"),
    ("Fine-tune", "A model is trained on what was kept.",
     _told("{} rows, {} updates", "trained_rows", "train_steps")),
    ("Repeat", "The better model solves more, so the next loop has more to learn from.",
     lambda row: f"{percent(row['accuracy'])} of held-out problems" if row.get("accuracy") is not None else None),
)


def _example(run: Run) -> Safe | None:
    """One rationalised attempt of the first loop that has one: what the model saw, wrote, and is trained on."""
    rows = [row for arm in run.arms for a in list(arm.attempts.values())[:1] for row in a.shown
            if row.get("verdict") == "rationalised" and row.get("hint")]
    group = frames.hardest(run)
    rows.sort(key=lambda row: (row.get("group") != group, row.get("valid") is False, len(row["completion"])))
    if not rows:
        return None
    row = rows[0]
    bare = _without(row["prompt"], row["hint"])
    facts = [
        ("shown", tag("pre", marked(row["prompt"], row["hint"]))),
        ("wrote", tag("pre", row["completion"])),
        ("trained on", tag("pre", bare, tag("b", row["completion"]))),
    ]
    items = (join([tag("dt", name), tag("dd", value)]) for name, value in facts)
    return tag("figure", tag("figcaption", f"A rationalisation from loop {row['iteration']} of this run: the hint is "
               "marked; the model is trained on the part in bold."), tag("dl", *items), class_="example")


def marked(prompt: str, spans: Sequence[Sequence[int]]) -> Safe:
    """A prompt with its hint marked."""
    parts: list[Any] = []
    at = 0
    for start, end in spans:
        parts += [prompt[at:start], tag("mark", prompt[start:end])]
        at = end
    return join([*parts, prompt[at:]])


def _without(prompt: str, spans: Sequence[Sequence[int]]) -> str:
    for start, end in reversed(list(spans)):
        prompt = prompt[:start] + prompt[end:]
    return prompt


def accuracy_section(run: Run) -> Safe | None:
    """Accuracy by loop, a line per group, a chart per arm; the paper's Figure 4."""
    arms = [arm for arm in run.arms if frames.curve(arm, "accuracy").loops]
    if not arms:
        return None
    charts = [_chart(arm_title(run, arm), _accuracy_chart(run, arm)) for arm in arms]
    names = frames.groups(run) or [""]
    hinted = any(frames.curve(arm, "hinted_accuracy", group).loops for arm in arms for group in names)
    held_out = next((counted[""].total for arm in arms for counted in arm.answers.values() if "" in counted), None)
    about = f"Greedy answers on {held_out:,} held-out problems" if held_out else "Greedy answers on held-out problems"
    text = f"{about}, without hints, after every loop; loop 0 is the base model. Bands are 95% bootstrap intervals over "
    text += "problems: they say nothing about other random seeds, and have no width where every answer is right or wrong."
    if hinted:
        text += " Dashed: the same model when it is shown the answer as a hint, which is not a result but shows " \
                "whether rationalisation can work."
    return section("accuracy", "Accuracy by loop", note(text), grid(charts), _accuracy_table(run, arms, names),
                   _test_table(run))


def _accuracy_chart(run: Run, arm: Arm) -> Safe:
    lines = []
    for number, group in enumerate(frames.groups(run) or [""]):
        colour = f"var(--c{number % COLOURS})"
        name = group_label(run, group)
        plain = frames.curve(arm, "accuracy", group)
        hinted = frames.curve(arm, "hinted_accuracy", group)
        if plain.loops:
            lines.append(Line(name, plain.loops, plain.values, colour, plain.low, plain.high))
        if hinted.loops:
            label = f"{group or 'all'}, hinted"
            lines.append(Line(f"{name}, with the hint", hinted.loops, hinted.values, colour, dashed=True, label=label))
    return line_chart(lines, title=f"Accuracy by outer loop, {arm_title(run, arm)}", x_label="outer loop",
                      y_format=_whole_percent, y_range=(0.0, 1.0), x_name=_loop_name)


def _accuracy_table(run: Run, arms: Sequence[Arm], names: Sequence[str]) -> Safe:
    rows = []
    for arm in arms:
        for group in names:
            for metric, label in (("accuracy", ""), ("hinted_accuracy", ", with the hint")):
                line = frames.curve(arm, metric, group)
                by_loop = {loop: _value(line, at) for at, loop in enumerate(line.loops)}
                if by_loop:
                    rows.append((_arm_name(run, arm), group_label(run, group) + label, by_loop))
    loops = sorted({loop for *_, by_loop in rows for loop in by_loop})
    cells = [[arm, group, *(by_loop.get(loop, "–") for loop in loops)] for arm, group, by_loop in rows]
    return details("The same numbers as a table", table(["arm", "problems", *map(_loop_title, loops)], cells))


def _test_table(run: Run) -> Safe | None:
    rows = [[_arm_name(run, arm), row["iteration"], key.replace("_", " "), _plain(row[key], key)]
            for arm in run.arms for row in arm.test for key in _values(row) if not re.search(r"_(low|high)\b", key)]
    if not rows:
        return None
    return join([tag("h3", "On the test split"), table(["arm", "of loop", "measure", "value"], rows)])


def outcome_section(run: Run) -> Safe | None:
    """What became of the problems of every loop, and why attempts were rejected."""
    arms = [arm for arm in run.arms if frames.outcomes(arm)]
    if not arms:
        return None
    parts: list[Any] = [note(
        "Every problem of a loop counts once: kept (right without help), rationalised (right with the hint), or "
        "rejected (neither). Only the first two are trained on."), legend(VERDICT_COLOURS)]
    for group in dict.fromkeys(["", frames.hardest(run)]):
        with_data = [arm for arm in arms if frames.outcomes(arm, group)]
        charts = [_chart(f"{arm_title(run, arm)} · {group_label(run, group)}", _outcome_chart(run, arm, group))
                  for arm in with_data]
        parts.append(grid(charts))
    reasons = [_reasons(run, arm) for arm in arms if frames.rejections(arm)]
    if reasons:
        parts += [tag("h3", "Why attempts were rejected"), note(
            "Attempts, not problems: one that failed without and with the hint counts twice."), *reasons]
    return section("kept", "What was kept", *parts)


def _outcome_chart(run: Run, arm: Arm, group: str) -> Safe:
    columns = []
    for loop, counts in frames.outcomes(arm, group).items():
        total = sum(counts.values())
        columns.append((str(loop), [counts[name] / total for name in OUTCOMES]))
    return stacked_bars(columns, VERDICT_COLOURS, y_format=_whole_percent, y_max=1.0, x_label="outer loop",
                        title=f"Shares kept, rationalised and rejected by loop, {arm_title(run, arm)}")


def _reasons(run: Run, arm: Arm) -> Safe:
    found = frames.rejections(arm)
    loops = sorted({loop for counts in found.values() for loop in counts})
    most = max(count for counts in found.values() for count in counts.values())
    rows = [[reason, *(_heat(counts.get(loop, 0), most) for loop in loops)] for reason, counts in found.items()]
    return table([arm_title(run, arm), *map(_loop_title, loops)], rows)


def _heat(count: int, most: int) -> Safe:
    share = round(100 * count / most)
    return tag("td", f"{count:,}", class_="heat", style=f"--share:{share}%")


def audit_section(run: Run) -> Safe | None:
    """How often a right answer has right steps, and whether wrong answers began with miscopied operands."""
    names = (("valid_kept", "kept"), ("valid_rationalised", "rationalised"))
    charts = []
    for arm in run.arms:
        curves = [(name, frames.curve(arm, key)) for key, name in names]
        lines = [Line(name, c.loops, c.values, f"var(--{name})", c.low, c.high) for name, c in curves if c.loops]
        if lines:
            charts.append(_chart(arm_title(run, arm), line_chart(
                lines, title=f"Share of exactly right rationales by loop, {arm_title(run, arm)}",
                x_label="outer loop", y_format=_whole_percent, y_range=(0.0, 1.0), x_name=_loop_name)))
    copies = _copy_table(run)
    if not charts and copies is None:
        return None
    text = note("A right answer may come from wrong steps. This task can check a rationale line by line: the share of "
                "kept and of rationalised ones in which every line is exactly right. Training does not see this check.")
    return section("audit", "Right for the right reason?", text if charts else None, grid(charts), copies)


def _copy_table(run: Run) -> Safe | None:
    group = frames.hardest(run)
    rows = []
    for arm in run.arms:
        for loop in arm.answers:
            counted = frames.answers(arm, loop, group)
            if counted and counted.restated:
                share = percent(counted.miscopied / counted.restated)
                rows.append([_arm_name(run, arm), _loop_title(loop), f"{counted.wrong:,} of {counted.total:,}",
                             f"{counted.miscopied:,} of {counted.restated:,}", share])
    if not rows:
        return None
    text = ("The scratchpad begins by restating the sum. In many wrong answers the model already restates it with a "
            "wrong digit, and then adds the wrong numbers: what it lacks is copying, not carrying.")
    head = ["arm", "model after", "wrong answers", "of these, operands miscopied", "share"]
    return join([tag("h3", f"Wrong answers that miscopy the operands · {group_label(run, group)}"), note(text),
                 table(head, rows)])


def training_section(run: Run) -> Safe | None:
    """Loss by update and seconds per stage."""
    named = [(arm_title(run, arm), arm.train) for arm in run.arms] + [("base", run.base_train)]
    lines = []
    for number, (name, rows) in enumerate(named):
        steps, values = frames.losses(rows)
        if steps:
            colour = f"var(--c{number % COLOURS})"
            lines.append(Line(name, steps, values, colour, marks=len(steps) == 1, label=name.partition(" · ")[0]))
    charts = []
    if lines:
        chart = line_chart(lines, title="Training loss by update", x_label="updates (all loops, one after the other)",
                           y_format=lambda v: f"{v:g}", x_name=lambda v: f"{v:,.0f}")
        charts.append(_chart("Training loss", chart))
    timed = [arm for arm in run.arms if frames.seconds(arm)]
    highest = max((sum(s.values()) for arm in timed for s in frames.seconds(arm).values()), default=0.0)
    for arm in timed:
        columns = [(str(loop), list(stages.values())) for loop, stages in frames.seconds(arm).items()]
        total = sum(map(sum, (values for _, values in columns)))
        charts.append(_chart(f"Seconds per loop · {arm_title(run, arm)}", stacked_bars(
            columns, STAGE_COLOURS, title=f"Seconds per stage by loop, {arm_title(run, arm)}", x_label="outer loop",
            y_format=lambda v: f"{v:.0f} s", y_max=highest), legend(STAGE_COLOURS),
            note(f"{total:,.0f} s in all.")))
    return section("training", "Training and time", grid(charts)) if charts else None


def gates_section(run: Run) -> Safe | None:
    """The checks that the base model had to pass."""
    if not run.gates:
        return None
    rows = []
    for name, gate in run.gates.items():
        gate = gate if isinstance(gate, dict) else {"value": gate}
        verdict = {True: tag("span", "pass", class_="chip ok"), False: tag("span", "fail", class_="chip bad")}
        shown = [_plain(gate.get(key)) for key in ("value", "limit")]
        rows.append([name, *shown, verdict.get(gate.get("ok"), "–"), gate.get("why", "")])
    text = note("Checked before the first loop: a base that fails them cannot start the loop, or leaves it nothing to show.")
    return section("gates", "Gates", text, table(["gate", "value", "limit", "", "why"], rows))


def numbers_section(run: Run) -> Safe | None:
    """Every number of every loop, a table per arm."""
    tables = []
    for arm in run.arms:
        loops = [row["iteration"] for row in arm.iterations]
        keys = list(dict.fromkeys(key for row in arm.iterations for key in _values(row)))
        rows = [[key, *(_plain(row.get(key), key) for row in arm.iterations)] for key in keys]
        if rows:
            tables.append(details(f"All numbers · {arm_title(run, arm)}", table(["", *map(_loop_title, loops)], rows)))
    return section("numbers", "All numbers", *tables) if tables else None


def config_section(run: Run) -> Safe:
    """The resolved config, searchable, and the environment."""
    flat = list(flatten(run.config))
    rows = [[tag("code", key), tag("code", _json(value))] for key, value in flat]
    search = tag("input", type="search", placeholder="search the config", aria_label="search the config",
                 data_filters="config-table")
    config = tag("div", table(["key", "value"], rows), id="config-table")
    parts = [details(f"Config ({len(flat)} keys)", search, config)]
    if run.environment:
        lines = [[tag("code", key), tag("code", _json(value))] for key, value in flatten(run.environment)]
        parts.append(details("Environment", table(["", ""], lines)))
    return section("config", "How to repeat it", *parts)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested dict as ("outer.inner", value) pairs."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        pairs += flatten(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return pairs


def grid(items: Sequence[Safe]) -> Safe | None:
    """Charts side by side where there is room."""
    return tag("div", *items, class_="grid") if items else None


def details(title: str, *children: Any) -> Safe:
    """Something that opens at a click."""
    return tag("details", tag("summary", title), *children)


def arm_title(run: Run, arm: Arm) -> str:
    """An arm's name with its meaning: "rat · with rationalisation"."""
    return " · ".join(dict.fromkeys(part for part in (arm.name, arm_label(run, arm)) if part))


def _arm_name(run: Run, arm: Arm) -> Safe:
    label = arm_label(run, arm)
    name = arm.name or run.method
    return join([tag("b", name), f" {label}" if label != name else None])


def _status(arm: Arm) -> Safe:
    kinds = {"finished": "ok", "stopped": "bad"}
    return tag("span", arm.status, class_=f"chip {kinds.get(arm.status, 'open')}")


def _chart(title: str, *children: Any) -> Safe:
    return tag("figure", tag("figcaption", title), *children, class_="card")


def _value(line: frames.Curve, at: int) -> Safe:
    value, low, high = line.at(at)
    bounds = None if low is None else tag("small", f" {100 * low:.1f}–{100 * high:.1f}")
    return tag("span", percent(value), bounds, class_="value")


def _values(row: Row) -> list[str]:
    return [key for key in row if key not in ("arm", "iteration", "stage", "step")]


def _plain(value: Any, key: str = "") -> Any:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if "seconds" in key else f"{value:.4g}"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else repr(value) if value != {} else "{}"


def _whole_percent(value: float) -> str:
    return f"{100 * value:.1f}%" if 0 < value < 0.01 or 0.99 < value < 1 else f"{100 * value:.0f}%"


def _loop_name(value: float) -> str:
    return "base" if value == 0 else f"{value:g}"


def _loop_title(loop: int) -> str:
    return "base" if loop == 0 else f"loop {loop}"
