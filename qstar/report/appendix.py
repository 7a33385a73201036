"""Appendix of a report: training, time, gates, all numbers and the config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qstar.report import frames
from qstar.report.markup import Safe, table, tag
from qstar.report.pieces import (
    COLOURS,
    STAGE_COLOURS,
    arm_title,
    card,
    details,
    grid,
    loop_title,
    measures,
    note,
    plain,
    section,
)
from qstar.report.plots import Line, legend, line_chart, stacked_bars
from qstar.report.quiet.run import QuietRun
from qstar.report.rationales import Row
from qstar.report.run import Run


def training_section(run: Run) -> Safe | None:
    """Loss by update and seconds per stage."""
    named = [(arm.name or run.method, arm.train) for arm in run.arms]
    charts = [
        loss_chart("Training loss · the base", [("base", run.base_train)], "updates"),
        loss_chart("Training loss · the loops", named, "updates, all loops one after the other"),
    ]
    charts = [chart for chart in charts if chart]
    timed = [arm for arm in run.arms if frames.seconds(arm)]
    highest = max((sum(s.values()) for arm in timed for s in frames.seconds(arm).values()), default=0.0)
    for arm in timed:
        columns = [(str(loop), list(stages.values())) for loop, stages in frames.seconds(arm).items()]
        total = sum(map(sum, (values for _, values in columns)))
        charts.append(
            card(
                f"Seconds per loop · {arm_title(run, arm)}",
                stacked_bars(
                    columns,
                    STAGE_COLOURS,
                    title=f"Seconds per stage by loop, {arm_title(run, arm)}",
                    x_label="outer loop",
                    y_format=lambda v: f"{v:.0f} s",
                    y_max=highest,
                ),
                legend(STAGE_COLOURS),
                note(f"{total:,.0f} s in all."),
            )
        )
    return section("training", "Training and time", grid(charts)) if charts else None


def loss_chart(title: str, named: Sequence[tuple[str, Sequence[Row]]], x_label: str) -> Safe | None:
    """Training loss by update, a line per (name, "train" rows); None without one."""
    lines = []
    for number, (name, rows) in enumerate(named):
        steps, values = frames.losses(rows)
        if steps:
            lines.append(Line(name, steps, values, f"var(--c{number % COLOURS})", marks=len(steps) == 1))
    if not lines:
        return None
    return card(
        title,
        line_chart(lines, title=title, x_label=x_label, y_format=lambda v: f"{v:g}", x_name=lambda v: f"{v:,.0f}"),
    )


STAR_GATES = "Checked before the first loop: a base that fails them cannot start it, or leaves it nothing to show."


def gates_section(run: Run | QuietRun, about: str = STAR_GATES) -> Safe | None:
    """The checks that the base model had to pass."""
    if not run.gates:
        return None
    rows = []
    for name, gate in run.gates.items():
        gate = gate if isinstance(gate, dict) else {"value": gate}
        verdict = {True: tag("span", "pass", class_="chip ok"), False: tag("span", "fail", class_="chip bad")}
        shown = [plain(gate.get(key)) for key in ("value", "limit")]
        rows.append([name, gate.get("metric", ""), *shown, verdict.get(gate.get("ok"), "–"), gate.get("why", "")])
    return section("gates", "Gates", note(about), table(["gate", "measures", "value", "limit", "", "why"], rows))


def numbers_section(run: Run) -> Safe | None:
    """Every number of every loop, a table per arm."""
    tables = []
    for arm in run.arms:
        loops = [row["iteration"] for row in arm.iterations]
        keys = list(dict.fromkeys(key for row in arm.iterations for key in measures(row)))
        rows = [[key, *(plain(row.get(key), key) for row in arm.iterations)] for key in keys]
        if rows:
            tables.append(details(f"All numbers · {arm_title(run, arm)}", table(["", *map(loop_title, loops)], rows)))
    return section("numbers", "All numbers", *tables) if tables else None


def config_section(run: Run | QuietRun) -> Safe:
    """The resolved config, searchable, and the environment."""
    flat = list(flatten(run.config))
    rows = [[tag("code", key), tag("code", _json(value))] for key, value in flat]
    search = tag(
        "input",
        type="search",
        placeholder="search the config",
        aria_label="search the config",
        data_filters="config-table",
    )
    config = tag("div", table(["key", "value"], rows), id="config-table")
    parts = [details(f"Config ({len(flat)} keys)", search, config)]
    if run.resolved:
        lines = [[tag("code", key), tag("code", _json(value))] for key, value in flatten(run.resolved)]
        parts.append(details("Settings with presets and defaults filled in", table(["", ""], lines)))
    if run.environment:
        lines = [[tag("code", key), tag("code", _json(value))] for key, value in flatten(run.environment)]
        parts.append(details("Environment", table(["", ""], lines)))
    return section("config", "How to repeat it", *parts)


def provenance(environment: Mapping[str, Any]) -> Safe | None:
    """When and where a run was made, how long it took, and by which command; for the head of a page."""
    if not environment.get("started"):
        return None  # of an earlier version
    get, starts = environment.get, environment.get("starts") or 1
    seconds = round(get("seconds") or 0)
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} h" if seconds >= 3600 else f"{seconds} s"
    parts = [
        f"started {str(get('started'))[:16].replace('T', ' ')} UTC on {get('host')}",
        clock + (f" in {starts} starts" if starts > 1 else "") if get("ended") else "not ended yet, or killed",
        f"{get('devices')} x {get('device')}" + (f" in {get('processes')} processes" if get("processes") != 1 else ""),
        f"qstar {get('qstar')}" + (f" ({get('revision')})" if get("revision") else ""),
    ]
    return note(" · ".join(parts), tag("br"), tag("code", get("command")))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested dict as ("outer.inner", value) pairs."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        pairs += flatten(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return pairs


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
