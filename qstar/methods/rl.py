"""Reinforcement learning with verifiable rewards: a response earns 1 if its answer is right (DeepSeekMath's GRPO, RLOO, PPO).

What users expect beside STaR, on the same tasks: STaR keeps the right rationales and imitates them; RL also learns from
the wrong ones, and from how surprising the right ones were.

    for every update:
        responses = policy(problems), a group of each     reinforce.reinforce
        scores    = 1 where the task's own parser finds the right answer
        update by PPO, RLOO or GRPO                       train.rl
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qstar import distributed
from qstar.data.sources import read_jsonl
from qstar.errors import Settings, TrainingFailed, bounded, require
from qstar.methods.reinforce import ReinforceSettings, RewardOutput, reinforce
from qstar.models.model import Model
from qstar.runs import base_model
from qstar.runs.context import Arm, RunContext
from qstar.runs.folder import stable_seed
from qstar.runs.rollouts import judge, read_answer
from qstar.runs.settings import TaskSections, settings_from
from qstar.tasks.base import Problem, Task
from qstar.train.checkpoint import Checkpoints
from qstar.train.loop import Diverged
from qstar.train.rl import RLSettings
from qstar.types import Completion


@dataclasses.dataclass(frozen=True)
class RLConfig(Settings):
    """How long, and how often measured. A config's `loop` section."""

    rounds: int = bounded(4, ge=1)  # evaluations on the way, the last at the end
    problems_per_iter: int | None = bounded(None, ge=1)  # of the pool; None: all there are
    few_shot_at_sample: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLSections(TaskSections):
    """The sections of an RL config."""

    loop: RLConfig  # type: ignore[assignment]
    train: ReinforceSettings  # type: ignore[assignment]
    rl: dict = dataclasses.field(default_factory=dict)  # RLSettings of all arms


class RLContext(RunContext):
    """One RL run."""

    SECTIONS: ClassVar = RLSections


class Verifiable:
    """A task as an environment: prompts are its problems, a pass over the pool after the other; 1 for a right answer."""

    def __init__(self, task: Task, seed: int, prompts: int, pool: int | None, few_shot: bool = True):
        """`prompts` problems per update; `pool`: how many there are in a pass (None: all)."""
        self.task, self.seed, self.count, self.pool = task, seed, prompts, pool
        self.prefix, self.stop = task.prefix() if few_shot else "", task.stop
        self.per_pass = len(self._problems(0)) // prompts
        require((self.per_pass > 0, f"config.train.prompts={prompts} is more than the pool has; lower it"))

    def problems(self, update: int) -> list[Problem]:
        """The problems of an update."""
        epoch, at = divmod(update, self.per_pass)
        return self._problems(epoch)[at * self.count : (at + 1) * self.count]

    def prompts(self, update: int) -> list[str]:
        return [self.prefix + self.task.prompt(p) for p in self.problems(update)]

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> RewardOutput:
        pairs = [(p, done) for p, row in zip(self.problems(update), responses) for done in row]
        _, answers, ended = zip(*(read_answer(self.task, done) for _, done in pairs), strict=True)
        right = judge(self.task, [p for p, _ in pairs], answers, ended)
        scores = np.asarray(right, np.float32)
        return RewardOutput(
            scores, {"correct": scores, "parsed": np.asarray([a is not None for a in answers], np.float32)}
        )

    @functools.lru_cache(maxsize=2)  # noqa: B019  one environment per arm, and it lives as long as the arm
    def _problems(self, epoch: int) -> list[Problem]:
        return self.task.pool(epoch, self.seed, self.pool)


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs every arm of an RL config in `workdir`, going on where an earlier run of the same config stopped."""
    ctx = RLContext.make(config, workdir, console)
    loop = ctx.settings.loop
    arms = {name: arm_settings(ctx, name) for name in config.arms}
    start = base_model.checked(ctx, [loop])
    worlds = {
        name: Verifiable(ctx.task, ctx.seed, settings.prompts, loop.problems_per_iter, loop.few_shot_at_sample)
        for name, (_, settings) in arms.items()
    }
    resolved = {name: {"rl": rl, "train": settings} for name, (rl, settings) in arms.items()}
    ctx.start(model=start.config, arms=resolved)
    base = base_model.prepare(ctx, start)
    for name, (rl_settings, settings) in arms.items():
        train_arm(Arm(ctx, name, loop.few_shot_at_sample), loop, rl_settings, settings, worlds[name], base)
    ctx.close()


def arm_settings(ctx: RunContext, name: str) -> tuple[RLSettings, ReinforceSettings]:
    """Returns an arm's settings: the config's `rl` and `train` sections, over them its own keys and its `train`."""
    own = dict(ctx.settings.arms[name])
    own.pop("preset", None)
    train = {**ctx.config.train.to_dict(), **own.pop("train", {})}
    rl_settings = settings_from(RLSettings, {**ctx.settings.rl, **own}, f"arms.{name}")
    settings = settings_from(ReinforceSettings, train, f"arms.{name}.train")
    count = settings.prompts * rl_settings.group
    line = f"config.arms.{name}: train.batch_size={settings.batch_size} does not divide train.prompts * group = {count}"
    require((count % settings.batch_size == 0, line))
    return rl_settings, settings


def train_arm(
    arm: Arm, loop: RLConfig, rl_settings: RLSettings, settings: ReinforceSettings, environment: Verifiable, base: Model
) -> Model:
    """Trains one arm from the base, measuring it `loop.rounds` times; returns its model."""
    ctx = arm.ctx
    arm.report(0, arm.evaluate(base, 0), {})
    ctx.say(f"\n[bold]{arm.name}[/bold]: {rl_settings.estimator}, {settings.updates} updates")
    marks = {math.ceil(settings.updates * n / loop.rounds): n for n in range(1, loop.rounds + 1)}

    scores: dict[int, float] = {}

    def watch(update: int, params: Any) -> None:
        """Measures a round, and keeps its model as long as it is the best on validation: `Arm.finish` tests that one."""
        if (n := marks.get(update)) is None:
            return
        model = base.replace(params=params)
        rows = arm.answers(model, ctx.settings.evaluate.split, f"iter_{n:03d}", n, hinted=False)
        ctx.say(f"  update {update}: accuracy {np.mean([r.correct for r in rows]):.4f}")
        if ctx.settings.evaluate.split != "val" or n == loop.rounds:
            return
        scores.update({m: accuracy(arm, m) for m in marks.values() if m <= n})
        best = max(scores, key=scores.get)
        if best == n:
            save_round(arm, n, params)
            for m in scores.keys() - {n}:
                distributed.remove(arm.checkpoint(m))

    try:
        with arm.timed("train"), ctx.bar(arm.name, settings.updates) as progress:
            model, done = reinforce(
                base,
                environment,
                rl_settings,
                settings,
                seed=stable_seed(ctx.seed, arm.name),
                folder=arm.checkpoint(loop.rounds),
                writer=ctx.writer,
                label={"arm": arm.name},
                progress=progress,
                watch=watch,
            )
    except Diverged as e:
        raise TrainingFailed(f"config.arms.{arm.name}: {e}") from None
    if done["stopped"]:
        ctx.say(f"[yellow]{arm.name} stopped after {done['updates']} updates: {done['stopped']}")
    for update, n in marks.items():
        if update <= done["updates"] or n == loop.rounds:
            arm.report(n, arm.evaluate(model, n), {"updates": min(update, done["updates"]), **done})
    arm.finish(base)
    return model


def accuracy(arm: Arm, n: int) -> float:
    """The accuracy of a round that has been measured."""
    return float(np.mean([row["correct"] for row in read_jsonl(arm.folder / "evaluation" / f"iter_{n:03d}.jsonl")]))


def save_round(arm: Arm, n: int, params: Any) -> None:
    """Keeps the parameters of a round where `Arm.finish` looks for them."""
    with contextlib.closing(Checkpoints(arm.checkpoint(n) / "model")) as weights:
        weights.save(n, params)
