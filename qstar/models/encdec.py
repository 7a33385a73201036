"""T5, T5 v1.1, FLAN-T5, mT5 and umT5 as pure functions of one sequence: an encoder, and a decoder that reads its states.

What differs from `models.decoder` is T5's own: attention scores are not scaled; one table of relative positions per stack,
which all its layers add to their scores (in umT5 each layer has one, at layers/relative); a second attention of every
decoder layer over the encoder's states, without positions; and a head that may be the embedding (then, in the first T5,
after a division by the square root of the width).

    embed/table [V, E]   {encoder,decoder}/layers/{q,k,v,o,gate,up,down,cross_q,...}/kernel [L, in, out]
    {encoder,decoder}/relative/table [buckets, H]   {encoder,decoder}/final_norm/scale [E]   head/kernel [E, V] if untied

Norms, softmax, relative positions and logits are float32 whatever `config.dtype` is. There is no dropout: log-probabilities
of RL must be the same twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qstar.errors import require
from qstar.mesh import all_gather_params, drop_constraints, replicate, use_fsdp_gather
from qstar.models.attention import attend, write_column
from qstar.models.decoder import PARAM_AXES
from qstar.models.layers import ACTIVATIONS, Linear, Norm
from qstar.types import Params, RingKVCache, Segment

DTYPES = ("float32", "bfloat16")
T5_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
# Rows of the embedding -> ids that have a text: the rest pads the table to a round size.
SENTINEL_VOCAB = {32128: 32100, 250112: 250100}
CLASSES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "head_dim",
    "intermediate_size",
    "buckets",
    "max_distance",
    "scan_unroll",
)


@dataclasses.dataclass(frozen=True)
class EncDecConfig:
    """What an encoder-decoder is (the first block) and how it is run here (the second). Hashable: static under `jit`."""

    family: str = "t5"  # "mt5" is v1.1 with other words; in "umt5" every layer has relative positions of its own
    vocab_size: int = 32128
    hidden_size: int = 512
    num_layers: int = 8  # of the encoder
    num_decoder_layers: int = 8
    num_heads: int = 6
    head_dim: int = 64  # heads * head_dim need not be the width: 384 in FLAN-T5 small
    intermediate_size: int = 1024
    buckets: int = 32  # of relative positions
    max_distance: int = 128  # beyond it all positions share a bucket
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"
    gated_mlp: bool = True  # v1.1 and FLAN; the first T5 has a plain ReLU
    tie_embeddings: bool = False
    scale_outputs: bool = False  # decoder outputs times 1 / sqrt(width) before the head: the first T5 only
    start_id: int = 0  # what decoding begins with: the id of padding, so masks come from lengths and never from ids
    eos_id: int | None = 1  # after every text that the encoder reads
    also_eos: tuple[int, ...] = ()  # further ids that end a response
    bos_id: int | None = None
    max_positions: int = 16_384  # T5 has no limit of its own; this one keeps a mistake from filling the memory

    dtype: str = "float32"  # of the computation; parameters keep their own dtype
    remat: str = "none"  # "none" | "block" | "dots"
    scan_unroll: int = 1

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in SIZES}
        kinds = tuple(T5_ACTIVATIONS.values())
        half = "float16 overflows in T5's MLP (65,504); use bfloat16"
        require(
            *(
                (isinstance(v, int) and v >= 1, f"model config: {n}={v!r} must be a whole number of at least 1")
                for n, v in sizes.items()
            ),
            (self.family in CLASSES, f"model config: family={self.family!r} is not one of {', '.join(CLASSES)}"),
            (self.activation in kinds, f"model config: activation={self.activation!r} is not one of {', '.join(kinds)}"),
            (self.remat in ("none", "block", "dots"), f"model config: remat={self.remat!r} is not one of none, block, dots"),
            (self.dtype != "float16", f"model config: dtype='float16': {half}"),
            (self.dtype in DTYPES, f"model config: dtype={self.dtype!r} is not one of {', '.join(DTYPES)}"),
            (self.buckets % 4 == 0, f"model config: buckets={self.buckets} must be a multiple of 4"),
            (self.max_distance > self.buckets // 2, f"model config: max_distance={self.max_distance} is too near"),
        )  # fmt: skip

    def replace(self, **changes: Any) -> EncDecConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    thoughts = None  # it does not think before it speaks: that is for decoders
    value_head = ""  # nor is one trained as a verifier
    sliding_window = None

    @property
    def num_kv_heads(self) -> int:
        """Every query head has its own keys."""
        return self.num_heads

    @property
    def text_ids(self) -> int:
        """Ids from here on have no text (32,100 of the published models' 32,128) and are never drawn."""
        return SENTINEL_VOCAB.get(self.vocab_size, self.vocab_size)


class Block(nn.Module):
    """One layer of either stack: self-attention, attention over the encoder's states (in the decoder), the MLP."""

    config: EncDecConfig
    cross: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        mask: jax.Array | None,
        source: Segment | None = None,
        ring: RingKVCache | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Runs the layer.

        Args:
          x: [T, E]. bias: float32 [H, T, S] of relative positions. mask: bool [T, S], None = everything is visible.
          source: what the decoder reads. With `values` None its keys are the encoder's states [S, E], which are
            projected here; else keys and values [H, S, K] of this layer.
          ring: cached keys and values of this row, its own token's column included (then T = 1; `mask` is the ring's).

        Returns:
          x [T, E], and the new (keys, values) [H, T, K], or the ring's [H, R, K].
        """
        c = self.config
        h = Norm("rms", c.norm_eps, name="attn_norm")(x)
        q, k, v = self._heads(h, "q"), self._keys(h, "k"), self._keys(h, "v")
        if ring is not None:
            k, v = write_column(ring.keys, k, ring.column), write_column(ring.values, v, ring.column)
            mask = ring.mask
        with jax.named_scope("attention"):
            x = x + self._out(attend(q, [Segment(k, v, mask, bias)], scale=1.0), "o")
        if self.cross:
            h = Norm("rms", c.norm_eps, name="cross_norm")(x)
            if source.values is None:
                states = source.keys
                source = source._replace(keys=self._keys(states, "cross_k"), values=self._keys(states, "cross_v"))
            with jax.named_scope("cross_attention"):
                x = x + self._out(attend(self._heads(h, "cross_q"), [source], scale=1.0), "cross_o")
        return x + self._mlp(Norm("rms", c.norm_eps, name="mlp_norm")(x)), (k, v)

    def _heads(self, h: jax.Array, name: str) -> jax.Array:
        """Returns [T, H, K]. Queries start small, since no score is ever scaled."""
        c = self.config
        std = c.hidden_size**-0.5 * (c.head_dim**-0.5 if name.endswith("q") else 1.0)
        return Linear(c.num_heads * c.head_dim, False, std, name=name)(h).reshape(-1, c.num_heads, c.head_dim)

    def _keys(self, h: jax.Array, name: str) -> jax.Array:
        return jnp.swapaxes(self._heads(h, name), 0, 1)  # [H, T, K]

    def _out(self, a: jax.Array, name: str) -> jax.Array:
        inner = self.config.num_heads * self.config.head_dim
        return Linear(self.config.hidden_size, False, inner**-0.5, name=name)(a.reshape(-1, inner))

    def _mlp(self, h: jax.Array) -> jax.Array:
        c = self.config
        act, std = ACTIVATIONS[c.activation], c.hidden_size**-0.5
        up = Linear(c.intermediate_size, False, std, name="up")(h)
        if c.gated_mlp:
            up = act(Linear(c.intermediate_size, False, std, name="gate")(h)) * up
        else:
            up = act(up)
        return Linear(c.hidden_size, False, c.intermediate_size**-0.5, name="down")(up)


# ------------------------------------------------------------------------------------------------- parameters


def init(config: EncDecConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters, of T5's own scales (an untied head of 1 / sqrt(width), so that losses start at log V)."""
    c = config
    keys = jax.random.split(key, 4)
    params: Params = {
        "embed": {"table": jax.random.normal(keys[0], (c.vocab_size, c.hidden_size))},
        "encoder": _init_stack(c, keys[1], c.num_layers, cross=False),
        "decoder": _init_stack(c, keys[2], c.num_decoder_layers, cross=True),
    }
    if not c.tie_embeddings:
        kernel = jax.random.normal(keys[3], (c.hidden_size, c.vocab_size))
        params["head"] = {"kernel": c.hidden_size**-0.5 * kernel}
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _init_stack(c: EncDecConfig, key: jax.Array, layers: int, *, cross: bool) -> Params:
    keys = jax.random.split(key, 3)
    x, bias = jnp.zeros((1, c.hidden_size)), jnp.zeros((c.num_heads, 1, 1))
    source = Segment(x, None, None) if cross else None
    block = Block(c, cross)
    own = c.family == "umt5"
    table = c.hidden_size**-0.5 * jax.random.normal(keys[1], ((layers,) if own else ()) + (c.buckets, c.num_heads))
    blocks = jax.vmap(lambda k: block.init(k, x, bias, None, source)["params"])(jax.random.split(keys[0], layers))
    return {
        "layers": {**blocks, "relative": {"table": table}} if own else blocks,
        **({} if own else {"relative": {"table": table}}),
        "final_norm": Norm("rms", c.norm_eps).init(keys[2], x)["params"],
    }


# -------------------------------------------------------------------------------------------- relative positions


def bucket(relative: jax.Array, *, both_ways: bool, buckets: int, max_distance: int) -> jax.Array:
    """Returns the bucket (int32) of relative positions, key minus query (int32).

    Half of the buckets of a direction hold one distance each, the others ever more, up to `max_distance`; beyond it all
    share the last. An encoder splits the buckets over both directions; a decoder sees no key after the query.
    """
    base = jnp.zeros_like(relative)
    if both_ways:
        buckets //= 2
        base = jnp.where(relative > 0, buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = -jnp.minimum(relative, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact)  # float32, and never log(0)
    far = exact + (far / math.log(max_distance / exact) * (buckets - exact)).astype(jnp.int32)
    return base + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def relative_bias(
    config: EncDecConfig, queries: jax.Array, keys: jax.Array, both_ways: bool, table: jax.Array
) -> jax.Array:
    """Returns what a table adds to all scores, float32 [H, T, S], for positions of queries [T] and keys [S]."""
    found = bucket(
        keys[None, :] - queries[:, None], both_ways=both_ways, buckets=config.buckets, max_distance=config.max_distance
    )
    return jnp.moveaxis(table.astype(jnp.float32)[found], -1, 0)


# ------------------------------------------------------------------------------------------------------- stacks


def encode(params: Params, config: EncDecConfig, tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the encoder's states [S, E] of tokens [S]; mask [S] is true for real ones (padding stands on the right)."""
    stack, index = params["encoder"], jnp.arange(tokens.shape[0])
    bias = functools.partial(relative_bias, config, index, index, True)
    seen = None if mask is None else jnp.broadcast_to(mask.astype(bool), (tokens.shape[0],) * 2)
    x, _ = _run(stack, config, _embed(params, config, tokens), bias, seen, None)
    return x


def decode(
    params: Params, config: EncDecConfig, tokens: jax.Array, states: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Returns the decoder's final states [T, E], ready for `decoder.unembed`: row t is about the token after tokens[t].

    Args:
      tokens: [T], beginning with `config.start_id`. states: [S, E] of `encode`. mask: [S], true where states are real.
    """
    stack, index = params["decoder"], jnp.arange(tokens.shape[0])
    bias = functools.partial(relative_bias, config, index, index, False)
    source = Segment(states, None, None if mask is None else mask.astype(bool)[None])
    x, _ = _run(stack, config, _embed(params, config, tokens), bias, index[None] <= index[:, None], source)
    return scaled(config, x)


def decode_step(
    params: Params,
    config: EncDecConfig,
    token: jax.Array,
    step: jax.Array,
    sources: Sequence[Segment],
    rings: Sequence[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Feeds one token and returns the final state [E] and the caches with it in them.

    Args:
      params: with the decoder's layers unstacked (`unstack`). token: [] int32. step: [] int32, its position.
      sources: per layer, keys and values of the encoder's states (`cross_sources`).
      rings: per layer, keys and values [H, R, K] of the tokens before; column `step` is written.
    """
    stack = params["decoder"]
    columns = jnp.arange(rings[0][0].shape[1])
    bias = functools.partial(relative_bias, config, step[None], columns, False)
    past = [RingKVCache(k, v, columns <= step, step) for k, v in rings]
    x, rings = _run(stack, config, _embed(params, config, token[None]), bias, None, sources, past)
    return scaled(config, x)[0], rings


def cross_sources(params: Params, config: EncDecConfig, states: jax.Array, mask: jax.Array) -> list[Segment]:
    """Returns per layer the keys and values [H, S, K] of the encoder's states [S, E]: what decoding caches of them."""

    def heads(layer: Params, name: str) -> jax.Array:
        y = Linear(config.num_heads * config.head_dim, False, 1.0).apply({"params": layer[name]}, states)
        return jnp.swapaxes(y.reshape(-1, config.num_heads, config.head_dim), 0, 1)

    return [
        Segment(heads(layer, "cross_k"), heads(layer, "cross_v"), mask.astype(bool)[None])
        for layer in params["decoder"]["layers"]
    ]


def unstack(params: Params, config: EncDecConfig) -> Params:
    """Returns the parameters with one tree per decoder layer: what a decode loop reads."""
    layers = params["decoder"]["layers"]
    layers = [jax.tree.map(itemgetter(i), layers) for i in range(config.num_decoder_layers)]
    return {**params, "decoder": {**params["decoder"], "layers": layers}}


def scaled(config: EncDecConfig, x: jax.Array) -> jax.Array:
    """The first T5 divides by sqrt(width) what it compares with its embeddings; v1.1 and FLAN do not."""
    return x * jnp.asarray(config.hidden_size**-0.5, x.dtype) if config.scale_outputs else x


def _embed(params: Params, config: EncDecConfig, tokens: jax.Array) -> jax.Array:
    return replicate(params["embed"]["table"][tokens].astype(config.dtype))


def _run(
    stack: Params,
    config: EncDecConfig,
    x: jax.Array,
    bias: Callable[[jax.Array], jax.Array],
    mask: jax.Array | None,
    source: Any,
    rings: Sequence[RingKVCache] = (),
) -> tuple[jax.Array, Any]:
    """Runs a stack and its last norm: stacked layers by `lax.scan`, listed ones (with a source and a ring each) in turn.

    Args:
      bias: from a table of relative positions to what is added to the scores.
    """
    block = Block(config, source is not None)
    layers = stack["layers"]
    of_all = bias(stack["relative"]["table"]) if "relative" in stack else None

    def one(x: jax.Array, layer: Params, source: Any, ring: RingKVCache | None = None) -> tuple[jax.Array, Any]:
        own = bias(layer["relative"]["table"]) if of_all is None else of_all
        x, kv = block.apply({"params": layer}, x, own, mask, source, ring)
        return replicate(x), kv

    if isinstance(layers, list):
        new = []
        for layer, read, ring in zip(layers, source, rings):
            x, kv = one(x, layer, read, ring)
            new.append(kv)
    else:
        gather = use_fsdp_gather()

        def step(x: jax.Array, layer: Params) -> tuple[jax.Array, Any]:
            return one(x, all_gather_params(layer, PARAM_AXES, config.dtype) if gather else layer, source)

        if config.remat != "none":
            keep = None if config.remat == "block" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            step = jax.checkpoint(step, policy=keep, prevent_cse=False)
        elif gather:
            step = jax.checkpoint(step, policy=drop_constraints, prevent_cse=False)
        count = jax.tree.leaves(layers)[0].shape[0]
        x, new = jax.lax.scan(
            lambda x, layer: (step(x, layer)[0], None), x, layers, unroll=min(config.scan_unroll, count)
        )
    return Norm("rms", config.norm_eps).apply({"params": stack["final_norm"]}, x), new
