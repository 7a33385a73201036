"""Pallas kernel for TPUs of `prefix_attention.attend_shared`: scores stay in a core's vector memory.

The plain form writes the scores of each tile to main memory, several times in float32: on a TPU v6e two fifths of the
traffic of a Quiet-STaR update of Mistral-7B. Here a grid cell has the queries of one head of a pass, a tile of n rows,
and all keys of their text, which stay in place from cell to cell (FlashAttention, arXiv 2205.14135).

Axes as there: B texts, P passes, M threads, T tokens each, H = G Q query heads, C keys; and N = M T rows, padded to
whole tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from qstar.mesh import Rules, batch_axes, count_spare_shards, spare_axes
from qstar.models.flash import platform_of
from qstar.models.scores import NEG, soft_cap

ROWS = 256  # of a tile: the columns of its scores
KEYS = 128  # in a block of keys, the rows of a tile's scores
MOST_KEYS = 4096  # of a text whose keys, values and their gradients fit into the vector memory of all TPUs since v4
VECTOR_MEMORY = 64 * 2**20  # bytes that the compiler may use of it


def available(q: Array, keys: Array) -> bool:
    """Whether the kernel computes these queries [B, P, M, T, H, K] and keys [B, G, C, K]: bfloat16 on a TPU."""
    divides = bool(batch_axes(q.shape[0])) or q.shape[2] % count_spare_shards(q.shape[0]) == 0
    small = q.dtype == jnp.bfloat16 and keys.shape[2] <= MOST_KEYS and keys.shape[3] % 64 == 0
    return platform_of(q) == "tpu" and small and divides


def forward(q: Array, keys: Array, values: Array, ranges: Array, **static: Any) -> tuple[Array, Array]:
    """Computes `prefix_attention._forward`: [B, P, M, T, H, K] and log-sum-exp [B, P, M, T, H], float32."""
    return _by_device(partial(_forward, **static), q, keys, (q, keys, values, ranges), ("q", "lse"))


def backward(*args: Array, **static: Any) -> tuple[Array, Array, Array]:
    """Computes `prefix_attention._backward`: gradients of q, keys and values from (q, keys, values, ranges, out, lse)
    and the cotangents of the last two."""
    return _by_device(partial(_backward, **static), args[0], args[1], args, ("q", "keys", "keys"))


def _by_device(run: Callable[..., Any], q: Array, keys: Array, args: tuple[Array, ...], results: tuple) -> Any:
    mesh, rules = jax.typeof(q).sharding.mesh, Rules()
    run = partial(run, interpret=platform_of(q) == "cpu", summed=())
    if mesh.empty or mesh.size == 1:
        return run(*args)
    # XLA cannot partition a Pallas kernel: each device runs it on its texts, or its threads of every text, and heads.
    rows = tuple(a for a in rules.batch if a in mesh.shape) if count_spare_shards(q.shape[0]) == 1 else ()
    threads = spare_axes(q.shape[0])
    heads = tuple(a for a in rules.heads if a in mesh.shape)
    heads = heads if keys.shape[1] % math.prod(mesh.shape[a] for a in heads) == 0 else ()
    by_head = PartitionSpec(rows or None, None, threads or None, None, heads or None)
    where = {
        "q": by_head,
        "lse": by_head,
        "keys": PartitionSpec(rows or None, heads or None),
        "ranges": PartitionSpec(rows or None, threads or None),
    }
    kinds = ("q", "keys", "keys", "ranges", "q", "lse", "q", "lse")[: len(args)]
    specs, made = tuple(where[k] for k in kinds), tuple(where[k] for k in results)
    f = partial(run, summed=threads)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=made, check_vma=False)(*args)


class _Tiles:
    """Rows of queries as the kernel takes them, and the blocks of keys that each tile attends to."""

    def __init__(self, q: Array, keys: Array, ranges: Array):
        (_, self.P, self.M, self.T, _, _), self.G = q.shape, keys.shape[1]
        rows = self.M * self.T
        self.n = min(ROWS, -(-rows // KEYS) * KEYS)
        self.count = -(-rows // self.n)
        self.padding = self.count * self.n - rows
        self.keys_padding = -keys.shape[2] % KEYS
        # Rows that are padded on attend to no key. A window may begin before the text.
        ranges = jnp.maximum(rearrange(ranges, "b m t e -> b e (m t)"), 0)
        ranges = jnp.pad(ranges, [(0, 0), (0, 0), (0, self.padding)])
        first, last = (rearrange(x, "b (i n) -> b i n", n=self.n) for x in (ranges[:, 0], ranges[:, 1]))
        some = first < last
        self.ranges = ranges
        self.blocks = (
            jnp.min(jnp.where(some, first, keys.shape[2]), axis=-1) // KEYS,
            -(-jnp.max(jnp.where(some, last, 0), axis=-1) // KEYS),
        )

    def rows(self, x: Array) -> Array:
        """[B, G, PQ, N, K] from [B, P, M, T, H, K]."""
        x = rearrange(x, "b p m t (g q) k -> b g (p q) (m t) k", g=self.G)
        return jnp.pad(x, [(0, 0)] * 3 + [(0, self.padding), (0, 0)])

    def scalars(self, x: Array) -> Array:
        """[B, G, PQ, 1, N] from [B, P, M, T, H]: a row of numbers per tile."""
        return rearrange(self.rows(x[..., None]), "b g r n 1 -> b g r 1 n")

    def threads(self, x: Array) -> Array:
        """Undoes `rows`."""
        x = x[:, :, :, : self.M * self.T]
        return rearrange(x, "b g (p q) (m t) k -> b p m t (g q) k", p=self.P, m=self.M)

    def texts(self, x: Array) -> Array:
        """Pads the keys [B, G, C, K] to whole blocks."""
        return jnp.pad(x, [(0, 0), (0, 0), (0, self.keys_padding), (0, 0)])

    def call(
        self,
        kernel: Callable[..., Any],
        rows: Array,
        inputs: dict[str, list],
        results: dict[str, list],
        products: int,
        **how: Any,
    ) -> Any:
        """Runs a kernel over the grid; `inputs` and `results` are arrays (or shapes) by how they are cut."""
        K, C = rows.shape[-1], inputs["text"][0].shape[2]
        arrays = [x for part in (inputs, results) for xs in part.values() for x in xs]
        # For the compiler's scheduler and `qstar plan`: the positions of a text attend to half of it on average.
        read = (C + KEYS) // 2
        costs = pl.CostEstimate(
            flops=2 * products * rows.size * read,
            transcendentals=rows.size // K * read,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )
        cut = {
            "rows": pl.BlockSpec((1, 1, 1, self.n, K), lambda b, g, r, i, *_: (b, g, r, i, 0)),
            "scalars": pl.BlockSpec((1, 1, 1, 1, self.n), lambda b, g, r, i, *_: (b, g, r, 0, i)),
            "text": pl.BlockSpec((1, 1, C, K), lambda b, g, r, i, *_: (b, g, 0, 0)),
            "text_t": pl.BlockSpec((1, 1, K, C), lambda b, g, r, i, *_: (b, g, 0, 0)),
            "ranges": pl.BlockSpec((1, 2, self.n), lambda b, g, r, i, *_: (b, 0, i)),
        }
        specs = [[cut[kind] for kind, xs in part.items() for _ in xs] for part in (inputs, results)]
        grid = (*rows.shape[:3], self.count)
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2, grid=grid, in_specs=specs[0], out_specs=specs[1]
            ),
            out_shape=[x for xs in results.values() for x in xs],
            compiler_params=pltpu.CompilerParams(
                # The gradients of a text's keys add up over the last two axes.
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VECTOR_MEMORY,
            ),
            cost_estimate=costs,
            **how,
        )(*self.blocks, *(x for xs in inputs.values() for x in xs))


def _scores(keys: Array, q: Array, dot: Any, scale: float, cap: float | None) -> Array:
    # Keys are on the rows and queries on the columns: maxima and sums over keys are then those of whole vectors.
    return soft_cap(scale * dot(keys, q, (((1,), (1,)), ((), ()))), cap)


def _visible(ranges: Any, j: Array, shape: tuple[int, ...]) -> Array:
    c = j * KEYS + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (c >= ranges[0, 0:1, :]) & (c < ranges[0, 1:2, :])


def _products(exact: str | None) -> tuple[Any, Any]:
    dot = partial(jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
    return dot, lambda x, y: dot(x, y, (((1,), (0,)), ((), ())))


def _forward(
    q: Array,
    keys: Array,
    values: Array,
    ranges: Array,
    *,
    scale: float,
    cap: float | None,
    exact: str | None,
    interpret: bool,
    summed: tuple[str, ...],
) -> tuple[Array, Array]:
    tiles = _Tiles(q, keys, ranges)
    dot, product = _products(exact)

    def kernel(first, last, q, keys, values_t, ranges, out, lse):
        b, i, rows = pl.program_id(0), pl.program_id(3), q[0, 0, 0]

        def block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, sums = carry
            at = pl.ds(pl.multiple_of(j * KEYS, KEYS), KEYS)
            s = _scores(keys[0, 0, at, :], rows, dot, scale, cap)
            s = jnp.where(_visible(ranges, j, s.shape), s, NEG)
            higher = jnp.maximum(top, jnp.max(s, axis=0, keepdims=True))
            w, shrink = jnp.exp(s - higher), jnp.exp(top - higher)
            sums = shrink * sums + product(values_t[0, 0, :, at], w.astype(values_t.dtype))
            return higher, shrink * total + jnp.sum(w, axis=0, keepdims=True), sums

        one = (1, tiles.n)
        start = (jnp.full(one, NEG), jnp.zeros(one), jnp.zeros((rows.shape[1], tiles.n)))
        top, total, sums = jax.lax.fori_loop(first[b, i], last[b, i], block, start)
        # Without a block of keys the total is 0.
        total = jnp.maximum(total, 1e-30)
        out[0, 0, 0] = (sums / total).T
        lse[0, 0, 0] = top + jnp.log(total)

    rows = tiles.rows(q)
    inputs = {
        "rows": [rows],
        "text": [tiles.texts(keys)],
        "text_t": [rearrange(tiles.texts(values), "b g c k -> b g k c")],
        "ranges": [tiles.ranges],
    }
    like = jax.ShapeDtypeStruct
    scalars = like((*rows.shape[:3], 1, rows.shape[3]), jnp.float32)
    results = {"rows": [like(rows.shape, jnp.float32)], "scalars": [scalars]}
    out, lse = tiles.call(kernel, rows, inputs, results, 2, interpret=interpret, name="attend_shared")
    return tiles.threads(out), tiles.threads(rearrange(lse, "b g r 1 n -> b g r n 1"))[..., 0]


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
    interpret: bool,
    summed: tuple[str, ...],
) -> tuple[Array, Array, Array]:
    tiles = _Tiles(q, keys, ranges)
    dot, product = _products(exact)
    # sum_c p_c dp_c of the softmax's gradient is an inner product of results (algorithm 4, line 4).
    less = jnp.sum(out * d_out, axis=-1) - d_lse

    def kernel(first, last, q, d, less, lse, keys, values, keys_t, ranges, d_q, d_keys, d_values):
        b, i, rows, low = pl.program_id(0), pl.program_id(3), q[0, 0, 0], d[0, 0, 0]

        @pl.when((pl.program_id(2) == 0) & (i == 0))
        def _() -> None:
            d_keys[...], d_values[...] = jnp.zeros_like(d_keys), jnp.zeros_like(d_values)

        def block(j: Array, sums: Array) -> Array:
            at = pl.ds(pl.multiple_of(j * KEYS, KEYS), KEYS)
            s = _scores(keys[0, 0, at, :], rows, dot, scale, cap)
            # Masked after the subtraction: without visible keys the log-sum-exp is about NEG as well.
            p = jnp.exp(jnp.where(_visible(ranges, j, s.shape), s - lse[0, 0, 0], NEG))
            ds = scale * p * (dot(values[0, 0, at, :], low, (((1,), (1,)), ((), ()))) - less[0, 0, 0])
            # d c tanh(s / c) = (1 - tanh(s / c)^2) ds
            ds = ds if cap is None else ds * (1 - jnp.square(s / cap))
            p, ds = p.astype(low.dtype), ds.astype(low.dtype)
            d_keys[0, 0, at, :] += product(ds, rows)
            d_values[0, 0, at, :] += product(p, low)
            return sums + product(keys_t[0, 0, :, at], ds)

        sums = jax.lax.fori_loop(first[b, i], last[b, i], block, jnp.zeros((rows.shape[1], tiles.n)))
        d_q[0, 0, 0] = sums.T.astype(d_q.dtype)

    rows, texts = tiles.rows(q), tiles.texts(keys)
    inputs = {
        "rows": [rows, tiles.rows(d_out.astype(values.dtype))],
        "scalars": [tiles.scalars(less), tiles.scalars(lse)],
        "text": [texts, tiles.texts(values)],
        "text_t": [rearrange(texts, "b g c k -> b g k c")],
        "ranges": [tiles.ranges],
    }
    like = jax.ShapeDtypeStruct
    results = {"rows": [like(rows.shape, q.dtype)], "text": [like(texts.shape, jnp.float32)] * 2}
    d_q, *pair = tiles.call(kernel, rows, inputs, results, 5, interpret=interpret, name="attend_shared_gradient")
    d_keys, d_values = (x[:, :, : keys.shape[2]] for x in pair)
    if summed:
        # Each device has its threads' part of the gradients of the keys.
        d_keys, d_values = jax.lax.psum((d_keys, d_values), summed)
    return tiles.threads(d_q), d_keys.astype(keys.dtype), d_values.astype(values.dtype)
