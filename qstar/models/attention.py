"""Attention over a list of key/value segments, and the masks of text.

One function, `attend`, serves training (one causal segment), prefill (a shared few-shot prefix and the prompt itself),
decoding (prefix, prompt, the tokens generated so far, the token itself) and thoughts (the text, and the thought).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from qstar.models import flash
from qstar.models.prefix_attention import attend_shared, in_range
from qstar.models.scores import NEG, soft_cap
from qstar.types import Segment, Shared


class LayerMasks(NamedTuple):
    """A mask (or ranges) in two forms, of which each layer takes one, where only some layers have the sliding window."""

    full: Array
    near: Array  # within the window


def within_window(config: Any, mask: Array, distance: Array) -> Array | LayerMasks:
    """Returns the mask of queries and keys with a `ModelConfig`'s sliding window.

    Args:
      distance: int32, broadcastable to the mask: tokens from the key to the query.
    """
    if config.sliding_window is None:
        return mask
    near = mask & (distance < config.sliding_window)
    return LayerMasks(mask, near) if config.windowed else near


def precision(dtype: Any) -> str | None:
    """Returns the matmul precision for a compute dtype: "highest" for float32, else the default (None)."""
    # By default a TPU multiplies float32 matrices in bfloat16 passes.
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def attend(q: Array, segments: Sequence[Segment | Shared], *, scale: float, cap: float | None = None) -> Array:
    """Softmax attention of the queries of one sequence over the union of the segments.

    Args:
      q: [T, H, K]. Each of the G key/value heads serves Q = H / G neighbouring query heads.
      segments: keys and values [G, C, K] with masks broadcastable to [T, C], and biases [H, T, C] if any. A lone one
        whose mask is a `flash.KernelMask` goes to the kernel that it names.
      scale: factor on the scores, 1 / sqrt(K) in most decoders. cap: c, scores s become c tanh(s / c); the kernels of
        `flash` do not have it.

    Returns:
      [T, H, K] in q's dtype; scores and softmax are float32.
    """
    if isinstance(mask := segments[0].mask, flash.KernelMask):
        (text,) = segments
        return flash.attend_text(q, text.keys, text.values, mask, scale=scale)
    T, G, exact = q.shape[0], segments[0].keys.shape[0], precision(q.dtype)
    # Query heads and tokens of a group are the rows of one product, so that grouped queries need no copies of the keys.
    rows = rearrange(q, "t (g q) k -> g (q t) k", g=G)
    # Scores of the segments are joined, keys never: under `vmap` an unmapped segment (a shared prefix) is read in place
    # instead of being copied per row.
    plain = [s for s in segments if not isinstance(s, Shared)]
    scores = [_scores(rows, s, scale, cap, T) for s in plain]
    done = []  # results of shared segments, each normalised, with the log of its sum of exponentials
    for s in segments:
        if isinstance(s, Shared):
            part, lse = attend_shared(q, s.keys, s.values, s.mask, scale=scale, cap=cap, exact=exact)
            done.append((rearrange(part, "t (g q) k -> g (q t) k", g=G), rearrange(lse, "t (g q) -> g (q t) 1", g=G)))
    # The maximum cancels out of the softmax, so no gradient needs to flow through it.
    tops = [jnp.max(s, axis=-1, keepdims=True) for s in scores] + [lse for _, lse in done]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    out: Any = 0.0
    total: Any = 0.0
    # A part that is normalised already enters with weight exp(lse), its own sum of exponentials.
    for part, lse in done:
        share = jnp.exp(lse - top)
        out, total = out + part * share, total + share
    for s, score in zip(plain, scores):
        w = jnp.exp(score - top)
        total = total + jnp.sum(w, axis=-1, keepdims=True)
        # Rounded for the product only: the sum above is of float32 weights.
        w = w.astype(q.dtype)
        out = out + jnp.einsum("gnc,gck->gnk", w, s.values, precision=exact, preferred_element_type=jnp.float32)
    # Normalised once, after the product, where the array has K instead of C columns.
    out = (out * (1 / total)).astype(q.dtype)
    return rearrange(out, "g (q t) k -> t (g q) k", t=T)


def _scores(rows: Array, segment: Segment, scale: float, cap: float | None, T: int) -> Array:
    """Returns float32 scores [G, (Q T), C] of one segment, very negative where its mask hides a key."""
    exact, G = precision(rows.dtype), rows.shape[0]
    s = jnp.einsum("gnk,gck->gnc", rows, segment.keys, precision=exact, preferred_element_type=jnp.float32)
    s = soft_cap(scale * s, cap)
    if segment.bias is not None:
        s = s + rearrange(segment.bias, "(g q) t c -> g (q t) c", g=G)
    if segment.mask is None:
        return s
    masked = jnp.where(segment.mask, rearrange(s, "g (q t) c -> g q t c", t=T), NEG)
    return rearrange(masked, "g q t c -> g (q t) c")


@jax.custom_batching.custom_vmap
def write_column(cache: Array, new: Array, column: Array) -> Array:
    """Returns the cache [G, R, K] with new [G, 1, K] at `column`."""
    return _update(cache, new, column)


def _update(cache: Array, new: Array, column: Array, axis: int = 1) -> Array:
    # XLA's CPU backend widens an update of bfloat16 to float32, hence the whole cache at every token; not one of
    # integers. A TPU would read and write the whole cache to convert it.
    if cache.dtype != jnp.bfloat16 or flash.platform_of(cache) != "cpu":
        return jax.lax.dynamic_update_slice_in_dim(cache, new, column, axis)
    words, more = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (cache, new))
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice_in_dim(words, more, column, axis), cache.dtype)


@write_column.def_vmap
def _write_rows(axis_size: int, in_batched: list[bool], cache: Array, new: Array, column: Array) -> Any:
    if in_batched[2]:  # each row at a column of its own
        return jax.vmap(_update, [0 if b else None for b in in_batched])(cache, new, column), True
    # Rows that share the column, as in decoding: one contiguous update, where `vmap` alone would make a scatter.
    cache, new = (x if b else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, b in zip((cache, new), in_batched))
    return _update(cache, new, column, axis=cache.ndim - 2), True


def causal_mask(
    config: Any, segment_ids: Array, *, one_text: bool = False, must: bool = False
) -> Array | LayerMasks | flash.KernelMask:
    """Returns the mask of a row over itself in the form that its attention takes, see `text_segment`.

    Args:
      config: a `ModelConfig`. segment_ids: [T] int32; 1.. per document, 0 = padding. one_text, must: `flash.choose`.

    Raises:
      UserError: with `must`, a kernel that `config.attention` names and that cannot take the row.
    """
    impl = flash.choose(config, segment_ids, one_text=one_text, must=must)
    if impl in ("splash", "cudnn"):
        return flash.KernelMask(segment_ids, impl, config.sliding_window)
    found = text_ranges(segment_ids, segment_ids.shape[0], config)
    return found if impl == "tiles" else as_mask(found, segment_ids.shape[0])


def text_mask(segment_ids: Array | None, length: int, config: Any) -> Array | LayerMasks:
    """Returns bool [T, T]: causal, within one document (None: there is only one) and a config's sliding window."""
    return as_mask(text_ranges(segment_ids, length, config), length)


def text_ranges(segment_ids: Array | None, length: int, config: Any) -> Array | LayerMasks:
    """Returns int32 [T, 2], the keys of each token: those of `text_mask`."""
    i = jnp.arange(length)
    starts = jnp.zeros_like(i) if segment_ids is None else document_starts(segment_ids)
    # Indices stand for positions: documents are contiguous in a row, so their differences are equal.
    return key_ranges(config, starts, i + 1, i)


def document_starts(segment_ids: Array) -> Array:
    """Returns [T], the first token of each token's document. segment_ids: [T], those of a document contiguous."""
    i = jnp.arange(segment_ids.shape[0])
    return jax.lax.cummax(jnp.where(segment_ids == jnp.roll(segment_ids, 1), 0, i))


def key_ranges(config: Any, starts: Array, ends: Array, queries: Array) -> Array | LayerMasks:
    """Returns int32 [T, 2]: the keys starts <= c < ends, cut to a `ModelConfig`'s sliding window.

    Args:
      starts, ends: [T]. queries: [T], where the queries stand in the row of keys.
    """
    full = jnp.stack([starts, ends], axis=-1)
    if config.sliding_window is None:
        return full
    near = jnp.stack([jnp.maximum(starts, queries - config.sliding_window + 1), ends], axis=-1)
    return LayerMasks(full, near) if config.windowed else near


def as_mask(ranges: Array | LayerMasks, count: int) -> Array | LayerMasks:
    """Returns bool [T, count] of ranges int32 [T, 2]."""
    return jax.tree.map(lambda x: in_range(x, count), ranges)


def text_segment(keys: Array, values: Array, mask: Any) -> Segment | Shared:
    """Returns a text's keys and values as `attend` takes them with a mask [T, T], a `KernelMask`, or ranges [T, 2]."""
    ranges = isinstance(mask, Array) and jnp.issubdtype(mask.dtype, jnp.integer)
    return Shared(keys, values, mask) if ranges else Segment(keys, values, mask)
