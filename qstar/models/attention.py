"""Attention over a list of key/value segments, and the masks of text.

One function, `attend`, serves training (one causal segment), prefill (a shared few-shot prefix and the prompt itself),
decoding (prefix, prompt, the tokens generated so far, the token itself) and thoughts (the text, and the thought).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qstar.models import flash
from qstar.models.prefix_attention import attend_shared
from qstar.types import Segment, Shared

NEG = -1e30  # finite, so that a row which sees nothing gives numbers and not NaN


def precision(dtype: Any) -> str | None:
    """Returns the matmul precision for a compute dtype: float32 means float32 (a TPU would take bfloat16 passes)."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def attend(q: jax.Array, segments: Sequence[Segment | Shared], *, scale: float) -> jax.Array:
    """Softmax attention of the queries of one sequence over the union of the segments.

    Args:
      q: [T, H, K] queries; each of the G key/value heads serves H / G neighbouring query heads.
      segments: keys and values [G, S, K] with masks broadcastable to [T, S], and biases [H, T, S] if any. A lone one whose
        mask is a `flash.KernelMask` goes to the kernel that it names.
      scale: factor on the scores, 1 / sqrt(K) in every decoder here.

    Returns:
      [T, H, K] in q's dtype. Scores and softmax are float32. Scores of the segments are joined, keys never are: under
      `vmap` a segment that is not mapped is read in place, not copied per row.
    """
    if isinstance(segments[0].mask, flash.KernelMask):
        (text,) = segments
        return flash.attend_text(q, text.keys, text.values, text.mask, scale=scale)
    T, H, K = q.shape
    G = segments[0].keys.shape[0]

    def by_group(x: jax.Array) -> jax.Array:  # [T, H, ...] -> [G, R*T, ...]: plain batched products
        return jnp.moveaxis(x.reshape(T, G, H // G, -1), 0, 2).reshape(G, H // G * T, -1)

    rows, own = by_group(q), [s for s in segments if not isinstance(s, Shared)]
    scores = [_scores(rows, s, scale, T) for s in own]
    done = [
        tuple(map(by_group, attend_shared(q, s.keys, s.values, s.mask, scale=scale, exact=precision(q.dtype))))
        for s in segments
        if isinstance(s, Shared)
    ]
    top = [jnp.max(s, axis=-1, keepdims=True) for s in scores] + [lse for _, lse in done]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, top))
    out, total = 0.0, 0.0
    for part, lse in done:
        share = jnp.exp(lse - top)
        out, total = out + _scaled(part, share), total + share
    for s, score in zip(own, scores):
        weights = jnp.exp(score - top)
        total = total + jnp.sum(weights, axis=-1, keepdims=True)
        out = out + jnp.einsum(
            "gns,gsk->gnk",
            weights.astype(q.dtype),
            s.values,
            precision=precision(q.dtype),
            preferred_element_type=jnp.float32,
        )
    out = _scaled(out, 1 / total).astype(q.dtype).reshape(G, H // G, T, K)  # normalised once, at the smaller array
    return jnp.moveaxis(out, 2, 0).reshape(T, H, K)


def _scaled(rows: jax.Array, factors: jax.Array) -> jax.Array:
    """Returns rows [G, N, K] times factors [G, N, 1]; the gradient of these is an inner product, and fast as such."""
    return jnp.einsum("gnk,gn->gnk", rows, factors[..., 0], precision="highest")


def _scores(rows: jax.Array, segment: Segment, scale: float, T: int) -> jax.Array:
    """Returns float32 scores [G, R*T, S] of one segment, very negative where its mask hides a key."""
    s = scale * jnp.einsum(
        "gnk,gsk->gns", rows, segment.keys, precision=precision(rows.dtype), preferred_element_type=jnp.float32
    )
    G, _, S = s.shape
    if segment.bias is not None:  # neighbouring heads share a group, as in `by_group`
        s = s + segment.bias.reshape(G, -1, S)
    if segment.mask is None:
        return s
    return jnp.where(segment.mask, s.reshape(G, -1, T, S), NEG).reshape(s.shape)


@jax.custom_batching.custom_vmap
def write_column(cache: jax.Array, new: jax.Array, column: jax.Array) -> jax.Array:
    """Returns the cache [G, R, K] with new [G, 1, K] at `column`.

    Mapped over rows that share the column it stays one contiguous update (`vmap` alone would make it a scatter).
    """
    return jax.lax.dynamic_update_slice_in_dim(cache, new, column, axis=1)


@write_column.def_vmap
def _write_rows(axis_size: int, in_batched: list[bool], cache: jax.Array, new: jax.Array, column: jax.Array) -> Any:
    if in_batched[2]:  # each row at a column of its own
        axes = [0 if b else None for b in in_batched]
        return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1), axes)(cache, new, column), True
    rows = [x if b else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, b in zip((cache, new), in_batched)]
    return jax.lax.dynamic_update_slice_in_dim(*rows, column, axis=rows[0].ndim - 2), True


def causal_mask(
    config: Any, segment_ids: jax.Array, *, one_text: bool = False, must: bool = False
) -> jax.Array | flash.KernelMask:
    """Returns what the tokens of a row see of it, in the form that its attention takes (`flash.choose`): `text_mask`, or a
    `flash.KernelMask`.

    Args:
      config: a `ModelConfig`. segment_ids: [T] int32; 1.. per document, 0 = padding.

    Raises:
      UserError: with `must`, a kernel that `config.attention` names and that cannot take the row.
    """
    impl = flash.choose(config, segment_ids, one_text=one_text, must=must)
    if impl == "xla":
        return text_mask(segment_ids, segment_ids.shape[0], config.sliding_window)
    return flash.KernelMask(segment_ids, impl, config.sliding_window)


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
