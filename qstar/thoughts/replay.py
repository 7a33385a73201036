"""Reference replay: every quantity of the method in full, for given thoughts, for study and for tests.

The training loss is `loss.loss`, which never holds these logits; a test compares the two.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.models.scores import soft_cap
from qstar.models.vocabulary import head_logits
from qstar.thoughts import forward, layout
from qstar.thoughts import loss as thought_loss
from qstar.thoughts.chunked_replay import replay_states
from qstar.thoughts.forward import ThoughtStates
from qstar.thoughts.rollout import forbidden_bias
from qstar.types import Batch, Params


class Replay(NamedTuple):
    """Named as the official code's recorded arrays. R = B * P rows, row r of sequence r // P; M = N if all think."""

    base_logits: jax.Array  # [R, N, V] float32, without thoughts
    thought_logits: jax.Array  # [S, R, M, V] that the thoughts were drawn from; forbidden ids very negative
    thought_logp: jax.Array  # [S, R, M] of the thoughts' tokens, at `policy_temperature`
    talk_thought_logits: jax.Array  # [A, R, M, V] after a thought, unmixed
    talk_mixed_logits: jax.Array  # [A, R, M, V]; step a at j predicts x[j+1+a]; undefined past the end
    talk_mix_weight: jax.Array  # [A, R, M] weight of the thought
    base_nll: jax.Array  # [R, N-1] of x[j+1]; 0 where nothing is to be predicted
    talk_nll_s: tuple[jax.Array, ...]  # A arrays [R, N-1-a] (or [R, M] at chosen positions), of x[j+1+a]
    reward: jax.Array  # [R, L], L = N-1, or N-1-A without `reward_tail` (or [R, M]): sum over a of base - talk nll
    advantage: jax.Array  # [R, L] reward minus its baseline
    advantage_clipped: jax.Array  # [R, L] max(0, advantage), whether or not the config's loss clips
    loss_base: jax.Array  # [] mean nll without thoughts
    loss_talk: jax.Array  # [A] mean nll of each talk step
    loss_nll: jax.Array  # [] their weighted sum
    loss_policy: jax.Array  # [] REINFORCE, weight 1
    loss: jax.Array  # [] loss_nll + policy_weight * loss_policy


def replay(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    mask: jax.Array,
    thoughts: jax.Array,
    *,
    positions: jax.Array | None = None,
    schedule: str = "replay",
) -> Replay:
    """Runs texts with given thoughts, differentiably (official code: one training forward, its samples replayed).

    Args:
      params: a decoder's tree with `thoughts` and `mixing`. config: with `thoughts`; P and S are those of the array.
      tokens, mask: [B, N] ids, and 1 for real tokens. thoughts: [S, B*P, N] int32 (or [S, B*P, M]).
      positions: [M] or [B, M] int32 that think; default all.
      schedule: "replay" runs each thread in one pass, "joint" token by token, as when it was sampled. Same results.

    Returns:
      `Replay`. Rewards and advantages are constants to `jax.grad`, as REINFORCE requires.
    """
    batch = layout.text_batch(tokens, mask)
    thought_ids = layout.from_rows(jnp.asarray(thoughts, jnp.int32), batch.tokens.shape[0])
    B, P, M, S = thought_ids.shape
    # Recorded thoughts may be of another length than the config's.
    config = config.replace(thoughts=config.required_thoughts.replace(thought_tokens=S))
    everywhere = positions is None
    positions = layout.all_positions(batch) if everywhere else jnp.asarray(positions, jnp.int32)
    positions = jnp.broadcast_to(positions, (B, M))
    texts = forward.read(params, config, batch)
    if schedule == "joint":
        given = thought_loss.given_thoughts(thought_ids)
        threads, _ = forward.rollout_and_talk(params, config, batch, texts, positions, P, given)
        states = forward.thought_states(params, config, batch, texts, positions, threads)
    else:
        states = replay_states(params, config, batch, texts, positions, thought_ids)
    return _compute(params, config, batch, positions, states, thought_ids, everywhere)


def _compute(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    positions: jax.Array,
    states: ThoughtStates,
    thought_ids: jax.Array,
    everywhere: bool,
) -> Replay:
    t, P, N = config.required_thoughts, thought_ids.shape[1], batch.tokens.shape[1]
    A, logit_bias, temperature = t.talk_tokens, forbidden_bias(config), t.policy_temperature

    # ---- likelihood, without and with thoughts
    targets, weights = layout.text_targets(batch)
    kernel, bias, cap = decoder.head(params, config)
    base_logits = head_logits(states.base, kernel, bias)  # [B, N, V]
    base_nll = _nll(soft_cap(base_logits[:, :-1], cap), targets)  # [B, N-1]
    target_ids, target_weights = layout.talk_targets(batch, positions, A)  # [B, M, A]
    talk_logits = head_logits(states.talk, kernel, bias)  # [B, P, M, A, V]
    index = (positions[..., None] + jnp.arange(A)) % N
    base_at_targets = layout.take_rows(base_logits, index)[:, None]  # [B, 1, M, A, V]
    # The vocabulary product is linear, so states and logits mix alike (paper, section 4.3); with logits, a weight of 0
    # gives the base's to the last bit. A soft cap is not linear, and comes after.
    w = states.weight[..., None]
    mixed = (1 - w) * base_at_targets + w * talk_logits
    base_logits, talk_logits, mixed = (soft_cap(x, cap) for x in (base_logits, talk_logits, mixed))
    talk_nll = _nll(mixed, repeat(target_ids, "b m a -> b p m a", p=P))

    # ---- log-probabilities of the thoughts
    thought_logits = decoder.unembed(params, config, states.think)
    thought_logits = thought_logits if logit_bias is None else thought_logits + logit_bias
    logp = -_nll(thought_logits / temperature, thought_ids)  # [B, P, M, S]

    # ---- the loss
    shares = thought_loss.loss_weights(config, batch, positions, P)
    normalizer = thought_loss.divisors(config, shares, base_nll, talk_nll)
    reward = thought_loss.rewards(base_nll, talk_nll, shares.talk > 0, positions)
    advantage = thought_loss.advantages(config, reward)
    loss_base = jnp.sum(base_nll * shares.base) / normalizer.base
    loss_talk = jnp.sum(talk_nll * shares.talk[:, None], axis=(0, 1, 2)) / normalizer.talk
    loss_nll = t.base_weight * loss_base + (1 - t.base_weight) * jnp.mean(loss_talk)
    factor = thought_loss.reinforce_weight(config, advantage) * shares.policy[:, None]
    loss_policy = -jnp.sum(factor * jnp.sum(logp, axis=-1)) / normalizer.policy

    # ---- as rows, cut where the official code has no entry
    to_rows = partial(rearrange, pattern="b p m s ... -> s (b p) m ...")
    length = N - 1 - A * (not t.reward_tail) if everywhere else positions.shape[1]
    shown = to_rows(talk_nll * (target_weights[:, None] > 0))  # [A, R, M]
    reward, advantage = (rearrange(x, "b p m -> (b p) m")[:, :length] for x in (reward, advantage))
    return Replay(
        base_logits=repeat(base_logits, "b n v -> (b p) n v", p=P),
        thought_logits=to_rows(thought_logits),
        thought_logp=to_rows(logp),
        talk_thought_logits=to_rows(talk_logits),
        talk_mixed_logits=to_rows(mixed),
        talk_mix_weight=to_rows(states.weight),
        base_nll=repeat(base_nll * (weights > 0), "b n -> (b p) n", p=P),
        talk_nll_s=tuple(shown[a, :, : N - 1 - a if everywhere else None] for a in range(A)),
        reward=reward,
        advantage=advantage,
        advantage_clipped=jax.nn.relu(advantage),
        loss_base=loss_base,
        loss_talk=loss_talk,
        loss_nll=loss_nll,
        loss_policy=loss_policy,
        loss=loss_nll + t.policy_weight * loss_policy,
    )


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A gather: a one-hot product would hold a second array of the logits' size.
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
