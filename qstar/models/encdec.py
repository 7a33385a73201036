"""T5, T5 v1.1, FLAN-T5, mT5 and umT5 as pure functions of one sequence: an encoder and a decoder with cross-attention.

Differences from `models.decoder`: attention scores are not scaled; one table of relative positions per stack, added to
the scores of all its layers (in umT5 each layer has its own, at layers/relative); a second attention of every decoder
layer over the encoder's states, without positions; and a head that may be the embedding (then, in the first T5, after a
division by the square root of the width).

    embed/table [V, D]   {encoder,decoder}/layers/{q,k,v,o,gate,up,down,cross_q,...}/kernel [L, in, out]
    {encoder,decoder}/relative/table [buckets, H]  {encoder,decoder}/final_norm/scale [D]  head/kernel [D, V] if untied

Norms, softmax, relative positions and logits are float32 whatever `config.dtype` is. There is no dropout, so that RL
computes the same log-probabilities twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from qstar.errors import Settings, bounded, require
from qstar.mesh import all_gather_params, replicate, use_fsdp_gather
from qstar.models import decoder
from qstar.models.attention import attend, write_column
from qstar.models.layers import PARAM_AXES, Embed, Linear, LMHead, Norm, mlp
from qstar.types import Params, RingKVCache, Segment

Pair = tuple[Array, Array]  # keys and values
# Rows of the embedding -> ids that have a text: the rest pads the table to a round size.
SENTINEL_VOCAB = {32128: 32100, 250112: 250100}


@dataclasses.dataclass(frozen=True)
class EncDecConfig(Settings):
    """An encoder-decoder (the first block) and how it is run (the second). Hashable: a static argument of `jit`."""

    WHERE = "model config: "

    family: str = bounded("t5", choices=("t5", "mt5", "umt5"))  # mT5 is v1.1; in umT5 each layer has relative positions
    vocab_size: int = bounded(32128, ge=1)
    hidden_size: int = bounded(512, ge=1)
    num_layers: int = bounded(8, ge=1)  # of the encoder
    num_decoder_layers: int = bounded(8, ge=1)
    num_heads: int = bounded(6, ge=1)
    # Heads times head_dim need not be the width: 384 of 512 in FLAN-T5 small.
    head_dim: int = bounded(64, ge=1)
    intermediate_size: int = bounded(1024, ge=1)
    buckets: int = bounded(32, ge=1)  # of relative positions
    max_distance: int = bounded(128, ge=1)  # beyond it all positions share a bucket
    norm_eps: float = bounded(1e-6, ge=1e-38, le=1)
    activation: str = bounded("gelu_tanh", choices=("relu", "gelu_tanh", "gelu", "silu"))
    gated_mlp: bool = True  # v1.1 and FLAN; the first T5 has a plain ReLU
    tie_embeddings: bool = False
    scale_outputs: bool = False  # decoder outputs times 1 / sqrt(width) before the head: the first T5 only
    # Decoding begins with the id of padding, so masks come from lengths and never from ids.
    start_id: int = 0
    eos_id: int | None = 1  # after every text that the encoder reads
    also_eos: tuple[int, ...] = ()  # further ids that end a response
    bos_id: int | None = None
    # T5 has no limit of its own; this one keeps a mistake from filling the memory.
    max_positions: int = 16_384

    dtype: str = bounded("float32", choices=("float32", "bfloat16"))  # of the computation; parameters keep their own
    remat: str = bounded("none", choices=("none", "block", "dots"))
    scan_unroll: int = bounded(1, ge=1)

    # Options of decoders that an encoder-decoder does not have.
    thoughts = None
    value_head = ""
    sliding_window = None
    head_bias = False
    final_softcap = None

    def __post_init__(self) -> None:
        half = "model config: dtype='float16': float16 overflows in T5's MLP (65,504); use bfloat16"
        require((self.dtype != "float16", half))
        super().__post_init__()
        require(
            (self.buckets % 4 == 0, f"model config: buckets={self.buckets} must be a multiple of 4"),
            (self.max_distance > self.buckets // 2, f"model config: max_distance={self.max_distance} is too near"),
        )

    @property
    def num_kv_heads(self) -> int:
        """Every query head has its own keys."""
        return self.num_heads

    @property
    def init_std(self) -> float:
        """Of an untied head: 1 / sqrt(width), so that losses start at log V."""
        return self.hidden_size**-0.5

    @property
    def text_ids(self) -> int:
        """Ids from here on have no text (32,100 of the published models' 32,128) and are never drawn."""
        return SENTINEL_VOCAB.get(self.vocab_size, self.vocab_size)


class Block(nn.Module):
    """One layer of either stack: self-attention, attention over the encoder's states (in the decoder), the MLP."""

    config: EncDecConfig

    @nn.compact
    def __call__(
        self, x: Array, bias: Array, mask: Array | None, source: Any = None, ring: RingKVCache | None = None
    ) -> tuple[Array, Pair]:
        """Runs the layer.

        Args:
          x: [T, D]. bias: float32 [H, T, C] of relative positions. mask: bool [T, C], None = everything is visible.
          source: what the decoder attends to: a Segment of keys and values [H, C, K] of this layer; or the encoder's
            states [C, D], which are projected here, with their mask.
          ring: cached keys and values of this row, its own token's column included (then T = 1; `mask` is the ring's).

        Returns:
          x [T, D], and the new (keys, values) [H, T, K], or the ring's [H, R, K].
        """
        c = self.config
        h = Norm("rms", c.norm_eps, name="attn_norm")(x)
        q, k, v = self._heads(h, "q", "t h k"), self._heads(h, "k", "h t k"), self._heads(h, "v", "h t k")
        if ring is not None:
            k, v = write_column(ring.keys, k, ring.column), write_column(ring.values, v, ring.column)
            mask = ring.mask
        # T5 does not scale scores: its queries have small initial weights instead (`_heads`).
        with jax.named_scope("attention"):
            x = x + self._out(attend(q, [Segment(k, v, mask, bias)], scale=1.0), "o")
        if source is not None:
            h = Norm("rms", c.norm_eps, name="cross_norm")(x)
            # A whole sequence projects the states here; decoding does it once for all steps (`cross_sources`).
            if not isinstance(source, Segment):
                states, visible = source
                keys, values = (self._heads(states, name, "h t k") for name in ("cross_k", "cross_v"))
                source = Segment(keys, values, visible)
            with jax.named_scope("cross_attention"):
                x = x + self._out(attend(self._heads(h, "cross_q", "t h k"), [source], scale=1.0), "cross_o")
        h = Norm("rms", c.norm_eps, name="mlp_norm")(x)
        return x + mlp(h, c, bias=False, std=c.hidden_size**-0.5, out_std=c.intermediate_size**-0.5), (k, v)

    def _heads(self, h: Array, name: str, axes: str) -> Array:
        c = self.config
        # Queries start small by 1 / sqrt(K), since no score is ever scaled.
        std = c.hidden_size**-0.5 * (c.head_dim**-0.5 if name.endswith("q") else 1.0)
        y = Linear(c.num_heads * c.head_dim, False, std, name=name)(h)
        return rearrange(y, f"t (h k) -> {axes}", h=c.num_heads)

    def _out(self, a: Array, name: str) -> Array:
        std = (self.config.num_heads * self.config.head_dim) ** -0.5
        return Linear(self.config.hidden_size, False, std, name=name)(rearrange(a, "t h k -> t (h k)"))


# ------------------------------------------------------------------------------------------------- parameters


def init(config: EncDecConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters, of T5's own scales."""
    c = config
    keys = jax.random.split(key, 4)
    # Standard deviations as in Mesh TensorFlow and transformers: 1 for the embedding, inputs^-1/2 for the kernels.
    params: Params = {
        "embed": Embed(c.vocab_size, c.hidden_size, 1.0).init(keys[0], jnp.zeros((1,), jnp.int32))["params"],
        "encoder": _init_stack(c, keys[1], c.num_layers, cross=False),
        "decoder": _init_stack(c, keys[2], c.num_decoder_layers, cross=True),
    }
    if not c.tie_embeddings:
        head = LMHead(c.vocab_size, False, False, c.init_std)
        params["head"] = head.init(keys[3], params["embed"]["table"])["params"]
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _init_stack(c: EncDecConfig, key: Array, layers: int, *, cross: bool) -> Params:
    keys = jax.random.split(key, 3)
    x, bias = jnp.zeros((1, c.hidden_size)), jnp.zeros((c.num_heads, 1, 1))
    source = (x, None) if cross else None
    block = Block(c)
    own = c.family == "umt5"
    table = c.hidden_size**-0.5 * jax.random.normal(keys[1], ((layers,) if own else ()) + (c.buckets, c.num_heads))
    blocks = jax.vmap(lambda k: block.init(k, x, bias, None, source)["params"])(jax.random.split(keys[0], layers))
    stack = {"layers": blocks, "final_norm": Norm("rms", c.norm_eps).init(keys[2], x)["params"]}
    (blocks if own else stack)["relative"] = {"table": table}
    return stack


# -------------------------------------------------------------------------------------------- relative positions


def bucket(relative: Array, *, both_ways: bool, buckets: int, max_distance: int) -> Array:
    """Returns the bucket (int32) of relative positions, key minus query (int32).

    Half of the buckets of a direction hold one distance each, the others logarithmically more, up to `max_distance`;
    beyond it all share the last. An encoder splits the buckets over both directions; a decoder has only one.
    """
    base = jnp.zeros_like(relative)
    if both_ways:
        buckets //= 2
        base = jnp.where(relative > 0, buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = -jnp.minimum(relative, 0)
    exact = buckets // 2
    # At least `exact`: the `where` below computes both of its branches, and log(0) is -inf.
    far = jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact)
    far = exact + (far / math.log(max_distance / exact) * (buckets - exact)).astype(jnp.int32)
    return base + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def relative_bias(config: EncDecConfig, queries: Array, keys: Array, both_ways: bool, table: Array) -> Array:
    """Returns the scores' bias, float32 [H, T, C], from a table [buckets, H] for positions of queries [T], keys [C]."""
    found = bucket(
        keys[None, :] - queries[:, None], both_ways=both_ways, buckets=config.buckets, max_distance=config.max_distance
    )
    return rearrange(table.astype(jnp.float32)[found], "t c h -> h t c")


# ------------------------------------------------------------------------------------------------------- stacks


def encode(params: Params, config: EncDecConfig, tokens: Array, mask: Array) -> Array:
    """Returns the encoder's states [C, D] of tokens [C]; mask [C] is true for real ones (padding is on the right)."""
    stack, index = params["encoder"], jnp.arange(tokens.shape[0])
    bias = functools.partial(relative_bias, config, index, index, True)
    visible = jnp.broadcast_to(mask.astype(bool), (tokens.shape[0],) * 2)
    x, _ = _run(stack, config, params["embed"]["table"][tokens], bias, visible, None)
    return x


def decode(params: Params, config: EncDecConfig, tokens: Array, states: Array, mask: Array) -> Array:
    """Returns the decoder's final states [T, D], ready for `decoder.unembed`: row t predicts the token after tokens[t].

    Args:
      tokens: [T], beginning with `config.start_id`. states: [C, D] of `encode`. mask: [C], true where states are real.
    """
    stack, index = params["decoder"], jnp.arange(tokens.shape[0])
    bias = functools.partial(relative_bias, config, index, index, False)
    source = (states, mask.astype(bool)[None])
    x, _ = _run(stack, config, params["embed"]["table"][tokens], bias, index[None] <= index[:, None], source)
    return _scaled(config, x)


def decode_step(
    params: Params, config: EncDecConfig, token: Array, step: Array, sources: Sequence[Segment], rings: Sequence[Pair]
) -> tuple[Array, list[Pair]]:
    """Feeds one token and returns the final state [D] and the caches, written in its column.

    Args:
      params: with the decoder's layers unstacked (`unstack`). token: [] int32. step: [] int32, its position.
      sources: per layer, keys and values of the encoder's states (`cross_sources`).
      rings: per layer, keys and values [H, R, K] of the tokens before; column `step` is written.
    """
    stack = params["decoder"]
    # The column of a token in the cache is its position, so the step's bias is one row over the columns.
    columns = jnp.arange(rings[0][0].shape[1])
    bias = functools.partial(relative_bias, config, step[None], columns, False)
    past = [RingKVCache(k, v, columns <= step, step) for k, v in rings]
    x, new = _run(stack, config, params["embed"]["table"][token[None]], bias, None, sources, past)
    return _scaled(config, x)[0], new


def cross_sources(params: Params, config: EncDecConfig, states: Array, mask: Array) -> list[Segment]:
    """Returns per layer the keys and values [H, C, K] of the encoder's states [C, D], which decoding caches."""
    project = Linear(config.num_heads * config.head_dim, False, 1.0)

    def heads(kernel: Params) -> Array:
        found = cast(Array, project.apply({"params": kernel}, states))
        return rearrange(found, "c (h k) -> h c k", h=config.num_heads)

    layers = params["decoder"]["layers"]
    return [Segment(heads(layer["cross_k"]), heads(layer["cross_v"]), mask.astype(bool)[None]) for layer in layers]


def unstack(params: Params) -> Params:
    """Returns the parameters with one tree per decoder layer: what a decode loop reads."""
    stack = params["decoder"]
    return {**params, "decoder": {**stack, "layers": decoder.unstack(stack["layers"])}}


def _scaled(config: EncDecConfig, x: Array) -> Array:
    # The first T5, whose head is the embedding, divides by sqrt(width); v1.1 and FLAN do not.
    return x * jnp.asarray(config.hidden_size**-0.5, x.dtype) if config.scale_outputs else x


def _run(
    stack: Params,
    config: EncDecConfig,
    x: Array,
    bias: Callable[[Array], Array],
    mask: Array | None,
    source: Any,
    rings: Sequence[RingKVCache] = (),
) -> tuple[Array, Any]:
    """Runs a stack and its last norm; `bias` maps a table of relative positions to the bias of the scores."""
    block, layers, x = Block(config), stack["layers"], replicate(x.astype(config.dtype))
    # Computed once where all layers share a table, and in every layer of umT5.
    common = bias(stack["relative"]["table"]) if "relative" in stack else None

    def one(x: Array, layer: Params, source: Any, ring: RingKVCache | None = None) -> tuple[Array, Any]:
        added = bias(layer["relative"]["table"]) if common is None else common
        x, kv = block.apply({"params": layer}, x, added, mask, source, ring)
        return replicate(x), kv

    new = []
    if isinstance(layers, list):
        for layer, read, ring in zip(layers, source, rings):
            x, kv = one(x, layer, read, ring)
            new.append(kv)
    else:
        gather = use_fsdp_gather()

        def step(x: Array, layer: Params) -> tuple[Array, None]:
            layer = all_gather_params(layer, PARAM_AXES, config.dtype) if gather else layer
            return one(x, layer, source)[0], None

        count = jax.tree.leaves(layers)[0].shape[0]
        step = decoder.checkpointed(step, config.remat, gather)
        x, _ = jax.lax.scan(step, x, layers, unroll=min(config.scan_unroll, count))
    return cast(Array, Norm("rms", config.norm_eps).apply({"params": stack["final_norm"]}, x)), new
