"""The numbers behind every figure, as plain lists and dicts: report and notebook draw the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qstar.report.rationales import OUTCOMES, Answers
from qstar.report.run import Arm, Run

STAGES = ("sample", "rationalise", "train", "evaluate")  # of one outer loop, in their order


class Curve(NamedTuple):
    """One quantity by outer loop; `low` and `high` are empty where no interval is known."""

    loops: list[int]
    values: list[float]
    low: list[float]
    high: list[float]

    def at(self, position: int) -> tuple[float, float | None, float | None]:
        """The value at a position with its interval (None, None if there is none)."""
        interval = (self.low[position], self.high[position]) if self.low else (None, None)
        return self.values[position], *interval


def groups(run: Run) -> list[str]:
    """The groups that accuracy is broken down by, "9" before "10"; empty if there are fewer than two."""
    names = {
        key.partition("/")[2]
        for arm in run.arms
        for row in arm.iterations
        for key in row
        if key.startswith(("accuracy/", "hinted_accuracy/"))
    }
    found = sorted(names, key=lambda name: (not name.isdigit(), len(name) if name.isdigit() else 0, name))
    return found if len(found) > 1 else []


def hardest(run: Run) -> str:
    """The group that the headline is about: the most digits in arithmetic, else "" (all problems)."""
    found = groups(run)
    return found[-1] if found and task_name(run) == "arithmetic" else ""


def task_name(run: Run) -> str:
    """The task's name, "" if the config does not say it."""
    task = run.config.get("task")
    return str(task.get("name") or "") if isinstance(task, Mapping) else str(task or "")


def group_label(run: Run, group: str) -> str:
    """A group in words: "3 digits" in arithmetic; "all problems" for ""."""
    if not group:
        return "all problems"
    return f"{group} digit{'s' * (group != '1')}" if task_name(run) == "arithmetic" and group.isdigit() else group


def arm_label(run: Run, arm: Arm) -> str:
    """An arm in words: what sets two arms apart if that is rationalisation, else its name."""
    kinds = [other.rationalises for other in run.arms]
    if None in kinds or kinds.count(arm.rationalises) > 1:
        return arm.name or run.method
    return f"{'with' if arm.rationalises else 'without'} rationalisation"


def curve(arm: Arm, name: str, group: str = "") -> Curve:
    """A metric of the "iteration" rows by outer loop, with its 95% interval where the rows have one."""
    suffix = f"/{group}" if group else ""
    rows = [row for row in arm.iterations if row.get(name + suffix) is not None]
    keys = [f"{name}_{end}{suffix}" for end in ("low", "high")]
    known = bool(rows) and all(row.get(key) is not None for row in rows for key in keys)
    low, high = ([row[key] for row in rows] if known else [] for key in keys)
    return Curve([row["iteration"] for row in rows], [row[name + suffix] for row in rows], low, high)


def outcomes(arm: Arm, group: str = "") -> dict[int, dict[str, int]]:
    """Outer loop -> outcome -> problems: each problem counts once, under the best of its attempts.

    Read from the rationales; without them from the metrics, which count kept rows.
    """
    found = {loop: dict(attempts.problems.get(group, {})) for loop, attempts in arm.attempts.items()}
    for row in arm.loops:
        if row["iteration"] not in found and not group and row.get("attempted") is not None:
            kept, rationalised = (row.get(name) or 0 for name in OUTCOMES[:2])
            counts = (kept, rationalised, max(0, row["attempted"] - kept - rationalised))
            found[row["iteration"]] = dict(zip(OUTCOMES, counts))
    return {loop: counts for loop, counts in sorted(found.items()) if sum(counts.values())}


def rejections(arm: Arm) -> dict[str, dict[int, int]]:
    """Why attempts were rejected: reason -> outer loop -> attempts, the commonest reason first."""
    found: dict[str, dict[int, int]] = {}
    for loop, attempts in arm.attempts.items():
        for kind, count in attempts.counts.items():
            if kind.verdict == "rejected":
                name = (kind.reason or "no reason given") + (" (with the hint)" if kind.hinted else "")
                found.setdefault(name, {})[loop] = found.get(name, {}).get(loop, 0) + count
    for row in arm.loops:
        if row["iteration"] not in arm.attempts:
            for key, count in row.items():
                if key.startswith("rejected_") and count:
                    found.setdefault(key.removeprefix("rejected_"), {})[row["iteration"]] = count
    return dict(sorted(found.items(), key=lambda item: (-sum(item[1].values()), item[0])))


def losses(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """(updates since the first, training loss) of "train" rows; the steps of every loop start anew."""
    steps: list[float] = []
    values: list[float] = []
    before, loop, last = 0, None, 0
    for row in rows:
        if row.get("loss") is None:
            continue
        if row["iteration"] != loop:
            before = last if loop is not None and row["step"] <= last - before else before
            loop = row["iteration"]
        last = before + row["step"]
        steps.append(last)
        values.append(row["loss"])
    return steps, values


def seconds(arm: Arm) -> dict[int, dict[str, float]]:
    """Outer loop -> stage -> seconds."""
    taken = {row["iteration"]: {s: row.get(f"seconds_{s}") or 0.0 for s in STAGES} for row in arm.loops}
    return {loop: stages for loop, stages in taken.items() if sum(stages.values())}


def answers(arm: Arm, loop: int, group: str = "") -> Answers | None:
    """The counted greedy answers of one loop's model, None if they were not saved."""
    return arm.answers.get(loop, {}).get(group)


def percent(value: float | None) -> str:
    """0.0042 as "0.4%"; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}%"


def with_interval(point: tuple[float, float | None, float | None]) -> str:
    """What `Curve.at` returns as text: "0.4% (0.0–1.2%)", without brackets where no interval is known."""
    value, low, high = point
    return percent(value) + ("" if low is None else f" ({100 * low:.1f}–{100 * high:.1f}%)")


def headline(run: Run) -> str:
    """The result in one sentence, made from the first and the last loop of every arm (never the best)."""
    group = hardest(run)
    subject = f"{group}-digit accuracy" if group else "accuracy on held-out problems"
    curves = [(arm, curve(arm, "accuracy", group)) for arm in run.arms]
    curves = [(arm, line) for arm, line in curves if line.loops]
    if not curves:
        return "No results yet: this run has not evaluated a model."
    if all(line.loops[-1] == 0 for _, line in curves):
        before = with_interval(curves[0][1].at(0)).replace("%)", "%, 95% interval)")
        return f"Before the first loop, {subject} is {before}. No loop has finished yet."
    curves.sort(key=lambda item: not item[0].rationalises)
    (arm, line), others = curves[0], curves[1:]
    start = f"{subject} {_change(line)}" if len(run.arms) == 1 else f"{arm_label(run, arm)}, {subject} {_change(line)}"
    sentences = [start[0].upper() + start[1:]]
    for arm, other in others:
        label = arm_label(run, arm)
        sentences.append(("without it" if "rationalisation" in label else label) + f", it {_change(other)}")
    return "; ".join(sentences).replace("%)", "%, 95% interval)", 1) + "."


def _change(line: Curve) -> str:
    if len(line.loops) == 1:
        return f"was {with_interval(line.at(0))} after {_loops(line.loops[0])}"
    count = line.loops[-1] - line.loops[0]
    return f"went from {with_interval(line.at(0))} to {with_interval(line.at(-1))} in {_loops(count)}"


def _loops(count: int) -> str:
    return f"{count} loop{'s' * (count != 1)}"
