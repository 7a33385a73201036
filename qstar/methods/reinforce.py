"""The RL loop: sample responses, score them, update the policy; for any model, prompts and rewards.

    for every update:
        responses = policy(prompts), `group` of each
        scores    = environment(responses)                      verifiable, or by a model: it is the caller's
        old, ref  = measure(policy), measure(reference)         one function, one dtype
        A         = PPO, RLOO or GRPO
        a few clipped gradient steps on minibatches

The reference is the model that the loop starts from. Killed at any point and called again, a run goes on from its last
checkpoint and ends with the same bits: rollouts depend on (parameters, seed, update) alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qstar.errors import bounded, require
from qstar.mesh import put_global_batch, to_host
from qstar.methods.distillation import only_updates
from qstar.models import heads, scoring
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model, encoder_ids
from qstar.runs.folder import data_hash, stable_seed
from qstar.runs.stages import MACHINE, Stage, UpdateSettings, run_updates, train_once
from qstar.sample.batching import padded_length, stream
from qstar.train import rl
from qstar.train.metrics import Writer
from qstar.train.state import TrainState
from qstar.train.step import make_step
from qstar.types import Completion, Params

SECONDS = ("seconds_rollout", "seconds_reward", "seconds_score", "seconds_update")  # of an update, in its metrics


@dataclasses.dataclass(frozen=True)
class ReinforceSettings(UpdateSettings):
    """How rollouts become updates. Of the fields above, `batch_size` counts responses per gradient step."""

    updates: int = bounded(100, ge=0)
    prompts: int = bounded(64, ge=1)  # per update
    epochs: int = bounded(1, ge=1)  # over the responses of an update
    max_new_tokens: int = bounded(64, ge=1)
    # Mean nats per token between the policy and the one that sampled; above it an update's remaining minibatches are skipped
    max_approx_kl: float = bounded(0.0, ge=0, note="0: off")
    max_kl: float = bounded(
        0.0, ge=0, note="0: off"
    )  # nats per response from the reference, above which training stops

    def __post_init__(self) -> None:
        super().__post_init__()
        require((not self.lora_rank, f"lora_rank={self.lora_rank}: RL trains all parameters; leave it at 0"))


class RewardOutput(NamedTuple):
    """What an environment says of responses, in the order it got them."""

    scores: np.ndarray  # [N * group] float32
    parts: dict[str, np.ndarray]  # what the scores are made of, each [N * group]; their means are logged


class Environment(Protocol):
    """Prompts, and what responses to them are worth. Where it has `stop`, these strings end a response, too."""

    def prompts(self, update: int) -> Sequence[Any]:
        """The prompts of an update: texts, or lists of token ids. A pure function of the update."""

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> RewardOutput:
        """Scores `group` responses to every prompt of the update."""


@dataclasses.dataclass
class Run:
    """One training run: what does not change in it."""

    start: Model  # float32 masters; the reference
    environment: Environment
    rl: rl.RLSettings
    settings: ReinforceSettings
    seed: int
    encode: Callable[[Any], list[int]]  # of a prompt

    @functools.cached_property
    def static(self) -> dict[str, Any]:
        """The static arguments of `rl.measure`."""
        limit = scoring.text_limit(self.start.config, self.start.tokenizer)
        return {"config": self.start.config, "settings": self.rl, "limit": limit}


@functools.lru_cache(maxsize=16)
def compiled(config: Any, settings: rl.RLSettings, limit: int, update: UpdateSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step), one per configuration: all arms that share one share a compilation."""
    tx = update.optimiser()
    loss = functools.partial(rl.rl_loss, config=config, settings=settings, limit=limit)
    return tx, make_step(loss, tx, update.accumulate)


def reinforce(
    start: Model,
    environment: Environment,
    rl_settings: rl.RLSettings,
    settings: ReinforceSettings,
    *,
    seed: int,
    folder: Path,
    writer: Writer,
    label: dict[str, Any],
    progress: Callable[[int, dict[str, float]], None] | None = None,
    watch: Callable[[int, Params], None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains a copy of `start` on the environment's scores; returns the new model with a summary.

    Args:
      folder: holds `model/` (the parameters) and `summary.json` when done, and `training/` until then.
      label: arm and so on, for the metrics rows (stage "rl").
      watch: is shown (updates done, the policy's parameters) after every update; it may read them, not keep them.

    Raises:
      UserError: minibatches that do not divide the responses. Diverged: updates that were not finite.
    """
    count = settings.prompts * rl_settings.group
    line = f"batch_size={settings.batch_size} does not divide prompts * group = {count}; choose a divisor"
    require((count % settings.batch_size == 0, line))
    first = [list(map(str, environment.prompts(0)))] if settings.updates else []
    made_with = {"settings": settings, "rl": rl_settings, "seed": seed, "data_hash": data_hash(first)}

    def train(start: Model) -> tuple[Params, dict[str, Any]]:
        run = Run(start, environment, rl_settings, settings, seed, _encoder(start))
        return _train(run, folder, writer, label, progress, watch)

    return train_once(start, folder, made_with, train)


def _train(
    run: Run, folder: Path, writer: Writer, label: dict[str, Any], progress: Any, watch: Any
) -> tuple[Any, dict[str, Any]]:
    s = run.settings
    tx, step = compiled(**run.static, update=only_updates(s))
    params = {"policy": run.start.params}
    if run.rl.estimator == "ppo":
        params["value"] = heads.init_critic(
            run.start.config.hidden_size, jax.random.key(stable_seed(run.seed, "value"))
        )
    record: dict[str, Any] = {"kl_weight": run.rl.kl_weight, "first": {}, "last": {}}

    def update(state: TrainState, sampled: Sampled, lr: np.float32) -> tuple[TrainState, dict[str, float]]:
        state, metrics = learn(run, step, state, sampled, lr)
        record["kl_weight"] = rl.adapted(record["kl_weight"], metrics["kl"], s.prompts * run.rl.group, run.rl)
        record["first"], record["last"] = record["first"] or metrics, metrics
        return state, metrics

    stopped, last, policy = "", 0, run.start.params
    updates = run_updates(
        params,
        Stage(folder, s, s.updates, run.seed, writer, label),
        tx,
        lambda n: update,
        lambda n, state: sample(run, state.params, n, record["kl_weight"]),
        mesh=run.start.mesh,
        log_every=1,
        on_policy=True,
        place=lambda arrays: arrays,  # minibatch by minibatch, in `learn`
        extra=record,
    )
    with contextlib.closing(updates):  # also where an environment fails
        for at, lr in updates:
            policy, last = at.state.params["policy"], at.step
            # Also where the run resumes: the row of its checkpoint may not have been written.
            if last and (last % s.log_every == 0 or last == s.updates):
                row = {**record["last"], **{k: v for k, v in at.metrics.items() if k.startswith(MACHINE)}}
                writer.write(stage="rl", step=last, lr=lr, **label, **row)
            if at.metrics and progress is not None:
                progress(last, {"loss": at.metrics["loss"]})
            if last and watch is not None:
                with at.interruptible():
                    watch(last, policy)
            if s.max_kl and record["last"] and record["last"]["kl"] > s.max_kl:
                stopped = f"{record['last']['kl']:.2f} nats per response from the reference (max_kl={s.max_kl})"
                break
    summary = {"updates": last, "stopped": stopped}
    keys = ("score", "kl", "length", "ended")
    for when in ("first", "last"):
        summary |= {f"{k}_{when}": record[when].get(k) for k in keys}
    return policy, summary


def one_update(
    run: Run, step: Any, state: TrainState, update: int, kl_weight: float, lr: np.float32
) -> tuple[TrainState, dict[str, float]]:
    """One round: rollouts, scores, advantages, gradient steps. Returns the state, and metrics (`sample`, `learn`)."""
    return learn(run, step, state, sample(run, state.params, update, kl_weight), lr)


class Sampled(NamedTuple):
    """The rollouts of an update, as they are learnt from."""

    batch: rl.Experience  # host arrays
    orders: np.ndarray  # [epochs, minibatches, batch_size] rows of the gradient steps
    metrics: dict[str, float]


def sample(run: Run, params: Any, update: int, kl_weight: float) -> Sampled:
    """Rollouts, scores and advantages of an update; among the metrics are the wall seconds of rollouts, of the environment
    (rewards; a frozen answerer is asked there) and of scoring (log-probabilities under policy and reference)."""
    clock = [time.perf_counter()]
    prompts = run.environment.prompts(update)
    responses = rollouts(run, params["policy"], prompts, update)
    clock.append(time.perf_counter())
    scored = run.environment.score(update, responses)
    clock.append(time.perf_counter())
    batch, metrics = experience(run, params, prompts, responses, scored, kl_weight)
    clock.append(time.perf_counter())
    s, count = run.settings, len(batch.response)
    orders = [np.random.default_rng([run.seed, update, epoch]).permutation(count) for epoch in range(s.epochs)]
    metrics |= {"kl_weight": kl_weight, **dict(zip(SECONDS, np.diff(clock).tolist()))}
    return Sampled(batch, np.stack(orders).reshape(s.epochs, -1, s.batch_size), metrics)


def learn(
    run: Run, step: Any, state: TrainState, sampled: Sampled, lr: np.float32
) -> tuple[TrainState, dict[str, float]]:
    """Gradient steps on minibatches of the rollouts; stops where the policy has moved by more than `max_approx_kl`."""
    began = time.perf_counter()
    found: list[dict[str, jax.Array]] = []
    for chosen in sampled.orders.reshape(-1, run.settings.batch_size):
        rows = jax.tree.map(operator.itemgetter(chosen), sampled.batch)
        rows, rate = put_global_batch((rows, lr), run.start.mesh)
        state, more = step(state, rows, rate)
        found.append(more)
        if run.settings.max_approx_kl and float(jax.device_get(more["approx_kl"])) > run.settings.max_approx_kl:
            break
    host = jax.device_get(found)
    finite = [m for m in host if not m["skipped"]] or host
    metrics = sampled.metrics | {k: float(np.mean([m[k] for m in finite])) for k in host[0] if k != "tokens"}
    metrics |= {"skipped": float(np.mean([m["skipped"] for m in host])), SECONDS[-1]: time.perf_counter() - began}
    return state, metrics


def rollouts(run: Run, params: Any, prompts: Sequence[Any], update: int) -> list[list[Completion]]:
    """Samples `group` responses to every prompt from the policy."""
    out: list[list[Any]] = [[None] * run.rl.group for _ in prompts]
    for i, j, done in stream(
        run.start.replace(params=params),
        [run.encode(p) for p in prompts],
        max_new_tokens=run.settings.max_new_tokens,
        temperature=run.rl.temperature,
        n=run.rl.group,
        stop=getattr(run.environment, "stop", ()),
        seed=stable_seed(run.seed, "rollout", update),
    ):
        out[i][j] = done
    return out


def experience(
    run: Run,
    params: Any,
    prompts: Sequence[Any],
    responses: Sequence[Sequence[Completion]],
    scored: RewardOutput,
    kl_weight: float,
) -> tuple[rl.Experience, dict[str, float]]:
    """Returns the rollout record (host arrays) and what there is to say of it."""
    c, G, R = run.start.config, run.rl.group, run.settings.max_new_tokens
    ids = [row for p in prompts for row in [run.encode(p)] * G]
    prompt, prompt_mask = scoring.pad_prompts(c, ids, padded_length(max(map(len, ids))))
    flat = [done for row in responses for done in row]
    response, mask = np.zeros((len(flat), R), np.int32), np.zeros((len(flat), R), np.float32)
    for i, done in enumerate(flat):
        response[i, : len(done.tokens)], mask[i, : len(done.tokens)] = done.tokens, 1.0
    ended = np.asarray([d.stopped for d in flat])
    inputs = (prompt, prompt_mask, response)
    placed = put_global_batch(inputs, run.start.mesh)
    old, entropy, values = rl.measure_jit(params, *placed, **run.static)
    ref = rl.measure_jit({"policy": run.start.params}, *placed, **run.static)[0]
    old, ref, values = (x * mask for x in to_host((old, ref, values)))
    scores = np.asarray(rl.score_with_penalty(scored.scores, ended, run.rl))
    advantages, returns = jax.device_get(
        rl.estimate_jit(scores, old, ref, values, mask, jnp.float32(kl_weight), settings=run.rl)
    )
    weights = np.full(len(flat), kl_weight, np.float32)
    record = rl.Experience(prompt, prompt_mask, response, mask, old, ref, values, advantages, returns, weights)
    k1 = np.sum(old - ref, axis=1)
    metrics = {
        "score": float(scores.mean()),
        "score_std": float(scores.reshape(-1, G).std(axis=1).mean()),
        "kl": float(k1.mean()),
        "length": float(mask.sum(axis=1).mean()),
        "ended": float(ended.mean()),
        "response_tokens": float(mask.sum()),
    }
    return record, metrics | {f"reward/{k}": float(np.mean(v)) for k, v in scored.parts.items()}


def _encoder(model: Model) -> Callable[[Any], list[int]]:
    """How a prompt becomes ids: lists of ids stay, texts are encoded as `generate` would."""

    def encode(prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if isinstance(model.config, EncDecConfig):
            return encoder_ids(model, prompt)
        return model.tokenizer.encode(prompt, bos=True)

    return encode
