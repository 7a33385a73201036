"""Quiet-STaR the way the official code computes it: what `bench quiet_star` measures qstar's schedules against.

Rows repeat every text P times; each iteration runs the whole transformer over N tokens of each row, and appends its
keys and values to a cache that the next iteration's queries attend to through one dense mask of N x N(i+1).
"""
# Blocks, draws and loss are qstar's own, so that the difference is the schedule alone.

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qstar.models import decoder, heads
from qstar.models.config import ModelConfig
from qstar.thoughts import forward, layout
from qstar.thoughts import loss as thought_loss
from qstar.thoughts.forward import ThoughtStates, mix
from qstar.thoughts.rollout import sampler
from qstar.types import Batch, Params, Segment


def loss(params: dict[str, Params], batch: Batch, rng: jax.Array, *, config: ModelConfig) -> Any:
    """The loss of `thoughts.loss.loss`, with thoughts sampled at all positions of the batch [B, N]."""
    policy, passes = params["policy"], config.required_thoughts.thoughts_per_position
    positions = layout.all_positions(batch)
    key, _ = jax.random.split(rng)  # as `thoughts.loss.loss`: the same thoughts
    draw = sampler(jax.lax.stop_gradient(policy), config, batch, positions, key, passes)
    found, thoughts = paths(policy, config, batch, positions, passes, draw)
    return thought_loss.compute_loss(params, config, batch, positions, found, thoughts)


def paths(
    params: Params, config: ModelConfig, batch: Batch, positions: jax.Array, passes: int, draw: forward.SampleFn
) -> tuple[ThoughtStates, jax.Array]:
    """Returns `ThoughtStates` of thoughts drawn by `draw` at all positions [B, N], and the thoughts [B, P, N, S]."""
    (B, N), P, t = batch.tokens.shape, passes, config.required_thoughts
    S, T, E = t.thought_tokens, t.talk_tokens, config.hidden_size
    rows = jax.tree.map(lambda x: jnp.repeat(x, P, axis=0), batch)
    table = params["embed"]["table"]
    start, end = (heads.thought_vector(params, config, name) for name in ("start", "end"))
    ahead = jax.vmap(lambda row: jax.vmap(lambda j: layout.future(row, config, j, T - 1))(jnp.arange(N)))(rows)
    seen: Any = jax.vmap(partial(layout.causal_mask, config=config.replace(attention="xla")))(rows)  # [R, N, N]
    pairs: Any = None
    x, states, thoughts = table[rows.tokens], [], []
    for i in range(S + T + 2):  # the text, the start, S draws, the end, T - 1 true tokens
        hidden, new = _iterate(params, config, x, rows.positions + i, pairs, seen)
        pairs = new if i == 0 else tuple(jnp.concatenate(both, axis=3) for both in zip(pairs, new))
        # Within an iteration a thread attends to its own position alone: the diagonal.
        seen = seen if i == 0 else jnp.concatenate([seen, jnp.broadcast_to(jnp.eye(N, dtype=bool), (B * P, N, N))], 2)
        states.append(hidden)
        if 1 <= i <= S:
            thoughts.append(draw(jnp.int32(i - 1), hidden.reshape(B, P, N, E))[0])
        if i == 0 or i == S + 1:
            x = jnp.broadcast_to(start if i == 0 else end, x.shape)
        elif i <= S:
            x = table[thoughts[-1].reshape(B * P, N)]
        elif i < S + T + 1:
            x = table[ahead[..., i - S - 2]]
    texts = forward.PrefixCache(states[0].reshape(B, P, N, E)[:, 0], [])
    think, talk = (jnp.stack(x, axis=2).reshape(B, P, N, -1, E) for x in (states[1 : S + 1], states[S + 2 :]))
    mixed, weight = forward.vmap_thoughts(partial(mix, params, config))(batch, texts, positions, talk)
    return ThoughtStates(texts.hidden, think, talk, mixed, weight), jnp.stack(thoughts, axis=-1)


def _iterate(params: Params, config: ModelConfig, x: jax.Array, positions: jax.Array, pairs: Any, seen: Any) -> Any:
    # x [R, N, E] -> final states, and keys and values [R, L, G, N, K]. The text comes first, when `pairs` is None.
    N = x.shape[1]

    def one(x: jax.Array, positions: jax.Array, pairs: Any, seen: jax.Array) -> Any:
        past = [] if pairs is None else [Segment(pairs[0], pairs[1], seen)]
        mask = seen if pairs is None else jnp.eye(N, dtype=bool)
        return decoder.run(params, config, decoder.embed_tokens(params, config, x, positions), positions, mask, past)

    return jax.vmap(one)(x, positions, pairs, seen)
