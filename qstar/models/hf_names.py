"""Names and layouts of a decoder's parameters in Hugging Face files: one table per family, read both ways.

A row holds the name of a parameter in the files, and how its layout differs (PyTorch's Linear keeps [out, in]; GPT-2
and Phi-3 fuse q, k and v). Which rows apply to a config, and their shapes, follows from its `init`, traced without computing.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from qstar import tree
from qstar.errors import UserError
from qstar.models import decoder, encdec
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.types import Params


class Row(NamedTuple):
    """The tensor of one parameter in the files."""

    path: str  # in qstar's tree
    name: str  # of the tensor; {i} is the layer (qstar stacks the layers on a leading axis)
    transpose: bool = False  # the file keeps [out, in]
    part: int | None = None  # which part of a fused q | k | v or gate | up, along the last axis
    spare: bool = False  # the file keeps [2, ...], the second row unused (written as zeros)
    factor: float = 1.0  # of the values when they are written
    start: int = 0  # `name_map` fills these in: where the parameter begins on the last axis, and the tensor's width
    fused_width: int = 0


def _linear(path: str, name: str, transpose: bool = True, part: int | None = None) -> tuple[Row, Row]:
    kernel = Row(f"{path}/kernel", f"{name}.weight", transpose, part)
    return kernel, Row(f"{path}/bias", f"{name}.bias", False, part)


def _fused(parts: Sequence[str], name: str, transpose: bool = True) -> tuple[Row, ...]:
    return tuple(row for i, n in enumerate(parts) for row in _linear(f"layers/{n}", name, transpose, part=i))


def _norm(path: str, name: str) -> tuple[Row, Row]:
    return Row(f"{path}/scale", f"{name}.weight"), Row(f"{path}/bias", f"{name}.bias")


_conv1d = functools.partial(_linear, transpose=False)  # GPT-2's own layer keeps [in, out], as we do


def _llama(mlp_norm: str = "post_attention_layernorm", **norms: str) -> tuple[Row, ...]:
    # `norms`: further ones of a block, and their names in the files.
    norms = {"attn_norm": "input_layernorm", "mlp_norm": mlp_norm, **norms}
    return (
        Row("embed/table", "model.embed_tokens.weight"),
        Row("positions/table", "model.embed_positions.weight"),  # only family `tiny` can have this and the next
        Row("layers/relative/table", "model.layers.{i}.self_attn.relative_bias"),
        *(row for ours, name in norms.items() for row in _norm(f"layers/{ours}", f"model.layers.{{i}}.{name}")),
        *(row for n in "qkvo" for row in _linear(f"layers/{n}", f"model.layers.{{i}}.self_attn.{n}_proj")),
        *(row for n in "qk" for row in _norm(f"layers/{n}_norm", f"model.layers.{{i}}.self_attn.{n}_norm")),
        *(row for n in ("gate", "up", "down") for row in _linear(f"layers/{n}", f"model.layers.{{i}}.mlp.{n}_proj")),
        *_norm("final_norm", "model.norm"),
        *_linear("head", "lm_head"),
    )


_AFTER = {"attn_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
_LLAMA = _llama()
_PHI3 = (
    *_LLAMA,
    *_fused("qkv", "model.layers.{i}.self_attn.qkv_proj"),
    *_fused(("gate", "up"), "model.layers.{i}.mlp.gate_up_proj"),
)

_GPT2 = (
    Row("embed/table", "transformer.wte.weight"),
    Row("positions/table", "transformer.wpe.weight"),
    *_norm("layers/attn_norm", "transformer.h.{i}.ln_1"),
    *_fused("qkv", "transformer.h.{i}.attn.c_attn", transpose=False),
    *_conv1d("layers/o", "transformer.h.{i}.attn.c_proj"),
    *_norm("layers/mlp_norm", "transformer.h.{i}.ln_2"),
    *_conv1d("layers/up", "transformer.h.{i}.mlp.c_fc"),
    *_conv1d("layers/down", "transformer.h.{i}.mlp.c_proj"),
    *_norm("final_norm", "transformer.ln_f"),
    *_linear("head", "lm_head"),
)

_GPTJ = (
    Row("embed/table", "transformer.wte.weight"),
    *_norm("layers/attn_norm", "transformer.h.{i}.ln_1"),
    *(row for n in "qkv" for row in _linear(f"layers/{n}", f"transformer.h.{{i}}.attn.{n}_proj")),
    *_linear("layers/o", "transformer.h.{i}.attn.out_proj"),
    *_linear("layers/up", "transformer.h.{i}.mlp.fc_in"),
    *_linear("layers/down", "transformer.h.{i}.mlp.fc_out"),
    *_norm("final_norm", "transformer.ln_f"),
    *_linear("head", "lm_head"),
)


def _t5_stack(stack: str, mlp: int) -> tuple[Row, ...]:
    # `mlp`: the number of the MLP's sub-layer, which cross-attention moves from 1 to 2 in the decoder.
    at, to = f"{stack}.block.{{i}}.layer", f"{stack}/layers"
    relative = f"{at}.0.SelfAttention.relative_attention_bias.weight"
    return (
        *_norm(f"{to}/attn_norm", f"{at}.0.layer_norm"),
        *(row for n in "qkvo" for row in _linear(f"{to}/{n}", f"{at}.0.SelfAttention.{n}")),
        *_norm(f"{to}/cross_norm", f"{at}.1.layer_norm"),
        *(row for n in "qkvo" for row in _linear(f"{to}/cross_{n}", f"{at}.1.EncDecAttention.{n}")),
        *_norm(f"{to}/mlp_norm", f"{at}.{mlp}.layer_norm"),
        *_linear(f"{to}/gate", f"{at}.{mlp}.DenseReluDense.wi_0"),
        *_linear(f"{to}/up", f"{at}.{mlp}.DenseReluDense.wi_1"),
        *_linear(f"{to}/down", f"{at}.{mlp}.DenseReluDense.wo"),
        *_norm(f"{stack}/final_norm", f"{stack}.final_layer_norm"),
        Row(f"{stack}/relative/table", relative.format(i=0)),  # all layers of a T5 read layer 0's
        Row(f"{to}/relative/table", relative),  # umT5
    )


_T5 = (
    Row("embed/table", "shared.weight"),
    *_t5_stack("encoder", 1),
    *_t5_stack("decoder", 2),
    *_linear("head", "lm_head"),
)

# Of the official Quiet-STaR code, for every family; the second row of a vector is a log-std that it never uses.
_THOUGHTS = (
    Row("thoughts/start", "start_embedding", spare=True),
    Row("thoughts/end", "end_embedding", spare=True),
    *_linear("mixing/in", "talk_head.0.0"),
    *_linear("mixing/hidden", "talk_head.0.2"),
    *_linear("mixing/out", "talk_head.0.4"),
)
_VALUE = _linear("value", "score")  # the name in transformers' classifiers of tokens
THOUGHT_SIGN = "talk_head.0.4.weight"  # in the files of every model with thoughts

NAMES = {  # of two rows for one parameter, the last counts
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    "tiny": _llama(attn_out_norm="attn_out_norm", mlp_out_norm="mlp_out_norm"),
    "olmo2": _llama(**_AFTER),
    **dict.fromkeys(("gemma2", "gemma3_text"), _llama("pre_feedforward_layernorm", **_AFTER)),
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gptj": _GPTJ,
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
}

# Tensors that are not read: causal masks and rotary tables, which old versions of transformers saved among the weights;
# T5's copies of the embedding, and its unused table of positions for cross-attention; Gemma 3's encoder of images.
BUFFERS = re.compile(
    r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$|^(en|de)coder\.embed_tokens\.weight$"
    r"|EncDecAttention\.relative_attention_bias\.weight$|^(model\.)?(vision_tower|multi_modal_projector)\."
)


def abstract_params(config: ModelConfig | EncDecConfig) -> Params:
    """Returns the tree of shapes of a config's parameters (ShapeDtypeStruct leaves, nothing is computed)."""
    family = encdec if isinstance(config, EncDecConfig) else decoder
    return jax.eval_shape(functools.partial(family.init, config), jax.random.key(0))


@functools.lru_cache(8)
def name_map(config: ModelConfig | EncDecConfig) -> list[tuple[Row, tuple[int, ...]]]:
    """Returns the rows that apply to a config, with the shape of each parameter.

    Raises:
      UserError: the family's files have no place for one of the parameters (say, a gated MLP in GPT-2).
    """
    rows = {row.path: row for row in (*NAMES.get(config.family, ()), *_THOUGHTS, *_VALUE)}
    # The first T5 has one matrix there, without a number.
    if isinstance(config, EncDecConfig) and not config.gated_mlp:
        rows = {path: row._replace(name=row.name.replace("wi_1", "wi")) for path, row in rows.items()}
    if _scaled_for_others(config):
        # The unscaled table is read from the head, because the embedding of these files is scaled (`copies`).
        rows["embed/table"] = rows["embed/table"]._replace(name="lm_head.weight")
    leaves = tree.named_leaves(abstract_params(config))
    for path, _ in leaves:
        if path not in rows:
            place = f"weights of family {config.family!r} have no place for {path}"
            raise UserError(f"model config: {place}; use family 'tiny'")
    widths: collections.Counter[str] = collections.Counter()
    for path, leaf in sorted(leaves, key=lambda named: rows[named[0]].part or 0):
        rows[path] = rows[path]._replace(start=widths[rows[path].name])
        widths[rows[path].name] += leaf.shape[-1]
    return [(rows[path]._replace(fused_width=widths[rows[path].name]), leaf.shape) for path, leaf in leaves]


def _scaled_for_others(config: ModelConfig | EncDecConfig) -> bool:
    # Such files hold the embedding twice, as the head and scaled: no class of transformers for them scales it itself.
    return isinstance(config, ModelConfig) and bool(config.portable_family) and config.embed_scale


def copies(config: ModelConfig | EncDecConfig) -> list[tuple[Row, tuple[int, ...]]]:
    """Returns rows that are written for other programs and never read here."""
    row = Row("embed/table", _LLAMA[0].name, factor=config.hidden_size**0.5, fused_width=config.hidden_size)
    return [(row, (config.vocab_size, config.hidden_size))] if _scaled_for_others(config) else []


def file_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that one tensor of a row has in the files, from that of the (stacked) parameter."""
    if "{i}" in row.name:
        shape = shape[1:]
    shape = (*shape[:-1], row.fused_width)
    if row.spare:
        shape = (2, *shape)
    return shape[::-1] if row.transpose else shape


def file_names(row: Row, shape: tuple[int, ...]) -> list[str]:
    """Returns the names of the tensors that make up a parameter: one, or one per layer."""
    return [row.name.format(i=i) for i in range(shape[0])] if "{i}" in row.name else [row.name]


def embedding_names(config: ModelConfig | EncDecConfig) -> tuple[str, str]:
    """Returns the embedding's name in the files, and the prefix of the names inside a family's base model."""
    table = next(row.name for row in NAMES[config.family] if row.path == "embed/table")
    prefix = "" if isinstance(config, EncDecConfig) else table.partition(".")[0] + "."
    return "lm_head.weight" if _scaled_for_others(config) else table, prefix
