"""LM-Guided CoT: a small model writes rationales, a large frozen one answers with them (arXiv 2404.03414).

    1 distil     (r, a) = LARGE(context, question)             the large model explains and answers
                 keep r where a is right                       SMALL = fine-tune(SMALL, (context, question) -> r)
    2 refine     r = SMALL(context, question)                  RL: PPO, as in the paper, or RLOO, or GRPO
                 reward = aspects of r + LARGE answers right with it
    3 answer     r = SMALL(context, question);  a = LARGE(context, question, r)        LARGE is never trained

Implements the method as its abstract and figure 1 describe it. Sizes, weights, filters and the measures of the aspects are
our choices: the paper's were not at hand. Arms differ in the filter, in what they start from and in what RL pays for; all
meet the same questions, so differences are paired.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from qstar import distributed
from qstar.errors import TrainingFailed, bounded, require, unknown
from qstar.methods import guided_hotpotqa, guided_two_hop
from qstar.methods.distillation import DistilTrain, Pair, distil
from qstar.methods.quiet_star import in_order
from qstar.methods.reinforce import Environment, ReinforceSettings, reinforce
from qstar.models.hf import read_config
from qstar.models.model import Model
from qstar.runs.base_model import check_gates
from qstar.runs.context import RunContext
from qstar.runs.folder import cached_jsonl, check_run, once_json, stable_seed, write_json
from qstar.runs.settings import Gate, Sections, settings_from
from qstar.runs.stages import Stage
from qstar.tasks import make_task
from qstar.tasks.multihop import MultiHop
from qstar.train.distil import DistilSettings
from qstar.train.loop import Diverged
from qstar.train.metrics import show_table
from qstar.train.rl import RLSettings
from qstar.train.stats import paired

FILTERS = ("em", "none", "parity", "f1", "includes")


@dataclasses.dataclass(frozen=True)
class GuidedConfig:
    """One arm. Keys of a config's `arms.<name>` section."""

    start: str = "base"  # the undistilled small model, or an earlier arm (which is then refined by RL)
    filter: str = "em"  # of the teacher's rationales: its answer is right; "none"; loose ones
    steps: int = 400  # of distillation
    rl: dict = dataclasses.field(default_factory=dict)  # over the config's `rl`
    train: dict = dataclasses.field(default_factory=dict)  # over the config's `train` (RL) or `distil_train`
    accuracy: float = 1.0  # what RL pays for the large model's right answer
    aspect: float = 1.0  # and for the aspects' mean
    weak: bool = False  # a weaker measure of factuality
    guard: bool = True  # no reward for the right answer where a rationale is nothing but the answer
    teacher: str = ""  # `in_order` asks; nothing here learns from an arm

    def __post_init__(self):
        require(
            (self.filter in FILTERS, f"filter={self.filter!r} is not one of {', '.join(FILTERS)}"),
            (self.steps >= 0, f"steps={self.steps} must be 0 or more"),
            (self.accuracy >= 0 and self.aspect >= 0, "accuracy and aspect must be 0 or more"),
            (self.accuracy + self.aspect > 0, "accuracy and aspect are both 0: there is nothing to reward"),
            (not self.teacher, "teacher: every arm's teacher is the large model; leave it out"),
            (self.start != "base" or not self.rl, "rl is for arms that start from another one; name it in `start`"),
        )


class GuidedGate(Gate):
    """A bound on a measurement of the large model, see `guided_synth.Synth.gates`."""

    NAMES = ("standard", "cot", "gold", "shuffled", "empty", "wrong", "copied", "headroom", "shuffled_gap")


class GuidedTask(Protocol):
    """Where the method is played out: a large model, questions, and how rationales are judged."""

    max_new_tokens: int  # of a rationale

    def train_large(self, stage: Any) -> Any:
        """Makes or loads the large model."""

    def gates(self) -> dict[str, float]:
        """What must hold of it."""

    def base(self, seed: int, stage: Any) -> Model:
        """The small model before distillation."""

    def teacher_rows(self, seed: int) -> list[dict[str, Any]]:
        """The large model's rationales and answers."""

    def kept(self, rows: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
        """Those that a filter keeps."""

    def to_pairs(self, rows: list[dict[str, Any]]) -> list[Pair]:
        """As the student learns them."""

    def environment(self, seed: int, group: int, prompts: int, recipe: GuidedConfig) -> Environment:
        """RL's prompts and rewards."""

    def fixed_arms(self) -> dict[str, np.ndarray]:
        """Arms that need no student: whether each test question is answered right."""

    def controls(self, base: Model, seed: int, stage: Any) -> dict[str, Any]:
        """Whatever else is to be measured of a student seed: models, or functions that measure themselves."""

    def costs(self) -> dict[str, dict[str, float]]:
        """Tokens per question that the large model reads and writes in them."""

    def own_votes(self) -> dict[str, float]:
        """What a vote of the large model's own chains brings."""

    def measure(self, student: Any) -> tuple[np.ndarray, dict[str, float]]:
        """The same for a student, and what else there is to say of it."""

    def study(self, student: Model) -> dict[str, float]:
        """What takes longer to find out: votes, choices among several rationales, leaks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedSections(Sections):
    """The sections of a config of LM-Guided CoT."""

    task: dict
    train: dict  # ReinforceSettings of all arms
    gates: dict[str, GuidedGate] = dataclasses.field(default_factory=dict)
    world: dict = dataclasses.field(default_factory=dict)
    distil: DistilSettings = dataclasses.field(default_factory=DistilSettings)
    distil_train: DistilTrain = dataclasses.field(default_factory=DistilTrain)
    rl: dict = dataclasses.field(default_factory=dict)  # RLSettings of all arms
    students: int = bounded(1, ge=1)
    studied: list = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        require((isinstance(self.task.get("name"), str), "task.name is missing; name a task, e.g. arithmetic"))
        super().__post_init__()


@dataclasses.dataclass
class GuidedContext(RunContext):
    """One run of LM-Guided CoT."""

    SECTIONS: ClassVar = GuidedSections
    setting: GuidedTask = dataclasses.field(init=False)
    recipes: dict[str, GuidedConfig] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        arms = {n: settings_from(GuidedConfig, arm, f"arms.{n}") for n, arm in self.settings.arms.items()}
        self.setting = make_setting(self.settings, self.workdir, self.mesh)
        self.recipes = in_order(arms)
        for name in self.recipes:
            self.rl_settings(name)
        for name in self.settings.studied:
            if name not in self.recipes:
                raise unknown(f"config.studied: {name!r}", name, self.recipes)

    def rl_settings(self, name: str) -> tuple[RLSettings, ReinforceSettings]:
        """Returns an arm's RL settings: the config's, with the arm's changes."""
        recipe = self.recipes[name]
        rl = settings_from(RLSettings, {**self.settings.rl, **recipe.rl}, f"arms.{name}.rl")
        changes = recipe.train if recipe.start != "base" else {}
        train = {**self.settings.train, "max_new_tokens": self.setting.max_new_tokens, **changes}
        return rl, settings_from(ReinforceSettings, train, f"arms.{name}.train")

    def part(self, where: Path, label: dict[str, Any], name: str, settings: Any, steps: int, seed: int) -> Stage:
        """Returns a training stage in the folder WHERE/name."""
        self.say(f"  {name}: {steps} steps")
        return Stage(where / name, settings, steps, seed, self.writer, {**label, "part": name})

    def student_folder(self, seed: int) -> Path:
        """WORKDIR/student_N"""
        return self.workdir / f"student_{seed}"


def make_setting(sections: GuidedSections, workdir: Path, mesh: Any) -> GuidedTask:
    """Returns the two-hop world (task "hops"), or the questions of a multi-hop task."""
    options = dict(sections.task)
    name, seed = options.pop("name"), stable_seed(sections.seed, "world")
    if name == "hops":
        return guided_two_hop.Synth(settings_from(guided_two_hop.SynthSettings, sections.world, "world"), seed)
    settings = settings_from(guided_hotpotqa.MultiHopSettings, sections.world, "world")
    task = make_task(name, **options)
    require((isinstance(task, MultiHop), f"config.task.name={name!r} has no paragraphs to reason over; use hotpotqa"))
    return guided_hotpotqa.MultiHop(settings, task, seed, workdir, mesh)


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs every arm of a config for every student seed, going on where an earlier run of the same config stopped."""
    ctx = GuidedContext.make(config, workdir, console)
    check_run(ctx.workdir, config.to_dict())
    if isinstance(ctx.setting, guided_hotpotqa.MultiHop):
        for folder in filter(None, (ctx.setting.settings.small, ctx.setting.settings.large.get("path"))):
            read_config(folder)  # a model that is not there shows before anything is written
    arms = {n: {"arm": r, **dict(zip(("rl", "train"), ctx.rl_settings(n)))} for n, r in ctx.recipes.items()}
    ctx.start(arms=arms)
    ctx.say("\n[bold]large model[/bold]")
    ctx.setting.train_large(functools.partial(ctx.part, ctx.workdir, {"arm": "large"}))
    measures = functools.partial(once_json, ctx.workdir / "large" / "measured.json", ctx.setting.gates)
    check_gates(ctx, ctx.workdir / "large", measures)
    measures()  # also where no gate asks for them
    right: dict[str, dict[int, np.ndarray]] = {}
    fixed = once_json(ctx.workdir / "large" / "fixed_arms.json", lambda: _as_lists(ctx.setting.fixed_arms()))
    right |= {name: {0: np.asarray(x, bool)} for name, x in fixed.items()}
    once_json(ctx.workdir / "large" / "costs.json", ctx.setting.costs)
    if ctx.settings.studied:
        ctx.say("  own chains, by vote")
        once_json(ctx.workdir / "large" / "votes.json", ctx.setting.own_votes)
    measured: dict[str, list[dict[str, float]]] = {}
    for seed in range(ctx.settings.students):
        for name, found in student(ctx, seed).items():
            right.setdefault(name, {})[seed] = np.asarray(found.pop("right"), bool)
            measured.setdefault(name, []).append(found)
    results(ctx, right, measured)
    ctx.close()


def student(ctx: GuidedContext, seed: int) -> dict[str, dict[str, Any]]:
    """Runs all arms for one student seed; returns what was measured of each."""
    folder, own = ctx.student_folder(seed), stable_seed(ctx.seed, "student", seed)
    ctx.say(f"\n[bold]student {seed}[/bold]")
    label = {"arm": f"student_{seed}"}
    models = {"base": ctx.setting.base(own, functools.partial(ctx.part, folder, label))}
    rows = cached_jsonl(folder / "teacher.jsonl", lambda: ctx.setting.teacher_rows(own))
    out = {"undistilled": evaluate(ctx, folder, "undistilled", models["base"], seed)}
    controls = ctx.setting.controls(models["base"], own, functools.partial(ctx.part, folder, label))
    out |= {name: evaluate(ctx, folder, name, control, seed) for name, control in controls.items()}
    for name, recipe in ctx.recipes.items():
        ctx.say(f"  {name}")
        try:
            if recipe.start == "base":
                models[name] = distilled(ctx, folder, name, models["base"], rows, own, seed)
            else:
                models[name] = refined(ctx, folder, name, models[recipe.start], own, seed)
        except Diverged as e:
            raise TrainingFailed(f"config.arms.{name}: {e}") from None
        out[name] = evaluate(ctx, folder, name, models[name], seed)
        if name in ctx.settings.studied:
            ctx.say("    votes, choices, leaks")
            out[name]["study"] = once_json(
                folder / name / "study.json", functools.partial(ctx.setting.study, models[name])
            )
    return out


def distilled(
    ctx: GuidedContext, folder: Path, name: str, base: Model, rows: list[dict[str, Any]], own: int, seed: int
) -> Model:
    """Step 1: imitates the teacher's rationales that the filter keeps."""
    recipe = ctx.recipes[name]
    kept = ctx.setting.kept(rows, recipe.filter)
    record = {"rows": len(rows), "kept": len(kept), "keep_rate": len(kept) / max(1, len(rows))}
    for kind in sorted({r.get("type", "") for r in rows}):
        mine = [r for r in rows if r.get("type", "") == kind]
        record[f"keep_rate/{kind}"] = sum(r.get("type", "") == kind for r in kept) / len(mine)
    once_json(folder / name / "buffer.json", lambda: {"filter": recipe.filter, **record})
    train = dataclasses.replace(ctx.settings.distil_train, **recipe.train)
    where, label = folder / name / "distil", {"arm": name, "student": seed}
    teacher = getattr(ctx.setting, "large", None)
    with ctx.stage(where, train, steps=recipe.steps, seed=own, bar=name, **label) as stage:
        return distil(base, ctx.setting.to_pairs(kept), ctx.settings.distil, stage, teacher)[0]


def refined(ctx: GuidedContext, folder: Path, name: str, start: Model, own: int, seed: int) -> Model:
    """Step 2: RL with the aspects and the large model's answers."""
    rl_settings, settings = ctx.rl_settings(name)
    world = ctx.setting.environment(own, rl_settings.group, settings.prompts, ctx.recipes[name])
    where, seed_of, label = folder / name / "rl", stable_seed(own, "rl"), {"arm": name, "student": seed}
    with ctx.stage(where, settings, steps=settings.updates, seed=seed_of, bar=name, **label) as stage:
        return reinforce(start, world, rl_settings, stage)[0]


def evaluate(ctx: GuidedContext, folder: Path, name: str, model: Model, seed: int) -> dict[str, Any]:
    """Step 3 on the test questions, once: FOLDER/NAME/evaluation.json."""

    def make() -> dict[str, Any]:
        right, found = ctx.setting.measure(model)
        numbers = {k: v for k, v in found.items() if k != "examples"}
        ctx.writer.write(stage="arm", step=0, arm=name, student=seed, accuracy=100.0 * float(right.mean()), **numbers)
        return {"right": right.astype(int).tolist(), "accuracy": 100.0 * float(right.mean()), **found}

    found = once_json(folder / name / "evaluation.json", make)
    ctx.say(f"    {found['accuracy']:.1f} right")
    return found


def results(
    ctx: GuidedContext, right: dict[str, dict[int, np.ndarray]], measured: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """Writes results.json and prints the table: accuracies per student, and paired differences between the arms."""
    rows = []
    for name, seeds in right.items():
        each = [100.0 * float(x.mean()) for x in seeds.values()]
        row = {"arm": name, "mean": float(np.mean(each)), "students": " / ".join(f"{x:.1f}" for x in each)}
        found = measured.get(name, [])
        rows.append(
            row | {k: float(np.mean([f[k] for f in found])) if found and k in found[0] else None for k in SHOWN}
        )
    steps = [(a, b) for a, b in _steps(ctx.recipes) if a in right and b in right]
    differences = []
    for a, b in steps:
        low, middle, high = paired(*(_over_students(right[n], ctx.settings.students) for n in (a, b)))
        differences.append({"from": a, "to": b, "difference": 100 * middle, "low": 100 * low, "high": 100 * high})
    studies = {name: [f["study"] for f in found if "study" in f] for name, found in measured.items()}
    out = {"arms": rows, "differences": differences}
    out["studies"] = {n: _means(each) for n, each in studies.items() if each}
    write_json(ctx.workdir / "results.json", out)
    if distributed.is_first():
        show_table(ctx.console, "right answers, %", rows)
        show_table(ctx.console, "paired differences, 95% over questions", differences)
        for name, found in out["studies"].items():
            found_rows = [{"what": k, "value": v} for k, v in found.items()]
            show_table(ctx.console, f"{name}: votes, choices among several rationales, leaks", found_rows)
    return out


SHOWN = ("quality", "gold_chain", "first_hop", "smuggled")


def _steps(recipes: dict[str, GuidedConfig]) -> list[tuple[str, str]]:
    """The comparisons: along the method; every arm with its start, and with NAME_long and NAME_flops (trained for longer)."""
    first = [n for n, r in recipes.items() if r.start == "base"]
    fixed = [("standard", "own CoT"), *(("own CoT", n) for n in first)]
    fixed += [(a, b) for i, a in enumerate(first) for b in first[i + 1 :]]
    refined = [(r.start, n) for n, r in recipes.items() if r.start != "base"]
    longer = [(f"{a}_{kind}", n) for kind in ("long", "flops") for a, n in refined]
    return [*fixed, *refined, *((a, n) for a, n in longer if a in recipes)]


def _over_students(seeds: dict[int, np.ndarray], count: int) -> np.ndarray:
    """Returns float [questions]: the mean over students (an arm without students is the same for all)."""
    return np.mean([seeds.get(s, seeds.get(0)) for s in range(count)], axis=0)


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}


def _as_lists(arms: dict[str, np.ndarray]) -> dict[str, Sequence[int]]:
    return {n: np.asarray(x).astype(int).tolist() for n, x in arms.items()}
