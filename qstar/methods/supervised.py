"""Fine-tuning on (prompt, completion) examples: the train stage of STaR, of its base model, and of the baselines."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qstar import tree
from qstar.data.loader import batches
from qstar.errors import UserError, require
from qstar.methods.run_folder import once_json
from qstar.models.decoder import PARAM_AXES
from qstar.models.model import Model
from qstar.text.packing import Example, pack
from qstar.train import losses, optim
from qstar.train.checkpoint import Checkpoints
from qstar.train.loop import fit
from qstar.train.metrics import Writer
from qstar.train.state import create_state
from qstar.train.step import make_step
from qstar.types import Batch


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How examples become updates. Read from a config's `train` (or `base`) section, field by field."""

    batch_size: int = 32  # rows per update
    accumulate: int = 1
    lr: float = 1e-6
    schedule: str = "constant"
    warmup: int = 100
    end: float = 0.0  # final rate of a decay, as a share of lr
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    z_loss: float = 0.0
    loss_on_prompt: bool = False  # the release trains on the prompt too, though it says otherwise
    packed: bool = True
    row_length: int = 1024
    save_every: int = 0
    log_every: int = 50
    max_bad: int = 20

    def __post_init__(self):
        kinds = ", ".join(optim.SCHEDULES)
        require(
            (self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1"),
            (self.accumulate >= 1, f"accumulate={self.accumulate} must be at least 1"),
            (
                self.batch_size % max(1, self.accumulate) == 0,
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}; choose a divisor of it",
            ),
            (0 <= self.lr < math.inf, f"lr={self.lr} must be a finite number of 0 or more"),
            (self.schedule in optim.SCHEDULES, f"schedule={self.schedule!r} is not one of {kinds}"),
            (self.warmup >= 0, f"warmup={self.warmup} must be 0 or more steps"),
            (0 <= self.end < math.inf, f"end={self.end} must be a share of lr, 0 or more"),
            (0 <= self.b1 < 1, f"b1={self.b1} must be in [0, 1)"),
            (0 <= self.b2 < 1, f"b2={self.b2} must be in [0, 1)"),
            (0 <= self.weight_decay < math.inf, f"weight_decay={self.weight_decay} must be 0 or more"),
            (0 <= self.clip < math.inf, f"clip={self.clip} must be 0 (off) or more"),
            (0 <= self.z_loss < math.inf, f"z_loss={self.z_loss} must be 0 or more"),
            (self.row_length >= 2, f"row_length={self.row_length} must be at least 2 tokens"),
            (self.save_every >= 0, f"save_every={self.save_every} must be 0 (only at the end) or more steps"),
            (self.log_every >= 1, f"log_every={self.log_every} must be at least 1 step"),
            (self.max_bad >= 1, f"max_bad={self.max_bad} must be at least 1 update"),
        )


@functools.cache
def sft_step(config: Any, settings: TrainSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step), one per configuration: all loops of a run share one compilation."""
    tx = optim.adamw(b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay, clip=settings.clip)
    loss = functools.partial(losses.sft_loss, config=config, z_loss=settings.z_loss)
    return tx, make_step(loss, tx, settings.accumulate)


def fine_tune(
    start: Model,
    examples: Sequence[Example],
    settings: TrainSettings,
    *,
    steps: int,
    seed: int,
    folder: Path,
    writer: Writer,
    label: dict[str, Any],
    mix: tuple[Sequence[Example], float] | None = None,
    progress: Any = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains a copy of `start` for `steps` updates and returns the new model with a summary.

    Killed at any point and called again it goes on from its last checkpoint and ends with the same bits; called after
    it has finished it only loads.

    Args:
      folder: holds `model/` (the parameters) when done, and `training/` until then.
      label: arm and iteration, for the metrics rows.
      mix: (other examples, share of every batch): hinted seed rows, in from-scratch runs.
    """
    # Master weights are float32, whatever the folder kept them in: updates of 1e-6 round to nothing in bfloat16.
    start = start.replace(params=tree.cast(start.params, np.float32))
    weights = Checkpoints(folder / "model")
    done = folder / "summary.json"
    if done.exists():
        shutil.rmtree(folder / "training", ignore_errors=True)  # a kill may have come between
        params, _ = weights.restore(start.params)
        weights.close()
        return start.replace(params=params), once_json(done, dict)
    params, summary = _train(start, examples, settings, steps, seed, folder, writer, label, mix, progress)
    weights.save(steps, params)
    weights.close()
    once_json(done, lambda: summary)
    shutil.rmtree(folder / "training", ignore_errors=True)  # moments are of no use to the next loop
    return start.replace(params=params), summary


def _train(start, examples, settings, steps, seed, folder, writer, label, mix, progress):
    tx, step_fn = sft_step(start.config, settings)
    state = create_state({"policy": start.params}, tx, seed=seed, mesh=start.mesh, table=PARAM_AXES)
    rows = batches(
        pack_rows(examples, settings),
        settings.batch_size,
        seed=seed,
        mix=(pack_rows(mix[0], settings), mix[1]) if mix else None,
        shard=(jax.process_index(), jax.process_count()),
    )
    lr_at = optim.schedule(settings.schedule, settings.lr, warmup=settings.warmup, steps=steps, end=settings.end)
    checkpoints = Checkpoints(folder / "training")
    metrics: dict[str, float] = {}
    lr_table = np.asarray(jax.vmap(lr_at)(np.arange(steps))) if steps else np.zeros(0)
    for at in fit(
        state,
        step_fn,
        lambda s: Batch(**rows[s]),
        lambda s: lr_table[s],
        steps=steps,
        mesh=start.mesh,
        checkpoints=checkpoints,
        save_every=settings.save_every,
        log_every=settings.log_every,
        max_bad=settings.max_bad,
    ):
        state, metrics = at.state, at.metrics
        if metrics:
            writer.write(stage="train", step=at.step, lr=float(lr_table[at.step - 1]), **label, **metrics)
        if progress is not None:
            progress(at.step, metrics)
    checkpoints.close()
    keys = ("loss", "accuracy", "tokens", "skipped")
    return state.params["policy"], {"steps": steps, "rows": len(examples), **{k: metrics.get(k) for k in keys}}


def pack_rows(examples: Sequence[Example], settings: TrainSettings) -> dict[str, np.ndarray]:
    """Returns the packed rows of the examples.

    Raises:
      UserError: an example that is longer than `row_length`.
    """
    if not examples:
        raise UserError("no examples to train on")
    return pack(examples, settings.row_length, packed=settings.packed, loss_on_prompt=settings.loss_on_prompt)
