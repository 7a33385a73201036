"""The states of all threads, whose gradient is taken a piece of the positions at a time.

Threads do not see each other, so a piece of them can be run, differentiated and forgotten before the next: what a step
holds at once is one piece's activations, however many positions think and however many thoughts each has. The forward pass
keeps the threads' inputs alone, and is left out where a rollout has found the states already; the backward pass runs each
piece, pulls its cotangents back, and adds up the gradients of the parameters and of the texts' keys and values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qstar.mesh import count_batch_shards
from qstar.models.config import ModelConfig
from qstar.thoughts import forward
from qstar.types import Batch, Params

OTHERS = ("embed", "head", "mixing", "thoughts")  # parameters that running a thread does not read


def thread_states(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    pairs: forward.KVCache,
    positions: jax.Array,
    fed: jax.Array,
    known: jax.Array | None = None,
) -> jax.Array:
    """Returns the final states [B, P, M, n, E] of whole threads, differentiable in parameters, texts and inputs.

    Args:
      batch: rows [B, N]. pairs: the texts' keys and values [B, L, G, N, K]. positions: [B, M]. fed: [B, P, M, n, E] rows
        like those of the embedding table. known: the result, where it is at hand.
    """
    core = {k: v for k, v in params.items() if k not in OTHERS}
    if known is not None:
        return _known(config, core, batch, pairs, positions, fed, jax.lax.stop_gradient(known))
    return _states(config, core, batch, pairs, positions, fed)


def _run(
    config: ModelConfig, batch: Batch, positions: jax.Array, core: Params, pairs: Any, fed: jax.Array
) -> jax.Array:
    def one(row: Batch, pairs: Any, j: jax.Array, x: jax.Array) -> jax.Array:
        return forward.run_thread(core, config, row, pairs, j, x, 1)[0]

    return forward.vmap_thoughts(one)(batch, pairs, positions, fed)


def _cut(config: ModelConfig, positions: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts [B, M] and [B, P, M, ...] into equal pieces [C, B, m] and [C, B, P, m, ...], filled up with zeros."""
    B, P, M, n, _ = arrays[0].shape
    m = min(M, max(1, config.piece_tokens * count_batch_shards(B) // (B * P * n)))
    count = -(-M // m)
    m = -(-M // count)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.pad(x, [(0, count * m - M if a == axis else 0) for a in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, m, *x.shape[axis + 1 :]), axis, 0)

    return cut(positions, 1), *(cut(x, 2) for x in arrays)


def _join(x: jax.Array, M: int) -> jax.Array:
    """Returns [B, P, M, ...] from pieces [C, B, P, m, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :M]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known(config: ModelConfig, core: Params, batch: Batch, pairs: Any, positions: Any, fed: Any, known: Any) -> Any:
    return known


def _keep_known(config: ModelConfig, *args: Any) -> tuple[jax.Array, Any]:
    return args[-1], args[:-1]


def _pull_known(config: ModelConfig, saved: Any, cotangents: jax.Array) -> tuple[Any, ...]:
    return *_pull(config, saved, cotangents), None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _states(config: ModelConfig, core: Params, batch: Batch, pairs: Any, positions: Any, fed: Any) -> jax.Array:
    def one(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _run(config, batch, piece[0], core, pairs, piece[1])

    return _join(jax.lax.map(one, _cut(config, positions, fed)), fed.shape[2])


def _keep(config: ModelConfig, *args: Any) -> tuple[jax.Array, Any]:
    return _states(config, *args), args


def _pull(config: ModelConfig, saved: Any, cotangents: jax.Array) -> tuple[Any, ...]:
    core, batch, pairs, positions, fed = saved

    def one(sums: Any, piece: Any) -> tuple[Any, jax.Array]:
        places, x, d = piece
        _, pull = jax.vjp(partial(_run, config, batch, places), core, pairs, x)
        d_core, d_pairs, d_x = pull(d)
        return jax.tree.map(jnp.add, sums, (d_core, d_pairs)), d_x

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (core, pairs))  # many small terms: not in bfloat16
    sums, d_fed = jax.lax.scan(one, zeros, _cut(config, positions, fed, cotangents))
    d_core, d_pairs = jax.tree.map(lambda d, x: d.astype(x.dtype), sums, (core, pairs))
    return d_core, None, d_pairs, None, _join(d_fed, fed.shape[2])


_known.defvjp(_keep_known, _pull_known)
_states.defvjp(_keep, _pull)
