"""One thought after one position of one text, as pure functions; and `vmap_thoughts`, which lifts them to all.

Every function here is written for a single thread. Its text's keys and values come as one unmapped segment, so that under
`vmap` over positions and passes they are read where they are: never a copy, never a mask of N x N(i+1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qstar.mesh import map_rows, use_fsdp_gather
from qstar.models import decoder, heads
from qstar.models.attention import text_mask
from qstar.models.config import ModelConfig
from qstar.thoughts import layout
from qstar.types import Batch, Params, Segment, Shared

# Keys and values [L, G, tokens, K]; or of each layer [G, tokens, K], where its parameters are listed (`unstacked`).
KVCache = tuple[jax.Array, jax.Array] | list[tuple[jax.Array, jax.Array]]


class PrefixCache(NamedTuple):
    """A text that was read once, for all thoughts about it."""

    hidden: jax.Array  # [N, E] final states: the predictions without a thought
    pairs: KVCache  # N tokens


def vmap_thoughts(
    f: Callable[..., Any], per_thought_axes: Sequence[int] | None = None, out_axes: Any = 0
) -> Callable[..., Any]:
    """Lifts f(row, text, j, *own), of one thought, to all thoughts of a batch.

    Args:
      own_axes, out_axes: where [B, P, M] stand in what is each thought's own, and in the results: 0, or 1 for keys and
        values whose layers lead, because that is how they are read (`pairs_axis`).

    Returns:
      g(batch [B, ...], texts [B, ...], positions [B, M], *own [B, P, M, ...]) -> f's results [B, P, M, ...]. Row, text and
      position are unmapped over passes, row and text over positions.
    """

    def lifted(batch: Batch, texts: PrefixCache, positions: jax.Array, *per_thought: Any) -> Any:
        rest = (0,) * len(per_thought) if per_thought_axes is None else tuple(per_thought_axes)
        per_position = jax.vmap(f, (None, None, 0, *rest), out_axes)
        per_pass = jax.vmap(per_position, (None, None, None, *rest), out_axes)
        return map_rows(per_pass, (0, 0, 0, *rest), out_axes=out_axes)(batch, texts, positions, *per_thought)

    return lifted


def unstacked(params: Params, config: ModelConfig, texts: PrefixCache) -> tuple[Params, PrefixCache]:
    """Returns parameters and texts [B, ...] with their layers listed, for loops that write: nothing is then cut out of the
    stacks at every turn (a third to a half of the time of a token on a CPU). Only where the scan of layers is unrolled
    altogether, and no matrices are to be gathered."""
    if pairs_axis(params) == 0 or config.scan_unroll < config.num_layers or use_fsdp_gather():
        return params, texts
    pairs = [tuple(x[:, i] for x in texts.pairs) for i in range(config.num_layers)]
    return {**params, "layers": decoder.unstack(params["layers"], config)}, texts._replace(pairs=pairs)


def pairs_axis(params: Params) -> int:
    """Returns which axis of keys and values comes after their layers: 1, or 0 where the layers are listed."""
    return 0 if isinstance(params["layers"], list) else 1


def past_of(params: Params, segments: Callable[..., list[Segment | Shared]], *pairs: KVCache) -> list[Any]:
    """Returns the `past` of `decoder.run`: the segments of keys and values, for all layers or of each."""
    return segments(*pairs) if pairs_axis(params) else [segments(*each) for each in zip(*pairs)]


def read(params: Params, config: ModelConfig, batch: Batch) -> PrefixCache:
    """Runs the texts [B, N] once each: `PrefixCache` with a leading axis B."""

    def one(row: Batch) -> PrefixCache:
        return PrefixCache(*decoder.forward(params, config, row.tokens, row.positions, layout.causal_mask(row, config)))

    return map_rows(one)(batch)


def run_thread(
    params: Params,
    config: ModelConfig,
    row: Batch,
    pairs: KVCache,
    j: jax.Array,
    x: jax.Array,
    first: int | jax.Array,
    thought_kv: KVCache | None = None,
) -> tuple[jax.Array, KVCache]:
    """Feeds some tokens of one thread, and returns their final states [t, E] and their keys and values.

    Args:
      pairs: of the text. j: [] the position. x: [t, E] rows like those of the embedding table.
      first: which token of the thread x[0] is, from 1.
      own: keys and values of n tokens of the thread so far, at column i token i + 1; those from `first` on are not seen.
    """
    t, window = x.shape[0], config.sliding_window
    steps = first + jnp.arange(t)
    mask = layout.thought_mask(row, config, j, steps)
    if thought_kv is None:
        past = past_of(params, lambda pair: [Shared(*pair, mask)], pairs)
    else:
        made = 1 + jnp.arange(jax.tree.leaves(thought_kv)[0].shape[-2])
        seen = jnp.broadcast_to(made < first, (t, made.shape[0]))
        seen = seen if window is None else seen & (steps[:, None] - made < window)
        past = past_of(params, lambda pair, mine: [Shared(*pair, mask), Segment(*mine, seen)], pairs, thought_kv)
    positions = layout.thread_positions(row, config, j, steps)
    x = decoder.embed_tokens(params, config, x, positions)
    return decoder.run(params, config, x, positions, text_mask(None, t, window), past)


def feed(
    params: Params, config: ModelConfig, row: Batch, text: PrefixCache, j: jax.Array, thought: jax.Array
) -> jax.Array:
    """Returns what a thread is fed, [start, c_1 .. c_S, end, x[j+1] .. x[j+T-1]], as rows [n, E], given c [S]."""
    S, T = config.thoughts.thought_tokens, config.thoughts.talk_tokens
    start, end = (heads.thought_vector(params, config, name)[None] for name in ("start", "end"))
    rows = params["embed"]["table"][jnp.concatenate([thought, layout.future(row, config, j, T - 1)])]
    return jnp.concatenate([start, rows[:S], end, rows[S:]])


def step(
    params: Params,
    config: ModelConfig,
    i: jax.Array,
    row: Batch,
    text: PrefixCache,
    j: jax.Array,
    token: jax.Array,
    thought_kv: KVCache,
) -> tuple[jax.Array, KVCache]:
    """Feeds token i of a thread, from 0 (the start vector, then the drawn tokens): its state [E], keys and values."""
    x = jnp.where(i == 0, heads.thought_vector(params, config, "start"), params["embed"]["table"][token])
    hidden, new = run_thread(params, config, row, text.pairs, j, x[None], i + 1, thought_kv)
    return hidden[0], new


def talk(
    params: Params,
    config: ModelConfig,
    row: Batch,
    text: PrefixCache,
    j: jax.Array,
    token: jax.Array,
    thought_kv: KVCache,
) -> jax.Array:
    """Feeds what follows the last draw in one pass, [c_S, end, x[j+1] ..], and returns the states [T + 1, E]."""
    S, T = config.thoughts.thought_tokens, config.thoughts.talk_tokens
    rows = params["embed"]["table"][jnp.append(token[None], layout.future(row, config, j, T - 1))]
    x = jnp.concatenate([rows[:1], heads.thought_vector(params, config, "end")[None], rows[1:]])
    return run_thread(params, config, row, text.pairs, j, x, S + 1, thought_kv)[0]


class Rollout(NamedTuple):
    """Thoughts as they were drawn, token by token."""

    records: Any  # what `draw` returned, leading axis S
    think: jax.Array  # [B, P, M, S, E] states drawn from
    token: jax.Array  # [B, P, M] the last token
    thought_kv: KVCache  # [L, B, P, M, G, S, K], or of each layer


SampleFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]


def rollout(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    texts: PrefixCache,
    positions: jax.Array,
    passes: int,
    draw: SampleFn,
) -> Rollout:
    """Writes all thoughts side by side, a token at a time.

    Args:
      draw: (i, states [B, P, M, E]) -> the i-th tokens [B, P, M] int32, and what to record of them.
    """
    c, (B, M), S = config, positions.shape, config.thoughts.thought_tokens
    params, texts = unstacked(params, config, texts)
    axes = (0, pairs_axis(params))
    empty = jnp.zeros((B, passes, M, c.num_kv_heads, S, c.head_dim), c.dtype)
    empty = jnp.broadcast_to(empty, (c.num_layers, *empty.shape)) if axes[1] else empty
    thought_kv = (empty, empty) if axes[1] else [(empty, empty)] * c.num_layers

    def body(carry: tuple[jax.Array, KVCache], i: jax.Array) -> tuple[Any, Any]:
        token, thought_kv = carry
        hidden, new = vmap_thoughts(partial(step, params, c, i), axes, axes)(batch, texts, positions, token, thought_kv)
        thought_kv = jax.tree.map(
            lambda o, k: jax.lax.dynamic_update_slice_in_dim(o, k, i, axis=o.ndim - 2), thought_kv, new
        )
        token, record = draw(i, hidden)
        return (token, thought_kv), (hidden, record)

    start = (jnp.zeros((B, passes, M), jnp.int32), thought_kv)
    (token, thought_kv), (think, records) = jax.lax.scan(body, start, jnp.arange(S))
    return Rollout(records, jnp.moveaxis(think, 0, 3), token, thought_kv)


def rollout_and_talk(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    texts: PrefixCache,
    positions: jax.Array,
    passes: int,
    draw: SampleFn,
) -> tuple[jax.Array, Any]:
    """A rollout, and what follows it as one pass on its keys and values: states [B, P, M, n, E], and the draws' records."""
    params, texts = unstacked(params, config, texts)
    result = rollout(params, config, batch, texts, positions, passes, draw)
    last = vmap_thoughts(partial(talk, params, config), (0, pairs_axis(params)))
    states = last(batch, texts, positions, result.token, result.thought_kv)
    return jnp.concatenate([result.think, states], axis=3), result.records
