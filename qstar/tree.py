"""Named paths, regex masks, casts, norms and masked means over pytrees; random keys from seeds."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qstar.errors import check_seed


def random_key(seed: int) -> jax.Array:
    """Returns `jax.random.key(seed)` for a seed of up to 64 bits; raises UserError for others."""
    check_seed("seed", seed)
    if seed < 2**31:
        return jax.random.key(seed)
    # Without x64, `jax.random.key` reads only the lower 32 bits: seeds that differ above would give the same key.
    return jax.random.wrap_key_data(jnp.asarray([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32), impl="threefry2x32")


# A key path as `a/b/c`: dict keys, attribute names and indices alike.
path_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def map_named(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `f(name, leaf, *rest_leaves)` over a tree."""
    return jax.tree_util.tree_map_with_path(lambda p, *xs: f(path_name(p), *xs), tree, *rest)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Returns [(path name, leaf)] in tree order."""
    return [(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree)]


def match(tree: Any, pattern: str) -> Any:
    """Returns a tree of bools: True where the leaf's path name contains a match of the regular expression."""
    compiled = re.compile(pattern)
    return map_named(lambda name, _: bool(compiled.search(name)), tree)


def cast(tree: Any, dtype: Any) -> Any:
    """Casts the floating leaves of a tree to `dtype`; integers and keys stay."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def size(tree: Any) -> int:
    """Returns the number of scalars in a tree of arrays (or of abstract arrays)."""
    return sum(x.size for x in jax.tree.leaves(tree))


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns sum(x * mask) / sum(mask), 0 where the mask is empty (never NaN)."""
    total = jnp.sum(mask)
    # `where` besides the product: NaN * 0 is NaN. The same for the divisor: 0 / 1, not 0 / 0, for an empty mask.
    return jnp.sum(jnp.where(mask > 0, x * mask, 0.0)) / jnp.where(total > 0, total, 1.0)
