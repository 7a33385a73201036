"""LM-Guided CoT: a small model writes rationales, a large frozen model answers with them (arXiv 2404.03414).

    1 distil     r, a = LARGE(context, question)
                 SMALL = fine-tune(SMALL, (context, question) -> r)   on the rows whose answer a is correct
    2 refine     r = SMALL(context, question);  a = LARGE(context, question, r)
                 SMALL = RL(SMALL)   with reward = aspects of r + correctness of a
    3 answer     r = SMALL(context, question);  a = LARGE(context, question, r)

Deviations from the paper, and gaps in it that are filled here:
1. The paper refines with PPO; RLOO and GRPO are options (`rl.estimator`).
2. The measures of the eight aspects are ours (`tasks.aspects`): the paper names the aspects, not how it measures them.
3. The weights of the reward's parts, the data sizes and the learning rates are ours.
4. A rationale that is only the answer gets no reward for a correct answer (`reject_bare_answers`).
5. Controls: unfiltered and loosely filtered distillation, RL on one part of the reward, and arms without a student.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qstar.errors import Settings, UserError, bounded, require, within
from qstar.methods.distillation import DistilTrain, distil
from qstar.methods.guided_eval import percent
from qstar.methods.guided_hotpotqa import MultiHop, MultiHopSettings
from qstar.methods.guided_two_hop import TwoHop, TwoHopSettings
from qstar.methods.quiet_star import in_order
from qstar.methods.reinforce import ReinforceSettings, check_minibatches, reinforce
from qstar.models.hf import read_config
from qstar.models.hub import resolve
from qstar.models.model import Model
from qstar.runs.base_model import check_gates
from qstar.runs.context import RunContext
from qstar.runs.folder import cached_jsonl, check_run, once_json, stable_seed, write_json
from qstar.runs.settings import Gate, Sections, arms_from, settings_from
from qstar.runs.stages import Stage
from qstar.tasks import make_task, multihop
from qstar.train.distil import DistilSettings
from qstar.train.loop import Diverged
from qstar.train.rl import RLSettings
from qstar.train.stats import paired

FILTERS = ("em", "none", "parity", "f1", "includes")
GuidedTask = TwoHop | MultiHop  # both have the methods that are called below
SHOWN = ("quality", "gold_chain", "first_hop", "answer_leak", "self_consistency")  # metrics in the table of results


@dataclasses.dataclass(frozen=True)
class GuidedConfig(Settings):
    """One arm. Keys of a config's `arms.<name>` section."""

    start: str = "base"  # distillation of the small model; or an earlier arm, which RL refines
    filter: str = bounded("em", choices=FILTERS)  # of the teacher's rationales, by the answers with them
    steps: int = bounded(400, ge=0)  # of distillation
    rl: dict = dataclasses.field(default_factory=dict)  # over the config's `rl`
    train: dict = dataclasses.field(default_factory=dict)  # over the config's `train` (RL) or `distil_train`
    accuracy_weight: float = bounded(1.0, ge=0)  # of a correct answer in the reward
    aspect_weight: float = bounded(1.0, ge=0)  # of the aspects' mean
    reject_bare_answers: bool = True

    def __post_init__(self):
        super().__post_init__()
        require(
            (self.accuracy_weight + self.aspect_weight > 0, "accuracy_weight and aspect_weight are both 0"),
            (self.start != "base" or not self.rl, "rl is for arms that start from another one; name it in `start`"),
        )


class GuidedGate(Gate):
    """A bound on a measurement of the large model, see `guided_two_hop.TwoHop.gates`."""

    NAMES = ("standard", "cot", "gold", "shuffled", "empty", "wrong", "copied", "headroom", "shuffled_gap")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedSections(Sections):
    """The sections of a config of LM-Guided CoT."""

    task: dict
    train: dict  # ReinforceSettings of all arms
    gates: dict[str, GuidedGate] = dataclasses.field(default_factory=dict)  # type: ignore[assignment]  # narrower, frozen
    guided: dict = dataclasses.field(default_factory=dict)  # TwoHopSettings or MultiHopSettings
    distil: DistilSettings = dataclasses.field(default_factory=DistilSettings)
    distil_train: DistilTrain = dataclasses.field(default_factory=DistilTrain)
    rl: dict = dataclasses.field(default_factory=dict)  # RLSettings of all arms
    students: int = bounded(1, ge=1)  # random seeds of the small model

    def __post_init__(self) -> None:
        require((isinstance(self.task.get("name"), str), "task.name is missing; name a task, e.g. hotpotqa"))
        super().__post_init__()


@dataclasses.dataclass
class GuidedContext(RunContext):
    """One run of LM-Guided CoT."""

    SECTIONS: ClassVar = GuidedSections
    task: GuidedTask = dataclasses.field(init=False)  # type: ignore[assignment]  # in place of a Task
    arms: dict[str, GuidedConfig] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        arms = arms_from(GuidedConfig, vars(self.settings))
        self.task = make_guided_task(self.settings, self.workdir, self.mesh)
        self.arms = in_order(arms, lambda arm: [arm.start])
        # Mistakes in an arm's settings are found here, before anything is written.
        for name, arm in self.arms.items():
            rl, settings = self.rl_settings(name)
            self.distil_settings(name)
            if arm.start != "base":
                with within(f"config.arms.{name}.train."):
                    check_minibatches(settings, rl)
            line = f"config.arms.{name}.filter='parity' is for two-hop questions; use em, f1, includes or none"
            require((arm.filter != "parity" or isinstance(self.task, TwoHop), line))

    def distil_settings(self, name: str) -> DistilTrain:
        """Returns an arm's settings of distillation: the config's, with the arm's changes if it is distilled."""
        arm = self.arms[name]
        changes = arm.train if arm.start == "base" else {}
        return settings_from(DistilTrain, {**vars(self.settings.distil_train), **changes}, f"arms.{name}.train")

    def rl_settings(self, name: str) -> tuple[RLSettings, ReinforceSettings]:
        """Returns an arm's RL settings: the config's, with the arm's changes."""
        arm = self.arms[name]
        rl = settings_from(RLSettings, {**self.settings.rl, **arm.rl}, f"arms.{name}.rl")
        # The `train` section of an arm that is distilled changes `distil_train`, not RL.
        changes = arm.train if arm.start != "base" else {}
        train = {**self.settings.train, "max_new_tokens": self.task.max_new_tokens, **changes}
        return rl, settings_from(ReinforceSettings, train, f"arms.{name}.train")

    def part(self, folder: Path, arm: str) -> Callable[..., Stage]:
        """Returns a function that makes the training stages FOLDER/name of models that are not arms."""

        def make(name: str, settings: Any, steps: int, seed: int) -> Stage:
            self.say(f"  {name}: {steps} steps")
            return Stage(folder / name, settings, steps, seed, self.writer, {"arm": arm, "part": name})

        return make


def make_guided_task(sections: GuidedSections, workdir: Path, mesh: Any) -> GuidedTask:
    """Returns the generated two-hop questions, or those of a multi-hop data set."""
    options = dict(sections.task)
    name, seed = options.pop("name"), stable_seed(sections.seed, "world")
    if name == "two_hop":
        return TwoHop(settings_from(TwoHopSettings, sections.guided, "guided"), seed)
    settings, task = settings_from(MultiHopSettings, sections.guided, "guided"), make_task(name, **options)
    if not isinstance(task, multihop.MultiHop):
        raise UserError(f"config.task.name={name!r} has no paragraphs to reason over; use hotpotqa")
    return MultiHop(settings, task, seed, workdir, mesh)


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs all arms of a config for every student seed; continues an interrupted run of the same config."""
    ctx = GuidedContext.make(config, workdir, console)
    check_run(ctx.workdir, config.to_dict())
    if isinstance(ctx.task, MultiHop):
        settings = ctx.task.settings
        for folder in filter(None, (settings.small, settings.large.get("path"))):
            read_config(resolve(folder))  # raises for a missing model before anything is written
    arms = {n: {"arm": arm, **dict(zip(("rl", "train"), ctx.rl_settings(n)))} for n, arm in ctx.arms.items()}
    ctx.start(arms=arms)
    large = ctx.workdir / "large"
    ctx.say("\n[bold]large model[/bold]")
    ctx.task.prepare_large(ctx.part(ctx.workdir, "large"))
    measures = functools.partial(once_json, large / "measured.json", ctx.task.gates)
    # Before any student: if the large model ignores rationales, or copies their answer, the arms cannot be compared.
    check_gates(ctx, large, measures)
    measures()  # the report shows them also where no gate bounds them
    fixed = once_json(
        large / "fixed_arms.json", lambda: {n: x.astype(int).tolist() for n, x in ctx.task.fixed_arms().items()}
    )
    once_json(large / "costs.json", ctx.task.costs)
    students = [run_student(ctx, seed) for seed in range(ctx.settings.students)]
    write_results(ctx, fixed, students)
    ctx.close()


def run_student(ctx: GuidedContext, seed: int) -> dict[str, dict[str, Any]]:
    """Runs all arms for one student seed; returns the evaluation of each."""
    folder, student_seed = ctx.workdir / f"student_{seed}", stable_seed(ctx.seed, "student", seed)
    ctx.say(f"\n[bold]student {seed}[/bold]")
    stage = ctx.part(folder, f"student_{seed}")
    # All arms of a student start from one base and one set of teacher rationales, so that only the method differs.
    models = {"base": ctx.task.base(student_seed, stage)}
    rows = cached_jsonl(folder / "teacher.jsonl", lambda: ctx.task.teacher_rows(student_seed))
    out = {"undistilled": evaluate(ctx, folder, "undistilled", models["base"], seed)}
    for name, control in ctx.task.controls(models["base"], student_seed, stage).items():
        out[name] = evaluate(ctx, folder, name, control, seed)
    for name, arm in ctx.arms.items():
        ctx.say(f"  {name}")
        shared: dict[str, Any] = {"folder": folder / name, "label": {"arm": name, "student": seed}}
        with within(f"config.arms.{name}: ", Diverged):
            if arm.start == "base":
                # ---- 1: distil the teacher's rationales
                models[name] = distil_rationales(ctx, name, models["base"], rows, student_seed, **shared)
            else:
                # ---- 2: refine an arm's student by RL
                models[name] = refine(ctx, name, models[arm.start], student_seed, **shared)
        # ---- 3: let the large model answer with its rationales
        out[name] = evaluate(ctx, folder, name, models[name], seed)
    return out


def distil_rationales(
    ctx: GuidedContext, name: str, start: Model, rows: list[dict[str, Any]], seed: int, folder: Path, label: dict
) -> Model:
    """Step 1: fine-tunes the small model on the teacher's rationales that pass the filter."""
    arm = ctx.arms[name]
    kept = ctx.task.keep(rows, arm.filter)
    record = {"filter": arm.filter, "rows": len(rows), "kept": len(kept), "keep_rate": len(kept) / max(1, len(rows))}
    # By type, because a filter keeps more of the easy questions and shifts the training set towards them.
    counts = {kind: sum(r["type"] == kind for r in rows) for kind in sorted({r["type"] for r in rows})}
    record |= {f"keep_rate/{kind}": sum(r["type"] == kind for r in kept) / n for kind, n in counts.items()}
    once_json(folder / "buffer.json", lambda: record)
    train = ctx.distil_settings(name)
    # Soft losses need logits of a model with the student's vocabulary, as the two-hop task's `large` has.
    teacher = getattr(ctx.task, "large", None)
    with ctx.stage(folder / "distil", train, steps=arm.steps, seed=seed, bar=name, **label) as stage:
        return distil(start, ctx.task.to_pairs(kept), ctx.settings.distil, stage, teacher)[0]


def refine(ctx: GuidedContext, name: str, start: Model, seed: int, folder: Path, label: dict) -> Model:
    """Step 2: RL with the aspects of the rationales and the correctness of the large model's answers as reward."""
    rl, settings = ctx.rl_settings(name)
    environment = ctx.task.environment(seed, settings.prompts, ctx.arms[name])
    rl_seed = stable_seed(seed, "rl")
    with ctx.stage(folder / "rl", settings, steps=settings.updates, seed=rl_seed, bar=name, **label) as stage:
        return reinforce(start, environment, rl, stage)[0]


def evaluate(ctx: GuidedContext, folder: Path, name: str, model: Any, seed: int) -> dict[str, Any]:
    """Step 3 on the test questions, once: FOLDER/NAME/evaluation.json."""

    def make() -> dict[str, Any]:
        correct, found = ctx.task.measure(model)
        found = {"accuracy": percent(correct), **found}
        numbers = {k: v for k, v in found.items() if k != "examples"}
        ctx.writer.write(stage="arm", step=0, arm=name, student=seed, **numbers)
        return {"correct": correct.astype(int).tolist(), **found}

    found = once_json(folder / name / "evaluation.json", make)
    ctx.say(f"    accuracy {found['accuracy']:.1f}%")
    return found


def write_results(ctx: GuidedContext, fixed: dict[str, list[int]], students: list[dict[str, dict[str, Any]]]) -> None:
    """Writes results.json and prints it: accuracies per student, and paired differences between arms."""
    # Arms without a student have the same answers for all student seeds.
    correct = {name: np.asarray([x], float) for name, x in fixed.items()}
    correct |= {name: np.asarray([found[name]["correct"] for found in students], float) for name in students[0]}
    rows = []
    for name, x in correct.items():
        each = [percent(row) for row in x]
        row = {"arm": name, "mean": float(np.mean(each)), "students": " / ".join(f"{x:.1f}" for x in each)}
        has = students[0].get(name, {})
        rows.append(row | {k: float(np.mean([s[name][k] for s in students])) if k in has else None for k in SHOWN})
    differences = []
    for a, b in comparisons(ctx.arms):
        if a in correct and b in correct:
            # All arms answer the same questions, so they are paired: the bootstrap resamples questions, not students.
            low, middle, high = paired(correct[a].mean(axis=0), correct[b].mean(axis=0))
            differences.append({"from": a, "to": b, "difference": 100 * middle, "low": 100 * low, "high": 100 * high})
    write_json(ctx.workdir / "results.json", {"arms": rows, "differences": differences})
    ctx.table("accuracy, %", rows)
    ctx.table("paired differences, 95% over questions", differences)


def comparisons(arms: dict[str, GuidedConfig]) -> list[tuple[str, str]]:
    """Returns pairs of arms: along the method's steps, and each refined arm beside longer distillation of its start."""
    distilled = [name for name, arm in arms.items() if arm.start == "base"]
    refined = [(arm.start, name) for name, arm in arms.items() if arm.start != "base"]
    found = [("standard", "own CoT"), *(("own CoT", name) for name in distilled)]
    found += [(a, b) for i, a in enumerate(distilled) for b in distilled[i + 1 :]]
    # RL adds compute to its start. NAME_long and NAME_flops add steps of distillation instead: controls of RL's gain.
    longer = [(f"{a}_{kind}", name) for kind in ("long", "flops") for a, name in refined]
    return [*found, *refined, *((a, name) for a, name in longer if a in arms)]
