"""Fine-tuning on (prompt, completion) examples: the train stage of STaR, of its base model, and of the baselines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qstar.data.loader import batches
from qstar.errors import UserError, bounded, require
from qstar.runs.folder import data_hash
from qstar.runs.stages import Stage, UpdateSettings, train_stage
from qstar.models import scoring
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model
from qstar.sample.batching import padded_length
from qstar.text.packing import Example, pack
from qstar.train import losses
from qstar.train.metrics import Writer
from qstar.train.step import make_step
from qstar.types import Batch, Responses


@dataclasses.dataclass(frozen=True)
class TrainSettings(UpdateSettings):
    """How examples become updates. Read from a config's `train` (or `base`) section, field by field."""

    z_loss: float = bounded(0.0, ge=0)
    loss_on_prompt: bool = False  # the release trains on the prompt too, though it says otherwise
    packed: bool = True
    row_length: int = bounded(1024, ge=2)


@functools.cache
def sft_step(config: Any, settings: TrainSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step), one per configuration: all loops of a run share one compilation."""
    check_trainable(config, settings)
    tx = settings.optimiser()
    if isinstance(config, EncDecConfig):
        loss = functools.partial(losses.response_loss, config=config, z_loss=settings.z_loss)
    else:
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
      folder: holds `model/` (the parameters) when done, and `training/` until then; with other examples or settings than
        those it was made with it is refused.
      label: arm and iteration, for the metrics rows.
      mix: (other examples, share of every batch): hinted seed rows, in from-scratch runs.
    """
    mixed = mix[0] if mix else ()

    @functools.cache  # packed when the first batch is asked for: a finished stage asks for none
    def rows() -> Any:
        return batches(
            pack_rows(examples, settings, start.config, shared_with=mixed),
            settings.batch_size,
            seed=seed,
            mix=(pack_rows(mixed, settings, start.config, shared_with=examples), mix[1]) if mix else None,
        )

    kind = Responses if isinstance(start.config, EncDecConfig) else Batch
    tx, step_fn = sft_step(start.config, settings)
    learnt = [*examples, *([mix[1], *mix[0]] if mix else ())]
    stage = Stage(folder, settings, steps, seed, writer, label, progress, data=data_hash(learnt))
    model, done = train_stage(start, stage, tx, lambda s: step_fn, lambda s: kind(**rows()[s]))
    return model, {**done, "rows": len(examples)}


def check_trainable(config: Any, settings: TrainSettings) -> None:
    """Raises UserError for settings that a model of this kind cannot be fine-tuned with."""
    if not isinstance(config, EncDecConfig):
        return settings.check_targets(config)
    why = "is for decoders, and this model is an encoder-decoder (T5)"
    require(
        (not settings.lora_rank, f"lora_rank={settings.lora_rank} {why}, of which all parameters train; set it to 0"),
        (not settings.loss_on_prompt, f"loss_on_prompt=True {why}, which predicts no prompt; set it to False"),
    )


def pack_rows(
    examples: Sequence[Example], settings: TrainSettings, config: Any = None, *, shared_with: Sequence[Example] = ()
) -> dict[str, np.ndarray]:
    """Returns the examples as rows: packed ones [N, L] for a decoder; one each, prompt and response apart, for an
    encoder-decoder, as wide as they and those that stand `beside` them in batches need.

    Raises:
      UserError: an example that is longer than `row_length`.
    """
    if not examples:
        raise UserError("no examples to train on")
    if isinstance(config, EncDecConfig):
        return _response_rows(examples, settings.row_length, config, [*examples, *shared_with])
    return pack(examples, settings.row_length, packed=settings.packed, loss_on_prompt=settings.loss_on_prompt)


def _response_rows(examples, row_length, config, widest):
    longest = max(map(len, examples))
    require((longest <= row_length, f"row_length={row_length} is too short: the longest example has {longest} tokens"))
    P, R = (padded_length(max(len(getattr(x, part)) for x in widest)) for part in ("prompt", "completion"))
    prompt, prompt_mask = scoring.pad_prompts(config, [x.prompt for x in examples], P)
    response, mask = np.zeros((len(examples), R), np.int32), np.zeros((len(examples), R), np.float32)
    for i, x in enumerate(examples):
        response[i, : len(x.completion)], mask[i, : len(x.completion)] = x.completion, 1.0
    return {"prompt": prompt, "prompt_mask": prompt_mask, "response": response, "mask": mask}
