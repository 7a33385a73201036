"""Masks, position ids and targets of the base pass and the parallel thoughts; choice of the positions that think.

A thread is the sequence that is fed after one position j: [start, c_1 .. c_S, end, x[j+1] .. x[j+A-1]], U = S + A + 1
tokens. Its i-th token, from 1, has position j + i, and attends to the text up to j and to the thread up to itself
(paper, section 4.2; in the official code a 4-D mask of one causal block and further diagonal blocks). State S + 1 + a,
from 0, is talk step a: it predicts x[j+1+a].

A sliding window moves with the thread: token i of position j attends to text from j + i - window + 1 on, as if the
thread were written out as a sequence. The official code takes the window at j: the same for texts within the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from qstar.mesh import count_spare_shards, spare_axes
from qstar.models import decoder
from qstar.models.attention import LayerMasks, as_mask, document_starts, key_ranges
from qstar.models.config import ModelConfig
from qstar.models.flash import AUTO_LENGTH
from qstar.models.thought_config import ThoughtConfig
from qstar.models.vocabulary import token_logprobs
from qstar.types import Batch, Params


def text_batch(tokens: Any, mask: Any) -> Batch:
    """Returns rows of one text each. tokens, mask: [B, N], the mask 1 for real tokens, with padding on either side."""
    tokens, real = jnp.asarray(tokens, jnp.int32), jnp.asarray(mask).astype(bool)
    first = jnp.argmax(real, axis=1, keepdims=True)
    # Counted from the first real token, so that padding on the left does not shift the positions.
    positions = jnp.maximum(jnp.arange(tokens.shape[1]) - first, 0)
    return Batch(tokens, real.astype(jnp.float32), real.astype(jnp.int32), positions.astype(jnp.int32))


def causal_ranges(row: Batch, config: ModelConfig) -> jax.Array | LayerMasks:
    """Returns int32 [N, 2], the range of tokens that each token attends to in the base pass over one row."""
    i, real = jnp.arange(row.tokens.shape[0]), row.segment_ids > 0
    # Padding attends to all real tokens before it, unlike in `models.attention.text_mask`: so do the masks of
    # transformers, hence the official code, whose talk states just past the end of a text depend on it.
    first = jnp.argmax(real)
    starts = jnp.where(real, document_starts(row.segment_ids), first)
    return key_ranges(config, starts, jnp.minimum(i + 1, first + jnp.sum(real)), i)


def causal_mask(row: Batch, config: ModelConfig) -> jax.Array | LayerMasks:
    """Returns the mask of the base pass: bool [N, N], or `causal_ranges` where a text is long enough to gain by tiles."""
    ranges, length = causal_ranges(row, config), row.tokens.shape[0]
    long = length >= AUTO_LENGTH["tiles"] and config.attention != "xla" and not config.relative_bias
    return ranges if long else as_mask(ranges, length)


def thought_ranges(row: Batch, config: ModelConfig, j: jax.Array, steps: jax.Array) -> jax.Array | LayerMasks:
    """Returns int32 [T, 2]: the text that thread tokens `steps` [T] (1 = start) of position j attend to.

    The other half of a thought's mask, the thread tokens that they attend to, is in `forward.run_thread`.
    """
    starts = jnp.full_like(steps, document_starts(row.segment_ids)[j])
    # The window is measured from j + step, the position of the thread's token, not from j.
    return key_ranges(config, starts, jnp.full_like(steps, j + 1), j + steps)


def thread_positions(row: Batch, config: ModelConfig, j: jax.Array, steps: jax.Array) -> jax.Array:
    """Returns int32 [T], the position ids of thread tokens `steps` [T] of position j."""
    positions = row.positions[j] + steps
    # A thread near the end of a table of learned positions runs past it, and repeats the last entry.
    return jnp.minimum(positions, config.max_positions - 1) if config.position == "learned" else positions


def future(row: Batch, config: ModelConfig, j: jax.Array, count: int) -> jax.Array:
    """Returns int32 [count]: the true tokens x[j+1] .. x[j+count] of one row; past its end the EOS id, as upstream."""
    index, N = j + 1 + jnp.arange(count), row.tokens.shape[0]
    pad = 0 if config.eos_id is None else config.eos_id
    return jnp.where(index < N, row.tokens[jnp.minimum(index, N - 1)], pad)


def text_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the targets of the base pass [B, N-1], and their weights: 0 across documents and on padding."""
    same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)
    return batch.tokens[:, 1:], batch.mask[:, 1:] * same


def talk_targets(batch: Batch, positions: jax.Array, talk_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns the targets [B, M, A] of thoughts at positions [B, M], and their weights (0 past a document's end)."""
    index = positions[..., None] + 1 + jnp.arange(talk_tokens)
    in_document = index < batch.tokens.shape[1]
    index = jnp.minimum(index, batch.tokens.shape[1] - 1)
    segments, tokens, mask = (take_rows(x, index) for x in (batch.segment_ids, batch.tokens, batch.mask))
    home = take_rows(batch.segment_ids, positions)[..., None]
    return tokens, mask * (in_document & (segments == home) & (home > 0))


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x [B, N, ...] at index [B, ...] of each row."""
    return jax.vmap(lambda x, index: x[index])(x, index)


def all_positions(batch: Batch, predicting: bool = False) -> jax.Array:
    """Returns int32 [B, N]: every position; with `predicting` only those that predict a token, [B, N-1]."""
    B, N = batch.tokens.shape
    return repeat(jnp.arange(N - predicting, dtype=jnp.int32), "n -> b n", b=B)


def thinking_count(t: ThoughtConfig, N: int) -> int:
    """Returns M, how many positions of a row of N tokens think in training."""
    return math.ceil(t.think_fraction * (N - 1))


def choose_positions(params: Params, config: ModelConfig, batch: Batch, hidden: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the positions [B, M] int32 that think in training, by the config's `think_fraction` and `think_where`.

    M: `thinking_count`. hidden: [B, N, D] final states of the text, for the entropy.
    """
    # M follows from N and not from the real tokens of a row: shapes are static, and the same for all rows.
    t = config.required_thoughts
    if t.think_fraction == 1.0:
        return all_positions(batch, predicting=True)
    targets, weights = text_targets(batch)
    if t.think_where == "entropy":
        # The choice of positions is discrete: the scores need no gradient.
        frozen = jax.lax.stop_gradient((hidden[:, :-1], decoder.head(params, config)))
        score = token_logprobs(*frozen, targets, entropy=True).entropy
    else:
        score = jax.random.uniform(key, weights.shape)
    return positions_of_mask(weights > 0, thinking_count(t, batch.tokens.shape[1]), score)


def positions_of_mask(mask: jax.Array, count: int, score: jax.Array) -> jax.Array:
    """Returns the `count` positions [B, count] int32 of highest score [B, N] within mask [B, N], in order."""
    # A row whose mask has fewer is filled with positions outside it: `count` is static.
    ranked = jnp.where(mask, score, -jnp.inf)
    return jnp.sort(jax.lax.top_k(ranked, count)[1], axis=1).astype(jnp.int32)


def position_axes(rows: int, positions: int) -> tuple[str, ...]:
    """Returns the mesh axes that split the positions: those that the rows leave free, if the positions divide."""
    return spare_axes(rows) if positions % count_spare_shards(rows) == 0 else ()


def spread(positions: jax.Array, length: int) -> tuple[jax.Array, Any, Any]:
    """Returns positions that divide over the mesh axes that the rows leave free, for texts of `length` tokens.

    Args:
      positions: [B, M] int32.

    Returns:
      Positions [B, M'], M' >= M, padded with length - 1, which predicts nothing. An index [M'] that arranges an array
      of the M given positions (their thoughts, say) in the same way. An index [M] that selects the results of the given
      positions, in their order. Both indices are a slice of everything where nothing is to be split.
    """
    rows, count = positions.shape
    shards = count_spare_shards(rows)
    if shards == 1:
        return positions, slice(None), slice(None)
    full = -(-count // shards) * shards
    # Device d has the positions d, d + D, ...: in text order, the last device's thoughts would have the most to read.
    order = rearrange(np.arange(full), "(m shard) -> (shard m)", shard=shards)
    padded = jnp.pad(positions, [(0, 0), (0, full - count)], constant_values=length - 1)
    return padded[:, order], np.minimum(order, count - 1), np.argsort(order)[:count]


def by_position(f: Callable[..., Any]) -> Callable[..., Any]:
    """Lifts f, whose arrays and results lead with tokens in any order, to arrays and results [B, P, M, ...]."""

    def lifted(*arrays: jax.Array) -> Any:
        if not position_axes(arrays[0].shape[0], arrays[0].shape[2]):
            return f(*arrays)
        # Positions first: the tokens are then still split over the devices when `f` makes one axis of [M, B, P, ...].
        found = f(*(jnp.moveaxis(x, 2, 0) for x in arrays))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2) if x.ndim else x, found)

    return lifted


def from_rows(x: jax.Array, sequences: int) -> jax.Array:
    """Returns [B, P, M, S] from [S, B*P, M]; row r belongs to sequence r // P.

    Raises:
      ValueError: the rows are no multiple of the sequences.
    """
    if x.shape[1] % sequences:
        raise ValueError(
            f"thoughts {x.shape} have {x.shape[1]} rows, which is no multiple of the {sequences} sequences"
        )
    return rearrange(jnp.asarray(x), "s (b p) m -> b p m s", b=sequences)
