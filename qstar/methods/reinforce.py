"""Policy-gradient RL on sampled responses (PPO, RLOO, GRPO), for any model, prompts and rewards.

    for every update:
        1  responses = policy(prompts), `group` of each
        2  scores    = environment(responses)
        3  log-probabilities of the responses under the policy and the reference; values (PPO)
        4  advantages: PPO (GAE), RLOO (leave one out) or GRPO (group mean and standard deviation)
        5  clipped gradient steps on minibatches

The losses and estimators, with their equations, are in `train.rl`.

Deviations from the papers (PPO 1707.06347, RLOO 2402.14740, GRPO 2402.03300):
1. The reference is the start model throughout; GRPO's iterative variant replaces it.
2. The log-probabilities of step 3 are recomputed by the function that step 5 differentiates, instead of taken from the
   sampler, so that probability ratios are 1 before the first gradient step (see `train.rl`).
3. PPO's critic is a head on the policy's hidden states, not a second model.
4. Two optional limits: `max_approx_kl` skips an update's remaining minibatches, `max_kl` ends the training.
5. With LoRA the reference is the base without adapters, so that there is one copy of the base. Responses are sampled
   from the merged weights, in the compute dtype.
6. The loss excludes the stop string that ends a response, and includes its EOS.
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
from einops import rearrange

from qstar import distributed
from qstar.data.sources import write_jsonl
from qstar.errors import bounded, require
from qstar.mesh import put_global_batch, to_host
from qstar.models import heads, lora, scoring
from qstar.models.model import Model
from qstar.runs.folder import data_hash, stable_seed
from qstar.runs.rollouts import tokenizer_of
from qstar.runs.stages import (
    MACHINE,
    Stage,
    UpdateSettings,
    fresh_adapters,
    merge_adapters,
    only_updates,
    run_updates,
    train_once,
)
from qstar.sample.batching import padded_length, stream
from qstar.text.chat import as_text
from qstar.train import rl
from qstar.train.state import TrainState
from qstar.train.step import make_step
from qstar.types import Completion, Params

SECONDS = ("seconds_rollout", "seconds_reward", "seconds_score", "seconds_update")  # of an update, in its metrics


@dataclasses.dataclass(frozen=True)
class ReinforceSettings(UpdateSettings):
    """Rollouts and gradient steps of an update. `batch_size` counts responses per gradient step."""

    updates: int = bounded(100, ge=0)
    prompts: int = bounded(64, ge=1)  # per update
    epochs: int = bounded(1, ge=1)  # over the responses of an update
    max_new_tokens: int = bounded(64, ge=1)
    # Mean nats per token from the policy that sampled, above which an update's remaining minibatches are skipped
    max_approx_kl: float = bounded(0.0, ge=0, note="0: off")
    # Nats per response from the reference, above which training stops
    max_kl: float = bounded(0.0, ge=0, note="0: off")
    log_completions: int = bounded(32, ge=0)  # responses of every logged update that are written to the run folder


def check_minibatches(settings: ReinforceSettings, rl_settings: rl.RLSettings) -> None:
    """Raises UserError if `batch_size` does not divide the responses of an update."""
    count = settings.prompts * rl_settings.group
    line = f"batch_size={settings.batch_size} does not divide prompts * group = {count}; choose a divisor"
    require((count % settings.batch_size == 0, line))


class RewardOutput(NamedTuple):
    """Rewards of responses, in the order of the responses."""

    scores: np.ndarray  # [N * group] float32
    parts: dict[str, np.ndarray]  # components of the scores, each [N * group]; their means are logged as reward/NAME
    labels: Sequence[dict[str, Any]] = ()  # [N * group]: more columns for the log of completions


class Environment(Protocol):
    """Prompts and the rewards of responses.

    Optional attributes: `stop`, strings that end a response; `made_with`, a dict of what the rewards depend on (JSON), by
    which a folder of other rewards is refused.
    """

    def prompts(self, update: int) -> Sequence[Any]:
        """Returns the prompts of an update: texts, lists of chat messages, or lists of token ids. A pure function of the
        update."""

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> RewardOutput:
        """Scores the `group` responses to every prompt of the update."""


@dataclasses.dataclass
class Run:
    """The constants of one training run."""

    start: Model  # as it was loaded; with LoRA the frozen base; also the reference
    environment: Environment
    rl: rl.RLSettings
    settings: ReinforceSettings
    seed: int
    encode: Callable[[Any], list[int]]  # prompt -> token ids

    @functools.cached_property
    def static(self) -> dict[str, Any]:
        """The static arguments of `rl.measure`."""
        limit = scoring.text_limit(self.start.config, self.start.tokenizer)
        return {"config": self.start.config, "settings": self.rl, "limit": limit}

    def policy(self, trained: Params) -> Params:
        """Returns the policy's parameters: what is trained, or the base with the trained adapters attached."""
        s = self.settings
        return lora.attach(self.start.params, trained, s.lora.scale) if s.lora_rank else trained


class Sampled(NamedTuple):
    """The rollouts of an update and the minibatches that they are trained on."""

    batch: rl.Experience  # host arrays
    minibatches: np.ndarray  # [gradient steps, batch_size] rows of `batch`
    metrics: dict[str, float]
    completions: list[dict[str, Any]]  # rows of the log


@functools.lru_cache(maxsize=16)
def compiled(config: Any, settings: rl.RLSettings, limit: int, update: UpdateSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted gradient step), one per configuration, so that arms share a compilation."""
    tx = update.optimiser()
    loss = functools.partial(rl.rl_loss, config=config, settings=settings, limit=limit)
    return tx, make_step(update.through(loss), tx, update.accumulate)


def reinforce(
    start: Model,
    environment: Environment,
    rl_settings: rl.RLSettings,
    stage: Stage,
    watch: Callable[[int, Params], None] | None = None,
    completions: Path | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains a copy of `start` on the environment's scores; returns the new model with a summary.

    Args:
      stage: its settings are ReinforceSettings, its steps updates; its metrics rows have the stage "rl".
      watch: called with (updates done, the policy's parameters) after every update; the next one donates them. With
        LoRA these are the base's with adapters attached: they can be sampled from; `lora.plain` merges them.
      completions: folder of the logged responses, update_NNNNNN.jsonl; default: `completions` in the stage's folder.

    Raises UserError if `batch_size` does not divide the responses, Diverged after updates that were not finite.
    """
    settings, seed = stage.settings, stage.seed
    check_minibatches(settings, rl_settings)
    # An environment has no data to hash; its first prompts stand for it.
    first = [list(map(str, environment.prompts(0)))] if stage.steps else []
    made_with = {"settings": settings, "rl": rl_settings, "seed": seed, "data_hash": data_hash(first)}
    made_with |= getattr(environment, "made_with", {})
    settings.check_targets(start.config)
    log = completions or stage.folder / "completions"

    def train(start: Model) -> tuple[Params, dict[str, Any]]:
        run = Run(start, environment, rl_settings, settings, seed, functools.partial(_encode, start))
        trained, summary = _train(run, stage, watch, log)
        if not settings.lora_rank:
            return trained, summary
        return merge_adapters(start, trained, settings.lora, stage.folder), summary

    return train_once(start, stage.folder, made_with, train, dtype=None if settings.lora_rank else np.float32)


def _train(
    run: Run, stage: Stage, watch: Callable[[int, Params], None] | None, log: Path
) -> tuple[Params, dict[str, Any]]:
    s, policy, last, stopped = run.settings, run.start.params, 0, ""
    if s.lora_rank:
        policy = fresh_adapters(run.start, s.lora, run.seed)
    tx, step = compiled(**run.static, update=only_updates(s))
    params = {"policy": policy}
    if run.rl.estimator == "ppo":
        key = jax.random.key(stable_seed(run.seed, "value"))
        params["value"] = heads.init_critic(run.start.config.hidden_size, key)
    # `fit` keeps it with the checkpoints, so that a resumed run continues with the adapted weight.
    record: dict[str, Any] = {"kl_weight": run.rl.kl_weight, "first": {}, "last": {}}

    def update(state: TrainState, sampled: Sampled, lr: np.float32) -> tuple[TrainState, dict[str, float]]:
        state, metrics = learn(run, step, state, sampled, lr)
        record["kl_weight"] = rl.adapted(record["kl_weight"], metrics["kl"], s.prompts * run.rl.group, run.rl)
        record["first"], record["last"] = record["first"] or metrics, metrics
        return state, metrics

    def batch_at(n: int, state: TrainState) -> Sampled:
        sampled = sample(run, state.params, n, record["kl_weight"])
        # A file per update: a resumed run samples the updates since its checkpoint again, and writes the same bytes.
        if sampled.completions and logs(n + 1) and distributed.is_first():
            rows = [{**stage.label, **row} for row in sampled.completions]
            write_jsonl(log / f"update_{n + 1:06d}.jsonl", rows, checksum=True)
        return sampled

    def logs(done: int) -> bool:
        return done % s.log_every == 0 or done == stage.steps

    # An update is a whole round: its batch is sampled from the state, and `learn` places it minibatch by minibatch.
    how: dict[str, Any] = {"log_every": 1, "on_policy": True, "place": lambda arrays: arrays, "extra": record}
    updates = run_updates(params, stage, tx, lambda n: update, batch_at, mesh=run.start.mesh, **how)
    with contextlib.closing(updates):  # also where an environment fails
        for at, lr in updates:
            policy, last = at.state.params["policy"], at.step
            # Also where the run resumes: the row of its checkpoint may not have been written.
            if last and logs(last):
                row = {**record["last"], **{k: v for k, v in at.metrics.items() if k.startswith(MACHINE)}}
                stage.writer.write(stage="rl", step=last, lr=lr, **stage.label, **row)
            if at.metrics and stage.progress is not None:
                stage.progress(last, {"loss": at.metrics["loss"]})
            if last and watch is not None:
                with at.interruptible():
                    watch(last, run.policy(policy))
            if s.max_kl and record["last"] and record["last"]["kl"] > s.max_kl:
                stopped = f"{record['last']['kl']:.2f} nats per response from the reference (max_kl={s.max_kl})"
                break
    keys = ("score", "kl", "length", "ended")
    ends = {f"{k}_{when}": record[when].get(k) for when in ("first", "last") for k in keys}
    return policy, {"updates": last, "stopped": stopped, **ends}


def sample(run: Run, params: Any, update: int, kl_weight: float) -> Sampled:
    """Runs steps 1 to 4; the metrics hold the wall seconds of each (a frozen answerer is part of the reward)."""
    s, G = run.settings, run.rl.group
    clock = [time.perf_counter()]

    # ---- 1: responses
    prompts, params = run.environment.prompts(update), {**params, "policy": run.policy(params["policy"])}
    responses = rollouts(run, params["policy"], prompts, update)
    flat = [done for row in responses for done in row]
    clock.append(time.perf_counter())

    # ---- 2: scores
    rewards = run.environment.score(update, responses)
    ended = np.asarray([done.stopped for done in flat])
    scores = np.asarray(rl.score_with_penalty(rewards.scores, ended, run.rl))
    clock.append(time.perf_counter())

    # ---- 3: log-probabilities and values
    # Bucketed prompts and responses of a fixed width: few shapes, few compilations.
    ids = [row for p in prompts for row in [run.encode(p)] * G]
    prompt, prompt_mask = scoring.pad_prompts(run.start.config, ids, padded_length(max(map(len, ids))))
    response, mask = scoring.pad_responses([done.tokens for done in flat], s.max_new_tokens)  # [B, R]
    placed = put_global_batch((prompt, prompt_mask, response), run.start.mesh)
    distributed.return_freed_memory()
    old, _, values = rl.measure_jit(params, *placed, **run.static)
    ref = rl.measure_jit({"policy": run.start.params}, *placed, **run.static)[0]
    old, ref, values = (x * mask for x in to_host((old, ref, values)))

    # ---- 4: advantages
    advantages, returns = jax.device_get(
        rl.estimate_jit(scores, old, ref, values, mask, jnp.float32(kl_weight), settings=run.rl)
    )
    # An array, not a static argument: an adapted weight does not compile the step anew.
    weights = np.full(len(flat), kl_weight, np.float32)
    columns: list[Any] = [prompt, prompt_mask, response, mask, old, ref, values, advantages, returns, weights]
    batch = rl.Experience(*columns)
    clock.append(time.perf_counter())

    parts = dict(rewards.parts)
    if run.rl.no_eos_penalty:
        parts["no_eos_penalty"] = -run.rl.no_eos_penalty * (1.0 - ended)
    grouped = rearrange(scores, "(prompt group) -> prompt group", group=G)
    # Seeded by the update and epoch, so that a resumed run shuffles alike.
    orders = [np.random.default_rng([run.seed, update, epoch]).permutation(len(flat)) for epoch in range(s.epochs)]
    metrics = {
        "score": float(scores.mean()),
        "score_std": float(grouped.std(axis=1).mean()),
        # Equal scores in a group: only the divergence from the reference has a gradient.
        **({"groups_without_signal": float(np.mean(np.ptp(grouped, axis=1) == 0))} if G > 1 else {}),
        "kl": float(np.sum(old - ref, axis=1).mean()),  # the k1 estimate, nats per response
        "length": float(mask.sum(axis=1).mean()),
        "ended": float(ended.mean()),
        "response_tokens": float(mask.sum()),
        **{f"reward/{k}": float(np.mean(v)) for k, v in parts.items()},
        "kl_weight": kl_weight,
        **dict(zip(SECONDS, np.diff(clock).tolist())),
    }
    advantage = np.sum(advantages * mask, axis=1) / np.maximum(mask.sum(axis=1), 1.0)
    numbers = {"score": scores, "advantage": advantage, "kl": np.sum(old - ref, axis=1)}
    rows = _completions(run, update, prompts, flat, numbers, parts, rewards.labels)
    return Sampled(batch, rearrange(np.stack(orders), "e (m b) -> (e m) b", b=s.batch_size), metrics, rows)


def _completions(run, update, prompts, flat, numbers, parts, labels) -> list[dict[str, Any]]:
    """Returns rows of the first `log_completions` responses. `advantage`: the mean over a response's tokens."""
    rows, tokenizer = [], run.start.tokenizer
    for at, done in enumerate(flat[: run.settings.log_completions]):
        prompt = prompts[at // run.rl.group]
        if tokenizer is not None and not isinstance(prompt, str):
            prompt = tokenizer.decode(prompt)
        row = {"update": update + 1, "group": at // run.rl.group, "sample": at % run.rl.group, "prompt": prompt}
        row |= {"completion": done.tokens if done.text is None else done.text, **(labels[at] if len(labels) else {})}
        row |= {name: round(float(values[at]), 6) for name, values in numbers.items()}
        row["rewards"] = {name: round(float(values[at]), 6) for name, values in parts.items()}
        rows.append(row | {"n_tokens": len(done.tokens), "truncated": not done.stopped})
    return rows


def learn(
    run: Run, step: Any, state: TrainState, sampled: Sampled, lr: np.float32
) -> tuple[TrainState, dict[str, float]]:
    """Runs step 5: gradient steps on minibatches, until `max_approx_kl` is exceeded."""
    began = time.perf_counter()
    found: list[dict[str, jax.Array]] = []
    base = ({"base": run.start.params},) if run.settings.lora_rank else ()
    for chosen in sampled.minibatches:
        rows = jax.tree.map(operator.itemgetter(chosen), sampled.batch)
        state, metrics = step(state, *put_global_batch((rows, lr), run.start.mesh), *base)
        found.append(metrics)
        # Reading the metric waits for the device, so only where the limit is set.
        if run.settings.max_approx_kl and float(jax.device_get(metrics["approx_kl"])) > run.settings.max_approx_kl:
            break
    host = jax.device_get(found)
    # The metrics of a skipped step may be NaN, and would make the means NaN.
    finite = [m for m in host if not m["skipped"]] or host
    means = {k: float(np.mean([m[k] for m in finite])) for k in host[0] if k != "tokens"}
    means["skipped"] = float(np.mean([m["skipped"] for m in host]))
    return state, {**sampled.metrics, **means, SECONDS[-1]: time.perf_counter() - began}


def rollouts(run: Run, params: Any, prompts: Sequence[Any], update: int) -> list[list[Completion]]:
    """Samples `group` responses to every prompt from the policy."""
    out: list[list[Any]] = [[None] * run.rl.group for _ in prompts]
    ids, stop = [run.encode(p) for p in prompts], getattr(run.environment, "stop", ())
    how = {"max_new_tokens": run.settings.max_new_tokens, "temperature": run.rl.temperature, "n": run.rl.group}
    # A function of seed and update: a run that was killed samples the same responses and ends with the same bits.
    seed = stable_seed(run.seed, "rollout", update)
    for i, j, done in stream(run.start.replace(params=params), ids, stop=stop, seed=seed, **how):
        out[i][j] = done
    return out


def _encode(model: Model, prompt: Any) -> list[int]:
    """Returns the ids of a prompt: texts and messages are encoded as `generate` does, lists of ids stay."""
    prompt = as_text(model.tokenizer, prompt)
    return tokenizer_of(model).encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
