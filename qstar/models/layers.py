"""Linen modules of a decoder block, for ONE sequence: no batch axis anywhere (`vmap` adds it).

Every module is a pure function of its parameters: only the `params` collection, no mutable state, no boxed metadata.
Matrix products run in `config.dtype`, norms, rotations and softmax in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qstar.models.attention import attend, precision, write_column
from qstar.models.config import ModelConfig
from qstar.models.flash import KernelMask
from qstar.models.rope import RopeTables, apply_rope
from qstar.types import Params, RingKVCache, Segment, Shared

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}


class Norm(nn.Module):
    """RMS norm or layer norm over the last axis, computed in float32."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        size = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1) + self.eps)
        # A scaling of rows whose gradient is an inner product of rows: a CPU sums broadcast products several times slower.
        y = jnp.einsum("...e,...->...e", y, size, precision="highest") * scale
        return (y + bias if self.kind == "layer" else y).astype(x.dtype)


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x [T, in] @ kernel [in, out].

    Under `vmap` the batch joins the rows of one plain matrix product. Left to itself XLA forms the kernel's gradient
    from a three-axis array, which takes twice as long on a CPU. It is a primitive and no `custom_vmap`, because that
    one cannot be differentiated before it is mapped: `grad` of one sequence and `vmap(grad)` would fail.
    """
    return _project.bind(x, kernel)


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, precision=precision(x.dtype))


def _project_rows(args: Sequence[jax.Array], axes: Sequence[int | None]) -> tuple[jax.Array, int]:
    x, kernel = args
    if axes[1] is not None:  # one kernel per row (adapters, ensembles): a batched product
        return jax.vmap(_matmul, axes)(x, kernel), 0
    x = jnp.moveaxis(x, axes[0], 0)
    return project(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1), 0


_project = Primitive("project")
_project.def_impl(jax.jit(_matmul))
_project.def_abstract_eval(lambda x, kernel: jax.core.ShapedArray((x.shape[0], kernel.shape[1]), x.dtype))
mlir.register_lowering(_project, mlir.lower_fun(_matmul, multiple_results=False))
ad.defbilinear(_project, lambda g, x, kernel: project(g, kernel.T), lambda g, x, kernel: _matmul(x.T, g))
batching.primitive_batchers[_project] = _project_rows


class Linear(nn.Module):
    """x [..., in] @ kernel [in, out] (+ bias), in the dtype of x.

    The kernel may be int8 with a scale (see `models.int8`), or have LoRA's adapters beside it (see `models.lora`): their
    product is added to that of the kernel and not to the kernel, in whose dtype a small change would vanish.
    """

    features: int
    bias: bool
    std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        if self.has_variable("params", "scale"):
            kernel, x = jax.lax.optimization_barrier(
                (kernel, x)
            )  # or a decode loop would keep a wide copy outside of it
            y = (project(x, kernel.astype(x.dtype)) * self.get_variable("params", "scale")).astype(x.dtype)
        else:
            y = project(x, kernel.astype(x.dtype))
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name).astype(x.dtype) for name in ("lora_a", "lora_b"))
            y = y + project(project(x, a), b)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class Relative(nn.Module):
    """What a head adds to its scores by distance in tokens (longer ones share the last number)."""

    heads: int
    length: int

    @nn.compact
    def __call__(self, queries: jax.Array, segments: Sequence[Segment], keys: Sequence[jax.Array]) -> list[Segment]:
        """Returns the segments with their biases [H, T, S], for queries at [T] and each segment's keys at [S]."""
        table = self.param("table", nn.initializers.zeros, (self.heads, self.length)).astype(jnp.float32)
        distances = [jnp.clip(queries[:, None] - k[None, :], 0, self.length - 1) for k in keys]
        return [s._replace(bias=table[:, d]) for s, d in zip(segments, distances)]


class Block(nn.Module):
    """One transformer block: attention over `past` and the block's own tokens, then the MLP (or both at once, GPT-J)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        turns: RopeTables | None,
        mask: jax.Array | KernelMask | None,
        past: Sequence[Segment | Shared | RingKVCache] = (),
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Args: x [T, E]; turns: of rotary positions; mask [T, T] of the tokens among themselves; past: segments
        [G, S, K], of which the last may be a `RingKVCache` (then T = 1, and `mask` is the ring's); positions [T], which only
        relative biases need.

        Returns: x [T, E] and the new (keys, values), each [G, T, K], rotated already; with a ring, the ring's [G, R, K].
        """
        c = self.config
        residual_std = c.init_std / math.sqrt(2 * c.num_layers)  # GPT-2: outputs add up over 2L branches
        h = Norm(c.norm, c.norm_eps, name="attn_norm")(x)
        q = self._heads(h, "q", c.num_heads)  # [T, H, K]
        k, v = self._heads(h, "k", c.num_kv_heads), self._heads(h, "v", c.num_kv_heads)  # [T, G, K]
        if c.qk_norm:
            q, k = Norm("rms", c.norm_eps, name="q_norm")(q), Norm("rms", c.norm_eps, name="k_norm")(k)
        if turns is not None:
            q, k = apply_rope(q, turns, c), apply_rope(k, turns, c)
        k, v = jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)  # [G, T, K]
        at = positions
        if past and isinstance(past[-1], RingKVCache):
            *past, ring = past
            at = ring.positions
            k, v = write_column(ring.keys, k, ring.column), write_column(ring.values, v, ring.column)  # [G, R, K]
            mask = ring.mask
        segments = [*past, Segment(k, v, mask)]
        if c.relative_bias:
            if not past and at is positions:  # index differences are position differences: see `attention.text_mask`
                at = positions = jnp.arange(x.shape[0])  # and these are one array for all rows
            relative = Relative(c.num_heads, c.max_positions, name="relative")
            segments = relative(positions, segments, [*(s.positions for s in past), at])
        with jax.named_scope("attention"):
            a = attend(q, segments, scale=c.head_dim**-0.5)
        a = Linear(c.hidden_size, c.out_bias, residual_std, name="o")(a.reshape(-1, c.num_heads * c.head_dim))
        if c.parallel_block:
            return x + a + self._mlp(h, residual_std), (k, v)
        x = x + a
        return x + self._mlp(Norm(c.norm, c.norm_eps, name="mlp_norm")(x), residual_std), (k, v)

    def _heads(self, h: jax.Array, name: str, count: int) -> jax.Array:
        c = self.config
        y = Linear(count * c.head_dim, c.qkv_bias, c.init_std, name=name)(h)
        return y.reshape(-1, count, c.head_dim)

    def _mlp(self, h: jax.Array, out_std: float) -> jax.Array:
        c = self.config
        act = ACTIVATIONS[c.activation]
        up = Linear(c.intermediate_size, c.mlp_bias, c.init_std, name="up")(h)
        if c.gated_mlp:
            up = act(Linear(c.intermediate_size, c.mlp_bias, c.init_std, name="gate")(h)) * up
        else:
            up = act(up)
        return Linear(c.hidden_size, c.mlp_bias, out_std, name="down")(up)


def with_adapters(layer: Params) -> Params:
    """Returns one layer's (or all stacked layers') parameters with LoRA's products added to the kernels that have one."""
    out = {}
    for name, leaves in layer.items():
        if "lora_a" in leaves:
            plain = {k: v for k, v in leaves.items() if not k.startswith("lora_")}
            delta = jnp.matmul(leaves["lora_a"], leaves["lora_b"], precision=jax.lax.Precision.HIGHEST)
            leaves = {**plain, "kernel": (plain["kernel"] + delta).astype(plain["kernel"].dtype)}
        out[name] = leaves
    return out
