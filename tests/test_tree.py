"""Names, masks and means over pytrees."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar import tree


@flax.struct.dataclass
class Point:
    x: jax.Array
    pair: tuple


TREE = {
    "a": {"kernel": jnp.ones((2, 3)), "ids": jnp.arange(4)},
    "p": Point(jnp.zeros(5), (jnp.ones(1), jnp.ones(2))),
}


def test_names_are_keys_attributes_and_indices():
    assert [n for n, _ in tree.named_leaves(TREE)] == ["a/ids", "a/kernel", "p/x", "p/pair/0", "p/pair/1"]
    doubled = tree.map_named(lambda name, x, y: (name, x.shape == y.shape), TREE, TREE)
    assert doubled["p"].pair[1] == ("p/pair/1", True)


def test_match_marks_the_leaves_whose_name_holds_the_pattern():
    assert jax.tree.leaves(tree.match(TREE, r"kernel$|pair/1")) == [False, True, False, False, True]


def test_cast_leaves_integers_and_keys_alone():
    key = jax.random.key(0)
    out = tree.cast({**TREE, "key": key}, jnp.bfloat16)
    assert (
        out["a"]["kernel"].dtype == jnp.bfloat16
        and out["a"]["ids"].dtype == jnp.int32
        and out["key"].dtype == key.dtype
    )


def test_sizes():
    assert tree.size(TREE) == 6 + 4 + 5 + 1 + 2 == tree.size(jax.eval_shape(lambda: TREE))


def test_masked_mean():
    x, mask = jnp.array([1.0, 2.0, jnp.nan, 4.0]), jnp.array([1.0, 0.0, 0.0, 1.0])
    assert tree.masked_mean(x, mask) == 2.5
    assert tree.masked_mean(x, 0 * mask) == 0
    assert float(tree.masked_mean(x, mask * 0.01)) == pytest.approx(2.5)  # weights may be small
    grads = jax.grad(lambda x: tree.masked_mean(x, mask))(x)
    np.testing.assert_array_equal(grads, [0.5, 0, 0, 0.5])
