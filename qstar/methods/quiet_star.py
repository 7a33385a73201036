"""Quiet-STaR: language models can teach themselves to think before speaking (arXiv 2403.09629, algorithm 1).

    for every position j of a text, in parallel:
        thought_j  ~ p(. | text up to j, start)                            think
        talk_j     = p(next tokens | text up to j, thought_j, end)         talk
        mixed_j    = (1 - w_j) base_j + w_j talk_j                         a small head weighs the thought
        reward_j   = log mixed_j(true next tokens) - its mean over the thoughts of j
    update by grad of  NLL(base) + NLL(mixed) - reward_j log p(thought_j)  REINFORCE

The update is `thoughts.objective.loss`. Here are its arms: the method, its controls (no policy gradient, learned pause
tokens, random thoughts, plain training for as many tokens or as much compute), lengths drawn in training, and Fast
Quiet-STaR (arXiv 2505.17746): a curriculum of shorter thoughts, then a student that does not think.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.errors import TrainingFailed, UserError, require
from qstar.methods import quiet_base
from qstar.methods.quiet_data import QuietContext
from qstar.methods.quiet_measure import Watch, measure, measure_difficulty
from qstar.models import heads
from qstar.models.config import ModelConfig
from qstar.models.model import Model, check_vocabulary
from qstar.runs import base_model
from qstar.runs.folder import check_run, stable_seed
from qstar.runs.stages import UpdateSettings, train_stage
from qstar.thoughts import distil
from qstar.thoughts import loss as thought_loss
from qstar.thoughts.measure import random_thoughts
from qstar.train import losses
from qstar.train.loop import Diverged
from qstar.train.state import optimizer_for
from qstar.train.step import make_step
from qstar.types import Batch

THINKERS = ("sampled", "random", "pause", "none")


@dataclasses.dataclass(frozen=True)
class QuietConfig:
    """One arm. Keys of a config's `arms.<name>` section."""

    thinker: str = "sampled"  # "random": uniform ids; "pause": one learned id; "none": plain training, no thoughts
    steps: int = 250
    thoughts: dict = dataclasses.field(default_factory=dict)  # over the config's `thoughts`
    train: dict = dataclasses.field(default_factory=dict)  # over the config's `train`
    trains: str = ""  # a pattern of the parameters that train ("thoughts|mixing": the transformer is frozen)
    lengths: tuple = ()  # thought lengths; one of them is drawn for every step
    start: str = "base"  # or an earlier arm, whose model this one goes on from
    teacher: str = ""  # an earlier arm, whose predictions with thoughts a `thinker="none"` also learns
    teacher_weight: float = 1.0  # of that; the text's own likelihood has 1
    every: int = 0  # steps between two measurements; 0 = as the config's `evaluate` says
    patience: int = (
        0  # evaluations without a better mixed NLL, on held-out text that is not reported, until the arm stops
    )
    # and the best model is kept; 0 = never

    def __post_init__(self):
        require(
            (self.thinker in THINKERS, f"thinker={self.thinker!r} is not one of {', '.join(THINKERS)}"),
            (self.steps >= 0, f"steps={self.steps} must be 0 or more"),
            (all(isinstance(n, int) and n >= 1 for n in self.lengths), f"lengths={self.lengths} must be whole numbers"),
            (_is_pattern(self.trains), f"trains={self.trains!r} is no regular expression; see Python's re"),
            (not self.teacher or self.thinker == "none", "a teacher is for students without thoughts (thinker='none')"),
            *((getattr(self, n) >= 0, f"{n}={getattr(self, n)} must be 0 or more") for n in ("every", "patience")),
        )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs every arm of a Quiet-STaR config in `workdir`, going on where an earlier run of the same config stopped."""
    ctx = QuietContext.make(config, workdir, console)
    recipes = {name: ctx.recipe(QuietConfig, name) for name in config.arms}
    recipes = in_order(recipes)
    check_run(ctx.workdir, config.to_dict())
    start = base_model.loaded_or_random(ctx, ctx.corpus.tokenizer)
    check_vocabulary(start.config, ctx.corpus.tokenizer, "config.data")
    for name, recipe in recipes.items():
        check_room(ctx, start, name, recipe)
    if any(recipe.patience for recipe in recipes.values()):
        ctx.corpus.hold_out_stopping()
    arms = {n: {"arm": r, "thoughts": ctx.thoughts.replace(**r.thoughts)} for n, r in recipes.items()}
    ctx.start(model=start.config, thoughts=ctx.thoughts, arms=arms)
    models = {"base": quiet_base.prepare(ctx, start)}
    measure_difficulty(ctx, models["base"])
    for name, recipe in recipes.items():
        ctx.say(f"\n[bold]{name}[/bold]: {recipe.steps} steps")
        models[name] = train_arm(ctx, name, recipe, models)
    ctx.close()


def check_room(ctx: QuietContext, model: Model, name: str, recipe: QuietConfig) -> None:
    """Raises UserError if a text with a thread after its last token does not fit into the model's context, or if `pause`
    has no id that no text holds."""
    t, room = ctx.thoughts.replace(**recipe.thoughts), model.config.max_positions
    thread = 0 if recipe.thinker == "none" else max(t.thought_tokens, *recipe.lengths, 0) + t.talk_tokens + 1
    need = max(ctx.corpus.length + thread, ctx.corpus.base_length if ctx.settings.base.steps else 0)
    line = f"config.arms.{name}: texts and thoughts take up to {need} positions and the model has {room}"
    require((need <= room, f"{line}; shorten data.length or the thoughts, or set model.max_positions"))
    unused = {*t.forbidden_ids[:1]} - {ctx.corpus.tokenizer.eos_id}
    line = f"config.arms.{name}.thinker='pause' needs an id that no text holds, and the tokenizer has no padding token"
    require(
        (
            bool(unused) or recipe.thinker != "pause",
            f"{line} of its own; name an unused id in config.thoughts.forbidden_ids",
        )
    )


def in_order(recipes: dict[str, QuietConfig]) -> dict[str, QuietConfig]:
    """Returns the arms so that those which others start from or learn from come first (a config sorts them by name).

    Raises:
      UserError: an arm that needs one which is not there, or itself.
    """
    done: dict[str, QuietConfig] = {}
    waiting = dict(recipes)
    while waiting:
        ready = [n for n, r in waiting.items() if {r.start, r.teacher} <= {"base", "", *done}]
        if not ready:
            name, r = next(iter(waiting.items()))
            missing = next(role for role in (r.start, r.teacher) if role not in {"base", "", *done})
            raise UserError(f"config.arms.{name}: {missing!r} is neither base nor an arm that can come before it")
        done |= {n: waiting.pop(n) for n in ready}
    return done


def train_arm(ctx: QuietContext, name: str, recipe: QuietConfig, models: dict[str, Model]) -> Model:
    """Trains one arm from its start, measuring it on held-out text on the way; returns its model."""
    start = thinking(ctx, recipe, models[recipe.start])
    teacher = models[recipe.teacher] if recipe.teacher else None
    settings = ctx.update_settings(recipe.train)
    tx = optimizer_for(settings.optimiser(), f"^policy/.*({recipe.trains})")
    seed = stable_seed(ctx.seed, name)

    def length_at(step: int) -> int:
        if not recipe.lengths:
            return start.config.thoughts.thought_tokens
        return int(recipe.lengths[np.random.default_rng([seed, step]).integers(len(recipe.lengths))])

    def step_at(step: int) -> Callable[..., Any]:
        length, other = length_at(step), teacher and teacher.config
        return update(start.config, recipe.thinker, length, tx, settings, other, recipe.teacher_weight)

    roles = {"teacher": teacher.params} if teacher else {}
    if recipe.thinker == "sampled" and start.config.thoughts.kl_weight:
        roles["reference"] = start.params  # what the arm starts from
    every = recipe.every or ctx.settings.evaluate.every
    watch = Watch(ctx, name, start, recipe.thinker, every, recipe.patience)
    try:
        with ctx.stage(ctx.workdir / name, settings, steps=recipe.steps, seed=seed, bar=name, arm=name) as stage:
            model, done = train_stage(
                start,
                stage,
                tx,
                step_at,
                lambda step: ctx.batch(ctx.corpus.rows(step, settings.batch_size, ctx.seed)),
                roles=roles,
                watch=watch,
                choose=watch.choose,
            )
    except Diverged as e:
        raise TrainingFailed(f"config.arms.{name}.train.lr={settings.lr}: {e}") from None
    kept = done.get("best_step", done["steps"])
    if kept < recipe.steps:
        ctx.say(f"  {name}: ended after {done['steps']} of {recipe.steps} steps; the model of step {kept} is kept")
    measure(ctx, name, model, recipe.thinker, kept)
    return model


def thinking(ctx: QuietContext, recipe: QuietConfig, model: Model) -> Model:
    """Returns the model with what thinking needs: start and end vectors and a mixing head, unless it has them."""
    config = model.config.replace(thoughts=ctx.thoughts.replace(**recipe.thoughts))
    if "mixing" in model.params or recipe.thinker == "none":
        params = {k: v for k, v in model.params.items() if recipe.thinker != "none" or k not in ("thoughts", "mixing")}
        return model.replace(config=config, params=params)
    key = jax.random.key(stable_seed(ctx.seed, "mixing"))
    params = jax.jit(functools.partial(heads.attach_thoughts, config=config, start_id=ctx.start_id))(
        model.params, key=key
    )
    return model.replace(config=config, params=params)


@functools.lru_cache(maxsize=64)
def update(
    config: ModelConfig,
    thinker: str,
    length: int,
    tx: Any,
    settings: UpdateSettings,
    teacher: ModelConfig | None,
    teacher_weight: float,
) -> Callable[..., Any]:
    """Returns the jitted update of an arm, for thoughts of `length` tokens."""
    config = config.replace(thoughts=config.thoughts.replace(thought_tokens=length))
    if thinker == "none":
        loss = functools.partial(losses.sft_loss, config=config)
        if teacher is not None:
            loss = functools.partial(distil.student_loss, config=config, teacher=teacher, weight=teacher_weight)
    elif thinker == "sampled":
        loss = functools.partial(thought_loss.loss, config=config)
    else:
        loss = functools.partial(given_loss, config=config, thinker=thinker)
    return make_step(loss, tx, settings.accumulate)


def given_loss(params: Any, batch: Batch, rng: jax.Array, *, config: ModelConfig, thinker: str) -> Any:
    """The loss of the controls whose thoughts are not the model's own; nothing is reinforced.

    `pause` feeds one id that no text holds (the first forbidden one), whose embedding is learned: Goyal et al. 2023.
    """
    t = config.thoughts
    B, N = batch.tokens.shape
    shape = (t.thought_tokens, B * t.thoughts_per_position, N - 1)
    own = random_thoughts(rng, config, shape) if thinker == "random" else jnp.full(shape, t.forbidden_ids[0], jnp.int32)
    silent = config.replace(thoughts=t.replace(policy_weight=0.0, kl_weight=0.0, entropy_weight=0.0))
    return thought_loss.loss(params, batch, rng, config=silent, thoughts=own)
