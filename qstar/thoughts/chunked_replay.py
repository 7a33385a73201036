"""The replay schedule: one teacher-forced pass over whole threads, differentiated a piece of the positions at a time.

Threads do not attend to each other, so a piece of them can be run, differentiated and discarded before the next: a step
holds one piece's activations, however many positions think and however many thoughts each has. The forward pass keeps
only the threads' inputs, and is skipped where the rollout has computed the states already; the backward pass runs each
piece again, applies its VJP, and adds up the gradients of the parameters and of the texts' keys and values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from qstar.mesh import count_batch_shards, count_spare_shards, split_axis
from qstar.models.config import ModelConfig
from qstar.thoughts import forward, layout
from qstar.types import Batch, Params

# Running a thread does not read these. They stay out of the custom VJP, which sums gradients in float32.
UNUSED = ("embed", "head", "mixing", "thoughts")


def replay_states(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    texts: forward.PrefixCache,
    positions: jax.Array,
    thoughts: jax.Array,
    known: jax.Array | None = None,
) -> forward.ThoughtStates:
    """Returns the states of thoughts [B, P, M, S] at [B, M]; `known` [B, P, M, U, D]: those a rollout has computed."""
    # Outside the custom VJP: the embedding table and the start and end vectors get their gradients through the inputs.
    inputs = forward.vmap_thoughts(partial(forward.thread_inputs, params, config))(batch, texts, positions, thoughts)
    core = {k: v for k, v in params.items() if k not in UNUSED}
    # With `known`, the threads run only in the backward pass, which computes their states again for the gradient.
    known = None if known is None else jax.lax.stop_gradient(known)
    states = _thread_states(config, core, batch, texts.pairs, positions, inputs, known)
    return forward.thought_states(params, config, batch, texts, positions, states)


def _run(
    config: ModelConfig, batch: Batch, positions: jax.Array, core: Params, pairs: Any, inputs: jax.Array
) -> jax.Array:
    def one(row: Batch, pairs: Any, j: jax.Array, x: jax.Array) -> jax.Array:
        return forward.run_thread(core, config, row, pairs, j, x, 1)[0]

    return forward.vmap_thoughts(one)(batch, pairs, positions, inputs)


def _split(config: ModelConfig, positions: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Splits [B, M] and [B, P, M, ...] into pieces [piece, B, m] and [piece, B, P, m, ...], padded with zeros."""
    B, P, M, U, _ = arrays[0].shape
    axes, shards = layout.position_axes(B, M), _position_shards(B, M)
    per_shard = M // shards
    # The limit is per device: rows or positions are split, and a piece has positions of every row and of every shard.
    m = min(per_shard, max(1, config.piece_tokens * count_batch_shards(B) // (B * P * U)))
    count = -(-per_shard // m)
    # Pieces of equal size: the padding is then less than one position per piece and row.
    m = -(-per_shard // count)
    padding = (0, count * m - per_shard)

    def split(x: jax.Array) -> jax.Array:
        x = rearrange(x, "b p (shard m) ... -> b p shard m ...", shard=shards)
        x = jnp.pad(x, [(0, 0)] * 3 + [padding] + [(0, 0)] * (x.ndim - 4))
        x = rearrange(x, "b p shard (piece m) ... -> piece b p (shard m) ...", piece=count)
        return split_axis(x, 3, axes) if axes else x

    return split(positions[:, None])[:, :, 0], *map(split, arrays)


def _position_shards(B: int, M: int) -> int:
    return count_spare_shards(B) if layout.position_axes(B, M) else 1


def _join(x: jax.Array, M: int) -> jax.Array:
    shards = _position_shards(x.shape[1], M)
    x = rearrange(x, "piece b p (shard m) u d -> b p shard (piece m) u d", shard=shards)
    return rearrange(x[:, :, :, : M // shards], "b p shard m u d -> b p (shard m) u d")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _thread_states(
    config: ModelConfig, core: Params, batch: Batch, pairs: Any, positions: jax.Array, inputs: jax.Array, known: Any
) -> jax.Array:
    """In plain terms: `known`, or `_run(config, batch, positions, core, pairs, inputs)`, [B, P, M, U, D]."""
    if known is not None:
        return known

    def one(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _run(config, batch, piece[0], core, pairs, piece[1])

    # Sequential, not vmapped: the activations of one piece exist at a time.
    return _join(jax.lax.map(one, _split(config, positions, inputs)), inputs.shape[2])


def _keep_inputs(config: ModelConfig, *args: Any) -> tuple[jax.Array, Any]:
    # No activations are saved: the backward pass runs each piece again.
    return _thread_states(config, *args), args[:-1]


def _pull_back(config: ModelConfig, saved: Any, cotangents: jax.Array) -> tuple[Any, ...]:
    core, batch, pairs, positions, inputs = saved

    def one(sums: Any, piece: Any) -> tuple[Any, jax.Array]:
        positions, x, d = piece
        _, vjp = jax.vjp(partial(_run, config, batch, positions), core, pairs, x)
        d_core, d_pairs, d_x = vjp(d)
        return jax.tree.map(jnp.add, sums, (d_core, d_pairs)), d_x

    # Many small terms: in bfloat16 a sum would stop growing.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (core, pairs))
    sums, d_inputs = jax.lax.scan(one, zeros, _split(config, positions, inputs, cotangents))
    d_core, d_pairs = jax.tree.map(lambda d, x: d.astype(x.dtype), sums, (core, pairs))
    return d_core, None, d_pairs, None, _join(d_inputs, inputs.shape[2]), None


_thread_states.defvjp(_keep_inputs, _pull_back)
