"""Attention over a list of key/value segments, and the masks of text.

One function, `attend`, serves training (one causal segment), prefill (a shared few-shot prefix and the prompt itself),
decoding (prefix, prompt, the tokens generated so far, the token itself) and thoughts (the text, and the thought).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qstar.types import Segment

NEG = -1e30  # finite, so that a row which sees nothing gives numbers and not NaN


def precision(dtype: Any) -> str | None:
    """Returns the matmul precision for a compute dtype: float32 means float32 (a TPU would take bfloat16 passes)."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def attend(q: jax.Array, segments: Sequence[Segment], *, scale: float) -> jax.Array:
    """Softmax attention of the queries of one sequence over the union of the segments.

    Args:
      q: [T, H, K] queries; each of the G key/value heads serves H / G neighbouring query heads.
      segments: keys and values [G, S, K] with masks broadcastable to [T, S].
      scale: factor on the scores, 1 / sqrt(K) in every decoder here.

    Returns:
      [T, H, K] in q's dtype. Scores and softmax are float32. Scores of the segments are joined, keys never are: under
      `vmap` a segment that is not mapped is read in place, not copied per row.
    """
    T, H, K = q.shape
    G = segments[0].keys.shape[0]
    grouped = jnp.moveaxis(q.reshape(T, G, H // G, K), 0, 2)  # [G, R, T, K]
    scores = [_scores(grouped, s, scale) for s in segments]
    joined = scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)
    weights = jax.nn.softmax(joined, axis=-1).astype(q.dtype)  # [G, R, T, sum of S]
    out, start = 0.0, 0
    for s in segments:
        part = jax.lax.slice_in_dim(weights, start, start + s.keys.shape[1], axis=-1)
        out = out + jnp.einsum("grts,gsk->grtk", part, s.values, precision=precision(q.dtype))
        start += s.keys.shape[1]
    return jnp.moveaxis(out, 2, 0).reshape(T, H, K)


def _scores(q: jax.Array, segment: Segment, scale: float) -> jax.Array:
    s = scale * jnp.einsum(
        "grtk,gsk->grts", q, segment.keys, precision=precision(q.dtype), preferred_element_type=jnp.float32
    )
    return s if segment.mask is None else jnp.where(segment.mask, s, NEG)


def text_mask(segment_ids: jax.Array | None, length: int, window: int | None = None) -> jax.Array:
    """Returns bool [T, T]: causal, within one document, and within the sliding window if there is one.

    Positions need no argument: documents are contiguous in a row, so index differences are position differences.
    """
    i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask = j <= i
    if window is not None:
        mask &= i - j < window
    if segment_ids is not None:
        mask &= segment_ids[:, None] == segment_ids[None, :]
    return mask
