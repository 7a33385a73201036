"""Distillation stage: train a student on a teacher's responses, or on the teacher's predictions for the student's own.

for every step:
    rows      = a batch of (prompt, response)
    responses = student(prompts), in a share `on_policy` of the steps         GKD, arXiv 2306.13649, algorithm 1
    loss      = hard (NLL of the responses) or soft (a divergence from the teacher's distribution)      `train.distil`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qstar.errors import bounded, require
from qstar.models import scoring
from qstar.models.config import ModelConfig
from qstar.models.model import Model
from qstar.runs.folder import data_hash, stable_seed
from qstar.runs.stages import Stage, UpdateSettings, only_updates, train_stage
from qstar.sample.batching import generate, padded_length
from qstar.train import distil as losses
from qstar.train.state import TrainState
from qstar.train.step import make_step
from qstar.types import Params


class Pair(NamedTuple):
    """A training row as token ids; the response ends with EOS unless it was truncated."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    teacher_prompt: tuple[int, ...] = ()  # () = the student's


@dataclasses.dataclass(frozen=True)
class DistilTrain(UpdateSettings):
    """Settings of the updates. A config's `distil_train` section."""

    max_new_tokens: int = bounded(64, ge=1)  # width of the rows of responses

    def __post_init__(self) -> None:
        super().__post_init__()
        require((not self.lora_rank, f"lora_rank={self.lora_rank}: distillation trains all of a model; leave it at 0"))


@functools.lru_cache(maxsize=16)
def compiled(config: Any, teacher: Any, settings: Any, limit: int, update: UpdateSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step), one per configuration of student, teacher and loss."""
    tx = update.optimiser()
    loss = functools.partial(losses.distil_loss, config=config, teacher=teacher, settings=settings, limit=limit)
    return tx, make_step(loss, tx, update.accumulate)


def distil(
    start: Model,
    rows: Sequence[Pair],
    settings: losses.DistilSettings,
    stage: Stage,
    teacher: Model | None = None,
    watch: Callable[[int, Params], None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains a copy of `start` for `stage.steps` updates; returns the new model with a summary.

    `rows`: batches are drawn from them independently, each without replacement. `teacher`: needed by soft losses.
    `stage`: with DistilTrain. `watch`: see `train_stage`.
    Raises UserError for no or too long rows, a soft loss without teacher or across vocabularies; Diverged.
    """
    train, R, soft = stage.settings, stage.settings.max_new_tokens, settings.kind != "hard"
    longest = max((len(r.response) for r in rows), default=0)
    require(
        (len(rows) > 0, "no rows to distil from: nothing was kept; loosen the filter, or sample more"),
        (longest <= R, f"max_new_tokens={R} is too short for distillation: the longest response has {longest} tokens"),
        (not soft or teacher is not None, f"kind={settings.kind!r} needs the predictions of a teacher model"),
    )
    other = (teacher or start).config
    if soft:
        sizes = (other.vocab_size, start.config.vocab_size)
        fault = f"teacher and student have vocabularies of {sizes[0]} and {sizes[1]}: use 'hard'"
        known = [m.tokenizer for m in (start, teacher) if m is not None and m.tokenizer is not None]
        # Equal sizes are not enough: Llama 2 and Mistral have 32,000 ids each, which stand for different texts.
        other_ids = "teacher and student have different tokenizers, so their predictions are of other texts: use 'hard'"
        require((sizes[0] == sizes[1], fault), (len(known) < 2 or known[0].spells_as(known[1]), other_ids))
    if settings.on_policy and isinstance(start.config, ModelConfig):
        most, context = max(len(r.prompt) for r in rows) + R, start.config.max_positions
        line = f"the longest prompt and max_new_tokens={R} make {most} tokens, but the student's context is {context}"
        require((most <= context, line))
    limit = scoring.text_limit(start.config, start.tokenizer)
    tx, step = compiled(start.config, other, settings, limit, only_updates(train))
    # Padded to the longest row of all, so that every batch has the same shapes and the step is compiled once.
    longest = max(len(r.teacher_prompt or r.prompt) for r in rows)
    lengths = [padded_length(n) for n in (max(len(r.prompt) for r in rows), longest)]

    def batch_at(s: int, state: TrainState) -> losses.Lesson:
        # A pure function of the step, so that a resumed run draws the same batches.
        rng = np.random.default_rng([stage.seed, s])
        on_policy = settings.on_policy > 0 and rng.random() < settings.on_policy
        chosen = [rows[i] for i in rng.choice(len(rows), train.batch_size, replace=train.batch_size > len(rows))]
        if on_policy:
            # From the current student, not `start`: on-policy responses hold the mistakes that it makes now.
            chosen = sample_on_policy(start, state.params["policy"], chosen, R, stable_seed(stage.seed, s))
        return make_batch(start.config, other, chosen, lengths, R)

    stage = dataclasses.replace(stage, data=data_hash([settings, *rows]))
    frozen = {"teacher": teacher.params} if soft and teacher else None  # a hard loss reads no predictions
    model, summary = train_stage(start, stage, tx, lambda s: step, batch_at, frozen=frozen, watch=watch, on_policy=True)
    return model, {**summary, "rows": len(rows)}


def make_batch(
    config: Any, teacher: Any, rows: Sequence[Pair], lengths: Sequence[int], response_length: int
) -> losses.Lesson:
    """Returns rows as host arrays; prompts are padded to `lengths`, the student's and the teacher's."""
    prompt = scoring.pad_prompts(config, [list(r.prompt) for r in rows], lengths[0])
    teacher_prompts = scoring.pad_prompts(teacher, [list(r.teacher_prompt or r.prompt) for r in rows], lengths[1])
    responses = scoring.pad_responses([r.response for r in rows], response_length)
    host: list[Any] = [*prompt, *responses, *teacher_prompts]
    return losses.Lesson(*host)


def sample_on_policy(model: Model, params: Any, rows: Sequence[Pair], max_new_tokens: int, seed: int) -> list[Pair]:
    """Returns the rows with responses that the student samples at temperature 1."""
    prompts = [list(r.prompt) for r in rows]
    found = generate(model.replace(params=params), prompts, max_new_tokens=max_new_tokens, seed=seed)
    return [row._replace(response=tuple(done.tokens)) for row, (done,) in zip(rows, found)]
