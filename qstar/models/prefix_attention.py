"""Attention to one text by many threads that share it, or by its own tokens, a tile of queries at a time.

The plain form is `attend` with a `Segment` of the text. `attend_shared` is written like it, for one thread, and
computes the same (tests compare values and gradients). Its mask is a range of keys per query, and no array of queries x
keys outlives its tile: memory grows with the queries plus the keys. Under `vmap`, threads with the same keys become
rows of queries over the one set of keys, instead of a batched product.

Axes of the lifted form: B texts, P passes with the same ranges, M threads, T tokens each, H = G Q query heads; C keys.
D devices with R = M T / D rows each, where texts leave mesh axes free (else D = 1). N = D Q r are the columns of a tile
of r rows per device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qstar.mesh import count_spare_shards, spare_axes, split_axis
from qstar.models import prefix_kernel
from qstar.models.flash import lift_to_rows, platform_of
from qstar.models.scores import NEG, soft_cap

TILE_BYTES = 2 * 2**20  # of float32 scores alive at once: fits in a CPU's cache
KEY_BLOCKS = 8  # a tile reads the first 1 .. 8 of as many blocks of keys
KEY_BLOCK = 32  # keys in a block, at least
# Rows of a tile, at least: with fewer, a tile costs what reading its keys costs. On a TPU or GPU 8 times as many.
MIN_ROWS = 16
# Scores of a head, up to which those of a text's only thread (as in generation) are computed at once.
PLAIN_SCORES = 2**16

Pair = tuple[Array, Array]


def attend_shared(
    q: Array, keys: Array, values: Array, ranges: Array, *, scale: float, cap: float | None, exact: str | None
) -> Pair:
    """Softmax attention of one thread to a text, with its normaliser, to join it with attention to other tokens.

    Args:
      q: [T, H, K]. keys, values: [G, C, K]. ranges: int32 [T, 2]: query t attends to keys ranges[t, 0] <= c <
        ranges[t, 1]. scale, cap: see `attention.attend`. exact: precision of products.

    Returns:
      [T, H, K] float32, and the log of the sum of exponentials [T, H] float32, very negative where no key is visible.
    """
    out, lse = _shared.bind(
        q[None, None, None], keys[None], values[None], ranges[None, None], scale=scale, cap=cap, exact=exact
    )
    return out[0, 0, 0], lse[0, 0, 0]


def in_range(ranges: Array, count: int) -> Array:
    """Returns bool [..., count]: whether keys 0 .. count - 1 lie within ranges [..., 2]."""
    c = jnp.arange(count)
    return (c >= ranges[..., :1]) & (c < ranges[..., 1:])


# ---------------------------------------------------------------------------------------------------- forward, backward


def _forward(
    q: Array, keys: Array, values: Array, ranges: Array, *, scale: float, cap: float | None, exact: str | None
) -> Pair:
    """q [B, P, M, T, H, K]; keys, values [B, G, C, K]; ranges [B, M, T, 2]: out like q, lse [B, P, M, T, H]; float32."""
    dot = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    if q.shape[1] * q.shape[2] == 1 and q.shape[3] * keys.shape[2] <= PLAIN_SCORES:
        rows = rearrange(q, "b 1 1 t (g q) k -> b t g q k", g=keys.shape[1])
        s = soft_cap(scale * dot("btgqk,bgck->bgqtc", rows, keys), cap)
        s = jnp.where(in_range(ranges, keys.shape[2])[:, :, None], s, NEG)
        lse = jax.nn.logsumexp(s, axis=-1)
        out = dot("bgqtc,bgck->btgqk", jnp.exp(s - lse[..., None]).astype(values.dtype), values)
        return rearrange(out, "b t g q k -> b 1 1 t (g q) k"), rearrange(lse, "b g q t -> b 1 1 t (g q)")
    if prefix_kernel.available(q, keys):
        return prefix_kernel.forward(q, keys, values, ranges, scale=scale, cap=cap, exact=exact)
    plan = _Plan(q, keys, ranges)
    # Transposed once, outside the loop, so that the tiles' products have their operands in memory order.
    values_t = rearrange(values, "b g c k -> b g k c")
    q = plan.rows(q)

    def tile(end: int, q_t: Array, ranges_t: Array) -> Pair:
        # Keys are on the rows and threads on the columns of the scores: sums over keys are then sums of vectors.
        s = soft_cap(scale * dot("bgck,bgkn->bgcn", keys[:, :, :end], q_t), cap)
        s = jnp.where(plan.mask_t(ranges_t, end), s, NEG)
        top = jnp.max(s, axis=2, keepdims=True)
        w = jnp.exp(s - top)
        total = jnp.sum(w, axis=2, keepdims=True)
        out = dot("bgkc,bgcn->bgkn", values_t[..., :end], w.astype(values.dtype))
        return out / total, (top + jnp.log(total))[:, :, 0]

    def body(i: Array, done: Pair) -> Pair:
        # One branch per number of key blocks, because slices need static sizes.
        branches = [partial(tile, end) for end in plan.ends]
        out, lse = jax.lax.switch(plan.blocks(i), branches, plan.columns(q, i), plan.ranges_t(i))
        return plan.put(done[0], out, i), plan.put(done[1][..., None], lse[:, :, None], i)[..., 0]

    zeros = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:-1], jnp.float32))
    out, lse = jax.lax.fori_loop(0, plan.tiles, body, jax.tree.map(plan.split, zeros))
    return plan.threads_of(out), plan.threads_of(lse)


def _backward(
    q: Array,
    keys: Array,
    values: Array,
    ranges: Array,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
    *,
    scale: float,
    cap: float | None,
    exact: str | None,
) -> tuple[Array, Array, Array]:
    # Gradients of q, keys and values. The scores are computed again from the log-sum-exp instead of being stored
    # (FlashAttention, arXiv 2205.14135, algorithm 4): no array of rows x keys outlives its tile.
    if prefix_kernel.available(q, keys):
        args = (q, keys, values, ranges, out, lse, d_out, d_lse)
        return prefix_kernel.backward(*args, scale=scale, cap=cap, exact=exact)
    plan = _Plan(q, keys, ranges)
    dot = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    keys_t = rearrange(keys, "b g c k -> b g k c")
    q_rows, out, d_out, lse, d_lse = map(plan.rows, (q, out, d_out, lse, d_lse))
    # sum_c p_c dp_c of the softmax's gradient is an inner product of results (algorithm 4, line 4).
    less = jnp.einsum("...k,...k->...", out, d_out, precision="highest") - d_lse

    def tile(end: int, sums: Pair, q: Array, d: Array, less: Array, lse: Array, ranges_t, fresh) -> Any:
        s = soft_cap(scale * dot("bgck,bgkn->bgcn", keys[:, :, :end], q), cap)
        # Masked after the subtraction: without visible keys lse is about NEG as well, and exp(NEG - lse) would be 1.
        p = jnp.exp(jnp.where(plan.mask_t(ranges_t, end), s - lse[:, :, None], NEG))
        low = d.astype(values.dtype)
        ds = scale * p * (dot("bgck,bgkn->bgcn", values[:, :, :end], low) - less[:, :, None])
        # d c tanh(s / c) = (1 - tanh(s / c)^2) ds
        ds = ds if cap is None else ds * (1 - jnp.square(s / cap))
        p, ds = p.astype(values.dtype), ds.astype(values.dtype)
        dq = dot("bgkc,bgcn->bgkn", keys_t[..., :end], ds)
        # The last tile may repeat rows of the one before, which count once.
        dk = dot("bgcn,bgnk->bgck", ds, rearrange(jnp.where(fresh, q, 0), "b g k n -> b g n k"))
        dv = dot("bgcn,bgnk->bgck", p, rearrange(jnp.where(fresh, low, 0), "b g k n -> b g n k"))
        return tuple(x.at[:, :, :end].add(y) for x, y in zip(sums, (dk, dv))), dq

    def body(i: Array, done: tuple[Array, Pair]) -> tuple[Array, Pair]:
        d_q, sums = done
        scalars = (plan.columns(x[..., None], i)[:, :, 0] for x in (less, lse))
        rows = (plan.columns(q_rows, i), plan.columns(d_out, i), *scalars)
        branches = [partial(tile, end) for end in plan.ends]
        sums, dq = jax.lax.switch(plan.blocks(i), branches, sums, *rows, plan.ranges_t(i), plan.fresh(i))
        return plan.put(d_q, dq.astype(q.dtype), i), sums

    # All tiles add to the gradients of the keys: in float32, since small terms vanish in a bfloat16 sum.
    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    zeros = plan.split(jnp.zeros(q_rows.shape, q.dtype))
    d_q, (d_keys, d_values) = jax.lax.fori_loop(0, plan.tiles, body, (zeros, sums))
    return plan.threads_of(d_q), d_keys.astype(keys.dtype), d_values.astype(values.dtype)


class _Plan:
    """The tiles: which rows of queries tile i has, and how many blocks of keys it attends to."""

    def __init__(self, q: Array, keys: Array, ranges: Array):
        B, P, M, self.T, self.H, _ = q.shape
        self.G, C = keys.shape[1:3]
        # A tile has rows of every device: each device computes on its own.
        self.shards = count_spare_shards(B) if M * self.T % count_spare_shards(B) == 0 else 1
        self.axes = spare_axes(B) if self.shards > 1 else ()
        self.R = M * self.T // self.shards
        least = MIN_ROWS if platform_of(q) == "cpu" else 8 * MIN_ROWS
        most = max(least, TILE_BYTES // (4 * B * self.H * C))
        self.count = -(-self.R // most)  # tiles of a pass
        # Spread evenly over the tiles, so that the last one repeats few rows of the one before.
        self.size = -(-self.R // self.count)
        self.tiles = P * self.count
        block = max(KEY_BLOCK, -(-C // KEY_BLOCKS))
        self.ends = [min(end, C) for end in range(block, C + block, block)]
        self.ranges = self.split(self.by_device(rearrange(ranges, "b m t e -> b e (m t)")))
        # A tile stops at the last block of keys that any of its rows attends to: queries in text order cost half.
        end = jnp.max(self.ranges[:, 1], axis=tuple(range(self.ranges.ndim - 2)))  # [R]
        self.last = jnp.maximum(end - 1, 0) // block

    def _pattern(self, pattern: str) -> str:
        # Without the axis d where D = 1: an axis of size 1 changes the last bits on a CPU.
        return pattern.replace("d ", "") if self.shards == 1 else pattern

    def by_device(self, x: Array) -> Array:
        """Splits the rows, axis 2 of x, into [D, R] where D > 1."""
        return x if self.shards == 1 else rearrange(x, "b p (d r) ... -> b p d r ...", d=self.shards)

    def split(self, x: Array) -> Array:
        """Splits axis 2, of D, over the devices."""
        return split_axis(x, 2, self.axes) if self.axes else x

    def rows(self, x: Array) -> Array:
        """[B, P, D, R, H, ...] from [B, P, M, T, H, ...]; without the axis D where D = 1, here and below."""
        return self.split(self.by_device(rearrange(x, "b p m t ... -> b p (m t) ...")))

    def threads_of(self, x: Array) -> Array:
        """Undoes `rows`."""
        x = x if self.shards == 1 else rearrange(x, "b p d r ... -> b p (d r) ...")
        return rearrange(x, "b p (m t) ... -> b p m t ...", t=self.T)

    def _at(self, i: Array) -> tuple[Array, Array]:
        # The pass and the first row of tile i. The last tile is moved back to be full: all tiles have one shape.
        return i // self.count, jnp.minimum(i % self.count * self.size, self.R - self.size)

    def blocks(self, i: Array) -> Array:
        """Number of blocks of keys beyond the first that tile i attends to."""
        return jnp.max(jax.lax.dynamic_slice_in_dim(self.last, self._at(i)[1], self.size))

    def ranges_t(self, i: Array) -> Array:
        """int32 [B, 2, N]: the ranges of tile i, a column for each of its N rows."""
        x = jax.lax.dynamic_slice_in_dim(self.ranges, self._at(i)[1], self.size, axis=-1)
        x = x.reshape(*x.shape[:2], self.shards, -1)
        return repeat(x, "b e d n -> b e (d q n)", q=self.H // self.G)

    def mask_t(self, ranges_t: Array, end: int) -> Array:
        """bool [B, 1, end, N]: the mask of a tile over its first keys."""
        c = jnp.arange(end)[:, None]
        return ((c >= ranges_t[:, :1]) & (c < ranges_t[:, 1:]))[:, None]

    def fresh(self, i: Array) -> Array:
        """bool [N]: the rows of tile i that no tile before it had."""
        row = self._at(i)[1] + jnp.arange(self.size)
        return jnp.tile(row >= i % self.count * self.size, self.shards * (self.H // self.G))

    def columns(self, x: Array, i: Array) -> Array:
        """Tile i of x [B, P, D, R, H, K] as [B, G, K, N], rows by device, query head of the group, then token."""
        size = (x.shape[0], 1, *x.shape[2:-3], self.size, *x.shape[-2:])
        x = jax.lax.dynamic_slice(x, self._start(i, x), size)
        return rearrange(x, self._pattern("b 1 d n (g q) k -> b g k (d q n)"), g=self.G)

    def put(self, all_rows: Array, x: Array, i: Array) -> Array:
        """Writes x [B, G, K, N] to its place in [B, P, D, R, H, K]."""
        d = {} if self.shards == 1 else {"d": self.shards}
        x = rearrange(x, self._pattern("b g k (d q n) -> b 1 d n (g q) k"), n=self.size, **d)
        return jax.lax.dynamic_update_slice(all_rows, x, self._start(i, all_rows))

    def _start(self, i: Array, all_rows: Array) -> tuple[Any, ...]:
        p, row = self._at(i)
        return (0, p, *[0] * (all_rows.ndim - 5), row, 0, 0)


# --------------------------------------------------------------------------------------------------- the primitives

# Primitives and no `custom_vmap`, which cannot be differentiated before it is mapped (see `layers.project`). The
# backward pass is one, too: autodiff and `scan` would split its loop and store, for all tiles, values that depend on
# the ranges alone.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(scale: float, cap: float | None, exact: str | None, *args: Any) -> Any:
    return _shared.bind(*args, scale=scale, cap=cap, exact=exact)


def _pull(scale: float, cap: float | None, exact: str | None, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    args, found = saved
    slopes = _gradient.bind(*args, *found, *cotangents, scale=scale, cap=cap, exact=exact)
    # The cotangent of an integer input (the ranges) must have the dtype float0.
    return (*slopes, np.zeros(args[3].shape, jax.dtypes.float0))


def _keep(scale: float, cap: float | None, exact: str | None, *args: Any) -> tuple[Any, Any]:
    found = _shared.bind(*args, scale=scale, cap=cap, exact=exact)
    return found, (args, found)


_differentiable.defvjp(_keep, _pull)


def _lift(p: Primitive, args: Sequence[Array], axes: Sequence[int | None], **static: Any) -> tuple[Any, Any]:
    # The mapped axis joins the texts if the keys have it, else the threads if the ranges have it, else the passes.
    size = next(x.shape[a] for x, a in zip(args, axes) if a is not None)
    q, keys, values, ranges = (x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(args, axes))
    q = q if axes[0] is not None else repeat(q, "... -> n ...", n=size)
    if axes[1] is not None or axes[2] is not None:
        at, merged, split = 0, "n b ... -> (n b) ...", "(n b) ... -> n b ..."
        arrays = ((keys, axes[1]), (values, axes[2]), (ranges, axes[3]))
        keys, values, ranges = (
            rearrange(x, merged) if a is not None else repeat(x, "b ... -> (n b) ...", n=size) for x, a in arrays
        )
    # Axes that share the keys become rows of queries: neither keys nor, over passes, the ranges are repeated.
    elif axes[3] is not None:
        at, merged, split = 2, "n b p m ... -> b p (n m) ...", "b p (n m) ... -> b p n m ..."
        ranges = rearrange(ranges, "n b m ... -> b (n m) ...")
    else:
        at, merged, split = 1, "n b p ... -> b (n p) ...", "b (n p) ... -> b n p ..."
    found = p.bind(rearrange(q, merged), keys, values, ranges, **static)
    return tuple(rearrange(x, split, n=size) for x in found), (at, at)


def _slope(
    primals: Sequence[Any], tangents: Sequence[Any], *, scale: float, cap: float | None, exact: str | None
) -> tuple[Any, Any]:
    *moved, ranges = primals
    moving = [ad.instantiate_zeros(t) for t in tangents[:3]]
    return jax.jvp(lambda *moved: _differentiable(scale, cap, exact, *moved, ranges), moved, moving)


def _primitive(name: str, f: Callable[..., Any], shapes: Callable[..., Any], lift: Callable[..., Any]) -> Primitive:
    def abstract(q: Any, keys: Any, values: Any, *rest: Any, **static: Any) -> list[jax.core.ShapedArray]:
        return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes(q, keys, values)]

    p = Primitive(name)
    p.multiple_results = True
    p.def_impl(jax.jit(f, static_argnames=("scale", "cap", "exact")))
    p.def_abstract_eval(abstract)
    mlir.register_lowering(p, mlir.lower_fun(f, multiple_results=True))
    batching.primitive_batchers[p] = partial(lift, p)
    return p


_shared = _primitive(
    "attend_shared", _forward, lambda q, *_: [(q.shape, jnp.float32), (q.shape[:-1], jnp.float32)], _lift
)
# Its mapped axis always joins the texts: a gradient taken under `vmap` has gradients of the keys per row.
_gradient = _primitive(
    "attend_shared_gradient", _backward, lambda *inputs: [(x.shape, x.dtype) for x in inputs], lift_to_rows
)
ad.primitive_jvps[_shared] = _slope
