"""Fine-tuning on (prompt, completion) examples: the train stage of STaR, of its base model, and of the baselines."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qstar.data.loader import batches
from qstar.errors import UserError, require
from qstar.methods.training import Stage, UpdateSettings, train_stage
from qstar.models.model import Model
from qstar.text.packing import Example, pack
from qstar.train import losses
from qstar.train.metrics import Writer
from qstar.train.step import make_step
from qstar.types import Batch


@dataclasses.dataclass(frozen=True)
class TrainSettings(UpdateSettings):
    """How examples become updates. Read from a config's `train` (or `base`) section, field by field."""

    z_loss: float = 0.0
    loss_on_prompt: bool = False  # the release trains on the prompt too, though it says otherwise
    packed: bool = True
    row_length: int = 1024

    def __post_init__(self):
        super().__post_init__()
        require(
            (0 <= self.z_loss < math.inf, f"z_loss={self.z_loss} must be 0 or more"),
            (self.row_length >= 2, f"row_length={self.row_length} must be at least 2 tokens"),
        )


@functools.cache
def sft_step(config: Any, settings: TrainSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step), one per configuration: all loops of a run share one compilation."""
    tx = settings.optimiser()
    loss = functools.partial(losses.sft_loss, config=config, z_loss=settings.z_loss, one_text=not settings.packed)
    return tx, make_step(settings.through(loss), tx, settings.accumulate)


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

    @functools.cache  # packed when the first batch is asked for: a finished stage asks for none
    def rows() -> Any:
        return batches(
            pack_rows(examples, settings),
            settings.batch_size,
            seed=seed,
            mix=(pack_rows(mix[0], settings), mix[1]) if mix else None,
        )

    tx, step_fn = sft_step(start.config, settings)
    stage = Stage(folder, settings, steps, seed, writer, label, progress)
    model, done = train_stage(start, stage, tx, lambda s: step_fn, lambda s: Batch(**rows()[s]))
    return model, {**done, "rows": len(examples)}


def pack_rows(examples: Sequence[Example], settings: TrainSettings) -> dict[str, np.ndarray]:
    """Returns the packed rows of the examples.

    Raises:
      UserError: an example that is longer than `row_length`.
    """
    if not examples:
        raise UserError("no examples to train on")
    return pack(examples, settings.row_length, packed=settings.packed, loss_on_prompt=settings.loss_on_prompt)
