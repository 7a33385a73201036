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

from qstar import processes, tree
from qstar.errors import require
from qstar.mesh import put_whole_batch, to_host
from qstar.methods.distillation import only_updates
from qstar.methods.run_folder import once_json, stable_seed
from qstar.methods.training import UpdateSettings, finished
from qstar.models import heads, policy
from qstar.models.decoder import PARAM_AXES
from qstar.models.encdec_config import EncDecConfig
from qstar.models.model import Model, encoder_ids
from qstar.sample.batching import padded_length, stream
from qstar.train import optim, rl
from qstar.train.checkpoint import Checkpoints
from qstar.train.loop import Diverged
from qstar.train.metrics import Writer
from qstar.train.state import TrainState, create_state
from qstar.train.step import make_step
from qstar.types import Completion, Params

SECONDS = ("seconds_rollout", "seconds_reward", "seconds_score", "seconds_update")  # of an update, in its metrics


@dataclasses.dataclass(frozen=True)
class ReinforceSettings(UpdateSettings):
    """How rollouts become updates. Of the fields above, `batch_size` counts responses per gradient step."""

    updates: int = 100
    prompts: int = 64  # per update
    epochs: int = 1  # over the responses of an update
    max_new_tokens: int = 64
    max_moved: float = 0.0  # nats per token from the old policy, above which the rest of an update is left out; 0 = off
    max_kl: float = 0.0  # nats per response from the reference, above which training stops; 0 = never

    def __post_init__(self):
        super().__post_init__()
        least = {n: getattr(self, n) for n in ("prompts", "epochs", "max_new_tokens")}
        require(
            (self.updates >= 0, f"updates={self.updates} must be 0 or more"),
            *((v >= 1, f"{n}={v} must be at least 1") for n, v in least.items()),
            *((getattr(self, n) >= 0, f"{n}={getattr(self, n)} must be 0 (off) or more") for n in ("max_moved", "max_kl")),
        )  # fmt: skip


class Scored(NamedTuple):
    """What an environment says of responses, in the order it got them."""

    scores: np.ndarray  # [N * group] float32
    parts: dict[str, np.ndarray]  # what the scores are made of, each [N * group]; their means are logged


class Environment(Protocol):
    """Prompts, and what responses to them are worth."""

    def prompts(self, update: int) -> Sequence[Any]:
        """The prompts of an update: texts, or lists of token ids. A pure function of the update."""

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> Scored:
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
        limit = policy.text_limit(self.start.config, self.start.tokenizer)
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
    start = start.replace(params=tree.cast(start.params, np.float32))
    weights = Checkpoints(folder / "model")
    done = folder / "summary.json"
    if finished(folder) and (kept := weights.resume(start.params)) is not None:
        processes.remove(folder / "training")
        weights.close()
        return start.replace(params=kept.state), once_json(done, dict)
    run = Run(start, environment, rl_settings, settings, seed, _encoder(start))
    params, summary = _train(run, folder, writer, label, progress, watch)
    weights.save(summary["updates"], params)
    weights.close()
    once_json(done, lambda: summary)
    processes.remove(folder / "training")
    return start.replace(params=params), summary


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
    state = create_state(params, tx, seed=run.seed, mesh=run.start.mesh, table=PARAM_AXES)
    checkpoints = Checkpoints(folder / "training")
    record: dict[str, Any] = {"kl_weight": run.rl.kl_weight, "first": {}, "last": {}, "bad": 0}
    first = 0
    if (kept := checkpoints.resume(state)) is not None:
        state, record, first = kept
    lr_at = optim.schedule(s.schedule, s.lr, warmup=s.warmup, steps=s.updates, end=s.end)
    stopped = ""
    last = first
    for update in range(first, s.updates):
        state, metrics = one_update(run, step, state, update, record["kl_weight"], np.float32(lr_at(update)))
        record["kl_weight"] = rl.adapted(record["kl_weight"], metrics["kl"], s.prompts * run.rl.group, run.rl)
        record["first"], record["last"] = record["first"] or metrics, metrics
        record["bad"] = record["bad"] + 1 if metrics["skipped"] else 0
        last = update + 1
        if last % s.log_every == 0 or last == s.updates:
            writer.write(stage="rl", step=last, lr=float(lr_at(update)), **label, **metrics)
        if progress is not None:
            progress(last, {"loss": metrics["loss"]})
        if watch is not None:
            watch(last, state.params["policy"])
        if s.max_kl and metrics["kl"] > s.max_kl:
            stopped = f"{metrics['kl']:.2f} nats per response from the reference (max_kl={s.max_kl})"
            break
        if s.save_every and last % s.save_every == 0 and last < s.updates:
            checkpoints.save(last, state, record)
            checkpoints.wait()  # an environment may fail: nothing half written is left behind
        if record["bad"] >= s.max_bad:
            raise Diverged(
                f"{record['bad']} updates in a row were not finite, up to update {last}; lower the learning rate"
            )
    checkpoints.close()
    summary = {"updates": last, "stopped": stopped}
    keys = ("score", "kl", "length", "ended")
    for when in ("first", "last"):
        summary |= {f"{k}_{when}": record[when].get(k) for k in keys}
    return state.params["policy"], summary


def one_update(
    run: Run, step: Any, state: TrainState, update: int, kl_weight: float, lr: np.float32
) -> tuple[TrainState, dict[str, float]]:
    """One round: rollouts, scores, advantages, gradient steps.

    Returns:
      The state, and metrics: among them the wall seconds of rollouts, of the environment (rewards; a frozen answerer is
      asked there), of scoring (log-probabilities under policy and reference) and of the gradient steps.
    """
    clock = [time.perf_counter()]
    prompts = run.environment.prompts(update)
    responses = rollouts(run, state.params["policy"], prompts, update)
    clock.append(time.perf_counter())
    scored = run.environment.score(update, responses)
    clock.append(time.perf_counter())
    batch, metrics = experience(run, state.params, prompts, responses, scored, kl_weight)
    clock.append(time.perf_counter())
    found: list[dict[str, jax.Array]] = []
    s, count = run.settings, len(batch.response)
    for epoch in range(s.epochs):
        order = np.random.default_rng([run.seed, update, epoch]).permutation(count)
        for at in range(0, count, s.batch_size):
            chosen = order[at : at + s.batch_size]
            rows = jax.tree.map(operator.itemgetter(chosen), batch)
            rows = put_whole_batch(rows, run.start.mesh)
            state, more = step(state, rows, lr)
            found.append(more)
        if s.max_moved and float(found[-1]["moved"]) > s.max_moved:
            break
    host = jax.device_get(found)
    clock.append(time.perf_counter())
    metrics |= {k: float(np.mean([m[k] for m in host])) for k in host[0] if k != "tokens"}
    metrics["kl_weight"] = kl_weight
    metrics |= dict(zip(SECONDS, np.diff(clock).tolist()))
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
        seed=stable_seed(run.seed, "rollout", update),
    ):
        out[i][j] = done
    return out


def experience(
    run: Run,
    params: Any,
    prompts: Sequence[Any],
    responses: Sequence[Sequence[Completion]],
    scored: Scored,
    kl_weight: float,
) -> tuple[rl.Experience, dict[str, float]]:
    """Returns the rollout record (host arrays) and what there is to say of it."""
    c, G, R = run.start.config, run.rl.group, run.settings.max_new_tokens
    ids = [row for p in prompts for row in [run.encode(p)] * G]
    prompt, prompt_mask = policy.pad_prompts(c, ids, padded_length(max(map(len, ids))))
    flat = [done for row in responses for done in row]
    response, mask = np.zeros((len(flat), R), np.int32), np.zeros((len(flat), R), np.float32)
    for i, done in enumerate(flat):
        response[i, : len(done.tokens)], mask[i, : len(done.tokens)] = done.tokens, 1.0
    ended = np.asarray([d.stopped for d in flat])
    inputs = (prompt, prompt_mask, response)
    placed = put_whole_batch(inputs, run.start.mesh)
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
