"""Linen modules of the models, for ONE sequence: no batch axis anywhere (`vmap` adds it).

Every module is a pure function of its parameters: only the `params` collection, no mutable state, no boxed metadata.
Matrix products run in `config.dtype`, norms, rotations and softmax in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qstar.models.attention import LayerMasks, attend, precision, text_segment, write_column
from qstar.models.config import ModelConfig
from qstar.models.flash import KernelMask
from qstar.models.rope import RopeTables, apply_rope
from qstar.types import Params, RingKVCache, Segment, Shared

# Of tokens among themselves: bool [T, T], or int32 [T, 2], a range of keys for each; None = all are visible.
Mask = Array | LayerMasks | KernelMask | None
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}
# Logical axes of every parameter, matched on the end of its path (leading axes that are not named, such as the stacked
# layers, stay whole). Column-parallel into heads and MLP, row-parallel out of them, as in Megatron.
PARAM_AXES = (
    (r"embed/table$", ("vocab", "embed")),
    (r"positions/table$", (None, "embed")),
    (r"relative/table$", (None, "heads")),
    (r"(q|k|v)/kernel$", ("embed", "heads")),
    (r"(q|k|v)/bias$", ("heads",)),
    (r"o/kernel$", ("heads", "embed")),
    (r"(up|gate|mixing/in|value/in)/kernel$", ("embed", "mlp")),
    (r"(up|gate|mixing/in|value/in)/bias$", ("mlp",)),
    (r"(down|mixing/hidden)/kernel$", ("mlp", "embed")),
    (r"(mixing/out|value)/kernel$", ("embed", None)),
    (r"value/out/kernel$", ("mlp", None)),
    (r"(q|k|v|up|gate)/lora_a$", ("embed", None)),  # so that a pair's products lie where its kernel's do
    (r"(q|k|v)/lora_b$", (None, "heads")),
    (r"(up|gate)/lora_b$", (None, "mlp")),
    (r"o/lora_a$", ("heads", None)),
    (r"down/lora_a$", ("mlp", None)),
    (r"(o|down)/lora_b$", (None, "embed")),
    (r"head/kernel$", ("embed", "vocab")),
    (r"head/bias$", ("vocab",)),
)


def from_init_key(module: nn.Module, draw: Callable[..., Any], part: int = 0, parts: int = 1) -> Callable[..., Any]:
    """Returns an initializer that draws from `module.init`'s own key, or from part `part` of its split into `parts`."""
    # Linen folds a hash of the parameter's path into the key: initial values, and with them every recorded run, would
    # change with the name of a module.

    def initializer(key: Array, *args: Any) -> Any:
        if module.scope is not None and module.scope.has_rng("params"):  # `apply` calls it for the shapes alone
            key = module.scope.rngs["params"].rng
        return draw(key if parts == 1 else jax.random.split(key, parts)[part], *args)

    return initializer


# ---------------------------------------------------------------------------------------------- parts of every model


class Embed(nn.Module):
    """A table of vectors [rows, D]: of tokens, or of learned positions."""

    rows: int
    width: int
    std: float

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        draw = nn.initializers.normal(self.std)
        return self.param("table", from_init_key(self, draw), (self.rows, self.width))[ids]


class LMHead(nn.Module):
    """The projection [D, V] of hidden states to logits, its kernel the embedding transposed where it is tied."""

    vocab: int
    tied: bool
    bias: bool
    std: float

    @nn.compact
    def __call__(self, table: Array) -> tuple[Array, Array | None]:
        """Returns the kernel [D, V] and the bias [V] or None. table: the embedding [V, D]."""
        if self.tied:
            kernel = table.T
        else:
            draw = nn.initializers.normal(self.std)
            kernel = self.param("kernel", from_init_key(self, draw), (table.shape[1], self.vocab))
        # GPT-J has a bias beside a tied kernel, too.
        return kernel, self.param("bias", nn.initializers.zeros, (self.vocab,)) if self.bias else None


class Norm(nn.Module):
    """RMS norm or layer norm over the last axis, computed in float32."""

    kind: str
    eps: float
    offset: bool = False  # the factor is 1 + scale

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        # The sum in float32: in half precision, 1 + scale would lose the digits of the scale.
        scale = 1 + scale.astype(jnp.float32) if self.offset else scale
        # In float32, because a mean of squares over the width loses digits in half precision.
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        size = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1) + self.eps)
        # The plain form is y * size[..., None]. As an einsum its gradient is an inner product of rows, which a CPU
        # computes faster than the sum of a broadcast product: 3 to 19% of an update of llama_20m.
        y = jnp.einsum("...d,...->...d", y, size, precision="highest") * scale
        return (y + bias if self.kind == "layer" else y).astype(x.dtype)


def project(x: Array, kernel: Array, transposed: bool = False) -> Array:
    """Returns x [T, in] @ kernel [in, out], or x [T, out] @ kernel.T [out, in]."""
    # Under `vmap` the batch joins the rows of one product. XLA otherwise forms the kernel's gradient from a three-axis
    # array, and an update of llama_20m (8 x 128 tokens) takes 22% more CPU time. A primitive, because a `custom_vmap`
    # cannot be differentiated before it is mapped (`grad` of one sequence would fail).
    return _project.bind(x, kernel, transposed=transposed)


def _matmul(x: Array, kernel: Array, transposed: bool = False, out: Any = None) -> Array:
    axes = ((x.ndim - 1,), (kernel.ndim - 1 if transposed else kernel.ndim - 2,))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())), precision=precision(x.dtype), preferred_element_type=out)


def _matmul_on_cpu(x: Array, kernel: Array, transposed: bool = False) -> Array:
    # Of bfloat16, XLA's CPU backend computes a product with a float32 result 1.6 times as fast as one that is rounded,
    # and the transposed kernel must be part of the product. Sums are in float32 either way.
    return _matmul(x, kernel, transposed, out=jnp.float32).astype(x.dtype)


def _project_rows(args: Sequence[Array], axes: Sequence[int | None], transposed: bool) -> tuple[Array, int]:
    x, kernel = args
    if axes[0] is None or axes[1] is not None:  # one kernel per row (adapters, ensembles): a batched product
        return jax.vmap(functools.partial(_matmul, transposed=transposed), axes)(x, kernel), 0
    x = jnp.moveaxis(x, axes[0], 0)
    y = project(rearrange(x, "b t i -> (b t) i"), kernel, transposed)
    return rearrange(y, "(b t) o -> b t o", b=x.shape[0]), 0


def _kernel_gradient(g: Array, x: Array, kernel: Array, transposed: bool) -> Array:
    return project(g.T, x) if transposed else project(x.T, g)


_project = Primitive("project")
_project.def_impl(jax.jit(_matmul, static_argnames="transposed"))
_project.def_abstract_eval(
    lambda x, kernel, transposed: jax.core.ShapedArray((x.shape[0], kernel.shape[0 if transposed else 1]), x.dtype)
)
mlir.register_lowering(_project, mlir.lower_fun(_matmul, multiple_results=False))
mlir.register_lowering(_project, mlir.lower_fun(_matmul_on_cpu, multiple_results=False), platform="cpu")
ad.defbilinear(_project, lambda g, x, kernel, transposed: project(g, kernel, not transposed), _kernel_gradient)
batching.primitive_batchers[_project] = _project_rows


class Linear(nn.Module):
    """x [..., in] @ kernel [in, out] (+ bias) in x's dtype; int8 (`models.int8`) or with adapters (`models.lora`)."""

    features: int
    bias: bool
    std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        if self.has_variable("params", "scale"):
            # Without the barrier XLA moves the conversion of an int8 kernel out of a decode loop and keeps a wide copy.
            kernel, x = jax.lax.optimization_barrier((kernel, x))
            # One scale per output channel: it multiplies the product, and the integers enter unscaled.
            y = (project(x, kernel.astype(x.dtype)) * self.get_variable("params", "scale")).astype(x.dtype)
        else:
            y = project(x, kernel.astype(x.dtype))
        if self.has_variable("params", "lora_a"):
            # Added to the product and not to the kernel, in whose dtype a small change would vanish.
            pair: list[Array] = [self.get_variable("params", name).astype(x.dtype) for name in ("lora_a", "lora_b")]
            y = y + project(project(x, pair[0]), pair[1])
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


def mlp(h: Array, config: Any, *, bias: bool, std: float, out_std: float) -> Array:
    """The MLP of a block, called within its `__call__`: modules `up`, `gate` (if gated) and `down` are the block's."""
    act = ACTIVATIONS[config.activation]
    up = Linear(config.intermediate_size, bias, std, name="up")(h)
    if config.gated_mlp:
        up = act(Linear(config.intermediate_size, bias, std, name="gate")(h)) * up
    else:
        up = act(up)
    return Linear(config.hidden_size, bias, out_std, name="down")(up)


# ------------------------------------------------------------------------------------------------ a decoder's block


class RelativePositionBias(nn.Module):
    """A learned number per head and distance in tokens (longer ones share the last), added to the scores."""

    heads: int
    length: int

    @nn.compact
    def __call__(self, queries: Array, segments: Sequence[Segment], keys: Sequence[Array]) -> list[Segment]:
        """Returns the segments with biases [H, T, C], for queries at positions [T] and each segment's keys at [C]."""
        table = self.param("table", nn.initializers.zeros, (self.heads, self.length)).astype(jnp.float32)
        distances = [jnp.clip(queries[:, None] - k[None, :], 0, self.length - 1) for k in keys]
        return [s._replace(bias=table[:, d]) for s, d in zip(segments, distances)]


class Block(nn.Module):
    """One transformer block: attention over `past` and the block's own tokens, then the MLP (GPT-J: both at once)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        rope: RopeTables | None,
        mask: Mask,
        past: Sequence[Segment | Shared | RingKVCache] = (),
        positions: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Runs the block.

        Args:
          x: [T, D]. rope: tables of rotary positions. mask: [T, T] of the tokens among themselves.
          past: segments [G, C, K], of which the last may be a `RingKVCache` (then T = 1, and `mask` is the ring's).
          positions: [T], which only relative biases need.

        Returns:
          x [T, D] and the new (keys, values), each [G, T, K], rotated already; with a ring, the ring's [G, R, K].
        """
        c = self.config
        out_std = c.init_std / math.sqrt(2 * c.num_layers)  # GPT-2: the outputs of 2 L branches add up
        norm, rms = (functools.partial(Norm, kind, c.norm_eps, c.norm_offset) for kind in (c.norm, "rms"))
        h = x if c.norm_place == "post" else norm(name="attn_norm")(x)
        sizes = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        q, k, v = (Linear(n * c.head_dim, c.qkv_bias, c.init_std, name=name)(h) for name, n in sizes.items())
        if c.qk_norm_wide:
            q, k = rms(name="q_norm")(q), rms(name="k_norm")(k)
        q, k, v = (rearrange(y, "t (h k) -> t h k", h=n) for y, n in zip((q, k, v), sizes.values()))
        # Before the rotation, as in Qwen3.
        if c.qk_norm:
            q, k = rms(name="q_norm")(q), rms(name="k_norm")(k)
        if rope is not None:
            q, k = apply_rope(q, rope, c), apply_rope(k, rope, c)
        k, v = rearrange(k, "t g k -> g t k"), rearrange(v, "t g k -> g t k")
        key_positions: Any = positions
        ring = past[-1] if past else None
        if isinstance(ring, RingKVCache):
            past, key_positions, mask = past[:-1], ring.positions, ring.mask
            # Written before it is read: XLA then updates the cache in place, instead of copying it at every step.
            k, v = write_column(ring.keys, k, ring.column), write_column(ring.values, v, ring.column)  # [G, R, K]
        segments: list[Any] = [*past, text_segment(k, v, mask)]
        if c.relative_bias:
            if not past and key_positions is positions:
                # Differences of indices are those of positions (see `attention.text_mask`), and the same for all rows.
                key_positions = positions = jnp.arange(x.shape[0])
            assert positions is not None
            relative = RelativePositionBias(c.num_heads, c.max_positions, name="relative")
            segments = relative(positions, segments, [*(s.positions for s in segments[:-1]), key_positions])
        with jax.named_scope("attention"):
            a = attend(q, segments, scale=(c.query_scalar or c.head_dim) ** -0.5, cap=c.attn_softcap)
        a = Linear(c.hidden_size, c.out_bias, out_std, name="o")(rearrange(a, "t h k -> t (h k)"))
        if c.norm_place != "pre":
            a = norm(name="attn_out_norm")(a)
        # GPT-J's MLP takes the same normed input as its attention; elsewhere it takes the sum after attention.
        if not c.parallel_block:
            x = x + a
            h = x if c.norm_place == "post" else norm(name="mlp_norm")(x)
        y = mlp(h, c, bias=c.mlp_bias, std=c.init_std, out_std=out_std)
        if c.norm_place != "pre":
            y = norm(name="mlp_out_norm")(y)
        return (x + a + y if c.parallel_block else x + y), (k, v)


def with_adapters(layer: Params) -> Params:
    """Returns one layer's (or all stacked layers') parameters with LoRA's products added to their kernels."""
    out = {}
    for name, leaves in layer.items():
        if "lora_a" in leaves:
            plain = {k: v for k, v in leaves.items() if not k.startswith("lora_")}
            # In full float32: the sum is rounded once, to the kernel's dtype.
            delta = jnp.matmul(leaves["lora_a"], leaves["lora_b"], precision=jax.lax.Precision.HIGHEST)
            leaves = {**plain, "kernel": (plain["kernel"] + delta).astype(plain["kernel"].dtype)}
        out[name] = leaves
    return out
