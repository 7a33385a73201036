"""Numbers behind the figures of runs, and names of arms: the same for pages and notebooks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from qstar.report.rationales import Row
from qstar.report.read import MAIN, Arm, Run

ALL = "all"  # Quiet-STaR: all classes of tokens
STAGES = ("sample", "rationalise", "train", "evaluate")  # of one iteration, in their order
METHODS = {"star": "STaR", "v_star": "V-STaR", "rl": "reinforcement learning", "quiet_star": "Quiet-STaR",
           "guided_cot": "LM-Guided CoT", "sft": "fine-tuning", "dpo": "DPO", "distil": "distillation"}  # fmt: skip
UNITS = {"v_star": "iteration", "rl": "update", "quiet_star": "step"}  # of the axis of a run; else "loop"
WORDS = {"star": "STaR", "norat": "without rationalisation", "1iter": "one iteration", "dr": "Dr."}  # in names of arms
WORDS |= {word: word.upper() for word in ("sft", "rft", "rpo", "dpo", "grpo", "rloo", "ppo", "prm", "kd", "rl")}
VERIFIERS = {"best/dpo": "DPO verifier", "best/prm_min": "PRM", "best/orm": "ORM"}  # rules of a selection
Point = tuple[float, float | None, float | None]  # value, and its 95% interval where it is known
_SMOOTHED = 60  # points of a smoothed training curve


class Number(NamedTuple):
    """A result of an arm, as a share; `low` and `high` are None where no interval is known."""

    arm: str
    measure: str  # in words
    value: float
    low: float | None
    high: float | None


class Curve(NamedTuple):
    """One quantity by iteration or step; `low` and `high` are empty where no interval is known."""

    x: list[int]
    values: list[float]
    low: list[float]
    high: list[float]

    def at(self, position: int) -> Point:
        """(value, low, high) at a position; None where no interval is known."""
        interval = (self.low[position], self.high[position]) if self.low else (None, None)
        return self.values[position], *interval


# --------------------------------------------------------------------------------------------------------------- words


def label(name: str) -> str:
    """The name of an arm in running text."""
    name = name.replace("v_star", "V-STaR").replace("quiet_star", "Quiet-STaR")
    return " ".join(WORDS.get(word, word) for word in name.split("_")) or "all"


def arm_label(run: Run, arm: Arm) -> str:
    """An arm in words: in STaR, with or without rationalisation where that alone tells two arms apart."""
    kinds = [other.rationalises for other in run.arms]
    if run.method != "star" or None in kinds or kinds.count(arm.rationalises) > 1:
        return label(arm.name) if arm.name else METHODS.get(run.method, run.method)
    return f"{'with' if arm.rationalises else 'without'} rationalisation"


def arm_title(run: Run, arm: Arm) -> str:
    """An arm's name with its meaning ("rat · with rationalisation"), once if both say the same."""
    words = arm_label(run, arm)
    both = words.startswith("with") and arm.name and "rationali" not in arm.name
    return f"{arm.name} · {words}" if both else words


def unit(run: Run) -> str:
    """What the horizontal axis of a run counts."""
    return UNITS.get(run.method, "loop")


def iteration_name(run: Run, number: int) -> str:
    """An iteration in running text; iteration 0 is the base model."""
    return "base" if number == 0 else f"{unit(run)} {number:,}"


def iteration_names(run: Run, numbers: Sequence[int]) -> list[str]:
    """Iterations in running text."""
    return [iteration_name(run, number) for number in numbers]


def count(number: int, word: str) -> str:
    """A number with its noun."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def percent(value: float | None) -> str:
    """0.0042 as "0.4%"; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}%"


def rounded_percent(value: float) -> str:
    """A share in whole per cent, with a decimal next to 0 and 1."""
    return f"{100 * value:.1f}%" if 0 < value < 0.01 or 0.99 < value < 1 else f"{100 * value:.0f}%"


def with_interval(point: Point) -> str:
    """What `Curve.at` returns as text: "0.4% (0.0–1.2%)", without brackets where no interval is known."""
    value, low, high = point
    return percent(value) + ("" if low is None or high is None else f" ({100 * low:.1f}–{100 * high:.1f}%)")


def seconds_text(seconds: float | None) -> str:
    """A duration: "12 s", "3:05 min", "1:01:40 h"; a dash for None."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def plain(value: Any, key: str = "") -> str:
    """A metric as table text: a dash for None, thousands with commas, seconds to a tenth."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if "seconds" in key else f"{value:.4g}"


def size(parameters: int | None) -> str:
    """A number of parameters as text: "334k", "1.5B"; a dash for None."""
    if parameters is None:
        return "–"
    unit, name = next(((u, n) for u, n in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if parameters >= u), (1, ""))
    return f"{parameters / unit:.3g}{name}"


# ------------------------------------------------------------------------------------------------------------- results


def numbers(run: Run) -> list[Number]:
    """The last results of every arm (never the best of several iterations), that of the headline first."""
    if run.method == "guided_cot":
        return _guided_numbers(run)
    found = []
    for arm in sorted(run.arms, key=lambda arm: arm is not main_arm(run)) if run.method == "quiet_star" else run.arms:
        if run.method == "quiet_star":
            named = [(f"accuracy on {class_label(focus(run))}", point(final(arm), "accuracy", focus(run)))]
        else:
            tested, group = arm.stage("test"), hardest(run)
            row: Row = next((r for r in reversed([*arm.stage("iteration"), *tested]) if "accuracy" in r), {})
            words = f"{'test ' if tested else ''}{f'{group}-digit ' if group else ''}accuracy"
            choice, rule = selected(arm)
            best = [(f"best of {choice['step']} by the {VERIFIERS[rule]}", row_point(choice, rule))] if rule else []
            named = [*best, (words, row_point(row, f"accuracy/{group}" if group else "accuracy"))]
        found += [Number(arm.name, words, *value) for words, value in named if value]
    return found


def selected(arm: Arm) -> tuple[Row, str]:
    """(row, rule) of a choice among the most samples by a verifier, after the last iteration; ({}, "") without one."""
    row = max(arm.stage("selection"), key=lambda row: (row["iteration"], row["step"]), default={})
    rule = next((rule for rule in VERIFIERS if rule in row), "")
    return (row, rule) if rule else ({}, "")


def single(arm: Arm) -> Point | None:
    """The chance that one sample of the last selection is right, with its interval."""
    last = selected(arm)[0].get("iteration")
    rows = (row for row in arm.stage("selection") if (row["iteration"], row["step"]) == (last, 1))
    return next((row_point(row, "pass") for row in rows), None)


def _guided_numbers(run: Run) -> list[Number]:
    rows: dict[str, list[float]] = defaultdict(list)
    for row in run.rows:
        if row["stage"] == "arm":
            rows[row["arm"]].append(row["accuracy"] / 100)
    arms = run.config.get("arms") or {}
    # Of the config's arms, the last one that RL has refined, else the first: fixed arms are what they are compared with.
    tuned = [name for name in arms if name in rows and (arms[name] or {}).get("rl")]
    first = (tuned[-1:] or [name for name in arms if name in rows] or [""])[0]
    order = sorted(rows, key=lambda name: name != first)
    return [Number(n, "right answers of the large model", sum(rows[n]) / len(rows[n]), None, None) for n in order]


def right(answers: Sequence[int]) -> float:
    """Percent right of a LM-Guided CoT arm without a student."""
    return 100.0 * sum(answers) / max(1, len(answers))


def mean(each: Sequence[Mapping[str, Any]], key: str, digits: int = 1) -> str:
    """The mean over students (or models) of what they have, as text."""
    values = [found[key] for found in each if found.get(key) is not None]
    return f"{fmean(values):.{digits}f}" if values else "–"


# ---------------------------------------------------------------------------------------------- iterations of an arm


def groups(run: Run) -> list[str]:
    """The groups that accuracy is broken down by, "9" before "10"; empty if there are fewer than two."""
    keys = {key for arm in run.arms for row in arm.stage("iteration") for key in row}
    names = {key.partition("/")[2] for key in keys if key.startswith(("accuracy/", "hinted_accuracy/"))}
    # Numbers by their length first: as text, "10" would come before "9".
    found = sorted(names, key=lambda name: (not name.isdigit(), len(name) if name.isdigit() else 0, name))
    return found if len(found) > 1 else []


def hardest(run: Run) -> str:
    """The group of the headline: the most digits in arithmetic, else "" (all problems)."""
    found = groups(run)
    return found[-1] if found and task_name(run) == "arithmetic" else ""


def task_name(run: Run) -> str:
    """The task's name, "" if the config has none."""
    task = run.config.get("task")
    return str(task.get("name") or "") if isinstance(task, Mapping) else str(task or "")


def group_label(run: Run, group: str) -> str:
    """A group in words: "3 digits" in arithmetic; "all problems" for ""."""
    digits = task_name(run) == "arithmetic" and group.isdigit()
    return (count(int(group), "digit") if digits else group) or "all problems"


def curve(rows: Sequence[Row], at: str, read: Callable[[Row], Point | None]) -> Curve:
    """The values that `read` takes from rows, by "iteration" or "step", with 95% intervals where all rows have one."""
    points = [(row[at] or 0, read(row)) for row in rows]
    found = [(x, *p) for x, p in points if p]
    x, values, low, high = map(list, zip(*found)) if found else ([], [], [], [])
    # Both ends in all rows or none: a band with holes would be drawn across them.
    return Curve(x, values, *((low, high) if None not in (*low, *high) else ([], [])))


def metric(arm: Arm, name: str, group: str = "") -> Curve:
    """A metric of the "iteration" rows."""
    return curve(arm.stage("iteration"), "iteration", lambda row: row_point(row, f"{name}/{group}" if group else name))


def outcomes(arm: Arm, group: str = "") -> dict[int, dict[str, int]]:
    """Iteration -> outcome -> problems: each problem counts once, under the best of its attempts."""
    found = {n: attempts.problems.get(group, {}) for n, attempts in arm.attempts.items()}
    return {n: dict(counts) for n, counts in sorted(found.items()) if sum(counts.values())}


def rejections(arm: Arm) -> dict[str, Counter[int]]:
    """Reason of rejection -> iteration -> attempts, the most frequent reason first."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for n, attempts in arm.attempts.items():
        for kind, number in attempts.counts.items():
            if kind.verdict == "rejected":
                found[(kind.reason or "no reason given") + (" (with the hint)" if kind.hinted else "")][n] += number
    return dict(sorted(found.items(), key=lambda item: (-item[1].total(), item[0])))


def losses(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """(updates since the first, training loss) of "train" rows."""
    # Every iteration counts its steps anew: they are added up for one axis.
    steps: list[float] = []
    before, loop = 0.0, None
    rows = [row for row in rows if row.get("loss") is not None]
    for row in rows:
        if row["iteration"] != loop:
            before, loop = steps[-1] if steps else 0.0, row["iteration"]
        steps.append(before + row["step"])
    return steps, [row["loss"] for row in rows]


def seconds(arm: Arm) -> dict[int, list[float]]:
    """Iteration -> seconds of each of STAGES."""
    taken = {row["iteration"]: [row.get(f"seconds_{stage}") or 0.0 for stage in STAGES] for row in arm.loops}
    return {n: values for n, values in taken.items() if sum(values)}


# -------------------------------------------------------------------------------------------- Quiet-STaR: by token class


def classes(run: Run) -> list[str]:
    """The token classes in the corpus's order, `ALL` last; empty before the first evaluation."""
    rows = [row for arm in run.arms for row in arm.stage("evaluation")]
    named = [name for row in rows for name in row.get("classes") or ()]
    keyed = [key.partition("/")[2] for row in rows for key in row if "/" in key]
    return sorted(dict.fromkeys(map(str, named + keyed)), key=lambda name: name == ALL)


def focus(run: Run) -> str:
    """The class of the headline: "hard" if there is one, else the one that the base predicts worst."""
    found = [name for name in classes(run) if name != ALL]
    if "hard" in found or not found:
        return "hard" if found else ALL
    first = [arm.stage("evaluation")[0] for arm in run.arms if arm.stage("evaluation")]
    return max(found, key=lambda name: max((row.get(f"nll_base/{name}") or 0.0 for row in first), default=0.0))


def class_label(name: str) -> str:
    """A class in running text: "hard tokens"."""
    name = name.replace("_", " ")
    return f"tokens that are {name}" if "(" in name else f"{name} tokens"


def main_arm(run: Run) -> Arm | None:
    """The arm that the page opens with: one called as the method is, else the first that thinks, else the first."""
    named = [arm for name in MAIN for arm in run.arms if arm.name == name]
    return next(iter([*named, *(arm for arm in run.arms if arm.thinks), *run.arms]), None)


def final(arm: Arm) -> Row:
    """The last evaluation, {} before the first."""
    return arm.stage("evaluation")[-1] if arm.stage("evaluation") else {}


def measured(row: Row, name: str, group: str) -> float | None:
    """A measure with thoughts where the row has it, else without."""
    value = row.get(f"{name}/{group}")
    return row.get(f"{name}_base/{group}") if value is None else value


def point(row: Row, name: str, group: str) -> Point | None:
    """(value, low, high) of what `measured` gives; None without a value."""
    return row_point(row, f"{name if row.get(f'{name}/{group}') is not None else f'{name}_base'}/{group}")


def row_point(row: Row, key: str) -> Point | None:
    """(value, low, high) of a metric of a row; None without a value. The ends of "a/b" are "a_low/b" and "a_high/b"."""
    name, slash, group = key.partition("/") if f"{key}_low" not in row else (key, "", "")
    value, low, high = (row.get(f"{name}{end}{slash}{group}") for end in ("", "_low", "_high"))
    return None if value is None else (value, low, high) if None not in (low, high) else (value, None, None)


def quiet_curve(arm: Arm, name: str, group: str) -> Curve:
    """A measure of the evaluations by step."""
    return curve(arm.stage("evaluation"), "step", lambda row: point(row, name, group))


def training(arm: Arm, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a measure of the "train" rows, smoothed."""
    pairs = [(row["step"], row[name]) for row in arm.stage("train") if row.get(name) is not None]
    # Means of neighbours: the noise of single updates would hide the trend.
    size = -(-len(pairs) // _SMOOTHED) or 1
    bins = [pairs[at : at + size] for at in range(0, len(pairs), size)]
    return [b[-1][0] for b in bins], [sum(v for _, v in b) / len(b) for b in bins]
