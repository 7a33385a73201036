"""The training loss of Quiet-STaR: likelihood with and without thoughts, and REINFORCE on the thoughts.

    L = base_weight * NLL(text) + (1 - base_weight) * mean_s NLL(talk step s) + policy_weight * L_policy
    reward[j] = sum_s (base_nll[j + s] - talk_nll_s[j])     L_policy = mean of -advantage * log p(thought)

(paper, equations 5 to 7; official code, `first_and_last_mode` with `policy_loss_beta`). Rewards are constants.

How means are taken is `nll_mean`. "tokens": every sum, over its thoughts per position, is divided by the number of tokens
that the text predicts, so that sums and weights add up exactly over micro-batches; where only some positions think, each
row's thoughts stand for all its tokens. "nonzero", the official way: every mean has its own count, of entries that are not
0.0, the policy's is over all rewarded positions, padding included; micro-batches are then averaged, as upstream does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.thoughts import forward, layout, regularise, select
from qstar.thoughts.paths import ThoughtStates, joint_states, replay_states
from qstar.thoughts.rollout import forbidden_bias, sampler
from qstar.train.losses import scored_nll
from qstar.types import Batch, Metrics, Params


class Weights(NamedTuple):
    """What every term counts for, before it is divided."""

    base: jax.Array  # [B, N-1]
    talk: jax.Array  # [B, M, T], of each of the P thoughts
    policy: jax.Array  # [B, M], of each of the P thoughts


def loss_weights(config: ModelConfig, batch: Batch, positions: jax.Array, passes: int) -> Weights:
    """Returns the weights of all terms, of thoughts at positions [B, M]."""
    t, N = config.thoughts, batch.tokens.shape[1]
    _, base = layout.text_targets(batch)
    _, talk = layout.talk_targets(batch, positions, t.talk_tokens)
    rewarded = positions < N - 1 - t.talk_tokens * (not t.reward_tail)
    if t.nll_mean == "nonzero":
        return Weights(base, talk, rewarded.astype(jnp.float32))
    # In a row where all positions think this is 1 / P; where some do, they stand for the others.
    stands = jnp.sum(base, axis=1) / jnp.maximum(jnp.sum(talk[..., 0], axis=1), 1e-6) / passes
    policy = rewarded & jnp.any(talk > 0, axis=-1)
    return Weights(base, talk * stands[:, None, None], policy * stands[:, None])


def divisors(config: ModelConfig, weights: Weights, base_nll: jax.Array, talk_nll: jax.Array) -> Weights:
    """Returns what the weighted sums are divided by: of the base [], of each talk step [T], of the policy [].

    Args:
      base_nll: [B, N-1]. talk_nll: [B, P, M, T].
    """
    T, P = talk_nll.shape[3], talk_nll.shape[1]
    if config.thoughts.nll_mean == "tokens":
        total = _nonzero(jnp.sum(weights.base))
        return Weights(total, jnp.broadcast_to(total, (T,)), total)

    def count(x: jax.Array, axis: Any = None) -> jax.Array:
        return _nonzero(jnp.sum(x != 0, axis=axis).astype(jnp.float32))

    talk = count(talk_nll * weights.talk[:, None], (0, 1, 2))
    return Weights(count(base_nll * weights.base), talk, _nonzero(P * jnp.sum(weights.policy)))


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1.0)


def rewards(base_nll: jax.Array, talk_nll: jax.Array, counted: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns [B, P, M]: by how many nats the thought helped its T true tokens (those that exist), a constant.

    Args:
      base_nll: [B, N-1]. talk_nll: [B, P, M, T]. counted: bool [B, M, T]. positions: [B, M].
    """
    index = jnp.minimum(positions[..., None] + jnp.arange(talk_nll.shape[3]), base_nll.shape[1] - 1)
    base = jax.vmap(lambda x, at: x[at])(base_nll, index)[:, None]  # [B, 1, M, T]
    return jax.lax.stop_gradient(jnp.sum(jnp.where(counted[:, None], base - talk_nll, 0.0), axis=3))


def advantages(config: ModelConfig, reward: jax.Array) -> jax.Array:
    """Returns [B, P, M]: rewards minus their mean over the passes (if there are several, and the config says so)."""
    passes = config.thoughts.baseline == "passes" and reward.shape[1] > 1
    return reward - jnp.mean(reward, axis=1, keepdims=True) if passes else reward


def reinforce_weight(config: ModelConfig, advantage: jax.Array) -> jax.Array:
    """Returns the factor on the log-probability of each of a thought's tokens, from its advantage."""
    t = config.thoughts
    kept = jax.nn.relu(advantage) if t.clip_negative else advantage
    return kept / (t.thought_tokens if t.policy_reduce == "mean" else 1)


def loss(
    params: dict[str, Params],
    batch: Batch,
    rng: jax.Array,
    *,
    config: ModelConfig,
    schedule: str = "replay",
    thoughts: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
    """The loss of `train.step.make_step`: thinks, replays, rewards. No [threads, V] array outlives its chunk.

    Args:
      params: {"policy": a decoder's tree with `thoughts` and `mixing`}; for `kl_weight`, `reference` like it.
      batch: rows [B, N], packed or not; `mask` marks the tokens to be predicted. rng: of thoughts and positions.
      config: with `thoughts`.
      schedule: "replay" (a rollout without gradient, then one pass over whole threads; `config.remat` applies) or "joint"
        (the rollout itself is differentiated). The same loss and gradients, for equal thoughts.
      thoughts: [S, B*P, M] to replay instead of sampled ones; for controls.
      positions: [B, M] that think; default by `think_fraction` and `think_where`.

    Returns:
      (sum, weight), and metrics as (sum, weight).
    """
    policy, t = params["policy"], config.thoughts
    key, choice = jax.random.split(rng)
    B = batch.tokens.shape[0]
    texts = forward.read(policy, config, batch)
    if positions is None:
        positions = select.choose(policy, config, batch, texts.hidden, choice)
    passes = t.thoughts_per_position if thoughts is None else thoughts.shape[1] // B
    thought_ids = None if thoughts is None else layout.from_rows(thoughts, B)
    if thought_ids is None:
        draw = sampler(jax.lax.stop_gradient(policy), config, batch, positions, key, passes)
    else:

        def draw(i: jax.Array, hidden: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
            return thought_ids[..., i], (thought_ids[..., i],)

    if schedule == "joint":
        states, records = joint_states(policy, config, batch, texts, positions, passes, draw)
        thought_ids = jnp.moveaxis(records[0], 0, 3)
    else:
        known = None
        if thought_ids is None:
            frozen, seen = jax.lax.stop_gradient((policy, texts))
            known, records = forward.rollout_and_talk(frozen, config, batch, seen, positions, passes, draw)
            thought_ids = jnp.moveaxis(records[0], 0, 3)
        states = replay_states(policy, config, batch, texts, positions, thought_ids, known)
    return compute_loss(params, config, batch, positions, states, thought_ids)


def compute_loss(
    params: dict[str, Params],
    config: ModelConfig,
    batch: Batch,
    positions: jax.Array,
    states: ThoughtStates,
    thought_ids: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
    """Returns the loss and metrics of paths through thoughts own [B, P, M, S] at positions [B, M]."""
    t, (B, P, M, _), T = config.thoughts, thought_ids.shape, config.thoughts.talk_tokens
    kernel, bias = decoder.head(params["policy"], config)
    weights = loss_weights(config, batch, positions, P)

    base_sum, base_nll = _score(states.base[:, :-1], kernel, bias, batch.tokens[:, 1:], weights.base)
    target_ids, _ = layout.talk_targets(batch, positions, T)
    target_ids, shares = (jnp.broadcast_to(x[:, None], (B, P, M, T)) for x in (target_ids, weights.talk))
    # One product over all talk steps; the official means have a count per step, so there each is on its own.
    steps = [slice(s, s + 1) for s in range(T)] if t.nll_mean == "nonzero" else [slice(0, T)]
    parts = [_score(states.mixed[:, :, :, s], kernel, bias, target_ids[..., s], shares[..., s]) for s in steps]
    talk_nll = jnp.concatenate([each for _, each in parts], axis=-1)
    normalizer = divisors(config, weights, base_nll, talk_nll)
    nll_base, nll_talk = (
        base_sum / normalizer.base,
        sum(x / normalizer.talk[s.start] for (x, _), s in zip(parts, steps)) / T,
    )

    reward = rewards(base_nll, talk_nll, weights.talk > 0, positions)
    advantage = advantages(config, reward)
    share = reinforce_weight(config, advantage) * weights.policy[:, None]  # [B, P, M]
    think, thoughts = states.think, thought_ids
    if t.clip_negative and t.baseline == "passes" and P > 1:
        think, thoughts, share = _without_worst(advantage, think, thoughts, share)
    cool, temperature, logit_bias = think, t.policy_temperature, forbidden_bias(config)
    offset = bias if logit_bias is None else logit_bias if bias is None else bias + logit_bias
    if temperature != 1:
        cool, offset = cool / temperature, None if offset is None else offset / temperature
    each = jnp.broadcast_to(share[..., None], thoughts.shape)
    policy_sum, thought_nll = _score(cool, kernel, offset, thoughts, each)
    policy = policy_sum / normalizer.policy

    total = t.base_weight * nll_base + (1 - t.base_weight) * nll_talk + t.policy_weight * policy
    if t.entropy_weight or t.kl_weight:
        each = jnp.broadcast_to(
            (weights.policy / normalizer.policy)[:, None, :, None] / thought_ids.shape[3], thought_ids.shape
        )
        total += regularise.penalty(params, config, batch, positions, states.think, thought_ids, each)
    weight = jnp.sum(weights.base) if t.nll_mean == "tokens" else jnp.float32(1)
    metrics = {
        "loss": (total * weight, weight),
        "nll_base": (nll_base * weight, weight),
        "nll_talk": (nll_talk * weight, weight),
        "loss_policy": (policy * weight, weight),
        "tokens": (jnp.sum(weights.base), jnp.float32(0)),  # weight 0: a count, not divided
        **_metrics(weights, states.weight, reward, advantage, thought_nll),
    }
    return (total * weight, weight), metrics


def _without_worst(advantage: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """Leaves the thought of least advantage [B, P, M] out of [B, P, M, ...] at every position: [B, P - 1, M, ...].

    It is not better than the mean, so where advantages are clipped it has no credit: of two thoughts one is never scored.
    """
    kept = jnp.argsort(advantage, axis=1)[:, 1:]
    return [jnp.take_along_axis(x, kept.reshape(*kept.shape, *[1] * (x.ndim - 3)), axis=1) for x in arrays]


def _score(
    hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of nlls, and each (a record) in the targets' shape [...], of states [..., E]."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    total, _, each = scored_nll(flat, kernel, bias, targets.reshape(-1), weights.reshape(-1))
    return total, each.reshape(targets.shape)


def _metrics(
    weights: Weights, w: jax.Array, reward: jax.Array, advantage: jax.Array, thought_nll: jax.Array
) -> Metrics:
    """Means over rewarded thoughts; `advantage` near 0 is the signature of a collapse (all thoughts of a place alike)."""
    rewarded_mask = jnp.broadcast_to((weights.policy > 0)[:, None], reward.shape).astype(jnp.float32)  # [B, P, M]
    means = {
        "reward": reward,
        "reward_positive": reward > 0,
        "advantage": jnp.abs(advantage),
        "mix_weight": w[..., 0],
        "mix_weight_abs": jnp.abs(w[..., 0]),
        "thought_nll": jnp.mean(thought_nll, axis=-1),  # of (scored) sampled tokens: an estimate of their entropy
    }

    def mean(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        counted = rewarded_mask[:, : x.shape[1]]
        return jax.lax.stop_gradient(jnp.sum(x * counted)), jnp.sum(counted)

    return {k: mean(x) for k, x in means.items()}
