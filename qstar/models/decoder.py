"""The decoder: one pure graph for training, prefill, decoding and thoughts.

Parameters are a plain dict; the layers are stacked on a leading axis and run by `lax.scan`. The scan is over Linen's
pure `Block.apply` rather than `nn.scan`, so that a decode loop can run the very same blocks unstacked, with one cache
per layer (1.3 to 2.3 times faster on a CPU), and so that past segments, mapped or not, are ordinary arguments.

    embed/table [V, E]   positions/table [P, E]   layers/{q,k,v,o,up,gate,down}/kernel [L, in, out]   final_norm   head

A model that thinks (`config.thoughts`) has the trees of `models.mixing` beside these, a verifier that of
`models.heads`; nothing here reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

from qstar.mesh import all_gather_params, drop_constraints, replicate, use_fsdp_gather
from qstar.models import heads
from qstar.models.attention import precision
from qstar.models.config import ModelConfig
from qstar.models.flash import KernelMask
from qstar.models.layers import Block, Norm
from qstar.models.rope import RopeTables, rope_turns
from qstar.types import Params

# Logical axes of every parameter, matched on the end of its path (leading axes that are not named, such as the stacked
# layers, stay whole). Column-parallel into heads and MLP, row-parallel out of them, as in Megatron.
PARAM_AXES = (
    (r"mixing/in/kernel$", ("embed", "mlp")),
    (r"mixing/in/bias$", ("mlp",)),
    (r"mixing/hidden/kernel$", ("mlp", "embed")),
    (r"mixing/out/kernel$", ("embed", None)),
    (r"value/kernel$", ("embed", None)),
    (r"value/in/kernel$", ("embed", "mlp")),
    (r"value/in/bias$", ("mlp",)),
    (r"value/out/kernel$", ("mlp", None)),
    (r"embed/table$", ("vocab", "embed")),
    (r"positions/table$", (None, "embed")),
    (r"relative/table$", (None, "heads")),
    (r"(q|k|v)/kernel$", ("embed", "heads")),
    (r"(q|k|v)/bias$", ("heads",)),
    (r"o/kernel$", ("heads", "embed")),
    (r"(up|gate)/kernel$", ("embed", "mlp")),
    (r"(up|gate)/bias$", ("mlp",)),
    (r"down/kernel$", ("mlp", "embed")),
    (r"(q|k|v|up|gate)/lora_a$", ("embed", None)),  # so that a pair's products lie where its kernel's do
    (r"(q|k|v)/lora_b$", (None, "heads")),
    (r"(up|gate)/lora_b$", (None, "mlp")),
    (r"o/lora_a$", ("heads", None)),
    (r"down/lora_a$", ("mlp", None)),
    (r"(o|down)/lora_b$", (None, "embed")),
    (r"head/kernel$", ("embed", "vocab")),
    (r"head/bias$", ("vocab",)),
)


def init(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters (normal of `init_std`, output projections scaled by 1 / sqrt(2 L), norms at 1)."""
    c = config
    keys = jax.random.split(key, 4)
    x, turns = jnp.zeros((1, c.hidden_size)), _turns(c, jnp.zeros((1,), jnp.int32))
    layer_keys = jax.random.split(keys[0], c.num_layers)
    params: Params = {
        "embed": {"table": c.init_std * jax.random.normal(keys[1], (c.vocab_size, c.hidden_size))},
        "layers": jax.vmap(lambda k: Block(c).init(k, x, turns, None, (), jnp.zeros((1,), jnp.int32))["params"])(
            layer_keys
        ),
        "final_norm": Norm(c.norm, c.norm_eps).init(keys[0], x)["params"],
    }
    if c.position == "learned":
        params["positions"] = {"table": c.init_std * jax.random.normal(keys[2], (c.max_positions, c.hidden_size))}
    if c.relative_bias:
        head = jnp.arange(c.num_heads - 1)
        table = params["layers"]["relative"]["table"]
        params["layers"]["relative"]["table"] = table.at[0, head, head].set(c.local_init)
    if not c.tie_embeddings:
        params["head"] = {"kernel": c.init_std * jax.random.normal(keys[3], (c.hidden_size, c.vocab_size))}
    if c.head_bias:  # GPT-J keeps its bias where the kernel is tied, too
        params.setdefault("head", {})["bias"] = jnp.zeros((c.vocab_size,))
    if c.thoughts is not None:
        params.update(heads.init_thoughts(c, jax.random.fold_in(key, 1)))
    if c.value_head:
        params["value"] = {"kernel": jnp.zeros((c.hidden_size, 1)), "bias": jnp.zeros((1,))}
    return jax.tree.map(lambda p: p.astype(dtype), params)


def embed(params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the input vectors [T, E] of tokens [T] at positions [T], in the compute dtype."""
    return embed_tokens(params, config, params["embed"]["table"][tokens], positions)


def embed_tokens(params: Params, config: ModelConfig, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the input vectors [T, E] of rows [T, E] (of the embedding table, or like them) at positions [T]."""
    dtype = jnp.dtype(config.dtype)
    x = rows.astype(dtype)
    if config.embed_scale:
        x = x * jnp.asarray(config.hidden_size**0.5, dtype)
    if config.position == "learned":
        x = x + params["positions"]["table"][positions].astype(dtype)
    return replicate(x)


def run_layers(
    layers: Any,
    config: ModelConfig,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array | KernelMask | None,
    past: Sequence[Any] = (),
) -> tuple[jax.Array, Any]:
    """Runs the blocks on one sequence.

    Args:
      layers: stacked parameters (leading axis L), or a list with one tree per layer (see `unstack`).
      x: [T, E] inputs. positions: [T]. mask: bool [T, T] of the tokens among themselves.
      past: with stacked layers, Segments whose keys and values carry a leading axis L (masks do not); with listed
        layers, one list of Segments per layer, of which the last may be a Ring to write into.

    Returns:
      x [T, E] before the final norm, and the new keys and values: a pair [L, G, T, K], or one pair per layer.
    """
    block, turns = Block(config), _turns(config, positions)

    listed = isinstance(layers, (list, tuple))
    gather = (
        use_fsdp_gather() and not listed and x.shape[0] > 1
    )  # of a lone token, the compiler may move the token instead

    def one(x: jax.Array, layer: Params, segments: Sequence[Any]) -> tuple[jax.Array, Any]:
        layer = all_gather_params(layer, PARAM_AXES, config.dtype) if gather else layer
        x, kv = block.apply({"params": layer}, x, turns, mask, segments, positions)
        return replicate(x), kv

    if config.remat != "none":
        keep = None if config.remat == "block" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        one = jax.checkpoint(one, policy=keep, prevent_cse=False)
    elif gather:
        one = jax.checkpoint(one, policy=drop_constraints, prevent_cse=False)
    if listed:
        new = []
        for i, layer in enumerate(layers):
            x, kv = one(x, layer, past[i] if past else ())
            new.append(kv)
        return x, new

    def body(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        layer, pairs = xs
        return one(x, layer, [s._replace(keys=k, values=v) for (k, v), s in zip(pairs, past)])

    stacked_pairs = [(s.keys, s.values) for s in past]
    return jax.lax.scan(body, x, (layers, stacked_pairs), unroll=min(config.scan_unroll, config.num_layers))


def _turns(config: ModelConfig, positions: jax.Array) -> RopeTables | None:
    return rope_turns(config, positions) if config.position == "rope" else None


def unstack(layers: Params, config: ModelConfig) -> list[Params]:
    """Returns one parameter tree per layer: what a decode loop reads, sliced once outside the loop."""
    return [jax.tree.map(itemgetter(i), layers) for i in range(config.num_layers)]


def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array | KernelMask | None,
    past: Sequence[Any] = (),
) -> tuple[jax.Array, Any]:
    """Returns the final hidden states [T, E] (after the last norm) of one sequence, and its new keys and values."""
    return run(params, config, embed(params, config, tokens, positions), positions, mask, past)


def run(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array | KernelMask | None,
    past: Sequence[Any] = (),
) -> tuple[jax.Array, Any]:
    """Like `forward`, from input vectors x [T, E] instead of tokens."""
    x, kv = run_layers(params["layers"], config, x, positions, mask, past)
    return Norm(config.norm, config.norm_eps).apply({"params": params["final_norm"]}, x), kv


def head(params: Params, config: Any) -> tuple[jax.Array, jax.Array | None]:
    """Returns the vocabulary projection [E, V] and its bias [V] or None (the embedding transposed where it is tied).

    For an encoder-decoder, too: its tree has the same names there.
    """
    own = params.get("head", {})
    return params["embed"]["table"].T if config.tie_embeddings else own["kernel"], own.get("bias")


def unembed(params: Params, config: Any, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., E]; products in the hidden dtype, sums in float32."""
    kernel, bias = head(params, config)
    logits = jnp.matmul(
        hidden, kernel.astype(hidden.dtype), precision=precision(hidden.dtype), preferred_element_type=jnp.float32
    )
    return logits if bias is None else logits + bias.astype(jnp.float32)
