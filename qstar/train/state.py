"""The training state: one pytree, parameters keyed by role."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from qstar import tree
from qstar.errors import require
from qstar.mesh import AxisTable, Rules, shardings
from qstar.types import Params


class TrainState(flax.struct.PyTreeNode):
    """All that a resumed run needs; the data position is `step`."""

    params: dict[str, Params]  # role -> parameters: "policy", and "value" (the critic) with PPO
    opt_state: Any
    step: jax.Array  # [] int32, updates so far, skipped ones included
    rng: jax.Array  # key; step s uses fold_in(rng, s)


def optimizer_for(tx: optax.GradientTransformation, pattern: str) -> optax.GradientTransformation:
    """Returns `tx` on parameters whose path (e.g. `policy/layers/q/kernel`) matches; no update or moments elsewhere."""

    def chosen(params: Any) -> Any:
        found, names = tree.match(params, pattern), [name for name, _ in tree.named_leaves(params)]
        parts = ", ".join(sorted({name.split("/")[1] for name in names if "/" in name}))
        # A misspelt pattern would train nothing, and every update would be finite.
        require((any(jax.tree.leaves(found)), f"no parameter's path matches {pattern!r}; the paths begin with {parts}"))
        return found

    # `partition`, not `masked`: a masked transformation passes the gradients of the others through as updates.
    return optax.partition({True: tx, False: optax.set_to_zero()}, chosen)


def create_state(
    params: dict[str, Params],
    tx: optax.GradientTransformation,
    *,
    seed: int,
    mesh: Mesh | None = None,
    table: AxisTable = (),
    dtype: Any = None,
) -> TrainState:
    """Returns a fresh state (step 0, empty moments) around copies of the parameters, as every STaR iteration starts.

    Args:
      params: by role. table: logical axes by path pattern (`decoder.PARAM_AXES`).
      dtype: of the copy of `policy`; None keeps what it has.
    """
    # Under jit, in its sharding: with a mesh no unsharded moment ever exists.
    return _creator(tx, mesh, tuple(table), dtype)(params, tree.random_key(seed))


# Cached: a new partial would be compiled again at the start of every STaR iteration.
@functools.cache
def _creator(tx: optax.GradientTransformation, mesh: Mesh | None, table: tuple, dtype: Any) -> Callable[..., Any]:
    return sharded_jit(functools.partial(_fresh, tx, dtype), mesh, table)


def _fresh(tx: optax.GradientTransformation, dtype: Any, params: dict[str, Params], key: jax.Array) -> TrainState:
    copies = jax.tree.map(jnp.copy, params)  # the step donates its state, and the caller keeps its parameters
    if dtype is not None:
        copies = {**copies, "policy": tree.cast(copies["policy"], dtype)}
    return TrainState(params=copies, opt_state=tx.init(copies), step=jnp.int32(0), rng=key)


def abstract_state(
    params: dict[str, Params], tx: optax.GradientTransformation, *, mesh: Mesh, table: AxisTable
) -> TrainState:
    """Returns the shapes, dtypes and shardings of `create_state`'s result; the parameters may be abstract."""
    return abstract(jax.eval_shape(functools.partial(_fresh, tx, None), params, jax.random.key(0)), mesh, table)


def abstract(tree_: Any, mesh: Mesh, table: AxisTable, rules: Rules = Rules()) -> Any:
    """Returns a tree as ShapeDtypeStruct leaves, sharded by the table."""
    where = shardings(tree_, table, mesh, rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree_, where)


def sharded_jit(f: Callable[..., Any], mesh: Mesh | None, table: AxisTable) -> Callable[..., Any]:
    """Returns jit(f) that makes only its shard of the results on each device, by the table (plain jit without a mesh)."""
    if mesh is None:
        return jax.jit(f)

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        # Shardings depend on the results' shapes, which `eval_shape` finds without allocating them.
        where = shardings(jax.eval_shape(f, *args), table, mesh)
        return jax.jit(f, out_shardings=where)(*args)

    return call
