"""Quiet-STaR: think before every token, and learn which thoughts help (arXiv 2403.09629, algorithm 1).

    for every position j of a text, in parallel:
        thought_j  ~ p(. | text up to j, start)                            think
        talk_j     = p(next tokens | text up to j, thought_j, end)         talk
        mixed_j    = (1 - w_j) base_j + w_j talk_j                         w_j from a small mixing head
        reward_j   = log mixed_j(true next tokens) - its mean over the thoughts of j
    update by grad of  NLL(base) + NLL(mixed) - reward_j log p(thought_j)  REINFORCE

The loss is `thoughts.loss`; this file runs its arms. Deviations from the paper:
1. The defaults of `ThoughtConfig` are not the official code's choices, which `thoughts.parity=True` restores.
2. Controls: no policy gradient, random thoughts, learned pause tokens (Goyal et al. 2023), and plain training on the
   same text or with the same compute.
3. The thought length may be drawn anew for every step (`thought_lengths`).
4. Early stopping on held-out text that is not reported (`patience`): the paper reports a fixed number of steps.
5. Fast Quiet-STaR (arXiv 2505.17746): a curriculum of shorter thoughts, then a student without thoughts, distilled from
   the mean of the teacher's predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
import optax

from qstar.errors import Settings, UserError, bounded, require, within
from qstar.methods.quiet_data import QuietContext, prepare_base
from qstar.methods.quiet_measure import EarlyStopping, compare_arms, control_thoughts, measure, measure_difficulty
from qstar.models import heads
from qstar.models.config import ModelConfig
from qstar.models.model import Model, check_vocabulary
from qstar.runs import base_model
from qstar.runs.folder import check_run, stable_seed
from qstar.runs.stages import UpdateSettings, only_updates, train_stage
from qstar.thoughts import distil
from qstar.thoughts import loss as thought_loss
from qstar.thoughts.layout import thinking_count
from qstar.train import losses
from qstar.train.loop import Diverged
from qstar.train.state import optimizer_for
from qstar.train.step import make_step
from qstar.types import Batch

Arm = TypeVar("Arm")


@dataclasses.dataclass(frozen=True)
class QuietConfig(Settings):
    """One arm. Keys of a config's `arms.<name>` section."""

    # "random": uniform ids, "pause": one learned id, "none": plain training without thoughts.
    thought_source: str = bounded("sampled", choices=("sampled", "random", "pause", "none"))
    steps: int = bounded(250, ge=0)
    thoughts: dict = dataclasses.field(default_factory=dict)  # over the config's `thoughts`
    train: dict = dataclasses.field(default_factory=dict)  # over the config's `train`
    trainable: str = ""  # a pattern of the parameters that train ("thoughts|mixing" freezes the transformer)
    thought_lengths: tuple = ()  # one of them is drawn for every step
    start: str = "base"  # or an earlier arm, whose model this one continues from
    teacher: str = ""  # an earlier arm, whose predictions with thoughts an arm without thoughts also learns
    teacher_weight: float = bounded(1.0, ge=0)  # of that divergence; the likelihood of the text has 1
    evaluate_every: int = bounded(0, ge=0)  # steps between two evaluations; 0: the config's `evaluate.every`
    patience: int = bounded(0, ge=0)  # evaluations without a lower mixed NLL until the arm stops; 0: no early stopping

    def __post_init__(self):
        super().__post_init__()
        lengths, without = self.thought_lengths, self.thought_source == "none"
        require(
            (all(isinstance(n, int) and n >= 1 for n in lengths), f"thought_lengths={lengths} must be integers >= 1"),
            (not self.teacher or without, "a teacher is for students without thoughts (thought_source='none')"),
        )
        try:
            re.compile(self.trainable)
        except re.error:
            raise UserError(f"trainable={self.trainable!r} is no regular expression; see Python's re") from None


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs all arms of a config; continues an interrupted run of the same config."""
    ctx = QuietContext.make(config, workdir, console)
    arms = {name: ctx.arm_config(QuietConfig, name) for name in config.arms}
    arms = in_order(arms, lambda arm: filter(None, (arm.start, arm.teacher)))
    check_run(ctx.workdir, config.to_dict())
    start = base_model.loaded_or_random(ctx, ctx.corpus.tokenizer)
    check_vocabulary(start.config, ctx.corpus.tokenizer, "config.data")
    # All arms are checked before the first one trains.
    for name, arm in arms.items():
        check_room(ctx, start, name, arm)
    # Text for early stopping is set apart before anything is read, so that all arms have the same held-out text.
    if any(arm.patience for arm in arms.values()):
        ctx.corpus.hold_out_stopping()
    resolved = {name: {"arm": arm, "thoughts": ctx.thoughts.replace(**arm.thoughts)} for name, arm in arms.items()}
    ctx.start(start, thoughts=ctx.thoughts, arms=resolved)
    models, found = {"base": prepare_base(ctx, start)}, {}
    measure_difficulty(ctx, models["base"])
    for name, arm in arms.items():
        ctx.say(f"\n[bold]{name}[/bold]: {arm.steps} steps")
        models[name], found[name] = train_arm(ctx, name, arm, models)
    compare_arms(ctx, found)
    ctx.close()


def check_room(ctx: QuietContext, model: Model, name: str, arm: QuietConfig) -> None:
    """Raises UserError if a text with a thread after its last token exceeds the context, or an id is wrong or missing."""
    t, room = ctx.thoughts.replace(**arm.thoughts), model.config.max_positions
    longest = max(t.thought_tokens, *arm.thought_lengths, 0)
    # A thread holds the start vector, the thought, the end vector and talk_tokens - 1 true tokens.
    thread = 0 if arm.thought_source == "none" else longest + t.talk_tokens + 1
    need = max(ctx.corpus.length + thread, ctx.corpus.base_length if ctx.settings.base.steps else 0)
    line = f"config.arms.{name}: texts and thoughts take up to {need} positions and the model has {room}"
    require((need <= room, f"{line}; shorten data.length or the thoughts, or set model.max_positions"))
    every = arm.evaluate_every or ctx.settings.evaluate.every
    line = f"config.arms.{name}.patience={arm.patience} counts evaluations, and there are none"
    require((every > 0 or not arm.patience, f"{line}; set config.evaluate.every"))
    words, last = model.config.vocab_size, max(t.forbidden_ids, default=0)
    line = f"config.arms.{name}: forbidden_ids holds {last}, and the vocabulary ends with the id {words - 1}"
    require((last < words, f"{line}; correct config.thoughts.forbidden_ids"))
    # Where the padding token is also the EOS, documents contain it, so it cannot be the pause token.
    unused = {*t.forbidden_ids[:1]} - {ctx.corpus.tokenizer.eos_id}
    line = f"config.arms.{name}.thought_source='pause' needs an id that no text holds, and the tokenizer has no padding"
    line += " token of its own; name an unused id in config.thoughts.forbidden_ids"
    require((bool(unused) or arm.thought_source != "pause", line))


def in_order(arms: dict[str, Arm], parents: Callable[[Arm], Iterable[str]]) -> dict[str, Arm]:
    """Returns the arms (a config sorts them by name) parents first; UserError for a missing or circular parent."""
    done: dict[str, Arm] = {}
    waiting = dict(arms)
    while waiting:
        missing = {n: next((p for p in parents(arm) if p not in {"base", *done}), "") for n, arm in waiting.items()}
        ready = [name for name, parent in missing.items() if not parent]
        if not ready:
            name, parent = next(iter(missing.items()))
            raise UserError(f"config.arms.{name}: {parent!r} is neither base nor an arm that can come before it")
        done |= {name: waiting.pop(name) for name in ready}
    return done


def train_arm(ctx: QuietContext, name: str, arm: QuietConfig, models: dict[str, Model]) -> tuple[Model, dict[str, Any]]:
    """Trains one arm from its start; returns its model and its `measure` on held-out text."""
    # ---- the models, trained and frozen
    start, thoughts = with_thoughts(ctx, arm, models[arm.start]), ctx.thoughts.replace(**arm.thoughts)
    teacher = models[arm.teacher] if arm.teacher else None
    frozen = {"teacher": teacher.params} if teacher else None

    # ---- the update, for the thought length of its step
    settings = ctx.update_settings(arm.train)
    tx = optimiser(only_updates(settings), arm.trainable)
    seed = stable_seed(ctx.seed, name)

    def step_at(step: int) -> Callable[..., Any]:
        length = thoughts.thought_tokens
        if arm.thought_lengths:
            # A function of (seed, step), so that a resumed run draws the same lengths.
            rng = np.random.default_rng([seed, step])
            length = int(arm.thought_lengths[rng.integers(len(arm.thought_lengths))])
        other = teacher and teacher.config
        return update(start.config, arm.thought_source, length, tx, settings.accumulate, other, arm.teacher_weight)

    def batch_at(step: int) -> Batch:
        # Rows depend on the run's seed, not on the arm's: all arms train on the same text in the same order.
        return ctx.batch(ctx.corpus.rows(step, settings.batch_size, ctx.seed))

    # ---- training and evaluation
    every = arm.evaluate_every or ctx.settings.evaluate.every
    if every:
        # Evaluations run after a log, so logs must fall on their steps.
        settings = dataclasses.replace(settings, log_every=math.gcd(settings.log_every, every))
    stopping = EarlyStopping(ctx, name, start, arm.thought_source, every, arm.patience)
    how: dict[str, Any] = {"frozen": frozen, "watch": stopping, "choose": stopping.choose}
    opened = ctx.stage(ctx.workdir / name, settings, steps=arm.steps, seed=seed, bar=name, arm=name)
    with within(f"config.arms.{name}.train.lr={settings.lr}: ", Diverged), opened as stage:
        model, done = train_stage(start, stage, tx, step_at, batch_at, **how)
    kept = done.get("best_step", done["steps"])
    if kept < arm.steps:
        ctx.say(f"  {name}: ended after {done['steps']} of {arm.steps} steps; the model of step {kept} is kept")
    return model, measure(ctx, name, model, arm.thought_source, kept)


def with_thoughts(ctx: QuietContext, arm: QuietConfig, model: Model) -> Model:
    """Returns the model with start and end vectors and a mixing head, unless it has them; without, for "none"."""
    config, thoughts = cast(ModelConfig, model.config), ctx.thoughts.replace(**arm.thoughts)
    if arm.thought_source == "none":
        params = {k: v for k, v in model.params.items() if k not in ("thoughts", "mixing")}
    elif "mixing" in model.params:
        thoughts.check_trained(config.thoughts)
        params = model.params
    else:
        # The arm's name is not in the seed: all arms start from one mixing head.
        key = jax.random.key(stable_seed(ctx.seed, "mixing"))
        attach = functools.partial(
            heads.attach_thoughts, config=config.replace(thoughts=thoughts), start_id=ctx.start_id
        )
        params = jax.jit(attach)(model.params, key=key)
    return model.replace(config=config.replace(thoughts=thoughts), params=params)


@functools.cache
def optimiser(settings: UpdateSettings, trainable: str) -> optax.GradientTransformation:
    """Returns the optimiser of the parameters that match `trainable`, cached, so that arms share compiled updates."""
    return optimizer_for(settings.optimiser(), f"^policy/.*({trainable})")


# Cached, because `thought_lengths` requests an update at every step; each length compiles once.
@functools.lru_cache(maxsize=64)
def update(
    config: ModelConfig,
    thought_source: str,
    length: int,
    tx: Any,
    accumulate: int,
    teacher: ModelConfig | None,
    teacher_weight: float,
) -> Callable[..., Any]:
    """Returns the jitted update of an arm, for thoughts of `length` tokens; arms with equal arguments share it."""
    config = config.replace(thoughts=config.required_thoughts.replace(thought_tokens=length))
    if thought_source == "sampled":
        loss = functools.partial(thought_loss.loss, config=config)
    elif thought_source != "none":
        loss = functools.partial(control_loss, config=config, thought_source=thought_source)
    elif teacher is not None:
        loss = functools.partial(distil.student_loss, config=config, teacher=teacher, weight=teacher_weight)
    else:
        loss = functools.partial(losses.sft_loss, config=config)
    return make_step(loss, tx, accumulate)


def control_loss(params: Any, batch: Batch, rng: jax.Array, *, config: ModelConfig, thought_source: str) -> Any:
    """Returns the loss of the controls "random" and "pause": their thoughts are not sampled, so none is reinforced."""
    t = config.required_thoughts
    B, N = batch.tokens.shape
    shape = (t.thought_tokens, B * t.thoughts_per_position, thinking_count(t, N))
    thoughts = control_thoughts(thought_source, config, rng, shape)
    # Given tokens have no distribution to reinforce.
    unreinforced = config.replace(thoughts=t.replace(policy_weight=0.0))
    return thought_loss.loss(params, batch, rng, config=unreinforced, thoughts=thoughts)
