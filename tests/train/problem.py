"""A training problem that compiles in no time: weighted least squares with noise from the step's key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

D = 6


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"policy": {"dense": {"kernel": normal(D, 2), "bias": normal(2)}, "norm": {"scale": normal(D)}}}


def batch(step: int, rows: int = 8) -> dict:
    """Rows with very unequal numbers of tokens that count."""
    rng = np.random.default_rng(step + 1000)
    mask = (rng.random((rows, 5)) < np.linspace(0.1, 1, rows)[:, None]).astype(np.float32)
    return {"x": rng.normal(size=(rows, 5, D)).astype(np.float32), "mask": mask}


def loss(params: dict, batch: dict, rng: jax.Array, noise: float = 0.0):
    p = params["policy"]
    y = (batch["x"] * p["norm"]["scale"]) @ p["dense"]["kernel"] + p["dense"]["bias"]
    y = y + noise * jax.random.normal(rng, y.shape[:1])[:, None, None]
    square = jnp.sum(jnp.square(y - 1.0), axis=-1)
    total, weight = jnp.sum(batch["mask"] * square), jnp.sum(batch["mask"])
    return (total, weight), {"loss": (total, weight), "tokens": (weight, jnp.float32(0))}


def same(a, b) -> None:
    """Asserts that two trees are the same to the last bit, random keys included."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        x, y = np.asarray(raw(x)), np.asarray(raw(y))
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def assert_same_gradients(ours, theirs, share: float = 1e-5) -> None:
    """Asserts of every parameter: |ours - theirs| <= 1e-5 |theirs|, in the Euclidean norm over its entries.

    Entry by entry float32 cannot be asked for that: an entry is a sum of terms as large as the largest entries, and is
    wrong by some 1e-7 of those, however small it is itself.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.linalg.norm(a - b) <= share * np.linalg.norm(b), jax.tree_util.keystr(path)
