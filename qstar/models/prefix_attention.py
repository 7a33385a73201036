"""Attention of many threads to one text that they share: what `attend` means for one of them, run as one causal pass.

`attend_shared` is written, like all of `models`, for one thread. Lifted by `vmap` over threads whose keys are the same, it
does not become a batched product: its rule lays the threads side by side as rows of queries over the one set of keys, as
ordinary causal attention with more query heads. These rows are taken a tile at a time, which

* stops at the last block of keys that any row of the tile sees, so threads in the order of their text cost half,
* keeps every array of rows x keys as small as a cache, and none of them for the backward pass, which forms the scores
  anew from the log-sum-exp (FlashAttention, arXiv 2205.14135, algorithm 4), and
* has keys on the rows of the scores and threads on the columns, so that sums over keys are sums of vectors, and every
  product but one has its operands where they lie.

It is a primitive and no `custom_vmap`, because that one cannot be differentiated before it is mapped (see `project`).

Shapes of the lifted form: B texts, R repeats (passes) that share sight, C threads, T tokens each; S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

NEG = -1e30  # as in `attention`
TILE_BYTES = 2 * 2**20  # of float32 scores alive at once
KEY_BLOCKS = 8  # a tile reads the first 1 .. 8 of as many blocks of keys
KEY_BLOCK = 32  # keys in a block, at least

Pair = tuple[jax.Array, jax.Array]


def attend_shared(
    q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, *, scale: float, exact: str | None
) -> Pair:
    """Softmax attention of one thread to a text, and what it takes to join it with attention to other tokens.

    Args:
      q: [T, H, K]. keys, values: [G, S, K]. mask: bool [T, S]. scale: on the scores. exact: precision of products.

    Returns:
      [T, H, K] float32, and the log of the sum of exponentials [T, H] float32, very negative where nothing is seen.
    """
    mask = jnp.broadcast_to(mask, (q.shape[0], keys.shape[1]))
    out, lse = _shared.bind(q[None, None, None], keys[None], values[None], mask[None, None], scale=scale, exact=exact)
    return out[0, 0, 0], lse[0, 0, 0]


# ---------------------------------------------------------------------------------------------------- forward, backward


def _forward(
    q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, *, scale: float, exact: str | None
) -> Pair:
    """q [B, R, C, T, H, K]; keys, values [B, G, S, K]; mask [B, C, T, S]: out like q, lse [B, R, C, T, H]; float32."""
    B, R, C, T, H, K = q.shape
    dot = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    if R * C == 1:  # one thread per text, as in generation: nothing to lay side by side
        s = scale * dot("btgrk,bgsk->bgrts", q.reshape(B, T, keys.shape[1], -1, K), keys)
        s = jnp.where(mask[:, :, None], s, NEG)
        lse = jax.nn.logsumexp(s, axis=-1)
        out = dot("bgrts,bgsk->btgrk", jnp.exp(s - lse[..., None]).astype(values.dtype), values)
        return out.reshape(q.shape), jnp.moveaxis(lse, 3, 1).reshape(q.shape[:-1])
    plan = _Plan(q, keys, mask)
    values_t = jnp.swapaxes(values, 2, 3)  # [B, G, K, S]
    q = q.reshape(B, R, C * T, H, K)

    def some(end: int, q_t: jax.Array, mask_t: jax.Array) -> Pair:
        s = scale * dot("bgsk,bgkn->bgsn", keys[:, :, :end], q_t)
        s = jnp.where(mask_t[:, None, :end], s, NEG)
        top = jnp.max(s, axis=2, keepdims=True)
        w = jnp.exp(s - top)
        total = jnp.sum(w, axis=2, keepdims=True)
        out = dot("bgks,bgsn->bgkn", values_t[..., :end], w.astype(values.dtype))
        return out / total, (top + jnp.log(total))[:, :, 0]

    def body(i: jax.Array, kept: Pair) -> Pair:
        out, lse = jax.lax.switch(
            plan.blocks(i), [partial(some, end) for end in plan.ends], plan.columns(q, i), plan.mask_t(i)
        )
        return plan.put(kept[0], out, i), plan.put_lse(kept[1], lse, i)

    zeros = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:-1], jnp.float32))
    out, lse = jax.lax.fori_loop(0, plan.tiles, body, zeros)
    return out.reshape(B, R, C, T, H, K), lse.reshape(B, R, C, T, H)


def _backward(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    *,
    scale: float,
    exact: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, keys and values, from the result and its log-sum-exp instead of the scores."""
    B, R, C, T, H, K = q.shape
    plan = _Plan(q, keys, mask)
    dot = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    keys_t = jnp.swapaxes(keys, 2, 3)
    flat = (B, R, C * T, H)
    q_rows, out, d_out = (x.reshape(*flat, K) for x in (q, out, d_out))
    lse, less = lse.reshape(flat), jnp.einsum("...k,...k->...", out, d_out, precision="highest") - d_lse.reshape(flat)

    def some(end: int, sums: Pair, q: jax.Array, d: jax.Array, less: jax.Array, lse: jax.Array, mask_t, fresh) -> Any:
        s = scale * dot("bgsk,bgkn->bgsn", keys[:, :, :end], q)
        p = jnp.exp(jnp.where(mask_t[:, None, :end], s - lse[:, :, None], NEG))
        low = d.astype(values.dtype)
        ds = scale * p * (dot("bgsk,bgkn->bgsn", values[:, :, :end], low) - less[:, :, None])
        p, ds = p.astype(values.dtype), ds.astype(values.dtype)
        dq = dot("bgks,bgsn->bgkn", keys_t[..., :end], ds)
        # A last tile that reaches back over rows of the one before counts those once.
        dk = dot("bgsn,bgnk->bgsk", ds, jnp.swapaxes(jnp.where(fresh, q, 0), 2, 3))
        dv = dot("bgsn,bgnk->bgsk", p, jnp.swapaxes(jnp.where(fresh, low, 0), 2, 3))
        return tuple(x.at[:, :, :end].add(y) for x, y in zip(sums, (dk, dv))), dq

    def body(i: jax.Array, kept: tuple[jax.Array, Pair]) -> tuple[jax.Array, Pair]:
        d_q, sums = kept
        numbers = (plan.columns(x[..., None], i)[:, :, 0] for x in (less, lse))
        rows = (plan.columns(q_rows, i), plan.columns(d_out, i), *numbers)
        branches = [partial(some, end) for end in plan.ends]
        sums, dq = jax.lax.switch(plan.blocks(i), branches, sums, *rows, plan.mask_t(i), plan.fresh(i))
        return plan.put(d_q, dq.astype(q.dtype), i), sums

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    d_q, (d_keys, d_values) = jax.lax.fori_loop(0, plan.tiles, body, (jnp.zeros(q_rows.shape, q.dtype), sums))
    return d_q.reshape(q.shape), d_keys.astype(keys.dtype), d_values.astype(values.dtype)


class _Plan:
    """Which rows of queries make tile i, where they lie, and how many blocks of keys they see."""

    def __init__(self, q: jax.Array, keys: jax.Array, mask: jax.Array):
        self.B, self.R, self.C, self.T, self.H, _ = q.shape
        self.G, self.S = keys.shape[1:3]
        threads = TILE_BYTES // (4 * self.B * self.T * self.H * self.S)
        self.count = -(-self.C // max(1, threads))  # tiles in a repeat
        self.threads = -(-self.C // self.count)
        self.tiles = self.R * self.count
        block = max(KEY_BLOCK, -(-self.S // KEY_BLOCKS))
        self.ends = [min(end, self.S) for end in range(block, self.S + block, block)]
        self.mask = jnp.moveaxis(mask, 3, 1).reshape(self.B, self.S, self.C * self.T)
        seen = jnp.max(jnp.where(jnp.any(mask, axis=(0, 2)), jnp.arange(self.S), 0), axis=1)  # [C] last key seen
        self.last = seen // block

    def _at(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        return i // self.count, jnp.minimum(i % self.count * self.threads, self.C - self.threads)

    def blocks(self, i: jax.Array) -> jax.Array:
        """Returns how many blocks of keys beyond the first tile i sees."""
        return jnp.max(jax.lax.dynamic_slice_in_dim(self.last, self._at(i)[1], self.threads))

    def mask_t(self, i: jax.Array) -> jax.Array:
        """Returns bool [B, S, n]: the mask of tile i, a column for each of its n rows."""
        x = jax.lax.dynamic_slice_in_dim(self.mask, self._at(i)[1] * self.T, self.threads * self.T, axis=2)
        return jnp.tile(x, (1, 1, self.H // self.G))

    def fresh(self, i: jax.Array) -> jax.Array:
        """Returns bool [n]: the rows of tile i that no tile before it had."""
        thread = self._at(i)[1] + jnp.arange(self.threads * self.T) // self.T
        return jnp.tile(thread >= i % self.count * self.threads, self.H // self.G)

    def columns(self, x: jax.Array, i: jax.Array) -> jax.Array:
        """Returns tile i of x [B, R, C * T, H, K] as [B, G, K, n], rows ordered by query head of the group, then token."""
        r, c = self._at(i)
        n, K = self.threads * self.T, x.shape[-1]
        x = jax.lax.dynamic_slice(x, (0, r, c * self.T, 0, 0), (self.B, 1, n, self.H, K))
        x = x.reshape(self.B, n, self.G, self.H // self.G, K)
        return jnp.transpose(x, (0, 2, 4, 3, 1)).reshape(self.B, self.G, K, -1)

    def put(self, all_rows: jax.Array, x: jax.Array, i: jax.Array) -> jax.Array:
        """Writes x [B, G, K, n] to its place in [B, R, C * T, H, K]."""
        r, c = self._at(i)
        x = x.reshape(self.B, self.G, x.shape[2], self.H // self.G, -1)
        x = jnp.transpose(x, (0, 4, 1, 3, 2)).reshape(self.B, 1, -1, self.H, all_rows.shape[-1])
        return jax.lax.dynamic_update_slice(all_rows, x, (0, r, c * self.T, 0, 0))

    def put_lse(self, all_rows: jax.Array, x: jax.Array, i: jax.Array) -> jax.Array:
        """Writes x [B, G, n] to its place in [B, R, C * T, H]."""
        return self.put(all_rows[..., None], x[:, :, None], i)[..., 0]


# --------------------------------------------------------------------------------------------------- the primitive


# Both halves are primitives: autodiff and `scan`, which would take their loops apart and store what depends on the mask
# alone for all tiles, leave them whole.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(scale: float, exact: str | None, q: Any, keys: Any, values: Any, mask: Any) -> Any:
    return _shared.bind(q, keys, values, mask, scale=scale, exact=exact)


def _keep(scale: float, exact: str | None, *args: Any) -> tuple[Any, Any]:
    found = _shared.bind(*args, scale=scale, exact=exact)
    return found, (*args, *found)


def _pull(scale: float, exact: str | None, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    return (*_gradient.bind(*saved, *cotangents, scale=scale, exact=exact), np.zeros(saved[3].shape, jax.dtypes.float0))


_differentiable.defvjp(_keep, _pull)


def _lift(args: Sequence[jax.Array], axes: Sequence[int | None], **static: Any) -> tuple[Pair, tuple[int, int]]:
    """Adds a mapped axis: to the texts if the keys have it, else to the threads if the mask has it, else to the repeats."""
    size = next(x.shape[a] for x, a in zip(args, axes) if a is not None)
    q, keys, values, mask = (x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(args, axes))

    def full(x: jax.Array, a: int | None) -> jax.Array:
        return jnp.broadcast_to(x, (size, *x.shape)) if a is None else x

    def merged(x: jax.Array, at: int) -> jax.Array:  # the mapped axis, now first, into axis `at` of the rest
        x = jnp.moveaxis(x, 0, at)
        return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])

    q = full(q, axes[0])
    if axes[1] is not None or axes[2] is not None:
        at, keys, values, mask = 0, *(merged(full(x, a), 0) for x, a in zip((keys, values, mask), axes[1:]))
    elif axes[3] is not None:
        at, mask = 2, merged(mask, 1)
    else:
        at = 1
    found = _shared.bind(merged(q, at), keys, values, mask, **static)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:at], size, -1, *x.shape[at + 1 :])

    return tuple(split(x) for x in found), (at, at)


def _lift_gradient(args: Sequence[jax.Array], axes: Sequence[int | None], **static: Any) -> tuple[Any, tuple[int, ...]]:
    """Adds a mapped axis to the texts. (Only a gradient taken under `vmap` comes here: keys then have gradients apart.)"""
    size = next(x.shape[a] for x, a in zip(args, axes) if a is not None)
    full = (jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(args, axes))
    found = _gradient.bind(*(x.reshape(-1, *x.shape[2:]) for x in full), **static)
    return tuple(x.reshape(size, -1, *x.shape[1:]) for x in found), (0, 0, 0)


def _slope(primals: Sequence[Any], tangents: Sequence[Any], *, scale: float, exact: str | None) -> tuple[Any, Any]:
    *moved, mask = primals
    f: Callable[..., Pair] = lambda *moved: _differentiable(scale, exact, *moved, mask)  # noqa: E731
    return jax.jvp(f, moved, [ad.instantiate_zeros(t) for t in tangents[:3]])


def _primitive(name: str, f: Callable[..., Any], shapes: Callable[..., Any], lift: Callable[..., Any]) -> Primitive:
    def abstract(q: Any, keys: Any, values: Any, *rest: Any, **static: Any) -> list[jax.core.ShapedArray]:
        return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes(q, keys, values)]

    p = Primitive(name)
    p.multiple_results = True
    p.def_impl(jax.jit(f, static_argnames=("scale", "exact")))
    p.def_abstract_eval(abstract)
    mlir.register_lowering(p, mlir.lower_fun(f, multiple_results=True))
    batching.primitive_batchers[p] = lift
    return p


def _results(q: Any, keys: Any, values: Any) -> Any:
    return [(shape, jnp.float32) for shape in (q.shape, q.shape[:-1])]


def _slopes(*inputs: Any) -> Any:
    return [(x.shape, x.dtype) for x in inputs]


_shared = _primitive("attend_shared", _forward, _results, _lift)
_gradient = _primitive("attend_shared_gradient", _backward, _slopes, _lift_gradient)
ad.primitive_jvps[_shared] = _slope
