"""Both schedules: the final states that a batch with thoughts is judged by."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qstar.models import heads
from qstar.models.config import ModelConfig
from qstar.thoughts import chunked_replay
from qstar.thoughts.forward import PrefixCache, SampleFn, feed, rollout_and_talk, vmap_thoughts
from qstar.types import Batch, Params


def mix(
    params: Params, config: ModelConfig, row: Batch, text: PrefixCache, j: jax.Array, states: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes talk states [T, E] with those of the text alone for the same tokens: [T, E], and the weights w [T].

    Talk step s goes with text state j + s (official code: the base states rolled left by s; past the end they wrap
    round, and no loss looks).
    """
    N = row.tokens.shape[0]
    base = text.hidden[(j + jnp.arange(states.shape[0])) % N]
    return heads.mix(params, config, base, states)


class ThoughtStates(NamedTuple):
    """All final states that a batch with thoughts is judged by."""

    base: jax.Array  # [B, N, E] without thoughts
    think: jax.Array  # [B, P, M, S, E] that the thoughts' tokens were drawn from
    talk: jax.Array  # [B, P, M, T, E] after a thought, before mixing
    mixed: jax.Array  # [B, P, M, T, E]
    weight: jax.Array  # [B, P, M, T] float32, of the thought


def _thought_states(
    params: Params, config: ModelConfig, batch: Batch, texts: PrefixCache, positions, states: jax.Array
) -> ThoughtStates:
    S = config.thoughts.thought_tokens
    think, talk = states[..., :S, :], states[..., S + 1 :, :]
    mixed, weight = vmap_thoughts(partial(mix, params, config))(batch, texts, positions, talk)
    return ThoughtStates(texts.hidden, think, talk, mixed, weight)


def replay_states(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    texts: PrefixCache,
    positions: jax.Array,
    thoughts: jax.Array,
    known: jax.Array | None = None,
) -> ThoughtStates:
    """The replay schedule: one teacher-forced pass over all threads, a piece of the positions at a time.

    Args:
      positions: [B, M]. thoughts: [B, P, M, S].
      known: [B, P, M, n, E] the threads' states, where a rollout has found them already: they are then run only for the
        gradient.
    """
    fed = vmap_thoughts(partial(feed, params, config))(batch, texts, positions, thoughts)
    states = chunked_replay.thread_states(params, config, batch, texts.pairs, positions, fed, known)
    return _thought_states(params, config, batch, texts, positions, states)


def joint_states(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    texts: PrefixCache,
    positions: jax.Array,
    passes: int,
    draw: SampleFn,
) -> tuple[ThoughtStates, Any]:
    """The joint schedule: the rollout itself is differentiated.

    Returns:
      The paths, and the draws' records [S, ...].
    """
    states, records = rollout_and_talk(params, config, batch, texts, positions, passes, draw)
    return _thought_states(params, config, batch, texts, positions, states), records
