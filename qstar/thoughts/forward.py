"""Forward pass of thoughts: pure functions of one thread, `vmap_thoughts` over all threads, and the rollout.

Every function of a thread is written for a single position of a single text. The text's keys and values are one
unmapped segment, so `vmap` over positions and passes neither copies them nor builds a mask of N x N * U.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from qstar.mesh import map_rows, spare_axes, split_axis
from qstar.models import decoder, heads
from qstar.models.attention import text_mask, within_window
from qstar.models.config import ModelConfig
from qstar.thoughts import layout
from qstar.types import Batch, Params, Segment, Shared

# Keys and values [L, G, N, K]; or per layer [G, N, K], where the layers are a list (`sample.sampler.prepare`).
KVCache = tuple[jax.Array, jax.Array] | list[tuple[jax.Array, jax.Array]]


class PrefixCache(NamedTuple):
    """The base pass over a text, which all its thoughts share."""

    hidden: jax.Array  # [N, D] final states: the predictions without a thought
    pairs: KVCache  # of N tokens


class ThoughtStates(NamedTuple):
    """All final states that the loss reads."""

    base: jax.Array  # [B, N, D] without thoughts
    think: jax.Array  # [B, P, M, S, D] that the thoughts' tokens were drawn from
    talk: jax.Array  # [B, P, M, A, D] after a thought, before mixing
    mixed: jax.Array  # [B, P, M, A, D]
    weight: jax.Array  # [B, P, M, A] float32, of the thought


class SampledThoughts(NamedTuple):
    """Thoughts drawn token by token."""

    records: Any  # what the `SampleFn` returned, leading axis S
    think: jax.Array  # [B, P, M, S, D] states drawn from
    token: jax.Array  # [B, P, M] the last token
    thought_kv: KVCache  # [L, B, P, M, G, S, K], or per layer


SampleFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]


def vmap_thoughts(
    f: Callable[..., Any], per_thought_axes: Sequence[int] | None = None, out_axes: Any = 0
) -> Callable[..., Any]:
    """Lifts f(row, text, j, *per_thought) of one thought to g(batch [B], texts [B], positions [B, M], *[B, P, M, ...]).

    Args:
      per_thought_axes, out_axes: the axis of [B, P, M] in each per-thought argument and in the results: 0, or 1 for
        keys and values whose layers lead (`kv_axis`).
    """

    def lifted(batch: Batch, texts: PrefixCache, positions: jax.Array, *per_thought: Any) -> Any:
        axes = (0,) * len(per_thought) if per_thought_axes is None else tuple(per_thought_axes)
        # The text is unmapped over positions and passes: its keys and values are read in place.
        if split := layout.position_axes(*positions.shape):
            # Positions outermost: where axes are merged to rows of one product, the devices' parts stay contiguous.
            per_pass = jax.vmap(f, (None, None, None, *axes), out_axes)
            per_row = jax.vmap(per_pass, (0, 0, 0, *axes), out_axes)
            per_position, outer = (None, None, 1, *(a + 2 for a in axes)), jax.tree.map(lambda a: a + 2, out_axes)
            over_all = jax.vmap(per_row, per_position, outer, spmd_axis_name=split)
        else:
            over_positions = jax.vmap(f, (None, None, 0, *axes), out_axes)
            per_pass = jax.vmap(over_positions, (None, None, None, *axes), out_axes)
            over_all = map_rows(per_pass, (0, 0, 0, *axes), out_axes=out_axes)
        return over_all(batch, texts, positions, *per_thought)

    return lifted


def kv_axis(params: Params) -> int:
    """Returns the axis of keys and values that follows their layers: 1, or 0 where the layers are a list."""
    return 0 if isinstance(params["layers"], list) else 1


def past_of(params: Params, segments: Callable[..., list[Segment | Shared]], *pairs: KVCache) -> list[Any]:
    """Returns the `past` of `decoder.run`: the segments of keys and values, for all layers at once or for each."""
    return segments(*pairs) if kv_axis(params) else [segments(*each) for each in zip(*pairs)]


def read(params: Params, config: ModelConfig, batch: Batch) -> PrefixCache:
    """Runs the base pass over texts [B, N], once for all passes: `PrefixCache` with a leading axis B."""

    def one(row: Batch) -> PrefixCache:
        return PrefixCache(*decoder.forward(params, config, row.tokens, row.positions, layout.causal_mask(row, config)))

    texts = map_rows(one)(batch)
    if not spare_axes(batch.tokens.shape[0]):
        return texts
    # Computed a part of the tokens per device, and gathered here once: every thought reads all of them.
    pairs = jax.tree.map(lambda x: split_axis(x, x.ndim - 2, ()), texts.pairs)
    return PrefixCache(split_axis(texts.hidden, 1, ()), pairs)


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
    """Feeds T tokens of one thread, and returns their final states [T, D] and their keys and values.

    Args:
      pairs: of the text. j: [] the position. x: [T, D] rows like those of the embedding table.
      first: which token of the thread x[0] is, from 1.
      thought_kv: keys and values of the thread so far, at column i those of token i + 1; from `first` on unset.
    """
    T = x.shape[0]
    steps = first + jnp.arange(T)
    mask = layout.thought_ranges(row, config, j, steps)
    if thought_kv is None:
        # The whole thread is in x: the causal mask below covers it, and there is no cache of it.
        past = past_of(params, lambda pair: [Shared(pair[0], pair[1], mask)], pairs)
    else:
        written = 1 + jnp.arange(jax.tree.leaves(thought_kv)[0].shape[-2])
        visible = within_window(config, repeat(written < first, "s -> t s", t=T), steps[:, None] - written)
        past = past_of(params, lambda t, s: [Shared(t[0], t[1], mask), Segment(s[0], s[1], visible)], pairs, thought_kv)
    positions = layout.thread_positions(row, config, j, steps)
    x = decoder.embed_tokens(params, config, x, positions)
    return decoder.run(params, config, x, positions, text_mask(None, T, config), past)


def thread_inputs(
    params: Params, config: ModelConfig, row: Batch, text: PrefixCache, j: jax.Array, thought: jax.Array
) -> jax.Array:
    """Returns the inputs of a whole thread, [start, c_1 .. c_S, end, x[j+1] .. x[j+A-1]], rows [U, D], given c [S]."""
    S, A = config.required_thoughts.thought_tokens, config.required_thoughts.talk_tokens
    # Only A - 1 true tokens are fed: the last one, x[j+A], is a target alone.
    start, end = (heads.thought_vector(params, config, name)[None] for name in ("start", "end"))
    rows = params["embed"]["table"][jnp.concatenate([thought, layout.future(row, config, j, A - 1)])]
    return jnp.concatenate([start, rows[:S], end, rows[S:]])


def rollout(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    texts: PrefixCache,
    positions: jax.Array,
    passes: int,
    draw: SampleFn,
) -> SampledThoughts:
    """Draws all thoughts in parallel, a token at a time (paper, section 4.2).

    Args:
      draw: (i, states [B, P, M, D]) -> the i-th tokens [B, P, M] int32, and what to record of them.
    """
    c, (B, M), S, axis = config, positions.shape, config.required_thoughts.thought_tokens, kv_axis(params)
    table, start = params["embed"]["table"], heads.thought_vector(params, config, "start")
    # All S columns from the start, because a scan's carry has fixed shapes; `run_thread` masks those not yet written.
    empty = jnp.zeros((B, passes, M, c.num_kv_heads, S, c.head_dim), c.dtype)
    empty = repeat(empty, "... -> l ...", l=c.num_layers) if axis else empty
    thought_kv = (empty, empty) if axis else [(empty, empty)] * c.num_layers

    def body(carry: tuple[jax.Array, KVCache], i: jax.Array) -> tuple[Any, Any]:
        token, thought_kv = carry

        def one(row: Batch, text: PrefixCache, j: jax.Array, token: jax.Array, thought_kv: KVCache) -> Any:
            # Selected, not branched: one body serves the start vector and all tokens.
            x = jnp.where(i == 0, start, table[token])
            hidden, new = run_thread(params, c, row, text.pairs, j, x[None], i + 1, thought_kv)
            return hidden[0], new

        hidden, new = vmap_thoughts(one, (0, axis), (0, axis))(batch, texts, positions, token, thought_kv)

        def write(cache: jax.Array, column: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(cache, column, i, axis=cache.ndim - 2)

        token, record = draw(i, hidden)
        return (token, jax.tree.map(write, thought_kv, new)), (hidden, record)

    first = (jnp.zeros((B, passes, M), jnp.int32), thought_kv)
    (token, thought_kv), (think, records) = jax.lax.scan(body, first, jnp.arange(S))
    return SampledThoughts(records, rearrange(think, "s b p m d -> b p m s d"), token, thought_kv)


def rollout_and_talk(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    texts: PrefixCache,
    positions: jax.Array,
    passes: int,
    draw: SampleFn,
) -> tuple[jax.Array, Any]:
    """The joint schedule, differentiable: states [B, P, M, U, D] of whole threads, and the draws' records [S, ...]."""
    S, A = config.required_thoughts.thought_tokens, config.required_thoughts.talk_tokens
    table, end = params["embed"]["table"], heads.thought_vector(params, config, "end")

    def talk(row: Batch, text: PrefixCache, j: jax.Array, token: jax.Array, thought_kv: KVCache) -> jax.Array:
        # The rollout has drawn c_S without feeding it, so its keys and values are not in the cache yet.
        rows = table[jnp.append(token[None], layout.future(row, config, j, A - 1))]  # c_S, x[j+1] ..
        x = jnp.concatenate([rows[:1], end[None], rows[1:]])
        return run_thread(params, config, row, text.pairs, j, x, S + 1, thought_kv)[0]

    result = rollout(params, config, batch, texts, positions, passes, draw)
    last = vmap_thoughts(talk, (0, kv_axis(params)))
    states = last(batch, texts, positions, result.token, result.thought_kv)
    return jnp.concatenate([result.think, states], axis=3), result.records


def thought_states(
    params: Params, config: ModelConfig, batch: Batch, texts: PrefixCache, positions: jax.Array, states: jax.Array
) -> ThoughtStates:
    """Splits the states [B, P, M, U, D] of whole threads, and mixes those after the thoughts with the text's."""
    S = config.required_thoughts.thought_tokens
    # State 0 is the start vector's, from which c_1 is drawn; state S, of c_S, predicts nothing.
    think, after = states[..., :S, :], states[..., S + 1 :, :]
    mixed, weight = vmap_thoughts(partial(mix, params, config))(batch, texts, positions, after)
    return ThoughtStates(texts.hidden, think, after, mixed, weight)


def mix(
    params: Params, config: ModelConfig, row: Batch, text: PrefixCache, j: jax.Array, states: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes talk states [A, D] with the text's for the same targets (paper, section 4.3): [A, D], and weights [A]."""
    # Talk step a predicts x[j+1+a], as text state j + a does (official code: the base states rolled left by a). Past
    # the end the index wraps round as upstream, and those targets have weight 0.
    base = text.hidden[(j + jnp.arange(states.shape[0])) % row.tokens.shape[0]]
    return heads.mix(params, config, base, states)
