"""Model configs to and from Hugging Face's config.json, its entries checked against declared types and ranges."""

from __future__ import annotations

import dataclasses
from typing import Any

from qstar.errors import UserError, require
from qstar.models import fields, rope
from qstar.models.config import ModelConfig
from qstar.models.encdec import CLASSES, T5_ACTIVATIONS, EncDecConfig
from qstar.models.fields import Flag, Ids, Text
from qstar.models.thought_config import ThoughtConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gptj", "t5", "mt5", "umt5")
_WIDTHS = dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"), fields.WIDTH)
_SHARED = {"eos_token_id": Ids(), "bos_token_id": Ids(), "tie_word_embeddings": Flag()}
_LLAMA_NEEDS = {**_WIDTHS, "num_hidden_layers": fields.DEPTH}
_LLAMA_ALLOWS: dict[str, fields.Field] = {
    **dict.fromkeys(("num_key_value_heads", "head_dim"), fields.WIDTH),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), fields.LENGTH),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), Flag()),
    "rms_norm_eps": fields.EPSILON,
    "hidden_act": Text(),
    "max_window_layers": fields.ID,
    "partial_rotary_factor": fields.Number(1, 1),
    **_SHARED,
}
_GPT_NEEDS = {**dict.fromkeys(("vocab_size", "n_embd", "n_head"), fields.WIDTH), "n_layer": fields.DEPTH}
_GPT_ALLOWS: dict[str, fields.Field] = {
    "n_inner": fields.WIDTH,
    "n_positions": fields.WIDTH,
    "rotary_dim": fields.WIDTH,
    "layer_norm_epsilon": fields.EPSILON,
    "activation_function": Text(),
    **_SHARED,
}
_T5_NEEDS = {
    **dict.fromkeys(("vocab_size", "d_model", "num_heads", "d_kv", "d_ff"), fields.WIDTH),
    "num_layers": fields.DEPTH,
}
_T5_ALLOWS: dict[str, fields.Field] = {
    "num_decoder_layers": fields.DEPTH,
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), fields.WIDTH),
    "layer_norm_epsilon": fields.EPSILON,
    "feed_forward_proj": fields.Text(),
    **dict.fromkeys(("tie_word_embeddings", "scale_decoder_outputs", "qstar_tied"), fields.Flag()),
    **dict.fromkeys(("decoder_start_token_id", "pad_token_id"), fields.ID),
    "eos_token_id": fields.Ids(),
}


def from_hf(config: dict[str, Any], where: str = "config.json") -> ModelConfig | EncDecConfig:
    """Reads a Hugging Face `config.json`, of a decoder or of a T5.

    Raises:
      UserError: a family, activation or option that is not implemented, a missing key, or a value of another type or out
        of range; the line names it.
    """
    family = config.get("model_type")
    readers = {
        "gpt2": _from_gpt2,
        "gptj": _from_gptj,
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _from_llama),
        **dict.fromkeys(("t5", "mt5", "umt5"), _from_t5),
    }
    for key in ("quantization_config", "compression_config"):
        if found := config.get(key):
            method = found.get("quant_method", "") if isinstance(found, dict) else found
            raise UserError(
                f"{where}: {key} ({method}) says that the weights are quantised, which are not read here; "
                "give the folder of the model before quantisation"
            )
    try:
        if config.get("qstar_family") == "tiny":
            return _thinking(_from_tiny(config), config)
        if family not in FAMILIES:
            raise UserError(f"{where}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
        return _thinking(readers[family](config, where), config)
    except KeyError as e:
        raise UserError(f"{where}: key {e} is missing") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as e:
        raise UserError(f"{where}: a value has the wrong type or size ({e}); copy the file again") from None
    except UserError as e:
        raise e if str(e).startswith(where) else UserError(f"{where}: {e}") from None


def _thinking(config: ModelConfig, raw: dict[str, Any]) -> ModelConfig:
    fields = raw.get("qstar_thoughts")
    if raw.get("qstar_value_head"):
        config = config.replace(value_head=raw["qstar_value_head"])
    return config if fields is None else config.replace(thoughts=ThoughtConfig.from_dict(fields))


def official_thoughts(raw: dict[str, Any]) -> ThoughtConfig:
    """Returns what the official Quiet-STaR code says of a checkpoint's thoughts in its config.json, which is little.

    It writes `max_thoughts` = n_ahead + n_ahead_talk + 1, where n_ahead_talk is 4 in all its scripts; without it the
    sizes are those of the release, n_ahead 8. Its two new ids, start and end of a thought, are the last of the vocabulary.
    """
    ahead = raw.get("max_thoughts", 13) - 5
    new = (raw["vocab_size"] - 2, raw["vocab_size"] - 1)
    return ThoughtConfig.parity(thought_tokens=max(1, ahead - 3), forbidden_ids=new)


_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _activation(c: dict[str, Any], key: str, default: str, where: str) -> str:
    name = c.get(key) or default
    if name not in _ACTIVATIONS:
        raise UserError(f"{where}: {key}: activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _ids(c: dict[str, Any]) -> dict[str, Any]:
    eos = c.get("eos_token_id")
    first, *rest = eos if isinstance(eos, list) and eos else [eos]
    return {"bos_id": c.get("bos_token_id"), "eos_id": first, "also_eos": tuple(rest)}


def _from_llama(c: dict[str, Any], where: str) -> ModelConfig:
    family = c["model_type"]
    fields.check(c, where, _LLAMA_NEEDS, _LLAMA_ALLOWS)
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or (
        128 if family == "qwen3" else _share(c, "hidden_size", "num_attention_heads", where)
    )
    return ModelConfig(
        family=family,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate_size=c["intermediate_size"],
        norm_eps=c.get("rms_norm_eps", 1e-6),
        activation=_activation(c, "hidden_act", "silu", where),
        qkv_bias=family == "qwen2" or bool(c.get("attention_bias")),
        out_bias=family != "qwen2" and bool(c.get("attention_bias")),
        mlp_bias=bool(c.get("mlp_bias")),
        qk_norm=family == "qwen3",
        **rope.read_scaling(c, where, head_dim),
        sliding_window=_window(c, where),
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        **_ids(c),
    )


def _share(c: dict[str, Any], width: str, heads: str, where: str) -> int:
    """Returns the size of a head where the file does not say it."""
    fits = c[width] % c[heads] == 0
    require((fits, f"{where}: {width}={c[width]} is not a multiple of {heads}={c[heads]}, and head_dim is not given"))
    return c[width] // c[heads]


def _window(c: dict[str, Any], where: str) -> int | None:
    """Returns the sliding window that all layers share, or None; absent keys mean what transformers' defaults mean."""
    if c["model_type"] == "mistral":
        return c.get("sliding_window", 4096)
    if not c["model_type"].startswith("qwen") or not c.get("use_sliding_window"):
        return None
    kinds = c.get("layer_types")
    if kinds is None:  # older files: full attention in the first max_window_layers layers, the window in the rest
        first, layers = c.get("max_window_layers", 28), c["num_hidden_layers"]
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if len(set(kinds)) > 1:
        raise UserError(
            f"{where}: layers mix {' and '.join(sorted(set(kinds)))} (layer_types, max_window_layers); "
            "only one kind of attention in all layers is supported"
        )
    return c.get("sliding_window", 4096) if "sliding_attention" in kinds else None


def _from_gpt2(c: dict[str, Any], where: str) -> ModelConfig:
    for key, need in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if c.get(key, need) != need:
            raise UserError(f"{where}: {key}={c[key]} is not supported")
    tied = bool(c.get("tie_word_embeddings", True))
    return _gpt(c, where, 1024, qkv_bias=True, out_bias=True, position="learned", tie_embeddings=tied)


def _from_gptj(c: dict[str, Any], where: str) -> ModelConfig:
    fields.check(c, where, _GPT_NEEDS, _GPT_ALLOWS)
    return _gpt(
        c,
        where,
        2048,
        parallel_block=True,
        head_bias=True,
        rotary_dim=c.get("rotary_dim") or c["n_embd"] // c["n_head"],
        rope_interleaved=True,
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
    )


def _gpt(c: dict[str, Any], where: str, positions: int, **own: Any) -> ModelConfig:
    """What GPT-2 and GPT-J write alike; `own` is what tells them apart."""
    fields.check(c, where, _GPT_NEEDS, _GPT_ALLOWS)
    width, heads = c["n_embd"], c["n_head"]
    return ModelConfig(
        family=c["model_type"],
        vocab_size=c["vocab_size"],
        hidden_size=width,
        num_layers=c["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_share(c, "n_embd", "n_head", where),
        intermediate_size=c.get("n_inner") or 4 * width,
        max_positions=c.get("n_positions", positions),
        norm="layer",
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=_activation(c, "activation_function", "gelu_new", where),
        gated_mlp=False,
        mlp_bias=True,
        **own,
        **_ids(c),
    )


def _from_tiny(c: dict[str, Any]) -> ModelConfig:
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    fields -= {"thoughts", "value_head"}
    own = {k: v for k, v in c.items() if k in fields}
    scaling = c.get("rope_scaling")  # json turned tuples into lists, which do not hash
    own |= {"rope_scaling": scaling and tuple(map(tuple, scaling)), "also_eos": tuple(c.get("also_eos", ()))}
    return ModelConfig(**own)


def to_hf(config: ModelConfig | EncDecConfig) -> dict[str, Any]:
    """Writes a Hugging Face `config.json` that `from_hf` and transformers read back.

    A model that thinks adds the key `qstar_thoughts`, a verifier with a head `qstar_value_head`; transformers ignores
    both. The `tiny` preset's file carries this class' own fields, beside those of the family of transformers that computes
    the same; where there is none, only qstar loads it.
    """
    if isinstance(config, EncDecConfig):
        return _to_t5(config)
    out = _to_hf(config)
    if config.value_head:
        out["qstar_value_head"] = config.value_head
    return out if config.thoughts is None else {**out, "qstar_thoughts": dataclasses.asdict(config.thoughts)}


def _to_hf(c: ModelConfig) -> dict[str, Any]:
    if c.family == "tiny":
        own = {"qstar_family": "tiny", **dataclasses.asdict(c.replace(thoughts=None, value_head=""))}
        if not c.portable_family:
            return {**own, "model_type": "qstar_tiny"}
        tied = (
            c.tie_embeddings and not c.embed_scale
        )  # the scaled copy of the embedding is another tensor than the head
        theirs = c.replace(family=c.portable_family, embed_scale=False, tie_embeddings=tied)
        return {**_to_hf(theirs), **own}  # they share no key that means another thing
    activation = {v: k for k, v in _ACTIVATIONS.items() if k != "gelu_pytorch_tanh"}[c.activation]
    common = {
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_id,
        "eos_token_id": [c.eos_id, *c.also_eos] if c.also_eos else c.eos_id,
        "torch_dtype": c.dtype,
    }
    if c.family in ("gpt2", "gptj"):
        out = {
            "architectures": ["GPT2LMHeadModel" if c.family == "gpt2" else "GPTJForCausalLM"],
            "n_embd": c.hidden_size,
            "n_layer": c.num_layers,
            "n_head": c.num_heads,
            "n_inner": c.intermediate_size,
            "n_positions": c.max_positions,
            "layer_norm_epsilon": c.norm_eps,
            "activation_function": activation,
            **common,
        }
        return out if c.family == "gpt2" else {**out, "rotary_dim": c.rotary_dim or c.head_dim}
    names = {"arcee": "Arcee", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    out = {
        "architectures": [names[c.family] + "ForCausalLM"],
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.trained_positions or c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": activation,
        "rope_theta": c.rope_theta,
        **common,
    }
    if c.rope_scaling:
        out["rope_scaling"] = dict(c.rope_scaling)
    if c.family in ("llama", "arcee", "qwen3"):
        out["attention_bias"] = c.qkv_bias
    if c.family in ("llama", "arcee"):
        out["mlp_bias"] = c.mlp_bias
    if c.family == "mistral":
        out["sliding_window"] = c.sliding_window
    elif c.family.startswith("qwen"):  # all layers alike: "from layer 0 on, use the window"
        out.update(
            use_sliding_window=c.sliding_window is not None, sliding_window=c.sliding_window, max_window_layers=0
        )
    return out


def _from_t5(c: dict[str, Any], where: str) -> EncDecConfig:
    """Reads the config.json of a T5.

    What `tie_word_embeddings` says of the head is not to be trusted: transformers 5 writes true for every T5. Whoever
    reads the weights compares the tensors (`models.hf.settle_head`). Of the scaling it tells the truth in files of older
    versions; newer ones have `scale_decoder_outputs`.

    Raises:
      UserError: an activation that is not implemented. KeyError: a key is missing (the caller names the file).
    """
    fields.check(c, where, _T5_NEEDS, _T5_ALLOWS)
    family = c["model_type"]
    kind = c.get("feed_forward_proj") or ("relu" if family == "t5" else "gated-gelu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    name = "gelu_new" if kind == "gated-gelu" else name  # as transformers does: the tanh approximation
    if name not in T5_ACTIVATIONS:
        raise UserError(f"{where}: feed_forward_proj {kind!r} is not supported; only {', '.join(T5_ACTIVATIONS)}")
    tied = c.get("tie_word_embeddings", True) is not False
    start = c.get("decoder_start_token_id")
    eos = c.get("eos_token_id", 1)
    eos, *more = eos if isinstance(eos, list) and eos else [eos]
    return EncDecConfig(
        family=family,
        vocab_size=c["vocab_size"],
        hidden_size=c["d_model"],
        num_layers=c["num_layers"],
        num_decoder_layers=c.get("num_decoder_layers") or c["num_layers"],
        num_heads=c["num_heads"],
        head_dim=c["d_kv"],
        intermediate_size=c["d_ff"],
        buckets=c.get("relative_attention_num_buckets", 32),
        max_distance=c.get("relative_attention_max_distance", 128),
        norm_eps=c.get("layer_norm_epsilon", 1e-6),
        activation=T5_ACTIVATIONS[name],
        gated_mlp=gated,
        tie_embeddings=bool(c.get("qstar_tied", tied)),
        scale_outputs=family != "mt5" and bool(c.get("scale_decoder_outputs", tied)),  # mT5 never does
        start_id=c.get("pad_token_id", 0) if start is None else start,
        eos_id=eos,
        also_eos=tuple(more),
    )


def _to_t5(c: EncDecConfig) -> dict[str, Any]:
    """Writes a config.json that `from_hf` and transformers read back.

    `tie_word_embeddings` holds what transformers derives from it, the scaling; whether the head is tied it sees from the
    weights, as we do.

    Raises:
      UserError: an activation that the file cannot express.
    """
    name = {v: k for k, v in T5_ACTIVATIONS.items()}[c.activation]
    if c.gated_mlp and name == "gelu":
        raise UserError(
            "model config: a gated MLP with exact GELU cannot be written as a T5: it reads back as gelu_tanh"
        )
    kind = ("gated-gelu" if name == "gelu_new" else f"gated-{name}") if c.gated_mlp else name
    return {
        "architectures": [CLASSES[c.family] + "ForConditionalGeneration"],
        "model_type": c.family,
        "is_encoder_decoder": True,
        "vocab_size": c.vocab_size,
        "d_model": c.hidden_size,
        "d_kv": c.head_dim,
        "d_ff": c.intermediate_size,
        "num_layers": c.num_layers,
        "num_decoder_layers": c.num_decoder_layers,
        "num_heads": c.num_heads,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.norm_eps,
        "feed_forward_proj": kind,
        "tie_word_embeddings": c.scale_outputs,
        "scale_decoder_outputs": c.scale_outputs,
        "qstar_tied": c.tie_embeddings,
        "decoder_start_token_id": c.start_id,
        "pad_token_id": c.start_id,
        "eos_token_id": [c.eos_id, *c.also_eos] if c.also_eos else c.eos_id,
        "torch_dtype": c.dtype,
    }
