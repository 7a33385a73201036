"""The distillation stage: a student learns from a teacher's responses, or from the teacher's word on its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qstar.errors import require
from qstar.models import scoring
from qstar.models.model import Model
from qstar.runs.folder import data_hash, stable_seed
from qstar.runs.stages import Stage, UpdateSettings, train_stage
from qstar.sample.batching import padded_length, stream
from qstar.train import distil as losses
from qstar.train.metrics import Writer
from qstar.train.state import TrainState, optimizer_for
from qstar.train.step import make_step


class Pair(NamedTuple):
    """A row to learn from, as ids. The response ends with EOS where it did end."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    teacher_prompt: tuple[int, ...] = ()  # () = the student's


@dataclasses.dataclass(frozen=True)
class DistilTrain(UpdateSettings):
    """How rows become updates."""

    max_new_tokens: int = 64  # rows of responses are this long; longer ones are an error

    def __post_init__(self):
        super().__post_init__()
        require(
            (self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"),
            (not self.lora_rank, f"lora_rank={self.lora_rank}: distillation trains all of a model; leave it at 0"),
        )


@functools.lru_cache(maxsize=16)
def compiled(config: Any, teacher: Any, settings: Any, limit: int, update: UpdateSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step) of a student's shape, a teacher's, and what the step depends on."""
    tx = optimizer_for(update.optimiser(), "^policy/")
    loss = functools.partial(losses.distil_loss, config=config, teacher=teacher, settings=settings, limit=limit)
    return tx, make_step(loss, tx, update.accumulate)


def distil(
    start: Model,
    rows: Sequence[Pair],
    settings: losses.DistilSettings,
    train: DistilTrain,
    *,
    steps: int,
    seed: int,
    folder: Path,
    writer: Writer,
    label: dict[str, Any],
    teacher: Model | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains a copy of `start` for `steps` updates; returns the new model with a summary.

    Killed at any point and called again it goes on from its last checkpoint and ends with the same bits.

    Args:
      rows: drawn with replacement between, without within, a batch. teacher: needed by soft losses.

    Raises:
      UserError: no rows, a row that is too long, a soft loss without teacher or across vocabularies. Diverged.
    """
    R, soft = train.max_new_tokens, settings.kind != "hard"
    longest = max((len(r.response) for r in rows), default=0)
    require(
        (len(rows) > 0, "no rows to distil from: nothing was kept; loosen the filter, or sample more"),
        (longest <= R, f"max_new_tokens={R} is too short for distillation: the longest response has {longest} tokens"),
        (
            not soft or teacher is not None,
            f"kind={settings.kind!r} needs the teacher's predictions, hence a teacher model",
        ),
    )
    if soft:
        sizes = (teacher.config.vocab_size, start.config.vocab_size)
        require(
            (sizes[0] == sizes[1], f"teacher and student have vocabularies of {sizes[0]} and {sizes[1]}: use 'hard'")
        )
    limit = scoring.text_limit(start.config, start.tokenizer)
    other = (teacher or start).config
    tx, step = compiled(start.config, other, settings, limit, only_updates(train))
    lengths = [padded_length(max(len(getattr(r, k)) for r in rows)) for k in ("prompt", "teacher_prompt")]

    def batch_at(s: int, state: TrainState) -> losses.Lesson:
        rng = np.random.default_rng([seed, s])
        own = settings.on_policy > 0 and rng.random() < settings.on_policy
        chosen = [rows[i] for i in rng.choice(len(rows), train.batch_size, replace=train.batch_size > len(rows))]
        if own:
            chosen = sample_on_policy(start, state.params["policy"], chosen, train.max_new_tokens, stable_seed(seed, s))
        return make_batch(start.config, other, chosen, lengths, train.max_new_tokens)

    data = data_hash([settings, *rows])
    stage = Stage(folder, train, steps, seed, writer, label, progress, data=data)
    model, summary = train_stage(
        start,
        stage,
        tx,
        lambda s: step,
        batch_at,
        roles={"teacher": teacher.params} if soft else None,
        on_policy=True,
    )
    return model, {**summary, "rows": len(rows)}


def only_updates(train: UpdateSettings) -> UpdateSettings:
    """Returns what the compiled step depends on: runs that differ in rates and lengths share a compilation."""
    return UpdateSettings(
        **{n: getattr(train, n) for n in ("batch_size", "accumulate", "b1", "b2", "weight_decay", "clip")}
    )


def make_batch(
    config: Any, teacher: Any, rows: Sequence[Pair], lengths: Sequence[int], response_length: int
) -> losses.Lesson:
    """Returns rows as host arrays; prompts are padded to `lengths`, the student's and the teacher's."""
    prompt = scoring.pad_prompts(config, [list(r.prompt) for r in rows], lengths[0])
    length = lengths[1] if any(r.teacher_prompt for r in rows) else lengths[0]
    teacher_prompts = scoring.pad_prompts(teacher, [list(r.teacher_prompt or r.prompt) for r in rows], length)
    response = np.zeros((len(rows), response_length), np.int32)
    mask = np.zeros((len(rows), response_length), np.float32)
    for i, r in enumerate(rows):
        response[i, : len(r.response)], mask[i, : len(r.response)] = r.response, 1.0
    return losses.Lesson(*prompt, response, mask, *teacher_prompts)


def sample_on_policy(model: Model, params: Any, rows: Sequence[Pair], max_new_tokens: int, seed: int) -> list[Pair]:
    """Returns the rows with responses that the student writes now, at temperature 1 (GKD's on-policy samples)."""
    found = list(rows)
    prompts = [list(r.prompt) for r in rows]
    for i, _, done in stream(model.replace(params=params), prompts, max_new_tokens=max_new_tokens, seed=seed):
        found[i] = rows[i]._replace(response=tuple(done.tokens))
    return found
