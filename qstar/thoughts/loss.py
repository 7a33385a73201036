"""Training loss of Quiet-STaR: likelihood with and without thoughts, and REINFORCE on the thoughts.

    L = base_weight * NLL(text) + (1 - base_weight) * mean_a NLL(talk step a) + policy_weight * L_policy
    reward[j] = sum_a (base_nll[j + a] - talk_nll_a[j])     L_policy = mean of -advantage * log p(thought)

(paper, sections 4.4.2 and 4.4.3; official code, `first_and_last_mode` with `policy_loss_beta`). Rewards are constants.

`nll_mean` sets how means are taken. "tokens": every sum, over its thoughts per position, is divided by the number of
tokens that the text predicts, so sums and weights add up exactly over micro-batches; where only some positions think,
each row's thoughts represent all its tokens. "nonzero", the official way: every mean has its own count, of entries that
are not 0.0, and the policy's is over all rewarded positions, padding included; micro-batches are then averaged, as
upstream does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat

from qstar.models import decoder, vocabulary
from qstar.models.config import ModelConfig
from qstar.thoughts import forward, layout
from qstar.thoughts.chunked_replay import replay_states
from qstar.thoughts.forward import ThoughtStates
from qstar.thoughts.rollout import forbidden_bias, sampler
from qstar.train.losses import SumWeight, nonzero, token_nll
from qstar.types import Batch, Metrics, Params


class Weights(NamedTuple):
    """Weights of the terms of the loss; or their divisors."""

    base: jax.Array  # [B, N-1]
    talk: jax.Array  # [B, M, A], of each of the P thoughts
    policy: jax.Array  # [B, M], of each of the P thoughts


def loss_weights(config: ModelConfig, batch: Batch, positions: jax.Array, passes: int) -> Weights:
    """Returns the weights of all terms, for thoughts at positions [B, M]."""
    t, N = config.required_thoughts, batch.tokens.shape[1]
    _, base = layout.text_targets(batch)
    _, talk = layout.talk_targets(batch, positions, t.talk_tokens)
    # Official code: the last A + 1 positions of a text get no reward.
    rewarded = positions < N - 1 - t.talk_tokens * (not t.reward_tail)
    if t.nll_mean == "nonzero":
        return Weights(base, talk, rewarded.astype(jnp.float32))
    # In a row where all positions think this is 1 / P; where some do, each stands for several tokens. 0 where no position
    # predicts a counted token: behind a gap in the mask, later talk steps may count all the same.
    count = jnp.sum(talk[..., 0], axis=1)
    stands = jnp.where(count > 0, jnp.sum(base, axis=1) / jnp.maximum(count, 1e-6) / passes, 0.0)
    policy = rewarded & jnp.any(talk > 0, axis=-1)
    return Weights(base, talk * stands[:, None, None], policy * stands[:, None])


def divisors(config: ModelConfig, weights: Weights, base_nll: jax.Array, talk_nll: jax.Array) -> Weights:
    """Returns the divisors: base [], talk steps [A], policy []. base_nll: [B, N-1]. talk_nll: [B, P, M, A]."""
    P, A = talk_nll.shape[1], talk_nll.shape[3]
    if config.required_thoughts.nll_mean == "tokens":
        total = nonzero(jnp.sum(weights.base))
        return Weights(total, repeat(total, "-> a", a=A), total)

    def count(x: jax.Array, axis: Any = None) -> jax.Array:
        return nonzero(jnp.sum(x != 0, axis=axis).astype(jnp.float32))

    talk = count(talk_nll * weights.talk[:, None], (0, 1, 2))
    return Weights(count(base_nll * weights.base), talk, nonzero(P * jnp.sum(weights.policy)))


def rewards(base_nll: jax.Array, talk_nll: jax.Array, counted: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns [B, P, M], constants: the nats that a thought takes off the NLL of its A true tokens (if they exist).

    Args:
      base_nll: [B, N-1]. talk_nll: [B, P, M, A]. counted: bool [B, M, A]. positions: [B, M].
    """
    # Non-myopic (paper, section 4.4.2): all A tokens after position j count, not the next one alone.
    index = jnp.minimum(positions[..., None] + jnp.arange(talk_nll.shape[3]), base_nll.shape[1] - 1)
    base = layout.take_rows(base_nll, index)[:, None]  # [B, 1, M, A]
    return jax.lax.stop_gradient(jnp.sum(jnp.where(counted[:, None], base - talk_nll, 0.0), axis=3))


def advantages(config: ModelConfig, reward: jax.Array) -> jax.Array:
    """Returns [B, P, M]: rewards minus their mean over the passes (if there are several, and the config says so)."""
    passes = config.required_thoughts.baseline == "passes" and reward.shape[1] > 1
    # The base NLL cancels in this difference, which leaves the paper's baseline: the mean over a position's rationales.
    return reward - reduce(reward, "b p m -> b 1 m", "mean") if passes else reward


def reinforce_weight(config: ModelConfig, advantage: jax.Array) -> jax.Array:
    """Returns the factor on the log-probability of each of a thought's tokens (paper, section 4.4.3)."""
    t = config.required_thoughts
    # Negative advantages are dropped, which the authors found more stable, though biased.
    kept = jax.nn.relu(advantage) if t.clip_negative else advantage
    # The paper's log p(thought) is a sum over its tokens; the official code takes the mean.
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
) -> tuple[SumWeight, Metrics]:
    """The loss of `train.step.make_step`: samples thoughts, replays and rewards them. Logits exist a chunk at a time.

    Args:
      params: {"policy": a decoder's tree with `thoughts` and `mixing`}.
      batch: rows [B, N], packed or not; `mask` marks the tokens to be predicted. rng: of thoughts and positions.
      config: with `thoughts`.
      schedule: "replay" (a rollout without gradient, then one pass over whole threads; `config.remat` applies) or
        "joint" (the rollout itself is differentiated). The same loss and gradients, for equal thoughts.
      thoughts: [S, B*P, M] to replay instead of sampled ones; for controls.
      positions: [B, M] that think; default by `think_fraction` and `think_where`.
    """
    policy, t, B = params["policy"], config.required_thoughts, batch.tokens.shape[0]
    thought_key, position_key = jax.random.split(rng)
    texts = forward.read(policy, config, batch)
    if positions is None:
        positions = layout.choose_positions(policy, config, batch, texts.hidden, position_key)
    positions, order, _ = layout.spread(positions, batch.tokens.shape[1])
    thought_ids = known = None
    passes = t.thoughts_per_position
    if thoughts is not None:
        thought_ids = layout.from_rows(thoughts, B)[:, :, order]
        passes = thought_ids.shape[1]
        draw = given_thoughts(thought_ids)
    else:
        draw = sampler(jax.lax.stop_gradient(policy), config, batch, positions, thought_key, passes)
    if schedule == "joint":
        threads, records = forward.rollout_and_talk(policy, config, batch, texts, positions, passes, draw)
        # The gradient goes through the rollout itself, so there is nothing to replay.
        states = forward.thought_states(policy, config, batch, texts, positions, threads)
        thought_ids = rearrange(records[0], "s b p m -> b p m s")
        return compute_loss(params, config, batch, positions, states, thought_ids)
    if thought_ids is None:
        # The rollout computes the states of the whole threads: the replay's forward pass is then skipped.
        frozen, frozen_texts = jax.lax.stop_gradient((policy, texts))
        known, records = forward.rollout_and_talk(frozen, config, batch, frozen_texts, positions, passes, draw)
        thought_ids = rearrange(records[0], "s b p m -> b p m s")
    states = replay_states(policy, config, batch, texts, positions, thought_ids, known)
    return compute_loss(params, config, batch, positions, states, thought_ids)


def given_thoughts(thought_ids: jax.Array) -> forward.SampleFn:
    """Returns the `draw` of `forward.rollout` that writes thoughts [B, P, M, S], and records their tokens."""

    def draw(i: jax.Array, hidden: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
        return thought_ids[..., i], (thought_ids[..., i],)

    return draw


def compute_loss(
    params: dict[str, Params],
    config: ModelConfig,
    batch: Batch,
    positions: jax.Array,
    states: ThoughtStates,
    thought_ids: jax.Array,
) -> tuple[SumWeight, Metrics]:
    """Returns the loss and metrics of the states of thoughts [B, P, M, S] at positions [B, M]."""
    t, (_, P, _, S) = config.required_thoughts, thought_ids.shape
    A, head = t.talk_tokens, decoder.head(params["policy"], config)
    weights = loss_weights(config, batch, positions, P)

    # ---- likelihood, without and with thoughts
    base_sum, _, base_nll = token_nll(states.base[:, :-1], head, batch.tokens[:, 1:], weights.base)
    target_ids, _ = layout.talk_targets(batch, positions, A)
    target_ids, talk_weights = (repeat(x, "b m a -> b p m a", p=P) for x in (target_ids, weights.talk))
    # One product over all talk steps; the official means have a count per step, so there each is on its own.
    steps = [slice(a, a + 1) for a in range(A)] if t.nll_mean == "nonzero" else [slice(0, A)]
    parts = [_token_nll(states.mixed[:, :, :, a], head, target_ids[..., a], talk_weights[..., a]) for a in steps]
    talk_nll = jnp.concatenate([each for _, _, each in parts], axis=-1)
    normalizer = divisors(config, weights, base_nll, talk_nll)
    nll_base = base_sum / normalizer.base
    nll_talk = sum(total / normalizer.talk[a.start] for (total, _, _), a in zip(parts, steps)) / A

    # ---- REINFORCE (paper, section 4.4.3)
    reward = rewards(base_nll, talk_nll, weights.talk > 0, positions)
    advantage = advantages(config, reward)
    weight = reinforce_weight(config, advantage) * weights.policy[:, None]  # [B, P, M]
    think, thoughts = states.think, thought_ids
    if t.clip_negative and t.baseline == "passes" and P > 1:
        think, thoughts, weight = _without_worst(advantage, think, thoughts, weight)
    logit_bias, temperature = forbidden_bias(config), t.policy_temperature
    if logit_bias is not None:
        head = head._replace(bias=logit_bias if head.bias is None else head.bias + logit_bias)
    if temperature != 1:
        # (h W + b) / T = (h / T) W + b / T: the states are divided, which are smaller than the logits.
        scaled: list[Any] = [None if x is None else x / temperature for x in head[1:]]
        think, head = think / temperature, vocabulary.Head(head.kernel, *scaled)
    weight = repeat(weight, "b p m -> b p m s", s=S)
    policy_sum, _, thought_nll = _token_nll(think, head, thoughts, weight)
    policy = policy_sum / normalizer.policy

    total = t.base_weight * nll_base + (1 - t.base_weight) * nll_talk + t.policy_weight * policy
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


def _token_nll(hidden: jax.Array, head: vocabulary.Head, targets: jax.Array, weights: jax.Array) -> Any:
    """Returns `train.losses.token_nll` of states [B, P, M, ..., D]."""
    return layout.by_position(lambda h, t, w: token_nll(h, head, t, w))(hidden, targets, weights)


def _without_worst(advantage: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    # With a mean baseline and clipping at 0, the thought of lowest reward has zero weight, so its log-probabilities are
    # not computed: of two thoughts, half of the products with the vocabulary (9% of a step at 32,002 ids, on a CPU).
    kept = jnp.argsort(advantage, axis=1)[:, 1:]
    return [jnp.take_along_axis(x, kept.reshape(*kept.shape, *[1] * (x.ndim - 3)), axis=1) for x in arrays]


def _metrics(
    weights: Weights, mix_weight: jax.Array, reward: jax.Array, advantage: jax.Array, thought_nll: jax.Array
) -> Metrics:
    # Over rewarded thoughts. `advantage` near 0 is the sign of a collapse: all thoughts of a position are alike.
    rewarded_mask = repeat((weights.policy > 0).astype(jnp.float32), "b m -> b p m", p=reward.shape[1])
    means = {
        "reward": reward,
        "reward_positive": reward > 0,
        "advantage": jnp.abs(advantage),
        "mix_weight": mix_weight[..., 0],
        "mix_weight_abs": jnp.abs(mix_weight[..., 0]),
        "thought_nll": reduce(thought_nll, "b p m s -> b p m", "mean"),  # of sampled tokens: estimates their entropy
    }

    def mean(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # `thought_nll` may lack the worst thought. The mask is the same for all passes.
        counted = rewarded_mask[:, : x.shape[1]]
        return jax.lax.stop_gradient(jnp.sum(x * counted)), jnp.sum(counted)

    return {k: mean(x) for k, x in means.items()}
