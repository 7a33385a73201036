"""Run context (task, settings, console, metrics), and one arm's folder, metrics and timers."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
from rich.console import Console

from qstar import distributed
from qstar.data.sources import read_jsonl
from qstar.errors import TrainingFailed, check_type, require, unknown
from qstar.mesh import make_mesh
from qstar.runs.rollouts import SampleSettings, sample_rollouts, to_example
from qstar.runs.folder import cached_jsonl, write_json
from qstar.runs.console import Screen, one_line
from qstar.runs.settings import Evaluation, Gate, Log, Sections, settings_from
from qstar.runs.supervised import TrainSettings
from qstar.runs.stages import UpdateSettings
from qstar.models.model import Model
from qstar.tasks import make_task
from qstar.tasks.base import Problem, Task
from qstar.text.packing import Example
from qstar.text.tokenizer import Tokenizer
from qstar.train.checkpoint import Checkpoints
from qstar.train.stats import summarise
from qstar.train.metrics import Writer, read, show_table
from qstar.types import Rollout


@dataclasses.dataclass
class RunContext(Screen):
    """One run: built once from the ConfigDict; nothing below `methods` sees a ConfigDict."""

    SECTIONS: ClassVar = Sections
    GATE: ClassVar = Gate
    config: Any
    workdir: Path
    console: Console
    task: Task
    mesh: Any
    seed: int
    train_settings: UpdateSettings  # a TrainSettings, or what the method trains by
    sample_settings: SampleSettings
    evaluation: Evaluation
    base_settings: TrainSettings  # of a from-scratch model
    base_steps: int
    gates: dict[str, Gate]
    tokenizer: Tokenizer = None  # set with the base model
    writer: Writer = None
    failures: list[str] = dataclasses.field(default_factory=list)  # arms whose training failed

    @classmethod
    def make(cls, config: Any, workdir: Path, console: Console, train: type = TrainSettings) -> RunContext:
        """Reads a config; all that can be wrong in these sections is found here, before anything is written.

        Args:
          train: the settings class of the section `train`.
        """
        sections = settings_from(cls.SECTIONS, config.to_dict(), "")
        task_options = dict(sections.task)
        base = {"steps": 0, **sections.base}
        check_type("config.base.steps", base["steps"], int)
        require((base["steps"] >= 0, f"config.base.steps={base['steps']} must be 0 or more"))
        settings_from(Log, sections.log, "log")
        return cls(
            config=config,
            workdir=workdir,
            console=console,
            task=make_task(task_options.pop("name"), **task_options),
            mesh=make_mesh(config.mesh) if jax.device_count() > 1 or config.mesh != "data=-1" else None,
            seed=config.seed,
            train_settings=settings_from(train, sections.train, "train"),
            sample_settings=settings_from(SampleSettings, sections.sample, "sample"),
            evaluation=settings_from(Evaluation, sections.evaluate, "evaluate"),
            base_steps=base.pop("steps"),
            base_settings=settings_from(TrainSettings, base, "base"),
            gates={k: settings_from(cls.GATE, gate, f"gates.{k}") for k, gate in sections.gates.items()},
        )

    def arm_settings(self, cls: type, presets: dict[str, dict[str, Any]], name: str) -> Any:
        """Returns an arm's loop settings: the config's `loop`, over it the arm's preset, over it the arm's own keys."""
        own = self.config.arms[name].to_dict()
        preset = own.pop("preset", "star")
        if preset not in presets:
            raise unknown(f"config.arms.{name}.preset={preset!r}", str(preset), presets)
        loop = self.config.loop.to_dict()
        settings_from(cls, loop, "loop")
        return settings_from(cls, {**loop, **presets[preset], **own}, f"arms.{name}")

    def start(self) -> None:
        """Opens the metrics files."""
        self.writer = Writer.of_run(self.workdir, self.config.to_dict())

    def close(self) -> None:
        """Flushes the metrics files.

        Raises:
          TrainingFailed: an arm did not learn.
        """
        self.writer.close()
        if self.failures:
            raise TrainingFailed("; ".join(self.failures))

    def seed_example(self, problem: Problem, hinted: bool) -> Example:
        """Returns a gold row of a from-scratch model's base, as a training example."""
        return to_example(self.tokenizer, self.task.prompt(problem, hint=hinted), self.task.solution(problem))

    def fitting(self, rows: list[Example]) -> list[Example]:
        """Drops rows longer than the training row, saying how many."""
        limit = self.train_settings.row_length
        fits = [r for r in rows if len(r) <= limit]
        if len(fits) < len(rows):
            self.say(
                f"[yellow]{len(rows) - len(fits)} of {len(rows)} rows are longer than train.row_length={limit}: dropped"
            )
        return fits


class Arm:
    """One arm: WORKDIR/<name>/ and the numbers of its loops."""

    def __init__(self, ctx: RunContext, name: str, few_shot: bool = True):
        """Opens the arm's folder (created when something is written); `few_shot`: as it samples, so it is measured."""
        self.ctx, self.name, self.few_shot = ctx, name, few_shot
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
        """Returns what loops 1 .. n-1 kept."""
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
        """Greedy answers on the held-out problems, without and (if asked) with hints; 95% intervals over problems."""
        e = self.ctx.evaluation
        out: dict[str, Any] = {}
        for hinted in (False, True) if e.hinted else (False,):
            stage = f"iter_{n:03d}" + ("_hinted" if hinted else "")
            rows = self.answers(model, e.split, stage, n, hinted=hinted)
            name = "hinted_accuracy" if hinted else "accuracy"
            out.update(summarise(name, [float(r.correct) for r in rows], [r.group for r in rows]))
            if not hinted:
                out["eval_truncation_rate"] = sum(r.truncated for r in rows) / max(1, len(rows))
        self._scores[n] = out["accuracy"]
        return out

    def report(self, n: int, metrics: dict[str, Any], more: dict[str, Any]) -> None:
        """Writes the loop's metrics row, unless a run that was killed later had done so, and prints the table so far."""
        if n not in self._reported():  # now its stages were only read back, and the clock says nothing
            clock = {f"seconds_{k}": v for k, v in self.seconds.items()}
            self.ctx.writer.write(stage="iteration", step=n, arm=self.name, iteration=n, **metrics, **more, **clock)
        if distributed.is_first():
            show_table(self.ctx.console, self.name, loop_rows([r for m, r in self._reported().items() if m <= n]))

    def _reported(self) -> dict[int, dict[str, Any]]:
        """The metrics rows of this arm's loops so far."""
        rows = read(self.ctx.workdir)
        return {r["iteration"]: r for r in rows if r["stage"] == "iteration" and r["arm"] == self.name}

    def show_examples(self, rows: list[Rollout]) -> None:
        """Prints one attempt of each kind: kept, rationalised, and the rejected ones with why."""
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
        return max(self._scores, key=self._scores.get)

    def stop(self, n: int, reason: str) -> None:
        """Ends the arm early, with the reason and the number of loops that made a model in status.json."""
        self.ctx.say(f"[yellow]{self.name} stopped in loop {n}: {reason}")
        status = {"status": "stopped", "reason": reason, "iterations": len(self._scores) - 1}
        write_json(self.folder / "status.json", status)

    def fail(self, n: int, why: TrainingFailed) -> None:
        """Ends the arm early; when the other arms are done, the run fails for it (`Context.close`)."""
        self.stop(n, str(why))
        self.ctx.failures.append(f"arm {self.name}, loop {n}: {why}")

    def finish(self, base: Model) -> None:
        """Marks the arm as done (a stop stays a stop). Loops that were chosen on validation are tested once, here."""
        best = self.best
        if not distributed.exists(self.folder / "status.json"):
            status = {"status": "finished", "reason": "", "iterations": len(self._scores) - 1}
            write_json(self.folder / "status.json", status)
        if self.ctx.evaluation.split != "val":
            return
        model = base
        if best:
            weights = Checkpoints(self.checkpoint(best) / "model")
            model = base.replace(params=weights.restore(base.params)[0])
            weights.close()
        rows = self.answers(model, "test", "test", best, hinted=False)
        result = summarise("accuracy", [float(r.correct) for r in rows], [r.group for r in rows])
        self.ctx.writer.write(stage="test", step=best, arm=self.name, iteration=best, **result)
        self.ctx.say(
            f"{self.name}: best loop on validation {best}, test accuracy {result['accuracy']:.4f} "
            f"({result['accuracy_low']:.4f} to {result['accuracy_high']:.4f}; {len(rows)} problems)"
        )

    def answers(self, model: Model, split: str, stage: str, n: int, *, hinted: bool) -> list[Rollout]:
        """Greedy answers on a split, kept in evaluation/<stage>.jsonl."""
        ctx = self.ctx
        problems = ctx.task.problems(split)[: ctx.evaluation.limit or None]

        def make() -> list[dict[str, Any]]:
            with ctx.bar("evaluate", len(problems)) as progress:
                rows = sample_rollouts(
                    model,
                    ctx.task,
                    problems,
                    dataclasses.replace(ctx.sample_settings, temperature=0.0),
                    k=1,
                    hinted=hinted,
                    iteration=n,
                    seed=0,
                    folder=self.folder / "stages" / "evaluation",
                    stage=stage,
                    few_shot=self.few_shot,
                    progress=progress,
                )
            return [r.to_json() for r in rows]

        with self.timed("evaluate"):
            return [Rollout(**row) for row in cached_jsonl(self.folder / "evaluation" / f"{stage}.jsonl", make)]


def loop_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the table of an arm's loops from its metrics rows: what is never measured has no column; fits 80 columns."""
    last = rows[-1] if rows else {}
    groups = [k.partition("/")[2] for k in last if k.startswith("accuracy/")]
    narrow = [g for g in groups if len(g) <= 5][-3:] if len(groups) > 1 else []  # the report has all
    columns = {"accuracy": "accuracy", **{f"acc/{g}": f"accuracy/{g}" for g in narrow}}
    columns |= {"hinted": "hinted_accuracy", "kept": "kept", "rationalised": "rationalised", "valid": "valid_kept"}
    used = {title: key for title, key in columns.items() if any(r.get(key) is not None for r in rows)}
    if not any(r.get("hinted_attempted") or r.get("rationalised") for r in rows):
        used.pop("rationalised", None)
    return [
        {"loop": r["iteration"], **{title: r.get(key) for title, key in used.items()}, "time": _clock(r)} for r in rows
    ]


def _clock(row: dict[str, Any]) -> str:
    seconds = round(sum(v for k, v in row.items() if k.startswith("seconds_") and v))
    if seconds < 100:
        return f"{seconds} s"
    return f"{seconds // 60}:{seconds % 60:02d}" if seconds < 3600 else f"{seconds / 3600:.1f} h"
