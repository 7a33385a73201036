"""Device meshes, and the one table that maps logical axes to mesh axes.

A parameter declares its logical axes once (`models.decoder.PARAM_AXES`: path pattern -> axis names); `Rules` maps
these to mesh axes. The optimiser's moments carry the parameter's path as a suffix, so the same table shards them.

    mesh = make_mesh("data=-1,fsdp=4,tensor=2")
    state_shardings = shardings(abstract_state, PARAM_AXES, mesh)
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qstar import tree
from qstar.errors import UserError

AXES = ("data", "fsdp", "tensor")
Axes = tuple[str | None, ...]
AxisTable = Sequence[tuple[str, Axes]]
AnyMesh = Mesh | AbstractMesh  # within a program the mesh has no devices


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. Each field is a logical axis; its value the mesh axes that split it."""

    batch: tuple[str, ...] = ("data", "fsdp")
    tokens: tuple[str, ...] = ("data", "fsdp")  # or thoughts: where the batch does not divide over the same axes
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    rows: tuple[str, ...] = AXES  # of small work that all devices would otherwise repeat

    def spec(self, axes: Axes, shape: tuple[int, ...], mesh: AnyMesh) -> P:
        """Returns the PartitionSpec of an array with these logical axes.

        An axis that its mesh axes do not divide stays whole (and shows as such in the table).

        Raises:
          ValueError: two axes of one array would be split over the same mesh axis.
        """
        if len(axes) > len(shape):
            raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {shape}")
        axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
        out: list[Any] = []
        taken: set[str] = set()
        for name, dim in zip(axes, shape):
            wanted = tuple(a for a in (getattr(self, name) if name else ()) if mesh.shape[a] > 1)
            if taken & set(wanted):
                raise ValueError(f"mesh axis {taken & set(wanted)} would split two axes of {axes}")
            if not wanted or dim % math.prod(mesh.shape[a] for a in wanted):
                out.append(None)
                continue
            taken |= set(wanted)
            out.append(wanted if len(wanted) > 1 else wanted[0])
        return P(*out)


# Sampling reads every parameter for every token: gathering them each time would cost more than all else. So heads, MLP and
# vocabulary are split over all but the data axis, and devices exchange a token's activations instead of parameters.
SAMPLING = Rules(
    batch=("data",), tokens=(), embed=(), heads=("fsdp", "tensor"), mlp=("fsdp", "tensor"), vocab=("fsdp", "tensor")
)


def make_mesh(spec: str = "data=-1", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes data, fsdp and tensor from e.g. "data=-1,fsdp=4" (-1: what is left; unnamed: 1).

    Raises:
      UserError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, _, value = part.partition("=")
        if name not in AXES or not re.fullmatch(r"-1|[1-9]\d*", value):
            known_axes = ", ".join(a + "=N" for a in AXES)
            raise UserError(f"mesh {spec!r}: {part!r} is not one of {known_axes} (N >= 1, or -1 for the rest)")
        sizes[name] = int(value)
    free = [a for a in AXES if sizes[a] == -1]
    known = math.prod(v for v in sizes.values() if v > 0)
    if len(free) > 1:
        raise UserError(f"mesh {spec!r}: only one axis can be -1")
    if free:
        sizes[free[0]] = max(1, len(devices) // known)
    if math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh {spec!r} needs {math.prod(sizes.values())} devices, but there are {len(devices)}")
    grid = np.asarray(devices).reshape([sizes[a] for a in AXES])
    # Auto: `jax.make_mesh` defaults to Explicit, on which Linen's constraints fail.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(state: Any, table: AxisTable, mesh: AnyMesh, rules: Rules = Rules()) -> Any:
    """Returns a tree of NamedSharding for `state` (arrays or abstract arrays), by the first pattern that matches a path.

    A leaf that no pattern matches (step, rng, counters) is replicated.
    """

    def one(name: str, leaf: Any) -> NamedSharding:
        for pattern, axes in table:
            if leaf.ndim and re.search(pattern, name):
                return NamedSharding(mesh, rules.spec(axes, leaf.shape, mesh))
        return NamedSharding(mesh, P())

    return tree.map_named(one, state)


# ------------------------------------------------------------------------------------------- inside of a program


def mesh_jit(f: Callable[..., Any], **options: Any) -> Any:
    """Returns `jax.jit(f)`, called and lowered in the mesh of its first argument's sharding, if it has one."""
    # The mesh is a context, not an argument: `replicate`, `map_rows` and `batch_axes` read it deep inside the model.
    jitted: Any = jax.jit(f, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        with _entered(args[0]):
            return jitted(*args, **kwargs)

    def lower(*args: Any, **kwargs: Any) -> Any:
        with _entered(args[0]):
            return jitted.lower(*args, **kwargs)

    out: Any = functools.wraps(f)(call)
    out.lower, out._cache_size, out.clear_cache = lower, jitted._cache_size, jitted.clear_cache
    return out


def _entered(tree_: Any) -> Any:
    first = next(iter(jax.tree.leaves(tree_)), None)
    where = None if isinstance(first, jax.core.Tracer) else getattr(first, "sharding", None)
    return jax.set_mesh(cast(Mesh, where.mesh)) if isinstance(where, NamedSharding) else contextlib.nullcontext()


def batch_axes(rows: int = 0, rules: Rules = Rules()) -> tuple[str, ...]:
    """Returns the axes of the current mesh that split so many rows: () outside of one or if they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in rules.batch if not mesh.empty and mesh.shape[a] > 1)
    return axes if rows % math.prod(mesh.shape[a] for a in axes) == 0 else ()


def count_batch_shards(rows: int = 0) -> int:
    """Returns into how many parts `batch_axes` splits the rows."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in batch_axes(rows))


def spare_axes(rows: int, rules: Rules = Rules()) -> tuple[str, ...]:
    """Returns the axes of the current mesh for tokens or thoughts: () where so many rows divide over the batch axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or batch_axes(rows, rules):
        return ()
    return tuple(a for a in rules.tokens if mesh.shape[a] > 1)


def count_spare_shards(rows: int) -> int:
    """Returns into how many parts `spare_axes` splits the tokens or thoughts of so many rows."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in spare_axes(rows))


# The mesh axes that split the tokens of the row that is being traced: set by `map_rows`, read by `replicate`.
_token_axes: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("token_axes", default=())


def map_rows(
    f: Callable[..., Any], in_axes: Any = 0, rules: Rules = Rules(), *, out_axes: Any = 0
) -> Callable[..., Any]:
    """Returns `jax.vmap(f)` over rows that are split over the batch axes of the mesh; the first argument is mapped, at 0.

    Where the rows do not divide, the tokens of each row are split instead (see `replicate`).
    """

    def mapped(*args: Any) -> Any:
        rows = jax.tree.leaves(args[0])[0].shape[0]
        before = _token_axes.set(spare_axes(rows, rules))
        try:
            return jax.vmap(f, in_axes, out_axes, spmd_axis_name=batch_axes(rows, rules) or None)(*args)
        finally:
            _token_axes.reset(before)

    return mapped


def replicate(x: jax.Array) -> jax.Array:
    """Keeps an array of one row, say [T, D], whole along its width on every device. Outside of a mesh it does nothing."""
    # With `map_rows` around it, rows then stay where they are. Without it the compiler may split activations over
    # their width, as the parameters are under `fsdp`: it gathers rows and reduces activations, not parameters.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = _token_axes.get()
    # The compiler pads tokens that do not divide. Fewer tokens than devices stay whole.
    split = axes if axes and x.shape[0] >= math.prod(mesh.shape[a] for a in axes) else None
    return jax.lax.with_sharding_constraint(x, P(split, *(None,) * (x.ndim - 1)))


def split_axis(x: jax.Array, axis: int, axes: tuple[str, ...]) -> jax.Array:
    """Splits one axis of an array over mesh axes, or gathers it (`axes` is ()); the other axes stay as they are."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec: list[Any] = [P.UNCONSTRAINED] * x.ndim
    spec[axis] = axes or None
    return jax.lax.with_sharding_constraint(x, P(*spec))


def constrain(x: jax.Array, axes: Axes, rules: Rules = Rules()) -> jax.Array:
    """Shards an array by its logical axes. Outside of a mesh it does nothing."""
    # Chiefly for sums of gradients, sharded like their parameter: the parts from many rows are then reduced and
    # scattered, not reduced on every device.
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, rules.spec(axes, x.shape, mesh))


def constrain_tree(tree_: Any, table: AxisTable, rules: Rules = Rules()) -> Any:
    """`constrain`, for a tree and its table; leaves that no pattern matches are whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree_
    where = shardings(tree_, table, mesh, rules)
    return jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, s.spec), tree_, where)


def use_fsdp_gather() -> bool:
    """Whether a program is traced in a mesh that splits `embed`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(mesh.shape[a] > 1 for a in Rules().embed)


def all_gather_params(layer: Any, table: AxisTable, dtype: Any) -> Any:
    """Returns a layer's parameters with its matrices in a dtype and whole along `embed`, gathered if `use_fsdp_gather`.

    Their gradients are reduced and scattered into the layout of the matrices. The backward pass gathers again, under
    rematerialisation or the policy `drop_constraints`.
    """
    # Left to itself, the compiler makes a ring of partial products out of a gather and a product with many rows, and
    # their sum goes through memory once for each device of the ring: 1.5 instead of 0.9 TB in an update of Llama-2-7B's
    # adapters on 8 chips.
    mesh = jax.sharding.get_abstract_mesh()

    def one(name: str, x: jax.Array) -> jax.Array:
        axes = next((axes for pattern, axes in table if re.search(pattern, name)), ())
        if "embed" not in axes or x.ndim != len(axes) or x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        source, target = (rules.spec(axes, x.shape, mesh) for rules in (Rules(), Rules(embed=())))
        return _moved(x.astype(dtype), source, target)

    return tree.map_named(one, layer)


def drop_constraints(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: the backward pass may keep everything but resharded arrays."""
    # Kept, the gathered parameters of all layers would be in memory at once, which is what FSDP avoids.
    return primitive.name != "sharding_constraint"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, source: P, target: P) -> jax.Array:
    # The first constraint pins the cast array to its shards, so that the gather moves the bytes of the cast dtype.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, source), target)


_moved.defvjp(
    # The function itself, because `drop_constraints` does not look into a custom_vjp.
    lambda x, here, there: (_moved.fun(x, here, there), None),
    lambda here, there, _, g: (jax.lax.with_sharding_constraint(g, here),),
)


# ------------------------------------------------------------------------------------------------ around a program


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, P(tuple(a for a in Rules().batch if mesh.shape[a] > 1)))


def count_shards(mesh: Mesh | None) -> int:
    """Returns into how many parts a mesh splits rows that divide."""
    return 1 if mesh is None else math.prod(mesh.shape[a] for a in Rules().batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, P())


def put_global_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Places host arrays on the mesh, split over the batch axes where the rows divide, else replicated.

    Every process passes the whole batch.
    """
    # Which rows a process's devices need follows from the mesh, not from the number of processes: several processes may
    # share a batch shard (a tensor axis over hosts), and replicated rows must be the same rows everywhere.
    if mesh is None:
        return jax.device_put(batch)
    full, split = replicated(mesh), batch_sharding(mesh)
    num_shards = count_shards(mesh)

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        target = split if x.ndim and x.shape[0] and x.shape[0] % num_shards == 0 else full
        return jax.make_array_from_callback(x.shape, target, x.__getitem__)

    return jax.tree.map(put, batch)


def to_host(arrays: Any) -> Any:
    """Returns whole numpy arrays on every host. A collective if an array is split over several hosts' devices."""

    def fetch(x: Any) -> Any:
        if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
            return jax.device_get(x)
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, arrays) if jax.process_count() > 1 else jax.device_get(arrays)


def parameter_table(params: Any, where: Any) -> str:
    """Returns a text table: path, shape, PartitionSpec and bytes per device of every leaf, and the totals."""
    rows, total, per_device = [], 0, 0
    for (name, leaf), (_, sharding) in zip(tree.named_leaves(params), tree.named_leaves(where)):
        local = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total, per_device = total + leaf.size, per_device + local
        shape, spec = "x".join(map(str, leaf.shape)), _spec_text(getattr(sharding, "spec", P()))
        rows.append((name, shape, str(leaf.dtype), spec, f"{local:,}"))
    rows = [("parameter", "shape", "dtype", "sharding", "bytes/device"), *rows]
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    return "\n".join([*lines, f"total {total:,} parameters, {per_device:,} bytes per device"])


def _spec_text(spec: P) -> str:
    names = ["+".join(a) if isinstance(a, tuple) else a for a in spec]
    return "(" + ", ".join(n or "-" for n in names) + ")" if any(names) else "replicated"
