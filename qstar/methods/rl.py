"""RL on a task (GRPO, RLOO, PPO): the reward is correctness of the final answer, or functions of the user's own.

    for every update:
        responses = policy(problems), a group of each     methods.reinforce
        scores    = rewards of the responses              methods.rewards
        update by PPO, RLOO or GRPO                       train.rl

It runs on the tasks of STaR: STaR fine-tunes on correct rationales only, RL also learns from incorrect ones.
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
from qstar.errors import Settings, bounded, require, within
from qstar.methods import rewards
from qstar.methods.reinforce import ReinforceSettings, RewardOutput, check_minibatches, reinforce
from qstar.models import lora
from qstar.models.model import Model
from qstar.runs import base_model
from qstar.runs.context import Arm, RunContext
from qstar.runs.folder import stable_seed
from qstar.runs.rollouts import SampleSettings, judge, read_answer
from qstar.runs.settings import TaskSections, narrowed, settings_from
from qstar.tasks.base import Problem, Task
from qstar.train.checkpoint import Checkpoints
from qstar.train.loop import Diverged
from qstar.train.rl import RLSettings
from qstar.types import Completion


@dataclasses.dataclass(frozen=True)
class RewardedSettings(RLSettings):
    """The loss, its advantages and the reward. A config's `rl` section."""

    reward: str = "correct"  # see `methods.rewards`; whatever it is, correct and parsed are logged


@dataclasses.dataclass(frozen=True)
class RLConfig(Settings):
    """Evaluations and problems. A config's `loop` section."""

    rounds: int = bounded(4, ge=1)  # evaluations during training, the last one after it
    problems_per_iter: int | None = bounded(None, ge=1)  # of the pool; None: all
    few_shot_at_sample: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLSections(TaskSections):
    """The sections of an RL config."""

    loop: RLConfig  # type: ignore[assignment]
    train: ReinforceSettings  # type: ignore[assignment]
    rl: dict = dataclasses.field(default_factory=dict)  # RewardedSettings of all arms


class RLContext(RunContext):
    """One RL run."""

    SECTIONS: ClassVar = RLSections


class TaskEnvironment:
    """A task as an environment: prompts are its problems, in passes over the pool."""

    def __init__(
        self,
        task: Task,
        seed: int,
        prompts: int,
        pool: int | None,
        few_shot: bool = True,
        reward: str = "correct",
        what: str = "config.rl.reward",
    ):
        """`prompts`: problems per update. `pool`: problems per pass (None: all). `what`: the key of `reward`."""
        self.task, self.seed, self.count, self.pool = task, seed, prompts, pool
        self.rewards = rewards.read_rewards(reward, what, (*GIVEN, "records", "answers", "correct"))
        self.made_with = rewards.made_with(self.rewards)
        self.prefix, self.stop = task.prefix() if few_shot else "", task.stop
        # The rest of a pass is left out, so that every update has equally many prompts.
        self.updates_per_pass = len(self._problems(0)) // prompts
        require((self.updates_per_pass > 0, f"config.train.prompts={prompts} is more than the pool has; lower it"))

    def problems(self, update: int) -> list[Problem]:
        epoch, at = divmod(update, self.updates_per_pass)
        return self._problems(epoch)[at * self.count : (at + 1) * self.count]

    def prompts(self, update: int) -> list[str]:
        return [self.task.behind(self.prefix, self.task.prompt(p)) for p in self.problems(update)]

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> RewardOutput:
        problems, found = per_response(self.problems(update), responses)
        _, answers, ended = zip(*(read_answer(self.task, done) for done in found), strict=True)
        # Judged as in evaluations, so that the reward is the metric.
        correct = list(judge(self.task, problems, answers, ended))
        names = ("id", "question", "gold", "meta")
        given = given_of(per_response(self.prompts(update), responses)[0], found)
        given |= {"records": [{k: getattr(p, k) for k in names} for p in problems], "answers": list(answers)}
        scores, parts = rewards.score(self.rewards, update, **given, correct=correct)
        logged = {"correct": correct, "parsed": [a is not None for a in answers]}
        labels = [
            {"problem_id": p.id, "prompt": self.task.prompt(p), "answer": a, "gold": p.gold}
            for p, a in zip(problems, answers, strict=True)
        ]
        return RewardOutput(scores, {**{k: np.asarray(v, np.float32) for k, v in logged.items()}, **parts}, labels)

    @functools.lru_cache(maxsize=2)  # noqa: B019  one environment per arm, and it lives as long as the arm
    def _problems(self, epoch: int) -> list[Problem]:
        return self.task.pool(epoch, self.seed, self.pool)


GIVEN = ("prompts", "completions", "tokens", "truncated")  # arguments of rewards that need no task


def given_of(prompts: Sequence[Any], found: Sequence[Completion]) -> dict[str, Any]:
    """Returns the arguments of rewards that need no task, a list each with an entry per response."""
    texts, tokens = [done.text or "" for done in found], [done.tokens for done in found]
    return dict(zip(GIVEN, (list(prompts), texts, tokens, [not done.stopped for done in found])))


def per_response(prompts: Sequence[Any], responses: Sequence[Sequence[Completion]]) -> tuple[list, list[Completion]]:
    """Returns (prompts, responses) of equal length: each prompt (or problem) once per response to it."""
    pairs = [(prompt, done) for prompt, row in zip(prompts, responses, strict=True) for done in row]
    return [prompt for prompt, _ in pairs], [done for _, done in pairs]


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs every arm of an RL config in `workdir`, resuming an earlier run of the same config."""
    ctx = RLContext.make(config, workdir, console)
    loop, sampling = ctx.settings.loop, ctx.settings.sample
    unread = next(
        (k for k in ("temperature", "top_k", "top_p") if getattr(sampling, k) != getattr(SampleSettings(), k)), ""
    )
    fault = f"config.sample.{unread}: RL evaluates greedily, its rollouts only have config.rl.temperature; leave it out"
    require((not unread, fault))
    arms = {name: arm_settings(ctx, name) for name in config.arms}
    start = base_model.checked(ctx, [loop])
    # Made before the folder is opened: a pool with fewer problems than an update needs is an error of the config.
    environments = {}
    for name, (rl, settings) in arms.items():
        what = f"config.arms.{name}.reward" if "reward" in config.arms[name] else "config.rl.reward"
        environments[name] = TaskEnvironment(
            ctx.task, ctx.seed, settings.prompts, loop.problems_per_iter, loop.few_shot_at_sample, rl.reward, what
        )
    ctx.start(start, arms={name: {"rl": rl, "train": settings} for name, (rl, settings) in arms.items()})
    base = base_model.prepare(ctx, start)
    for name, (rl_settings, settings) in arms.items():
        arm = Arm(ctx, name, loop.few_shot_at_sample, unit="round")
        train_arm(arm, narrowed(RLSettings, rl_settings), settings, environments[name], base)
    ctx.close()


def arm_settings(ctx: RunContext, name: str) -> tuple[RewardedSettings, ReinforceSettings]:
    """Returns an arm's settings: the config's `rl` and `train` sections, over them its own keys and its `train`."""
    own = dict(ctx.settings.arms[name])
    own.pop("preset", None)
    train = {**ctx.config.train.to_dict(), **own.pop("train", {})}
    rl_settings = settings_from(RewardedSettings, {**ctx.settings.rl, **own}, f"arms.{name}")
    settings = settings_from(ReinforceSettings, train, f"arms.{name}.train")
    with within(f"config.arms.{name}.train."):
        check_minibatches(settings, rl_settings)
    return rl_settings, settings


def train_arm(
    arm: Arm, rl_settings: RLSettings, settings: ReinforceSettings, environment: TaskEnvironment, base: Model
) -> None:
    """Trains one arm from the base, evaluating it `loop.rounds` times."""
    ctx, loop, split = arm.ctx, arm.ctx.settings.loop, arm.ctx.settings.evaluate.split
    arm.report(0, arm.evaluate(base, 0), {"updates": 0})
    ctx.say(f"\n[bold]{arm.name}[/bold]: {rl_settings.estimator}, {settings.updates} updates")
    # With fewer updates than rounds, several rounds fall on one update, and the last one counts.
    round_at = {math.ceil(settings.updates * n / loop.rounds): n for n in range(1, loop.rounds + 1)}
    scores: dict[int, float] = {}  # round -> validation accuracy

    def watch(update: int, params: Any) -> None:
        # The best round's model is kept for the test in `Arm.finish`.
        if (n := round_at.get(update)) is None:
            return
        model = base.replace(params=params)
        rows = arm.answers(model, split, f"iter_{n:03d}", n, hinted=False)
        if ctx.settings.evaluate.hinted:
            arm.answers(model, split, f"iter_{n:03d}_hinted", n, hinted=True)  # `arm.evaluate` reads them below
        ctx.say(f"  update {update}: accuracy {np.mean([r.correct for r in rows]):.4f}")
        # Without validation no round is chosen, and the last model is kept in any case.
        if split != "val" or n == loop.rounds:
            return
        # Read from the files, because a resumed run has not evaluated the earlier rounds itself.
        scores.update({m: _accuracy(arm, m) for m in round_at.values() if m <= n})
        if max(scores, key=scores.__getitem__) == n:
            # Saved before the earlier best one is removed: after a kill in between there are two, never none.
            with contextlib.closing(Checkpoints(arm.checkpoint(n) / "model")) as weights:
                weights.save(n, lora.plain(params) if settings.lora_rank else params)
            for m in scores.keys() - {n}:
                distributed.remove(arm.checkpoint(m))

    try:
        folder, seed = arm.checkpoint(loop.rounds), stable_seed(ctx.seed, arm.name)
        stage = ctx.stage(folder, settings, steps=settings.updates, seed=seed, bar=arm.name, arm=arm.name)
        with arm.timed("train"), stage as where:
            model, done = reinforce(base, environment, rl_settings, where, watch, arm.folder / "completions")
    except Diverged as e:
        measured = {update: n for update, n in round_at.items() if distributed.exists(_answers(arm, n))}
        for update, n in measured.items():
            arm.report(n, arm.evaluate(base, n), {"updates": update})  # reads the stored answers; nothing is sampled
        # The run fails when the other arms are done.
        arm.fail(len(measured) + 1, e)
    else:
        if done["stopped"]:
            ctx.say(f"[yellow]{arm.name} stopped after {done['updates']} updates: {done['stopped']}")
        for update, n in round_at.items():
            if update <= done["updates"] or n == loop.rounds:
                arm.report(n, arm.evaluate(model, n), {**done, "updates": min(update, done["updates"])})
    arm.finish(base)


def _answers(arm: Arm, n: int) -> Path:
    return arm.folder / "evaluation" / f"iter_{n:03d}.jsonl"


def _accuracy(arm: Arm, n: int) -> float:
    return float(np.mean([row["correct"] for row in read_jsonl(_answers(arm, n))]))
