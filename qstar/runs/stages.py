"""Training stages: settings, resumable training in a folder, and fine-tuning on (prompt, completion) examples.

A stage is made once. Its folder holds `model/` and `summary.json` when it is done, and `training/` (checkpoints with
the optimiser's state) until then; killed at any point and called again it continues from its last checkpoint and ends
with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qstar import distributed, tree
from qstar.data.loader import batches
from qstar.errors import Settings, bounded, require, within
from qstar.mesh import to_host
from qstar.models import lora, scoring
from qstar.models.config import ModelConfig
from qstar.models.decoder import PARAM_AXES
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model
from qstar.runs.folder import check_made_with, data_hash, intact, norm_and_sum, once_json
from qstar.sample.batching import padded_length
from qstar.text.packing import Example, pack
from qstar.train import flops, losses, optim
from qstar.train.checkpoint import Checkpoints
from qstar.train.loop import Progress, fit
from qstar.train.metrics import Writer
from qstar.train.profile import GUARDS, Watch
from qstar.train.state import create_state
from qstar.train.step import make_step
from qstar.types import Batch, Params, Responses


@dataclasses.dataclass(frozen=True)
class UpdateSettings(Settings):
    """Optimiser, schedule, checkpoints and adapters: what every training stage has."""

    batch_size: int = bounded(32, ge=1)  # rows per update
    accumulate: int = bounded(1, ge=1)
    lr: float = bounded(1e-6, ge=0)
    schedule: str = bounded("constant", choices=optim.SCHEDULES)
    warmup: int = bounded(100, ge=0, note="steps")
    end: float = bounded(0.0, ge=0)  # final rate of a decay, as a share of lr
    b1: float = bounded(0.9, ge=0, lt=1)
    b2: float = bounded(0.95, ge=0, lt=1)
    weight_decay: float = bounded(0.0, ge=0)
    clip: float = bounded(1.0, ge=0, note="0: off")
    save_every: int = bounded(0, ge=0, note="steps; 0: only at the end")
    log_every: int = bounded(50, ge=1, note="steps")
    max_bad: int = bounded(20, ge=1)
    transfer_guard: str = bounded("allow", choices=GUARDS)  # implicit transfers between host and device in an update
    lora_rank: int = 0  # 0: all parameters train; else adapters of this rank beside frozen ones
    lora_alpha: float = bounded(32.0, gt=0)
    lora_targets: tuple = lora.KERNELS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank:
            self.lora  # noqa: B018  raises if the adapters' settings are wrong
        why = f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}; choose a divisor of it"
        require((self.batch_size % self.accumulate == 0, why))

    @property
    def lora(self) -> lora.Lora:
        """The adapters' settings."""
        with within("lora_"):
            return lora.Lora(self.lora_rank, self.lora_alpha, tuple(self.lora_targets))

    def check_targets(self, config: Any) -> None:
        """Raises UserError where a model of this kind has no kernels that the adapters' targets name."""
        if self.lora_rank:
            with within("lora_"):
                lora.check_targets(config, self.lora)

    def optimiser(self) -> optax.GradientTransformation:
        """Returns AdamW's direction with these settings, over what trains."""
        return optim.adamw(b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, clip=self.clip)

    def through(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the loss as a function of what trains: all parameters, or adapters."""
        return lora.through(loss, self.lora.scale) if self.lora_rank else loss


@dataclasses.dataclass(frozen=True)
class TrainSettings(UpdateSettings):
    """Settings of fine-tuning. A config's `train` section."""

    z_loss: float = bounded(0.0, ge=0)
    loss_on_prompt: bool = False  # STaR's released code also trains on the prompt, unlike its paper
    packed: bool = True
    row_length: int = bounded(1024, ge=2)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where, how and for how long a model is trained."""

    folder: Path
    settings: Any  # an UpdateSettings
    steps: int
    seed: int
    writer: Writer
    label: dict[str, Any] = dataclasses.field(default_factory=dict)  # of its metrics rows: arm, iteration
    progress: Callable[[int, dict[str, float]], None] | None = None
    name: str = "train"  # the `stage` of its metrics rows
    data: str = ""  # a hash of the training data (`folder.data_hash`)


# Settings that do not change the trained parameters, left out of made_with.json: changing them keeps a finished stage.
FREE = ("save_every", "log_every", "log_completions", "max_bad", "transfer_guard")
# Metrics of the machine, left out of summaries: a resumed stage writes the same bytes.
MACHINE = ("seconds", "tokens_per_second", "mfu", "recompiles", "memory")


# ------------------------------------------------------------------------------------------------ stages in folders


def train_stage(
    start: Model,
    stage: Stage,
    tx: optax.GradientTransformation,
    step_at: Callable[[int], Any],
    batch_at: Callable[..., Any],
    *,
    frozen: dict[str, Params] | None = None,
    watch: Callable[[int, Params], bool | None] | None = None,
    choose: Callable[[Params, dict[str, Any]], tuple[Params, dict[str, Any]]] | None = None,
    on_policy: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """Trains a copy of `start` and returns the new model with a summary; a finished stage is only loaded.

    Args:
      step_at: the update (`make_step`) of a step. batch_at: all rows of a step, on the host.
      frozen: parameters by role that the loss reads beside `policy` (a teacher): no copy of them is made or saved.
      watch: called with (step, policy) at every log and where a resumed run starts; True from it ends the stage early.
      choose: is given the last parameters and the summary, and returns those that are kept.
      on_policy: see `train.loop.fit`.

    Raises UserError if the folder is of other data, settings or parameters; Diverged: see `fit`.
    """
    settings = stage.settings

    def train(start: Model) -> tuple[Params, dict[str, Any]]:
        if not settings.lora_rank:
            found = _train(start, stage, tx, step_at, batch_at, frozen, watch, on_policy)
            return choose(*found) if choose is not None else found
        # Adapters train beside frozen parameters, and are merged into them at the end.
        adapted = start.replace(params=fresh_adapters(start, settings.lora, stage.seed))
        all_frozen = {**(frozen or {}), "base": start.params}
        adapters, summary = _train(adapted, stage, tx, step_at, batch_at, all_frozen, watch, on_policy)
        summary["adapter_parameters"] = tree.size(adapters)
        return merge_adapters(start, adapters, settings.lora, stage.folder), summary

    made_with = {"settings": settings, "steps": stage.steps, "seed": stage.seed, "data_hash": stage.data}
    return train_once(start, stage.folder, made_with, train, dtype=None if settings.lora_rank else np.float32)


def train_once(
    start: Model,
    folder: Path,
    made_with: dict[str, Any],
    train: Callable[[Model], tuple[Params, dict[str, Any]]],
    *,
    dtype: Any = np.float32,
) -> tuple[Model, dict[str, Any]]:
    """Returns the model and the summary that `train` makes of `start`, kept in `folder` and made once.

    Args:
      made_with: what the result depends on, besides the parameters of `start`; a folder of anything else is refused.
      dtype: of the result's parameters; None leaves them as `train` makes them.
    """
    for key, settings in made_with.items():
        if dataclasses.is_dataclass(settings):
            lasting = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}  # type: ignore[arg-type]
            made_with = {**made_with, key: lasting}
    check_made_with(folder, {**made_with, "start_norm_and_sum": norm_and_sum(start.params)})
    done = folder / "summary.json"
    with contextlib.closing(Checkpoints(folder / "model")) as weights:
        if intact(done) and (kept := weights.resume(_in_dtype(start.params, dtype))) is not None:
            # In case a kill came before the removal below.
            distributed.remove(folder / "training")
            return start.replace(params=kept.state), once_json(done, dict)
        params, summary = train(start)
        # A stage of no update returns the parameters that it was given.
        params = tree.cast(params, dtype) if dtype is not None else params
        weights.save(summary["steps"] if "steps" in summary else summary["updates"], params)
    # The summary is the done-marker of the stage, so it is written after the parameters.
    once_json(done, lambda: summary)
    distributed.remove(folder / "training")
    return start.replace(params=params), summary


def _in_dtype(params: Params, dtype: Any) -> Any:
    """Returns the shapes of the parameters in another dtype: no copy is made."""
    cast = lambda x: dtype if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, cast(x), sharding=x.sharding), params)


def restore(model: Model, folder: Path) -> Model:
    """Returns the model with the parameters of the finished stage in `folder`."""
    missing = f"{folder / 'model'}: the checkpoint is missing; delete {folder} to train it again"
    require(((folder / "model").is_dir(), missing))
    with contextlib.closing(Checkpoints(folder / "model")) as checkpoints:
        params, _ = checkpoints.restore(model.params)
    return model.replace(params=params)


def run_updates(
    params: dict[str, Params],
    stage: Stage,
    tx: optax.GradientTransformation,
    step_at: Callable[[int], Any],
    batch_at: Callable[..., Any],
    *,
    mesh: Any,
    flops_of: Callable[[Any], float] | None = None,
    **how: Any,
) -> Generator[tuple[Progress, float], None, None]:
    """Runs the updates of a stage from its newest checkpoint; yields `train.loop.Progress` and the last learning rate.

    Args:
      params: {role: parameters}; `policy` is the trained model. flops_of: batch -> FLOPs of its update.
      how: `log_every`, `on_policy`, `place` and `extra` of `train.loop.fit`.
    """
    s = stage.settings
    # Master weights are float32, whatever the folder kept them in: updates of 1e-6 round to nothing in bfloat16.
    state = create_state(params, tx, seed=stage.seed, mesh=mesh, table=PARAM_AXES, dtype=np.float32)
    lr_at = optim.schedule(s.schedule, s.lr, warmup=s.warmup, steps=stage.steps, end=s.end)
    # One call for all steps: a call of the schedule per update would wait for the device every time.
    rates = np.asarray(jax.vmap(lr_at)(np.arange(stage.steps))) if stage.steps else np.zeros(0)
    opened = Checkpoints(stage.folder / "training", before=stage.writer.flush)
    with contextlib.ExitStack() as ends, contextlib.closing(opened) as checkpoints:
        # Rows for a bucket are buffered: flush the last ones, too, when SIGTERM ends the run.
        ends.callback(stage.writer.flush)
        how = {"log_every": s.log_every, "save_every": s.save_every, "max_bad": s.max_bad, **how}
        how |= {"steps": stage.steps, "checkpoints": checkpoints, "watch": Watch(flops_of, s.transfer_guard)}
        for at in fit(state, step_at, batch_at, lambda step: rates[step], mesh=mesh, **how):
            yield at, float(rates[at.step - 1]) if at.step else 0.0


def _train(start, stage, tx, step_at, batch_at, frozen, watch, on_policy):
    metrics: dict[str, float] = {}
    policy, last = start.params, 0
    # Batches of on-policy stages have no `segment_ids`, by which FLOPs are counted.
    counts = None if on_policy else _flops_of(start, stage.settings)
    # Cached: `train.profile.Watch` counts compilations by step object.
    bound = functools.cache(lambda step: functools.partial(step, frozen=frozen) if frozen else step)
    how = {"mesh": start.mesh, "flops_of": counts, "on_policy": on_policy}
    updates = run_updates({"policy": start.params}, stage, tx, lambda n: bound(step_at(n)), batch_at, **how)
    # Closed here: after an exception the garbage collector would close the checkpoints too late.
    with contextlib.closing(updates):
        for at, lr in updates:
            policy, last = at.state.params["policy"], at.step
            # Empty where it resumes. A skipped update's loss is not finite: the summary keeps the last finite one.
            if at.metrics:
                metrics = at.metrics if math.isfinite(at.metrics.get("loss", 0.0)) or not metrics else metrics
                stage.writer.write(stage=stage.name, step=at.step, lr=lr, **stage.label, **at.metrics)
            if stage.progress is not None:
                stage.progress(at.step, at.metrics)
            if watch is not None:
                # `watch` may evaluate for long: SIGTERM interrupts it, and the state is saved.
                with at.interruptible():
                    ends = watch(at.step, policy)
                if ends:
                    break
    keys = dict.fromkeys(("loss", "accuracy", "tokens", "skipped", *metrics))
    return policy, {"steps": last, **{k: metrics.get(k) for k in keys if not k.startswith(MACHINE)}}


def merge_adapters(start: Model, adapters: Params, settings: lora.Lora, folder: Path) -> Params:
    """Returns the parameters with adapters merged, and writes FOLDER/adapter in PEFT's layout."""
    assert isinstance(start.config, ModelConfig)  # see `fresh_adapters`
    # A collective: all processes take part, though one writes.
    on_host = to_host(adapters)
    if distributed.is_first():
        lora.save_adapters(start.config, on_host, settings, folder / "adapter", start.source)
    return jax.jit(lora.merge, static_argnums=2)(start.params, adapters, settings.scale)


def fresh_adapters(start: Model, settings: lora.Lora, seed: int) -> Params:
    """Returns what is trained in place of the parameters: fresh adapters, and the whole value head."""
    # `check_trainable` refuses adapters of a T5.
    assert isinstance(start.config, ModelConfig)
    fresh = lora.init(start.config, settings, jax.random.fold_in(tree.random_key(seed), 1))
    if start.config.value_head:
        # A new head has no trained weights that a low-rank change could adapt: it trains whole.
        fresh["value"] = tree.cast(start.params["value"], np.float32)
    return fresh


def _flops_of(model: Model, settings: UpdateSettings) -> Callable[[Any], float] | None:
    if not isinstance(model.config, ModelConfig):
        return None
    options = {"frozen": settings.lora_rank > 0, "with_thoughts": "mixing" in model.params}
    return functools.partial(flops.update_flops, model.config, **options)


# ------------------------------------------------------------------------------------------- supervised fine-tuning


def fine_tune(
    start: Model,
    examples: Sequence[Example],
    stage: Stage,
    *,
    mix: tuple[Sequence[Example], float] | None = None,
    watch: Callable[[int, Params], None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains a copy of `start` on (prompt, completion) examples; returns the new model with a summary.

    `stage`: with `TrainSettings`; its `data` is set here. `mix`: (other examples, share of every batch), hinted seed
    rows in from-scratch runs. `watch`, and the errors: see `train_stage`.
    """
    settings, mixed = stage.settings, mix[0] if mix else ()

    # Packed when the first batch is needed: a finished stage needs none.
    @functools.cache
    def rows() -> Any:
        own = pack_rows(examples, settings, start.config, shared_with=mixed)
        more = (pack_rows(mixed, settings, start.config, shared_with=examples), mix[1]) if mix else None
        return batches(own, settings.batch_size, seed=stage.seed, mix=more)

    kind = Responses if isinstance(start.config, EncDecConfig) else Batch
    tx, step = sft_step(start.config, settings)
    stage = dataclasses.replace(stage, data=data_hash([*examples, *([mix[1], *mix[0]] if mix else ())]))
    model, done = train_stage(start, stage, tx, lambda n: step, lambda n: kind(**rows()[n]), watch=watch)
    return model, {**done, "rows": len(examples)}


def sft_step(config: Any, settings: TrainSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step), one per configuration: the base and all loops of a run share one compilation."""
    check_trainable(config, settings)
    return _sft_step(config, only_updates(settings, TrainSettings, "z_loss", "packed"))


@functools.cache
def _sft_step(config: Any, settings: TrainSettings) -> tuple[Any, Any]:
    tx = settings.optimiser()
    loss: Any = functools.partial(losses.response_loss, config=config, z_loss=settings.z_loss)
    if not isinstance(config, EncDecConfig):
        # A row of one document takes simpler masks, which cuDNN's attention supports.
        loss = functools.partial(losses.sft_loss, config=config, z_loss=settings.z_loss, one_text=not settings.packed)
    return tx, make_step(settings.through(loss), tx, settings.accumulate)


def only_updates(train: Any, kind: Any = UpdateSettings, *more: str) -> Any:
    """Returns what a compiled step depends on, a cache key: stages that differ in rates and lengths alone share it."""
    names = ("batch_size", "accumulate", "b1", "b2", "weight_decay", "clip", "lora_rank", "lora_alpha", "lora_targets")
    return kind(**{name: getattr(train, name) for name in (*names, *more)})


def check_trainable(config: Any, settings: UpdateSettings) -> None:
    """Raises UserError for settings that a model of this kind cannot be trained with."""
    if not isinstance(config, EncDecConfig):
        return settings.check_targets(config)
    why = "is for decoders, and this model is an encoder-decoder (T5)"
    on_prompt = getattr(settings, "loss_on_prompt", False)
    require(
        (not settings.lora_rank, f"lora_rank={settings.lora_rank} {why}, of which all parameters train; set it to 0"),
        (not on_prompt, f"loss_on_prompt=True {why}, which predicts no prompt; set it to False"),
    )


def pack_rows(
    examples: Sequence[Example], settings: TrainSettings, config: Any = None, *, shared_with: Sequence[Example] = ()
) -> dict[str, np.ndarray]:
    """Returns the examples as arrays: packed rows [B, T] for a decoder; for an encoder-decoder one example per row,
    prompt and response apart, padded to the longest of `examples` and `shared_with` (with which they share batches).
    Raises UserError for an example that is longer than `row_length`.
    """
    require((len(examples) > 0, "no examples to train on"))
    if isinstance(config, EncDecConfig):
        return _response_rows(examples, settings.row_length, config, [*examples, *shared_with])
    return pack(examples, settings.row_length, packed=settings.packed, loss_on_prompt=settings.loss_on_prompt)


def _response_rows(examples, row_length, config, widest):
    longest = max(map(len, examples))
    require((longest <= row_length, f"row_length={row_length} is too short: the longest example has {longest} tokens"))
    # The widest rows count, mixed ones included: batches hold both, and equal shapes compile once.
    P, R = (padded_length(max(len(getattr(x, part)) for x in widest)) for part in ("prompt", "completion"))
    prompt, prompt_mask = scoring.pad_prompts(config, [x.prompt for x in examples], P)
    response, mask = scoring.pad_responses([x.completion for x in examples], R)
    return {"prompt": prompt, "prompt_mask": prompt_mask, "response": response, "mask": mask}
