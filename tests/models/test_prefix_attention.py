"""Attention of many threads to one text: what plain `attend` says of each, gradients included."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar.models import prefix_attention, prefix_kernel
from qstar.models.attention import as_mask, attend
from qstar.types import Segment, Shared

B, P, M, T, H, K, S = 2, 2, 9, 3, 4, 8, 80  # S: three blocks of keys, the last not full


def lifted(kind, positions, window, cap, q, keys, values, own):
    """[B, P, M, T, H, K]: threads that see the text up to their position (within a window), and themselves."""

    def one(q, keys, values, own, j):
        starts = j + jnp.arange(T) - window + 1 if window else jnp.zeros(T, int)
        ranges = jnp.stack([starts, jnp.full(T, j + 1)], axis=1)
        seen = ranges if kind is Shared else as_mask(ranges, S)
        causal = Segment(*own, jnp.tril(jnp.ones((T, T), bool)))
        return attend(q, [kind(keys, values, seen), causal], scale=K**-0.5, cap=cap)

    each = jax.vmap(one, (0, None, None, 0, 0))
    return jax.vmap(jax.vmap(each, (0, None, None, 0, None)))(q, keys, values, own, positions)


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    monkeypatch.setattr(
        prefix_attention, "TILE_BYTES", 4 * B * 10 * H * S
    )  # 10 rows of queries: of 27, the third tile repeats three
    monkeypatch.setattr(prefix_attention, "MIN_ROWS", 1)


@pytest.mark.parametrize("form", ["tiles", "kernel"])
@pytest.mark.parametrize(
    "groups, window, chosen, cap",
    [(4, None, False, None), (2, 7, False, 1.5), (1, None, True, None), (2, 7, True, None)],
)
def test_values_and_gradients_are_those_of_plain_attention(groups, window, chosen, cap, form, monkeypatch):
    # The kernel for TPUs is interpreted here: two blocks of 64 keys, the last not full, and of 27 rows one tile.
    monkeypatch.setattr(prefix_kernel, "available", lambda *args: form == "kernel")
    monkeypatch.setattr(prefix_kernel, "KEYS", 64)
    keys = jax.random.split(jax.random.key(0), 6)
    normal = jax.random.normal
    args = (
        normal(keys[0], (B, P, M, T, H, K)),
        normal(keys[1], (B, groups, S, K)),
        normal(keys[2], (B, groups, S, K)),
        tuple(normal(k, (B, P, M, groups, T, K)) for k in keys[3:5]),
    )
    place = [[70, 3, 79, 0, 41, 33, 32, 12, 64], [1, 2, 0, 50, 75, 31, 63, 8, 9]] if chosen else [range(0, 72, 8)] * B
    positions, factor = jnp.asarray(np.asarray(place)), normal(keys[5], args[0].shape)

    def run(kind, *args):
        def total(*args):
            out = lifted(kind, positions, window, cap, *args)
            return jnp.sum(out * factor), out

        return jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*args)

    (_, ours), d_ours = jax.jit(functools.partial(run, Shared))(*args)
    (_, plain), d_plain = jax.jit(functools.partial(run, Segment))(*args)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    for a, b in zip(jax.tree.leaves(d_ours), jax.tree.leaves(d_plain)):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_gradient_taken_of_each_thread_apart_is_the_same():
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (M, T, H, K))
    k, v = (jax.random.normal(x, (H, S, K)) for x in keys[1:])

    def slopes(kind):
        def one(q, k, v, j):
            ranges = jnp.stack([jnp.zeros(T, int), jnp.full(T, j + 1)], axis=1)
            seen = ranges if kind is Shared else as_mask(ranges, S)
            return jnp.sum(jnp.sin(attend(q, [kind(k, v, seen)], scale=1.0)))

        return jax.vmap(jax.grad(one, (0, 1, 2)), (0, None, None, 0))(q, k, v, jnp.arange(M))

    for a, b in zip(slopes(Shared), slopes(Segment)):
        np.testing.assert_allclose(a, b, atol=1e-4)
