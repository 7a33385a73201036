"""The distillation stage: a student learns from a teacher's responses, or from the teacher's word on its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qstar import processes, tree
from qstar.errors import require
from qstar.mesh import put_whole_batch
from qstar.methods.run_folder import once_json, stable_seed
from qstar.methods.training import UpdateSettings, finished
from qstar.models import policy
from qstar.models.decoder import PARAM_AXES
from qstar.models.model import Model
from qstar.sample.batching import padded_length, stream
from qstar.train import distil as losses
from qstar.train import optim
from qstar.train.checkpoint import Checkpoints
from qstar.train.loop import Diverged
from qstar.train.metrics import Writer
from qstar.train.state import create_state, optimizer_for
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
        require((self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"))


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
    start = start.replace(params=tree.cast(start.params, np.float32))
    weights, done = Checkpoints(folder / "model"), folder / "summary.json"
    if finished(folder) and (kept := weights.resume(start.params)) is not None:
        processes.remove(folder / "training")
        weights.close()
        return start.replace(params=kept.state), once_json(done, dict)
    params, summary = _train(start, rows, settings, train, steps, seed, folder, writer, label, teacher, progress)
    weights.save(steps, params)
    weights.close()
    once_json(done, lambda: {**summary, "rows": len(rows)})
    processes.remove(folder / "training")
    return start.replace(params=params), once_json(done, dict)


def _train(start, rows, settings, train, steps, seed, folder, writer, label, teacher, progress):
    limit = policy.text_limit(start.config, start.tokenizer)
    other = (teacher or start).config
    tx, step = compiled(start.config, other, settings, limit, only_updates(train))
    params = {"policy": start.params}
    if settings.kind != "hard":
        params["teacher"] = teacher.params
    state = create_state(params, tx, seed=seed, mesh=start.mesh, table=PARAM_AXES)
    checkpoints = Checkpoints(folder / "training")
    at, bad, window = 0, 0, []
    if (kept := checkpoints.resume(state)) is not None:
        state, record, at = kept
        bad = record["bad"]
    lengths = [padded_length(max(len(getattr(r, k)) for r in rows)) for k in ("prompt", "teacher_prompt")]
    lr_at = optim.schedule(train.schedule, train.lr, warmup=train.warmup, steps=steps, end=train.end)
    rate = np.asarray(jax.vmap(lr_at)(np.arange(steps))) if steps else np.zeros(0)
    last: dict[str, float] = {}
    for s in range(at, steps):
        rng = np.random.default_rng([seed, s])
        own = settings.on_policy > 0 and rng.random() < settings.on_policy
        chosen = [rows[i] for i in rng.choice(len(rows), train.batch_size, replace=train.batch_size > len(rows))]
        if own:
            chosen = own_text(start, state.params["policy"], chosen, train.max_new_tokens, stable_seed(seed, s))
        batch = lesson(start.config, other, chosen, lengths, train.max_new_tokens)
        batch = put_whole_batch(batch, start.mesh)
        state, metrics = step(state, batch, np.float32(rate[s]))
        window.append(metrics)
        ends = s + 1 == steps
        if (s + 1) % train.log_every == 0 or ends:
            host = jax.device_get(window)
            skipped = [m["skipped"] for m in host]
            bad = bad + len(skipped) if all(skipped) else 0
            last = {k: float(np.mean([m[k] for m in host])) for k in host[0]}
            writer.write(stage="train", step=s + 1, lr=float(rate[s]), **label, **last)
            window = []
            if progress is not None:
                progress(s + 1, last)
            if bad >= train.max_bad:
                raise Diverged(f"{bad} updates in a row were not finite, up to step {s + 1}; lower the learning rate")
        if train.save_every and (s + 1) % train.save_every == 0 and not ends:
            checkpoints.save(s + 1, state, {"bad": bad})
            checkpoints.wait()
    checkpoints.close()
    return state.params["policy"], {"steps": steps, "loss": last.get("loss"), "nll": last.get("nll")}


def only_updates(train: UpdateSettings) -> UpdateSettings:
    """Returns what the compiled step depends on: runs that differ in rates and lengths share a compilation."""
    return UpdateSettings(**{n: getattr(train, n) for n in ("batch_size", "accumulate", "b1", "b2", "weight_decay", "clip")})


def lesson(
    config: Any, teacher: Any, rows: Sequence[Pair], lengths: Sequence[int], response_length: int
) -> losses.Lesson:
    """Returns rows as host arrays; prompts are padded to `lengths`, the student's and the teacher's."""
    prompt = policy.pad_prompts(config, [list(r.prompt) for r in rows], lengths[0])
    length = lengths[1] if any(r.teacher_prompt for r in rows) else lengths[0]
    taught = policy.pad_prompts(teacher, [list(r.teacher_prompt or r.prompt) for r in rows], length)
    response = np.zeros((len(rows), response_length), np.int32)
    mask = np.zeros((len(rows), response_length), np.float32)
    for i, r in enumerate(rows):
        response[i, : len(r.response)], mask[i, : len(r.response)] = r.response, 1.0
    return losses.Lesson(*prompt, response, mask, *taught)


def own_text(model: Model, params: Any, rows: Sequence[Pair], max_new_tokens: int, seed: int) -> list[Pair]:
    """Returns the rows with responses that the student writes now, at temperature 1 (GKD's on-policy samples)."""
    found = list(rows)
    prompts = [list(r.prompt) for r in rows]
    for i, _, done in stream(model.replace(params=params), prompts, max_new_tokens=max_new_tokens, seed=seed):
        found[i] = rows[i]._replace(response=tuple(done.tokens))
    return found
