"""Masks, position ids and target tokens for the base pass and the parallel thoughts.

Shape letters beside those of `qstar.types`: N tokens of a text, S content tokens of a thought, T talk tokens,
P thoughts per position, M positions that think (N, where all do), n = S + T + 1 tokens of a thread.

A thread is what is fed after one position j: [start, c_1 .. c_S, end, x[j+1] .. x[j+T-1]]. Its i-th token, from 1, stands
at position j + i, and sees the text up to j and the thread up to itself (spec of the official code: 4-D mask of a causal
block and diagonal blocks). State S + 1 + s, from 0, is talk step s and predicts x[j+1+s].

A sliding window slides with the thread: token i of position j sees text from j + i - window + 1 on, as if the thread
were written out. The official code takes the window at j, which is the same unless a text is longer than the window.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qstar.models.config import ModelConfig
from qstar.types import Batch


def text_batch(tokens: Any, mask: Any) -> Batch:
    """Returns rows of one text each. tokens, mask: [B, N], the mask 1 for real tokens, with padding on either side."""
    tokens, real = jnp.asarray(tokens, jnp.int32), jnp.asarray(mask).astype(bool)
    first = jnp.argmax(real, axis=1)[:, None]
    positions = jnp.maximum(jnp.arange(tokens.shape[1]) - first, 0)
    return Batch(tokens, real.astype(jnp.float32), real.astype(jnp.int32), positions.astype(jnp.int32))


def causal_mask(row: Batch, config: ModelConfig) -> jax.Array:
    """Returns bool [N, N]: what the tokens of one row see of it.

    As `text_mask`, except that padding sees the real tokens before it (Hugging Face's masks, hence the official code):
    talk states just past the end of a text then mean the same.
    """
    i, segments = jnp.arange(row.tokens.shape[0]), row.segment_ids
    alike = (segments[:, None] == segments) | (segments[:, None] == 0)
    seen = (i <= i[:, None]) & alike & (segments > 0)
    return seen if config.sliding_window is None else seen & (i[:, None] - i < config.sliding_window)


def thought_mask(row: Batch, config: ModelConfig, j: jax.Array, steps: jax.Array) -> jax.Array:
    """Returns bool [t, N]: what thread tokens `steps` [t] (1 = start) of position j see of their text."""
    i, segments = jnp.arange(row.tokens.shape[0]), row.segment_ids
    seen = jnp.broadcast_to((i <= j) & (segments == segments[j]), (steps.shape[0], i.shape[0]))
    return seen if config.sliding_window is None else seen & ((j + steps)[:, None] - i < config.sliding_window)


def thread_positions(row: Batch, config: ModelConfig, j: jax.Array, steps: jax.Array) -> jax.Array:
    """Returns int32 [t]: j + i, in positions of the text. Learned ones end with their table: its last row serves on."""
    positions = row.positions[j] + steps
    return jnp.minimum(positions, config.max_positions - 1) if config.position == "learned" else positions


def future(row: Batch, config: ModelConfig, j: jax.Array, count: int) -> jax.Array:
    """Returns int32 [count]: the true tokens x[j+1] .. x[j+count] of one row; past its end the EOS id, as upstream."""
    index, N = j + 1 + jnp.arange(count), row.tokens.shape[0]
    pad = 0 if config.eos_id is None else config.eos_id
    return jnp.where(index < N, row.tokens[jnp.minimum(index, N - 1)], pad)


def text_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens [B, N-1] that the text alone predicts, and their weights: 0 across documents and on padding."""
    same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)
    return batch.tokens[:, 1:], batch.mask[:, 1:] * same


def talk_targets(batch: Batch, positions: jax.Array, talk_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens [B, M, T] that thoughts at positions [B, M] are judged by, and their weights (0: none there)."""
    index = positions[..., None] + 1 + jnp.arange(talk_tokens)  # [B, M, T]
    in_document = index < batch.tokens.shape[1]
    index = jnp.minimum(index, batch.tokens.shape[1] - 1)

    def take(x: jax.Array, at: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, at: x[at])(x, at)

    home = take(batch.segment_ids, positions)[..., None]
    in_document &= (take(batch.segment_ids, index) == home) & (home > 0)
    return take(batch.tokens, index), take(batch.mask, index) * in_document


def all_positions(batch: Batch, predicting: bool = False) -> jax.Array:
    """Returns int32 [B, N]: every position; or, if only those that predict a token are wanted, [B, N - 1]."""
    B, N = batch.tokens.shape
    return jnp.broadcast_to(jnp.arange(N - predicting, dtype=jnp.int32), (B, N - predicting))


def to_rows(x: jax.Array) -> jax.Array:
    """Returns [k, B*P, M, ...] from [B, P, M, k, ...]: the layout of the public functions (and of the fixtures)."""
    B, P = x.shape[:2]
    return jnp.moveaxis(x, 3, 0).reshape(x.shape[3], B * P, *x.shape[2:3], *x.shape[4:])


def from_rows(x: jax.Array, sequences: int) -> jax.Array:
    """Returns [B, P, M, k] from [k, B*P, M]; row r belongs to sequence r // P."""
    k, R, M = x.shape
    if R % sequences:
        raise ValueError(f"thoughts {x.shape} have {R} rows, which is no multiple of the {sequences} sequences")
    return jnp.moveaxis(x.reshape(k, sequences, R // sequences, M), 0, 3)
