"""Runs as pandas frames: `load_run`, the reader of run folders for notebooks, and `plot`, charts of frames."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qstar.data.sources import read_jsonl
from qstar.errors import UserError, pip_install, unknown
from qstar.report import charts, render, stats, thoughts
from qstar.report.charts import Card
from qstar.report.pages import guided_cot, quiet_star, rl, star, v_star
from qstar.report.read import Arm, Run, numbered, read_dict, read_run
from qstar.report.render import Panels

if TYPE_CHECKING:
    from pandas import DataFrame

# Method -> (folder of an arm, files) of what it sampled to train on; the number in a name is the iteration.
_ROLLOUTS = {"rl": ("completions", "update_*.jsonl"), "quiet_star": ("thoughts", "step_*.jsonl")}
_CHARTS: dict[str, Callable[[Run], Iterable[Card | None]]] = {
    "accuracy": lambda run: [star.accuracy_card(run, arm) for arm in run.arms if stats.metric(arm, "accuracy").x],
    "kept": lambda run: [star.outcome_card(run, a, g) for a in run.arms if stats.outcomes(a, g := stats.hardest(run))],
    "audit": lambda run: [star.audit_card(run, arm) for arm in run.arms],
    "selection": lambda run: [found["card"] for found in v_star.selections(run)],
    "auc": lambda run: [found["auc_card"] for found in v_star.selections(run)],
    "curves": lambda run: quiet_star.curve_cards(run, stats.focus(run)),
    "weights": quiet_star.weight_cards,
    "arms": lambda run: [guided_cot.accuracy_card(guided_cot.read_guided(run))],
    "reinforcement": rl.cards,
    "training": lambda run: star.loss_cards(run, "updates"),
}


class RunFrames:
    """A run folder, finished or not, as frames.

    Attributes:
      folder, name, method, status ("running", "done", "interrupted" or "failed"), config: of the run.
      headline: its result in a sentence.
      arms: the names of its arms, the one of the headline first; [""] for a run without named arms.
    """

    def __init__(self, run: Run):
        self.run = run
        self.folder, self.name, self.method, self.status = run.folder, run.name, run.method, run.status
        self.config = dict(run.config)
        self.arms = [arm.name for arm in run.arms]

    @functools.cached_property
    def headline(self) -> str:
        """The result in a sentence, with intervals."""
        guided = guided_cot.read_guided(self.run) if self.method == "guided_cot" else None
        return render.headline(self.run, guided)

    @functools.cached_property
    def metrics(self) -> DataFrame:
        """All rows of metrics.jsonl: arm, iteration, stage, step, and a column per metric."""
        return _frame(self.run.rows)

    @functools.cached_property
    def summary(self) -> DataFrame:
        """The last result of every arm: arm, measure, value, low, high (shares, 95% intervals over problems)."""
        return _frame([number._asdict() for number in stats.numbers(self.run)], stats.Number._fields)

    def rollouts(self, arm: str | None = None, iteration: int | None = None) -> DataFrame:
        """What an arm sampled to train on, a row per attempt; of Quiet-STaR a row per token with its thoughts.

        Args:
          arm: default: the first one.
          iteration: default: all; the update of RL, the step of Quiet-STaR.

        Raises:
          UserError: an arm or iteration that the run does not have.
        """
        folder, pattern = _ROLLOUTS.get(self.method, ("rationales", "iter_*.jsonl"))
        found = numbered(self.folder / self._arm(arm).name / folder, pattern)
        chosen = _chosen(found, iteration, f"{self.folder}: rollouts")
        read = _tokens if self.method == "quiet_star" else read_jsonl
        return _frame([{"iteration": n, **row} for n, path in chosen for row in read(path)])

    def evaluation(self, arm: str | None = None, iteration: int | None = None) -> DataFrame:
        """An arm's answers to held-out problems, a row per problem; of LM-Guided CoT the examples that it kept.

        `iteration` is the last one by default; otherwise as `rollouts`.
        """
        mine = self._arm(arm)
        if self.method == "guided_cot":
            files = sorted(self.folder.glob(f"student_*/{mine.name}/evaluation.json"))
            return _frame([row for path in files for row in read_dict(path).get("examples", ())])
        found = sorted(mine.answer_files.items())
        last = found[-1][0] if found and iteration is None else iteration
        return _frame([row for _, path in _chosen(found, last, f"{self.folder}: answers") for row in read_jsonl(path)])

    def selection(self, arm: str | None = None) -> DataFrame:
        """The chance that a V-STaR arm's choice of k samples is right: rule, k, value, low, high, and the scorer's AUC."""
        found = v_star.read_selections(self.folder, self._arm(arm).name)
        last = found[max(found)] if found else {"curves": {}, "auc": {}}
        auc = {f"best/{scorer}": value for scorer, value in last["auc"].items()}
        rows = [
            {"rule": v_star.rule_name(rule), "k": int(k), "value": mean, "low": low, "high": high, "auc": auc.get(rule)}
            for rule, by_k in last["curves"].items()
            for k, (mean, low, high) in by_k.items()
        ]
        return _frame(rows, ("rule", "k", "value", "low", "high", "auc"))

    def charts(self, section: str) -> Panels:
        """The charts of a section of the run's page, for a notebook to show.

        Raises:
          UserError: unknown section; the known ones are listed.
        """
        if section not in _CHARTS:
            raise unknown(f"charts: section {section!r}", section, _CHARTS)
        return Panels(_CHARTS[section](self.run))

    def _arm(self, name: str | None) -> Arm:
        found = {arm.name: arm for arm in self.run.arms}
        name = next(iter(found), "") if name is None else name
        # Arms of LM-Guided CoT are folders of their students.
        if self.method == "guided_cot" and any(self.folder.glob(f"student_*/{name}")):
            return Arm(name)
        if name not in found:
            raise unknown(f"{self.folder}: arm {name!r}", name, found)
        return found[name]


def load_run(path: str | os.PathLike) -> RunFrames:
    """Reads a run folder, the --workdir of `qstar train`, which may still be written to.

    Raises:
      UserError: no run folder, one of another format version, a broken file, or pandas is not installed.
    """
    _pandas()
    return RunFrames(read_run(path))


def plot(frame: DataFrame, x: str, y: str, by: str | None = None, title: str = "") -> Panels:
    """A chart of a frame that a notebook shows: a line per value of `by` over numbers, bars over anything else.

    Columns `low` and `high`, where the frame has them, are drawn as bands around lines and as lines on bars.
    """
    title = title or y
    if frame[x].dtype.kind not in "if":
        bars = [(str(name), float(value), charts.series(0)) for name, value in zip(frame[x], frame[y])]
        # A row without an interval has one of no width.
        known = {"low", "high"} <= {*frame.columns}
        ends = list(zip(*(frame[end].fillna(frame[y]) for end in ("low", "high")))) if known else []
        widest = max([1e-9, *(value for _, value, _ in bars), *(high for _, high in ends)])
        axes: dict[str, Any] = {"x_max": widest, "x_format": "{:.3g}".format, "intervals": ends}
        return Panels([Card(title, charts.horizontal_bars(bars, title=title, **axes))])
    named = []
    for name, rows in frame.groupby(by, sort=False) if by else [(y, frame)]:
        rows = rows.dropna(subset=[y]).sort_values(x)
        ends = [rows[end].tolist() for end in ("low", "high") if {"low", "high"} <= {*frame.columns}]
        named.append((str(name), [rows[x].tolist(), rows[y].tolist(), *ends]))
    return Panels([charts.series_card(title, named, marks=True, x_label=x, y_format="{:g}".format)])


def _tokens(path: Path) -> list[dict[str, Any]]:
    # A row per predicted token; thoughts of the position before it.
    rows = []
    for text in thoughts.read_texts(path):
        for j, gain in enumerate(text.gains):
            if gain is not None:
                known = [p for p in text.passes if p.nll[j] is not None]
                row = {"text": text.id, "position": j + 1, "token": text.tokens[j + 1], "class": text.classes[j + 1]}
                before = "".join(text.tokens[max(0, j - 11) : j + 1])
                row |= {"before": before, "base_nll": text.base_nll[j], "gain": gain}
                row |= {"thoughts": ["".join(p.tokens[j]) for p in known], "nll": [p.nll[j] for p in known]}
                rows.append(row | {"weights": [p.weight[j] for p in known], "rewards": [p.reward[j] for p in known]})
    return rows


def _chosen(found: list[tuple[int, Path]], number: int | None, where: str) -> list[tuple[int, Path]]:
    chosen = [(n, path) for n, path in found if number in (None, n)]
    if not chosen:
        known = f"those of {', '.join(str(n) for n, _ in found)}" if found else "none on disk"
        raise UserError(f"{where}{'' if number is None else f' of iteration {number}'}: there are {known}")
    return chosen


def _frame(rows: Iterable[Any], columns: Iterable[str] = ()) -> DataFrame:
    rows = list(rows)
    return _pandas().DataFrame(rows, columns=None if rows else list(columns))


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError(f"frames of runs need pandas: {pip_install('notebooks')}") from None
    return pandas
