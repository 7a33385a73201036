"""Attention kernels for the plain case, a text that attends to itself, without its T x T scores in memory.

    splash   Pallas on a TPU (`jax.experimental.pallas.ops.tpu.splash_attention`); packed rows; windows
    cudnn    cuDNN's fused attention on a GPU (`jax.nn.dot_product_attention`); rows of one text, padded on the right; windows

Which one runs is `ModelConfig.attention`: "auto" takes the kernel of the platform where its conditions hold and the text is
long enough to gain, and XLA's products elsewhere. Everything with a past (a prefix, a cache, a thought's text) and every
relative bias stays with XLA, whatever the field says: the kernels cannot join their scores with others'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

from qstar.errors import UserError
from qstar.mesh import Rules

AUTO_LENGTH = 1024  # tokens from which "auto" takes a kernel
LANES = 128  # splash cuts texts into pieces of these
BLOCK = 512  # tokens in a tile of splash, where the text divides into such


@flax.struct.dataclass
class KernelMask:
    """What the tokens of a row see of it, for a kernel: what is before them in their document, within the window."""

    segment_ids: jax.Array  # [T] int32; 1.. per document, 0 = padding
    impl: str = flax.struct.field(pytree_node=False)  # "splash" | "cudnn"
    window: int | None = flax.struct.field(pytree_node=False)


def choose(config: Any, segment_ids: jax.Array, *, one_text: bool, must: bool) -> str:
    """Returns what runs the attention of a row with itself: "xla", "splash" or "cudnn".

    Args:
      config: a `ModelConfig`. segment_ids: [T] int32 (its type says where the row lies).
      one_text: whether rows are known to hold one document each, padded on the right.
      must: whether a kernel that was asked for and cannot run is an error (training), or XLA steps in (scoring).

    Raises:
      UserError: says why the kernel that `config.attention` names cannot take this row.
    """
    platform, length = _platform(segment_ids), segment_ids.shape[0]
    if config.attention == "auto":
        kind = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
        return "xla" if length < AUTO_LENGTH or _obstacle(kind, config, platform, length, one_text) else kind
    why = _obstacle(config.attention, config, platform, length, one_text)
    if why and must:
        raise UserError(f"config.model.attention={config.attention}: {why}; use auto or xla")
    return "xla" if why else config.attention


def _obstacle(kind: str, config: Any, platform: str, length: int, one_text: bool) -> str:
    """Returns why a kernel cannot run, or ""."""
    c = config
    checks = {
        "xla": (),
        "splash": (
            (platform in ("tpu", "cpu"), f"it is a kernel for TPUs (a CPU interprets it), and this runs on {platform}"),
            (length % LANES == 0, f"rows of {length} tokens are no multiple of {LANES}"),
            (platform == "cpu" or c.dtype == "bfloat16", f"on a TPU it computes in bfloat16, and dtype is {c.dtype}"),
            (platform == "cpu" or c.head_dim % 64 == 0, f"head_dim {c.head_dim} is no multiple of 64"),
        ),
        "cudnn": (
            (platform == "gpu", f"it is a kernel for NVIDIA GPUs, and this runs on {platform}"),
            (c.dtype in ("bfloat16", "float16"), f"it computes in half precision, and dtype is {c.dtype}"),
            (c.head_dim % 8 == 0, f"head_dim {c.head_dim} is no multiple of 8"),
            (c.head_dim <= 128, f"head_dim {c.head_dim} is more than the 128 that every GPU takes"),
            (one_text, "it cannot keep the documents of packed rows apart (train.packed=False gives each a row)"),
        ),
    }[kind]
    if kind != "xla" and c.relative_bias:
        return "it knows no relative bias, and relative_bias is set"
    return next((why for fits, why in checks if not fits), "")


def _platform(x: jax.Array) -> str:
    """Returns cpu, gpu or tpu: of the mesh that x lies on (in a compilation for a described topology there is no other
    sign), or of the process."""
    device = getattr(jax.typeof(x).sharding.mesh, "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def attend_text(q: jax.Array, keys: jax.Array, values: jax.Array, mask: KernelMask, *, scale: float) -> jax.Array:
    """Softmax attention of one row with itself: q [T, H, K]; keys, values [G, T, K]; returns [T, H, K] in q's dtype."""
    static = dict(scale=scale, impl=mask.impl, window=mask.window)
    return _flash.bind(q[None], keys[None], values[None], mask.segment_ids[None], **static)[0]


# ------------------------------------------------------------------------------------------- rows [B, ...], on any mesh


def _rows(
    q: jax.Array, keys: jax.Array, values: jax.Array, ids: jax.Array, *, scale: float, impl: str, window: int | None
) -> jax.Array:
    """q [B, T, H, K]; keys, values [B, G, T, K]; ids [B, T]: [B, T, H, K].

    XLA cannot cut a Pallas kernel, so on a mesh each device runs it on its rows and heads. (cuDNN's call knows how.)
    """
    if impl == "cudnn":
        return _cudnn(q, keys, values, ids, scale=scale, window=window)
    mesh = jax.typeof(q).sharding.mesh
    run = partial(_splash, scale=scale, window=window, interpret=_platform(q) == "cpu")
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return run(q, keys, values, ids)
    rules = Rules()
    # All axes of the mesh are named, those of size 1, too: over one that is not, a gradient would be summed (of one).
    rows = tuple(a for a in rules.batch if a in mesh.shape)
    heads = tuple(a for a in rules.heads if a in mesh.shape)
    rows = rows if q.shape[0] % math.prod(mesh.shape[a] for a in rows) == 0 else ()
    heads = heads if keys.shape[1] % math.prod(mesh.shape[a] for a in heads) == 0 else ()
    by_head, pair = P(rows or None, None, heads or None), P(rows or None, heads or None)
    specs = (by_head, pair, pair, P(rows or None))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)(q, keys, values, ids)


def _splash(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    ids: jax.Array,
    *,
    scale: float,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H = q.shape[1:3]
    one = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)
    block = next(b for b in (BLOCK, BLOCK // 2, LANES) if T % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([one] * H),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q: jax.Array, keys: jax.Array, values: jax.Array, ids: jax.Array) -> jax.Array:
        scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel has no scale of its own
        return kernel(jnp.swapaxes(scaled, 0, 1), keys, values, splash.SegmentIds(ids, ids))

    return jnp.swapaxes(jax.vmap(row)(q, keys, values, ids), 1, 2).astype(q.dtype)


def _cudnn(
    q: jax.Array, keys: jax.Array, values: jax.Array, ids: jax.Array, *, scale: float, window: int | None
) -> jax.Array:
    """A mask would become a dense bias of B x H x T x T in cuDNN; causality, a window and lengths cost nothing."""
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)  # [B, T, G, K]
    lengths = jnp.maximum(jnp.sum((ids > 0).astype(jnp.int32), axis=1), 1)
    return jax.nn.dot_product_attention(
        q,
        keys,
        values,
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


# ----------------------------------------------------------------------------------------------------- the primitive

# It is a primitive so that `vmap` adds its axis to the rows, where the mesh splits them: the kernels' own rules would put
# it inside of what is split. (`custom_vmap` could not be differentiated before it is mapped; see `layers.project`.)


def _lift(args: Sequence[jax.Array], axes: Sequence[int | None], **static: Any) -> tuple[jax.Array, int]:
    size = next(x.shape[a] for x, a in zip(args, axes) if a is not None)
    full = [jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(args, axes)]
    out = _flash.bind(*(x.reshape(-1, *x.shape[2:]) for x in full), **static)
    return out.reshape(size, -1, *out.shape[1:]), 0


def _slope(primals: Sequence[Any], tangents: Sequence[Any], **static: Any) -> tuple[jax.Array, jax.Array]:
    *moved, ids = primals
    return jax.jvp(lambda *x: _rows(*x, ids, **static), moved, [ad.instantiate_zeros(t) for t in tangents[:3]])


_flash = Primitive("flash")
_flash.def_impl(jax.jit(_rows, static_argnames=("scale", "impl", "window")))
_flash.def_abstract_eval(lambda q, *_, **static: q.update(weak_type=False))
mlir.register_lowering(_flash, mlir.lower_fun(_rows, multiple_results=False))
batching.primitive_batchers[_flash] = _lift
ad.primitive_jvps[_flash] = _slope
