"""The context of a run (settings, task, mesh, console, metrics), and the folder, metrics and timers of one arm."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
from rich.console import Console

from qstar import distributed, tree
from qstar.data.sources import read_jsonl
from qstar.errors import TrainingFailed
from qstar.files import as_path
from qstar.mesh import make_mesh
from qstar.models.model import Model
from qstar.runs.console import Screen, one_line
from qstar.runs.folder import FREE_KEYS, ChecksPassed, cached_jsonl, note, open_run, write_json
from qstar.runs.rollouts import sample_rollouts, to_example
from qstar.runs.settings import Sections, TaskSections, settings_from
from qstar.runs.stages import Stage, UpdateSettings, restore
from qstar.tasks.base import Problem, Task
from qstar.tasks.prompts import PromptFormat, make_prompted
from qstar.text.packing import Example
from qstar.text.tokenizer import Tokenizer
from qstar.train.metrics import Writer, read
from qstar.train.stats import summarise
from qstar.types import Rollout


@dataclasses.dataclass
class RunContext(Screen):
    """One run: made once from the ConfigDict. A method with further sections names their class in SECTIONS."""

    SECTIONS: ClassVar[type[Sections]] = TaskSections
    config: Any
    workdir: Path
    console: Console
    settings: Any  # an object of SECTIONS
    mesh: Any
    # Set by `base_model.architecture`: a pretrained model brings its own.
    tokenizer: Tokenizer = dataclasses.field(init=False)
    # Set by `start`: it writes into the run folder, which is opened after all checks.
    writer: Writer = dataclasses.field(init=False)
    # Collected by `Arm.fail`: an arm that diverges does not end the others, and the run fails when all are done.
    failures: list[str] = dataclasses.field(default_factory=list)
    # Collected by `Arm.stop`: arms that ended before their first model, with the reason.
    idle: dict[str, str] = dataclasses.field(default_factory=dict)
    # (stage, few-shot or not) -> the base and its greedy answers, which the arms have in common.
    base_answers: dict[tuple[str, bool], tuple[Model, list[Rollout]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def make(cls, config: Any, workdir: Path, console: Console) -> Self:
        """Reads a config; raises UserError for a mistake in it, before anything is written."""
        settings = settings_from(cls.SECTIONS, config.to_dict(), "")
        several = jax.device_count() > 1 or settings.mesh != "data=-1"
        return cls(config, as_path(workdir), console, settings, make_mesh(settings.mesh) if several else None)

    @functools.cached_property
    def task(self) -> Task:
        """The task of the config. It is made at first use: a run can be exported where its task's file is gone."""
        return self._prompted[0]

    @functools.cached_property
    def prompt_format(self) -> PromptFormat:
        """The format that `base_model.checked` puts `task` in once the tokenizer is known."""
        return self._prompted[1]

    @functools.cached_property
    def _prompted(self) -> tuple[Task, PromptFormat]:
        options = dict(self.settings.task)
        return make_prompted(options.pop("name"), options)

    @property
    def seed(self) -> int:
        return self.settings.seed

    def start(self, model: Model | None = None, **resolved: Any) -> None:
        """Opens the run folder and its metrics files.

        Args:
          model: the one that the run starts from: its config goes to resolved.json, its size to environment.json.
          resolved: further entries of resolved.json.
        """
        if model is not None:
            resolved["model"] = model.config
        read = {k: v for k, v in vars(self.settings).items() if dataclasses.is_dataclass(v) and k not in FREE_KEYS}
        try:
            open_run(self.workdir, self.config.to_dict(), resolved={**read, **resolved})
        except ChecksPassed as e:
            e.context = self
            raise
        if model is not None:
            note(self.workdir, parameters=tree.size(model.params))
        self.writer = Writer(self.workdir, self.config.to_dict())

    def close(self) -> None:
        """Flushes the metrics files; raises TrainingFailed if the training of an arm failed, or no arm trained."""
        self.writer.close()
        if self.failures:
            raise TrainingFailed("; ".join(self.failures))
        if self.idle and self.idle.keys() == set(self.settings.arms):
            line = "; ".join(f"arm {name}: {reason}" for name, reason in self.idle.items())
            raise TrainingFailed(f"no arm has trained a model: {line}")

    @contextlib.contextmanager
    def stage(
        self, folder: Path, settings: UpdateSettings, *, steps: int, seed: int, bar: str = "train", **label: Any
    ) -> Iterator[Stage]:
        """A training stage of this run, under a progress bar; `label` goes into its metrics rows."""
        with self.bar(bar, steps) as progress:
            yield Stage(folder, settings, steps, seed, self.writer, label, progress)

    def seed_example(self, problem: Problem, hinted: bool) -> Example:
        """Returns a gold row of a from-scratch model's base, as a training example."""
        return to_example(self.tokenizer, self.task.prompt(problem, hint=hinted), self.task.solution(problem) or "")

    def hinted_seeds(self) -> list[Example]:
        """Returns the gold rows that have the answer as a hint in the prompt."""
        return [self.seed_example(p, hinted) for p, hinted in self.task.seeds() if hinted]

    def fitting(self, rows: list[Example]) -> list[Example]:
        """Drops rows longer than the training row, with a warning that counts them."""
        limit = self.settings.train.row_length
        fits = [r for r in rows if len(r) <= limit]
        if dropped := len(rows) - len(fits):
            self.say(f"[yellow]{dropped} of {len(rows)} rows are longer than train.row_length={limit}: dropped")
        return fits


class Arm:
    """One arm: WORKDIR/<name>/ and the numbers of its loops."""

    def __init__(self, ctx: RunContext, name: str, few_shot: bool = True, unit: str = "loop"):
        """`few_shot`: whether the arm samples, and hence is evaluated, with the few-shot prefix. `unit`: for messages."""
        self.ctx, self.name, self.few_shot, self.unit = ctx, name, few_shot, unit
        self.folder = ctx.workdir / name
        self.seconds: dict[str, float] = {}
        self._scores: dict[int, float] = {}  # loop -> accuracy

    def rationales(self, n: int) -> Path:
        """rationales/iter_NNN.jsonl"""
        return self.folder / "rationales" / f"iter_{n:03d}.jsonl"

    def checkpoint(self, n: int) -> Path:
        """checkpoints/iter_NNN, the folder of M_n"""
        return self.folder / "checkpoints" / f"iter_{n:03d}"

    def verifier(self, kind: str, n: int) -> Path:
        """verifiers/KIND/iter_NNN, the folder of a verifier (V-STaR)"""
        return self.folder / "verifiers" / kind / f"iter_{n:03d}"

    def kept_before(self, n: int) -> list[Rollout]:
        """Returns the rollouts that loops 1 .. n-1 kept."""
        # From the files, because a resumed run has not sampled the earlier loops itself.
        rows = [Rollout(**r) for m in range(1, n) for r in read_jsonl(self.rationales(m))]
        return [r for r in rows if r.verdict != "rejected"]

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall time of a stage to this loop's metrics."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def begin(self, n: int, of: int) -> None:
        """Starts the clock of loop n."""
        self.seconds = {}
        self.ctx.say(f"\n[bold]{self.name}[/bold]: loop {n} of {of}")

    def evaluate(self, model: Model, n: int) -> dict[str, Any]:
        """Returns greedy accuracy on held-out problems, without and (if asked) with hints, with 95% intervals."""
        e = self.ctx.settings.evaluate
        out: dict[str, Any] = {}
        for hinted in (False, True) if e.hinted else (False,):
            stage = f"iter_{n:03d}" + ("_hinted" if hinted else "")
            rows = self.answers(model, e.split, stage, n, hinted=hinted)
            name = "hinted_accuracy" if hinted else "accuracy"
            out.update(summarise(name, [float(r.correct) for r in rows], [r.group for r in rows]))
            if not hinted:
                out["eval_truncation_rate"] = sum(r.truncated for r in rows) / max(1, len(rows))
        # Hinted answers show what rationalisation could reach: they do not choose the best loop.
        self._scores[n] = out["accuracy"]
        return out

    def answers(self, model: Model, split: str, stage: str, n: int, *, hinted: bool) -> list[Rollout]:
        """Returns greedy answers on a split, kept in evaluation/<stage>.jsonl."""
        ctx = self.ctx
        problems = ctx.task.problems(split)[: ctx.settings.evaluate.limit or None]
        # Greedy whatever the loop samples with, so that arms of other temperatures can be compared.
        greedy = dataclasses.replace(ctx.settings.sample, temperature=0.0)
        answer = functools.partial(sample_rollouts, model, ctx.task, problems, greedy, few_shot=self.few_shot)
        folder = self.folder / "stages" / "evaluation"

        # All arms start from one base, whose greedy answers do not depend on the arm: the first one samples them.
        known = ctx.base_answers.get((stage, self.few_shot)) if n == 0 else None

        def make() -> list[dict[str, Any]]:
            if known is not None and known[0] is model:
                return [vars(r) for r in known[1]]
            with ctx.bar("evaluate", len(problems)) as progress:
                rows = answer(folder=folder, stage=stage, hinted=hinted, iteration=n, progress=progress)
            return [vars(r) for r in rows]

        with self.timed("evaluate"):
            rows = cached_jsonl(self.folder / "evaluation" / f"{stage}.jsonl", make)
        found = [Rollout(**row) for row in rows]
        if n == 0:
            ctx.base_answers.setdefault((stage, self.few_shot), (model, found))
        return found

    def report(self, n: int, metrics: dict[str, Any], more: dict[str, Any]) -> None:
        """Writes the loop's metrics row, and prints the table of the arm so far."""
        # A row that exists was written before the run was killed. This process only read the loop's stages back, so
        # that its clock would be wrong.
        if n not in self._reported():
            clock = {f"seconds_{k}": v for k, v in self.seconds.items()}
            self.ctx.writer.write(stage="iteration", step=n, arm=self.name, iteration=n, **metrics, **more, **clock)
        # The others print nothing, and would read the file while this row is being written.
        if distributed.is_first():
            self.ctx.table(self.name, loop_rows([r for m, r in self._reported().items() if m <= n]))

    def _reported(self) -> dict[int, dict[str, Any]]:
        rows = read(self.ctx.workdir)
        return {r["iteration"]: r for r in rows if r["stage"] == "iteration" and r["arm"] == self.name}

    def show_examples(self, rows: list[Rollout]) -> None:
        """Prints one attempt of each kind: kept, rationalised, and the rejected ones with the reason."""
        shown: set[str] = set()
        for r in rows:
            kind = r.verdict if r.verdict != "rejected" else r.reason.split(":")[0]
            if kind not in shown and len(shown) < 6:
                shown.add(kind)
                colour = {"kept": "green", "rationalised": "cyan"}.get(r.verdict, "red")
                console = self.ctx.console
                console.print(f"  [{colour}]{kind:>14}[/{colour}]  ", end="")
                width = max(40, console.width - 18) if console.is_terminal else 150
                console.print(one_line(r, width), markup=False, highlight=False, soft_wrap=True)

    def stale(self, patience: int) -> bool:
        """Whether the best score is `patience` loops old."""
        return sum(n > self.best for n in self._scores) >= patience

    @property
    def best(self) -> int:
        """The loop of the best score so far, of equal ones the first."""
        return max(self._scores, key=lambda n: self._scores[n])

    def stop(self, n: int, reason: str, idle: bool = False) -> None:
        """Ends the arm early, with the reason and the number of loops that made a model in status.json.

        `idle`: the loops have trained no model; an arm that stops in its first loop is idle in any case.
        """
        self.ctx.say(f"[yellow]{self.name} stopped in {self.unit} {n}: {reason}")
        if idle or not any(self._scores):  # 0 is the base
            self.ctx.idle[self.name] = reason
        self._write_status("stopped", reason)

    def fail(self, n: int, why: TrainingFailed) -> None:
        """Ends the arm early. The run fails for it after the other arms are done (`RunContext.close`)."""
        self.stop(n, str(why))
        self.ctx.failures.append(f"arm {self.name}, {self.unit} {n}: {why}")

    def _write_status(self, status: str, reason: str = "") -> None:
        # The score of loop 0 is that of the base, which no loop has made.
        loops = len(self._scores) - 1
        write_json(self.folder / "status.json", {"status": status, "reason": reason, "iterations": loops})

    def finish(self, base: Model) -> None:
        """Marks the arm as finished, unless it stopped. If loops were compared on validation, tests the best one."""
        # Test problems are read for one model alone: the best of several on them would be biased upwards.
        best = self.best
        if not distributed.exists(self.folder / "status.json"):
            self._write_status("finished")
        if self.ctx.settings.evaluate.split != "val":
            return
        model = restore(base, self.checkpoint(best)) if best else base
        rows = self.answers(model, "test", "test", best, hinted=False)
        result = summarise("accuracy", [float(r.correct) for r in rows], [r.group for r in rows])
        self.ctx.writer.write(stage="test", step=best, arm=self.name, iteration=best, **result)
        self.ctx.say(
            f"{self.name}: best {self.unit} on validation {best}, test accuracy {result['accuracy']:.4f} "
            f"({result['accuracy_low']:.4f} to {result['accuracy_high']:.4f}; {len(rows)} problems)"
        )


def loop_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the table of an arm's loops from its metrics rows, without empty columns; fits 80 characters."""
    last = rows[-1] if rows else {}
    groups = [k.partition("/")[2] for k in last if k.startswith("accuracy/")]
    narrow = [g for g in groups if len(g) <= 5][-3:] if len(groups) > 1 else []  # the report has all
    columns = {"accuracy": "accuracy", **{f"acc/{g}": f"accuracy/{g}" for g in narrow}}
    columns |= {"hinted": "hinted_accuracy", "kept": "kept", "rationalised": "rationalised", "valid": "valid_kept"}
    used = {title: key for title, key in columns.items() if any(r.get(key) is not None for r in rows)}
    if not any(r.get("hinted_attempted") or r.get("rationalised") for r in rows):
        used.pop("rationalised", None)
    # RL counts updates, of which a round has many.
    axes = [{"updates": r["updates"]} if "updates" in r else {"loop": r["iteration"]} for r in rows]
    cells = [{title: r.get(key) for title, key in used.items()} | {"time": _clock(r)} for r in rows]
    return [axis | row for axis, row in zip(axes, cells)]


def _clock(row: dict[str, Any]) -> str:
    seconds = round(sum(v for k, v in row.items() if k.startswith("seconds_") and v))
    if seconds < 100:
        return f"{seconds} s"
    return f"{seconds // 60}:{seconds % 60:02d}" if seconds < 3600 else f"{seconds / 3600:.1f} h"
