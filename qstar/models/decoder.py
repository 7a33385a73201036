"""The decoder: one pure graph for training, prefill, decoding and thoughts.

Parameters are a plain dict; the layers are stacked on a leading axis and run by `lax.scan`.

    embed/table [V, D]   positions/table [., D]   layers/{q,k,v,o,up,gate,down}/kernel [L, in, out]   final_norm   head

Thoughts (`config.thoughts`) and a value head add the trees of `models.heads`, which nothing here reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from qstar.mesh import all_gather_params, drop_constraints, replicate, use_fsdp_gather
from qstar.models import heads
from qstar.models.attention import LayerMasks
from qstar.models.config import ModelConfig
from qstar.models.layers import PARAM_AXES, Block, Embed, LMHead, Mask, Norm
from qstar.models.rope import RopeTables, layer_tables
from qstar.models.vocabulary import Head, head_logits
from qstar.types import Params


def init(config: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters (normal of `init_std`, output projections scaled by 1 / sqrt(2 L), norms at 1)."""
    c = config
    keys = jax.random.split(key, 4)
    x, ids = jnp.zeros((1, c.hidden_size)), jnp.zeros((1,), jnp.int32)
    (rope, *_) = layer_tables(c, ids)
    params: Params = {
        "embed": Embed(c.vocab_size, c.hidden_size, c.init_std).init(keys[1], ids)["params"],
        "layers": jax.vmap(lambda k: Block(c).init(k, x, rope, None, (), ids)["params"])(
            jax.random.split(keys[0], c.num_layers)
        ),
        "final_norm": _norm(c).init(keys[0], x)["params"],
    }
    if c.position == "learned":
        params["positions"] = Embed(c.max_positions, c.hidden_size, c.init_std).init(keys[2], ids)["params"]
    if c.relative_bias:
        # Only layer 0 begins with a preference for near tokens; the last head of it stays free to attend anywhere.
        head = jnp.arange(c.num_heads - 1)
        table = params["layers"]["relative"]["table"]
        params["layers"]["relative"]["table"] = table.at[0, head, head].set(c.local_init)
    if not c.tie_embeddings or c.head_bias:
        params["head"] = _head(c).init(keys[3], params["embed"]["table"])["params"]
    if c.thoughts is not None:
        # A key of their own, so that a decoder has the same initial values with and without thoughts.
        params.update(heads.init_thoughts(c, jax.random.fold_in(key, 1)))
    if c.value_head:
        params["value"] = heads.ValueHead().init(key, x)["params"]
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _head(config: Any) -> LMHead:
    return LMHead(config.vocab_size, config.tie_embeddings, config.head_bias, config.init_std)


def _norm(config: ModelConfig) -> Norm:
    return Norm(config.norm, config.norm_eps, config.norm_offset)


def embed_tokens(params: Params, config: ModelConfig, rows: Array, positions: Array) -> Array:
    """Returns the input vectors [T, D] of rows [T, D] (of the embedding table, or like them) at positions [T]."""
    dtype = jnp.dtype(config.dtype)
    x = rows.astype(dtype)
    if config.embed_scale:
        x = x * jnp.asarray(config.hidden_size**0.5, dtype)
    if config.position == "learned":
        x = x + params["positions"]["table"][positions].astype(dtype)
    # Else the compiler may split activations over their width, as FSDP splits the parameters, and move them for it.
    return replicate(x)


def forward(
    params: Params, config: ModelConfig, tokens: Array, positions: Array, mask: Mask, past: Sequence[Any] = ()
) -> tuple[Array, Any]:
    """Like `run`, from tokens [T] instead of input vectors."""
    x = embed_tokens(params, config, params["embed"]["table"][tokens], positions)
    return run(params, config, x, positions, mask, past)


def run(
    params: Params, config: ModelConfig, x: Array, positions: Array, mask: Mask, past: Sequence[Any] = ()
) -> tuple[Array, Any]:
    """Runs the blocks and the last norm on one sequence.

    Args:
      params: a decoder's tree; `layers` is stacked (leading axis L), or a list with one tree per layer (see `unstack`).
      x: [T, D] inputs of `embed_tokens`. positions: [T]. mask: of the tokens among themselves. This and the masks of
        `past` are `LayerMasks` where only some layers have the sliding window.
      past: with stacked layers, Segments whose keys and values carry a leading axis L (masks do not); with listed
        layers, one list of Segments per layer, of which the last may be a `RingKVCache` to write into.

    Returns:
      The final hidden states [T, D], and the new keys and values: a pair [L, G, T, K], or one pair per layer.
    """
    # `lax.scan` over Linen's pure `apply` instead of `nn.scan`: a decode loop runs the same blocks unstacked, with one
    # cache per layer (1.3 to 2.3 times faster on a CPU), and past segments, mapped or not, are ordinary arguments.
    layers, block, tables = params["layers"], Block(config), layer_tables(config, positions)
    listed = isinstance(layers, (list, tuple))
    # For a lone token, moving the token may cost less than gathering the weights: that is left to the compiler.
    gather = use_fsdp_gather() and not listed and x.shape[0] > 1

    def one(x: Array, layer: Params, segments: Sequence[Any], kind: Any) -> tuple[Array, Any]:
        layer = all_gather_params(layer, PARAM_AXES, config.dtype) if gather else layer
        # Chosen here and not outside, so that remat keeps two numbers per layer instead of its masks and tables.
        own = _of_layer(kind, tables, mask, segments) if kind else (tables[0], mask, segments)
        x, kv = block.apply({"params": layer}, x, *own, positions)
        return replicate(x), kv

    one = checkpointed(one, config.remat, gather)
    kinds = config.layer_kinds
    new: Any = []
    if listed:
        for i, layer in enumerate(layers):
            x, kv = one(x, layer, past[i] if past else (), kinds[i] if kinds else ())
            new.append(kv)
    else:

        def body(x: Array, xs: Any) -> tuple[Array, Any]:
            layer, pairs, kind = xs
            return one(x, layer, [s._replace(keys=k, values=v) for (k, v), s in zip(pairs, past)], kind)

        # Only these differ between layers; both forms of masks, all rotary tables and positions are constants.
        xs = layers, [(s.keys, s.values) for s in past], tuple(jnp.asarray(x) for x in zip(*kinds))
        x, new = jax.lax.scan(body, x, xs, unroll=min(config.scan_unroll, config.num_layers))
    return cast(Array, _norm(config).apply({"params": params["final_norm"]}, x)), new


def checkpointed(layer: Callable[..., Any], remat: str, gather: bool) -> Callable[..., Any]:
    """Returns a layer's function under a config's `remat`; weights gathered for it are never kept for its gradient."""
    # In a scan the two passes are separate loops: barriers against their common subexpressions would only cost time.
    if remat != "none":
        policy = None if remat == "block" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return jax.checkpoint(layer, policy=drop_constraints, prevent_cse=False) if gather else layer


def _of_layer(kind: Any, tables: Sequence[RopeTables | None], mask: Mask, segments: Sequence[Any]) -> tuple[Any, ...]:
    """Returns a layer's rotary tables, mask and segments. kind: an entry of `config.layer_kinds`, of ints or arrays."""
    near, table = kind

    def pick(mask: Mask) -> Mask:
        if not isinstance(mask, LayerMasks):
            return mask
        return jnp.where(near, mask.near, mask.full) if isinstance(near, Array) else mask[near]

    rope = tables[table] if isinstance(table, int) else jax.tree.map(lambda *x: jnp.stack(x)[table], *tables)
    return rope, pick(mask), [s._replace(mask=pick(s.mask)) for s in segments]


def unstack(layers: Params) -> list[Params]:
    """Returns one tree per layer of stacked layers: what a decode loop reads, sliced once outside the loop."""
    return [jax.tree.map(itemgetter(i), layers) for i in range(jax.tree.leaves(layers)[0].shape[0])]


def head(params: Params, config: Any) -> Head:
    """Returns the output projection of a decoder or an encoder-decoder."""
    found = _head(config).apply({"params": params.get("head", {})}, params["embed"]["table"])
    return Head(*cast(tuple[Array, Array | None], found), config.final_softcap)


def unembed(params: Params, config: Any, hidden: Array) -> Array:
    """Returns float32 logits [..., V] of hidden states [..., D]; products in the hidden dtype, sums in float32."""
    return head_logits(hidden, *head(params, config))
