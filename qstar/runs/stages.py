"""One stage of training in a run folder: what is common to supervised fine-tuning and to Quiet-STaR."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from qstar import distributed, tree
from qstar.errors import Settings, UserError, bounded, require
from qstar.runs.folder import check_made_with, intact, once_json
from qstar.models import lora
from qstar.models.config import ModelConfig
from qstar.models.decoder import PARAM_AXES
from qstar.models.model import Model
from qstar.train import flops, optim
from qstar.train.checkpoint import Checkpoints
from qstar.train.loop import fit
from qstar.train.metrics import Writer
from qstar.train.profile import GUARDS, Watch
from qstar.train.state import create_state, optimizer_for
from qstar.types import Params


@dataclasses.dataclass(frozen=True)
class UpdateSettings(Settings):
    """How batches become updates."""

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
    transfer_guard: str = bounded("allow", choices=GUARDS)  # "log" or "disallow": what an update moves to or from the device unasked
    lora_rank: int = 0  # 0: all parameters train; else adapters of this rank beside frozen ones
    lora_alpha: float = 32.0
    lora_targets: tuple = lora.KERNELS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank:
            self.lora  # noqa: B018  says what is wrong
        why = f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}; choose a divisor of it"
        require((self.batch_size % self.accumulate == 0, why))

    @property
    def lora(self) -> lora.Lora:
        """The adapters' settings."""
        try:
            return lora.Lora(self.lora_rank, self.lora_alpha, tuple(self.lora_targets))
        except UserError as e:
            raise UserError(f"lora_{e}") from None

    def check_targets(self, config: Any) -> None:
        """Raises UserError where a model of this kind has no kernels that the adapters' targets name."""
        try:
            if self.lora_rank:
                lora.check_targets(config, self.lora)
        except UserError as e:
            raise e if str(e).startswith("lora_") else UserError(f"lora_{e}") from None

    def optimiser(self) -> optax.GradientTransformation:
        """Returns AdamW's direction with these settings, over what trains."""
        tx = optim.adamw(b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, clip=self.clip)
        return optimizer_for(tx, "^policy/") if self.lora_rank else tx

    def through(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the loss of what trains: itself, or as a function of adapters."""
        return lora.through(loss, self.lora.scale) if self.lora_rank else loss


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where and for how long a model is trained."""

    folder: Path  # holds `model/` (the parameters) when done, and `training/` until then
    settings: UpdateSettings
    steps: int
    seed: int
    writer: Writer
    label: dict[str, Any]  # of the metrics rows: arm, iteration
    progress: Callable[[int, dict[str, float]], None] | None = None
    name: str = "train"  # the `stage` of its metrics rows
    data: str = ""  # a hash of what it learns from (`run_folder.data_hash`)


FREE = ("save_every", "log_every", "max_bad", "transfer_guard")  # settings that change nothing in what is learnt
MACHINE = ("seconds", "tokens_per_second", "mfu", "recompiles", "memory")  # metrics of the machine, not of the model


def finished(folder: Path) -> bool:
    """Whether the stage of this folder has ended (its model may yet prove damaged: then it is trained again)."""
    return intact(folder / "summary.json")


def train_stage(
    start: Model,
    stage: Stage,
    tx: optax.GradientTransformation,
    step_at: Callable[[int], Any],
    batch_at: Callable[..., Any],
    *,
    roles: dict[str, Params] | None = None,
    watch: Callable[[int, Params], bool | None] | None = None,
    choose: Callable[[Params, dict[str, Any]], tuple[Params, dict[str, Any]]] | None = None,
    **how: Any,
) -> tuple[Model, dict[str, Any]]:
    """Trains a copy of `start` and returns the new model with a summary.

    Killed at any point and called again it goes on from its last checkpoint and ends with the same bits; called after
    it has finished it only loads.

    Args:
      tx: over all roles. step_at: the update (`make_step`) of a step. batch_at: the host's rows of a step.
      roles: parameters beside `policy`, which do not train (a teacher).
      watch: is shown (step, policy) at every log, and where a resumed run starts; True from it ends the stage early.
      choose: is given the last parameters and the summary, and returns those that are kept.
      how: `on_policy` and `place` of `train.loop.fit`.

    Raises:
      UserError: the folder is of other data, settings or parameters. Diverged: see `fit`.
    """

    def train(start: Model) -> tuple[Params, dict[str, Any]]:
        if stage.settings.lora_rank:
            return _train_adapters(start, stage, tx, step_at, batch_at, roles or {}, watch, how)
        found = _train(start, stage, tx, step_at, batch_at, roles or {}, watch, how)
        return choose(*found) if choose is not None else found

    made_with = {"settings": stage.settings, "steps": stage.steps, "seed": stage.seed, "data_hash": stage.data}
    return train_once(start, stage.folder, made_with, train, cast=not stage.settings.lora_rank)


def train_once(
    start: Model,
    folder: Path,
    made_with: dict[str, Any],
    train: Callable[[Model], tuple[Params, dict[str, Any]]],
    *,
    cast: bool = True,
) -> tuple[Model, dict[str, Any]]:
    """Returns the model and the summary that `train` makes of `start`, kept in `folder` and made once.

    Args:
      made_with: what the result depends on, beside the parameters of `start`; a folder that was made with anything else is
        refused. Of settings, those that change nothing in the result are left out.
    """
    # Master weights are float32, whatever the folder kept them in: updates of 1e-6 round to nothing in bfloat16.
    # (Beside LoRA's adapters, which are float32, what is frozen stays as it is.)
    if cast:
        start = start.replace(params=tree.cast(start.params, np.float32))
    made_with = {k: _plain(v) if dataclasses.is_dataclass(v) else v for k, v in made_with.items()}
    check_made_with(folder, {**made_with, "start_norm_and_sum": [float(x) for x in _moments(start.params)]})
    weights = Checkpoints(folder / "model")
    done = folder / "summary.json"
    if finished(folder) and (kept := weights.resume(start.params)) is not None:
        distributed.remove(folder / "training")  # a kill may have come between
        weights.close()
        return start.replace(params=kept.state), once_json(done, dict)
    params, summary = train(start)
    weights.save(summary.get("steps", summary.get("updates")), params)
    weights.close()
    once_json(done, lambda: summary)
    distributed.remove(folder / "training")  # moments are of no use to the next loop
    return start.replace(params=params), summary


@jax.jit
def _moments(params: Params) -> tuple[jax.Array, jax.Array]:
    """Norm and sum of all parameters: what tells one model from another, on any machine."""
    leaves = [x.astype(np.float32) for x in jax.tree.leaves(params)]
    return optax.global_norm(leaves), sum(x.sum() for x in leaves)


def _plain(settings: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}


def _train_adapters(start, stage, tx, step_at, batch_at, roles, watch, how):
    """Trains adapters beside the frozen parameters; returns these merged, and leaves FOLDER/adapter in PEFT's layout."""
    settings = stage.settings.lora
    adapted = start.replace(params=fresh_adapters(start, settings, stage.seed))
    adapters, summary = _train(adapted, stage, tx, step_at, batch_at, {**roles, "base": start.params}, watch, how)
    if distributed.is_first():
        lora.save_adapters(start.config, adapters, settings, stage.folder / "adapter")
    merged = jax.jit(lora.merge, static_argnums=2)(start.params, adapters, settings.scale)
    return merged, {**summary, "adapter_parameters": tree.size(adapters)}


def fresh_adapters(start: Model, settings: lora.Lora, seed: int) -> Params:
    """Returns what is trained in place of the parameters: fresh adapters, and a value head whole."""
    fresh = lora.init(start.config, settings, jax.random.fold_in(tree.random_key(seed), 1))
    if start.config.value_head:
        fresh["value"] = tree.cast(start.params["value"], np.float32)  # a head has nothing to be an adapter of
    return fresh


def _train(start, stage, tx, step_at, batch_at, roles, watch, how):
    s = stage.settings
    params = {"policy": start.params, **roles}
    state = create_state(params, tx, seed=stage.seed, mesh=start.mesh, table=PARAM_AXES)
    lr_at = optim.schedule(s.schedule, s.lr, warmup=s.warmup, steps=stage.steps, end=s.end)
    metrics: dict[str, float] = {}
    last = 0
    lr_table = np.asarray(jax.vmap(lr_at)(np.arange(stage.steps))) if stage.steps else np.zeros(0)
    with contextlib.closing(Checkpoints(stage.folder / "training")) as checkpoints:
        for at in fit(
            state,
            step_at,
            batch_at,
            lambda step: lr_table[step],
            steps=stage.steps,
            mesh=start.mesh,
            checkpoints=checkpoints,
            save_every=s.save_every,
            log_every=s.log_every,
            max_bad=s.max_bad,
            watch=Watch(None if how else _flops_of(start, s), s.transfer_guard),
            **how,
        ):
            state, last = at.state, at.step
            if not at.metrics and stage.progress is not None:  # it goes on from a checkpoint
                stage.progress(at.step, {})
            if at.metrics:
                metrics = at.metrics if math.isfinite(at.metrics.get("loss", 0.0)) or not metrics else metrics
                stage.writer.write(
                    stage=stage.name, step=at.step, lr=float(lr_table[at.step - 1]), **stage.label, **at.metrics
                )
                if stage.progress is not None:
                    stage.progress(at.step, at.metrics)
            if watch is not None:
                with at.interruptible():
                    ends = watch(at.step, state.params["policy"])
                if ends:
                    break
    keys = dict.fromkeys(("loss", "accuracy", "tokens", "skipped", *metrics))
    shown = {k: metrics.get(k) for k in keys if not k.startswith(MACHINE)}
    return state.params["policy"], {"steps": last, **shown}


def _flops_of(model: Model, settings: UpdateSettings) -> Callable[[Any], float] | None:
    if not isinstance(model.config, ModelConfig):
        return None
    thinks = "mixing" in model.params
    return functools.partial(flops.update_flops, model.config, frozen=settings.lora_rank > 0, thinks=thinks)
