"""Attention kernels for a text that attends to itself, without its T x T scores in memory.

    splash   Pallas on a TPU (`jax.experimental.pallas.ops.tpu.splash_attention`); packed rows; windows
    cudnn    cuDNN's fused attention on a GPU (`jax.nn.dot_product_attention`); one text a row, right padding; windows
    tiles    XLA's products, a tile of queries at a time (`prefix_attention`), on any device

`ModelConfig.attention` chooses: "auto" takes, where the text is long enough to gain, the kernel of the platform if its
conditions hold, on a CPU tiles; and XLA's products elsewhere. Attention with a past (a prefix, a cache) or a relative
bias always runs on XLA, because the kernels cannot join their scores with those of other segments; a thought attends
to its text in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

from qstar.errors import UserError
from qstar.mesh import Rules

AUTO_LENGTH = {"splash": 1024, "cudnn": 1024, "tiles": 512}  # tokens from which "auto" takes a form
LANES = 128  # splash needs rows of a multiple of it
BLOCK = 512  # tokens in a tile of splash, where they divide the text


class KernelMask(flax.struct.PyTreeNode):
    """The mask of a row over itself, for a kernel: causal, within a document, within the window."""

    segment_ids: Array  # [T] int32; 1.. per document, 0 = padding
    impl: str = flax.struct.field(pytree_node=False)  # "splash" | "cudnn"
    window: int | None = flax.struct.field(pytree_node=False)


def choose(config: Any, segment_ids: Array, *, one_text: bool, must: bool) -> str:
    """Returns the implementation of a row's attention to itself: "xla", "tiles", "splash" or "cudnn".

    Args:
      config: a `ModelConfig`. segment_ids: [T] int32 (its sharding gives the platform).
      one_text: whether rows are known to hold one document each, padded on the right.
      must: whether a kernel that was asked for and cannot run is an error (training), or replaced by XLA (scoring).

    Raises:
      UserError: says why the kernel that `config.attention` names cannot take this row.
    """
    platform, length = platform_of(segment_ids), segment_ids.shape[0]
    if config.attention == "auto":
        kind = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "tiles")
        return "xla" if length < AUTO_LENGTH[kind] or _obstacle(kind, config, platform, length, one_text) else kind
    # Training must not run silently at another speed and memory than was asked for; scoring may.
    why = _obstacle(config.attention, config, platform, length, one_text)
    if why and must:
        raise UserError(f"config.model.attention={config.attention}: {why}; use auto or xla")
    return "xla" if why else config.attention


def _obstacle(kind: str, config: Any, platform: str, length: int, one_text: bool) -> str:
    """Returns why a kernel cannot run, or ""."""
    c, cpu = config, platform == "cpu"
    if kind != "xla" and c.relative_bias:
        return "it has no relative bias, and relative_bias is set"
    if kind in ("xla", "tiles"):
        return ""
    if c.attn_softcap:
        return f"it has no soft cap on scores, and attn_softcap is {c.attn_softcap:g}"
    if c.windowed:
        return "it has one mask for all layers, and here only some have the sliding window"
    checks = {
        "splash": (
            (platform in ("tpu", "cpu"), f"it is a kernel for TPUs (a CPU interprets it), and this runs on {platform}"),
            (length % LANES == 0, f"rows of {length} tokens are no multiple of {LANES}"),
            (cpu or c.dtype == "bfloat16", f"on a TPU it computes in bfloat16, and dtype is {c.dtype}"),
            (cpu or c.head_dim % 64 == 0, f"head_dim {c.head_dim} is no multiple of 64"),
        ),
        "cudnn": (
            (platform == "gpu", f"it is a kernel for NVIDIA GPUs, and this runs on {platform}"),
            (c.dtype in ("bfloat16", "float16"), f"it computes in half precision, and dtype is {c.dtype}"),
            (c.head_dim % 8 == 0, f"head_dim {c.head_dim} is no multiple of 8"),
            (c.head_dim <= 128, f"head_dim {c.head_dim} is more than the 128 that every GPU takes"),
            (one_text, "it cannot keep the documents of packed rows apart (train.packed=False gives each a row)"),
        ),
    }
    return next((why for fits, why in checks[kind] if not fits), "")


def platform_of(x: Array) -> str:
    """Returns the platform that computes x: "cpu", "gpu" or "tpu"."""
    # In a compilation for a described topology, the mesh of the array alone names the platform.
    device = getattr(jax.typeof(x).sharding.mesh, "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def attend_text(q: Array, keys: Array, values: Array, mask: KernelMask, *, scale: float) -> Array:
    """Softmax attention of one row with itself: q [T, H, K]; keys, values [G, T, K]; returns [T, H, K] in q's dtype."""
    static = dict(scale=scale, impl=mask.impl, window=mask.window)
    return _flash.bind(q[None], keys[None], values[None], mask.segment_ids[None], **static)[0]


# ------------------------------------------------------------------------------------------- rows [B, ...], on any mesh


def _rows(q: Array, keys: Array, values: Array, ids: Array, *, scale: float, impl: str, window: int | None) -> Array:
    """q [B, T, H, K]; keys, values [B, G, T, K]; ids [B, T]: [B, T, H, K]."""
    if impl == "cudnn":
        return _cudnn(q, keys, values, ids, scale=scale, window=window)
    mesh = jax.typeof(q).sharding.mesh
    run = partial(_splash, scale=scale, window=window, interpret=platform_of(q) == "cpu")
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return run(q, keys, values, ids)
    # XLA cannot partition a Pallas kernel (it can partition cuDNN's), so each device runs it on its rows and heads.
    rules = Rules()
    # Axes of size 1 are named, too: over an axis that is not named, `shard_map` would sum the gradients.
    rows = tuple(a for a in rules.batch if a in mesh.shape)
    heads = tuple(a for a in rules.heads if a in mesh.shape)
    # `shard_map` needs equal parts: rows or heads that the devices do not divide are replicated.
    rows = rows if q.shape[0] % math.prod(mesh.shape[a] for a in rows) == 0 else ()
    heads = heads if keys.shape[1] % math.prod(mesh.shape[a] for a in heads) == 0 else ()
    by_head, pair = P(rows or None, None, heads or None), P(rows or None, heads or None)
    specs = (by_head, pair, pair, P(rows or None))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)(q, keys, values, ids)


def _splash(
    q: Array, keys: Array, values: Array, ids: Array, *, scale: float, window: int | None, interpret: bool
) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H = q.shape[1:3]
    # The window counts the token itself (as in Mistral); the kernels count only tokens to its left.
    one = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)
    # There is one: `_obstacle` refuses rows that LANES does not divide.
    block = next(b for b in (BLOCK, BLOCK // 2, LANES) if T % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([one] * H),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q: Array, keys: Array, values: Array, ids: Array) -> Array:
        # The kernel takes no scale. Multiplied in float32, so that the scale itself is not rounded to bfloat16.
        scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
        return kernel(rearrange(scaled, "t h k -> h t k"), keys, values, splash.SegmentIds(ids, ids))

    return rearrange(jax.vmap(row)(q, keys, values, ids), "b h t k -> b t h k").astype(q.dtype)


def _cudnn(q: Array, keys: Array, values: Array, ids: Array, *, scale: float, window: int | None) -> Array:
    # A mask would become a dense bias of B x H x T x T in cuDNN; causality, a window and lengths cost nothing.
    # At least 1: in a row of padding alone the softmax would have no keys.
    lengths = jnp.maximum(jnp.sum((ids > 0).astype(jnp.int32), axis=1), 1)
    return jax.nn.dot_product_attention(
        q,
        *(rearrange(x, "b g t k -> b t g k") for x in (keys, values)),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


# ----------------------------------------------------------------------------------------------------- the primitive

# A primitive, so that `vmap` adds its axis to the rows, which the mesh splits; the kernels' own rules would put it
# inside of the split part. (`custom_vmap` cannot be differentiated before it is mapped; see `layers.project`.)


def lift_to_rows(p: Primitive, args: Sequence[Array], axes: Sequence[int | None], **static: Any) -> tuple[Any, Any]:
    """The batching rule of a primitive of rows [B, ...]: the mapped axis joins the rows of all operands and results."""
    size = next(x.shape[a] for x, a in zip(args, axes) if a is not None)
    # The kernels have one axis of rows for all operands, so an unmapped operand is repeated.
    full = [jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(args, axes)]
    out = p.bind(*(rearrange(x, "n b ... -> (n b) ...") for x in full), **static)
    return jax.tree.map(lambda x: rearrange(x, "(n b) ... -> n b ...", n=size), out), jax.tree.map(lambda _: 0, out)


def _slope(primals: Sequence[Any], tangents: Sequence[Any], **static: Any) -> tuple[Array, Array]:
    # Segment ids are integers and have no tangent.
    *moved, ids = primals
    return jax.jvp(partial(_rows, ids=ids, **static), moved, [ad.instantiate_zeros(t) for t in tangents[:3]])


_flash = Primitive("flash")
_flash.def_impl(jax.jit(_rows, static_argnames=("scale", "impl", "window")))
_flash.def_abstract_eval(lambda q, *_, **static: q.update(weak_type=False))
mlir.register_lowering(_flash, mlir.lower_fun(_rows, multiple_results=False))
batching.primitive_batchers[_flash] = partial(lift_to_rows, _flash)
ad.primitive_jvps[_flash] = _slope
