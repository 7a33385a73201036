"""Model configs to and from Hugging Face's config.json: one table of entries per family, read both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qstar.errors import UserError, require
from qstar.models import fields, rope
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.fields import DEPTH, EPSILON, FLAG, ID, IDS, LENGTH, TEXT, WIDTH, Field
from qstar.models.thought_config import ThoughtConfig


class Key(NamedTuple):
    """An entry of config.json that holds a field of our config."""

    name: str
    field: str
    kind: Field
    default: Any = ...  # of an entry that is absent or null; `...`: the entry is required


class Family(NamedTuple):
    """The config.json of one `model_type`."""

    architecture: str
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any] = {}  # fields that every model of the family has
    checked: Mapping[str, Field] = {}  # further entries, read by functions below


_TOKENS = {"eos_token_id": IDS, "bos_token_id": IDS}
_LLAMA_KEYS = (
    Key("vocab_size", "vocab_size", WIDTH),
    Key("hidden_size", "hidden_size", WIDTH),
    Key("num_hidden_layers", "num_layers", DEPTH),
    Key("num_attention_heads", "num_heads", WIDTH),
    Key("intermediate_size", "intermediate_size", WIDTH),
    Key("num_key_value_heads", "num_kv_heads", WIDTH, None),  # None: as many as query heads
    Key("head_dim", "head_dim", WIDTH, None),  # None: the width over the heads
    Key("rms_norm_eps", "norm_eps", EPSILON, 1e-6),
    Key("hidden_act", "activation", TEXT, "silu"),
    Key("tie_word_embeddings", "tie_embeddings", FLAG, False),
)
_ATTENTION_BIAS = Key("attention_bias", "qkv_bias", FLAG, False)
_BIASES = (_ATTENTION_BIAS, Key("mlp_bias", "mlp_bias", FLAG, False))
_LLAMA_CHECKED = {
    **_TOKENS,
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), LENGTH),
    "use_sliding_window": FLAG,
    "max_window_layers": ID,
    "partial_rotary_factor": fields.number(1, 1),
}
_GPT_KEYS = (
    Key("vocab_size", "vocab_size", WIDTH),
    Key("n_embd", "hidden_size", WIDTH),
    Key("n_layer", "num_layers", DEPTH),
    Key("n_head", "num_heads", WIDTH),
    Key("n_inner", "intermediate_size", WIDTH, None),  # None: 4 times the width
    Key("layer_norm_epsilon", "norm_eps", EPSILON, 1e-5),
    Key("activation_function", "activation", TEXT, "gelu_new"),
)
_GPT_FIXED = {"norm": "layer", "gated_mlp": False, "mlp_bias": True}
_GPT2_FIXED = {**_GPT_FIXED, "qkv_bias": True, "out_bias": True, "position": "learned"}
_GPTJ_FIXED = {**_GPT_FIXED, "parallel_block": True, "head_bias": True, "rope_interleaved": True}
_GPT2_KEYS = (
    *_GPT_KEYS,
    Key("n_positions", "max_positions", WIDTH, 1024),
    Key("tie_word_embeddings", "tie_embeddings", FLAG, True),
)
_GPTJ_KEYS = (
    *_GPT_KEYS,
    Key("n_positions", "max_positions", WIDTH, 2048),
    Key("rotary_dim", "rotary_dim", WIDTH, None),  # None: the whole head
    Key("tie_word_embeddings", "tie_embeddings", FLAG, False),
)
_T5_KEYS = (
    Key("vocab_size", "vocab_size", WIDTH),
    Key("d_model", "hidden_size", WIDTH),
    Key("num_layers", "num_layers", DEPTH),
    Key("num_decoder_layers", "num_decoder_layers", DEPTH, None),  # None: as many as the encoder has
    Key("num_heads", "num_heads", WIDTH),
    Key("d_kv", "head_dim", WIDTH),
    Key("d_ff", "intermediate_size", WIDTH),
    Key("relative_attention_num_buckets", "buckets", WIDTH, 32),
    Key("relative_attention_max_distance", "max_distance", WIDTH, 128),
    Key("layer_norm_epsilon", "norm_eps", EPSILON, 1e-6),
)
_T5_CHECKED = {
    **_TOKENS,
    "feed_forward_proj": TEXT,
    **dict.fromkeys(("tie_word_embeddings", "scale_decoder_outputs", "qstar_tied"), FLAG),
    **dict.fromkeys(("decoder_start_token_id", "pad_token_id"), ID),
}
_FAMILIES = {
    "llama": Family("LlamaForCausalLM", _LLAMA_KEYS + _BIASES, {}, _LLAMA_CHECKED),
    "arcee": Family("ArceeForCausalLM", _LLAMA_KEYS + _BIASES, {}, _LLAMA_CHECKED),  # written for `tiny`, never read
    "mistral": Family("MistralForCausalLM", _LLAMA_KEYS, {}, _LLAMA_CHECKED),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA_KEYS, {"qkv_bias": True}, _LLAMA_CHECKED),
    "qwen3": Family("Qwen3ForCausalLM", (*_LLAMA_KEYS, _ATTENTION_BIAS), {"qk_norm": True}, _LLAMA_CHECKED),
    "gpt2": Family("GPT2LMHeadModel", _GPT2_KEYS, _GPT2_FIXED, _TOKENS),
    "gptj": Family("GPTJForCausalLM", _GPTJ_KEYS, _GPTJ_FIXED, _TOKENS),
    "t5": Family("T5ForConditionalGeneration", _T5_KEYS, {}, _T5_CHECKED),
    "mt5": Family("MT5ForConditionalGeneration", _T5_KEYS, {}, _T5_CHECKED),
    "umt5": Family("UMT5ForConditionalGeneration", _T5_KEYS, {}, _T5_CHECKED),
}
FAMILIES = tuple(name for name in _FAMILIES if name != "arcee")
# Names of activations in config.json -> ours; of two names for one function the first is written.
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_T5_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu"}


# ---------------------------------------------------------------------------------------------------- reading


def from_hf(config: dict[str, Any], where: str = "config.json") -> ModelConfig | EncDecConfig:
    """Reads a Hugging Face `config.json`, of a decoder or of a T5.

    Raises:
      UserError: names what is not implemented, or an entry that is missing, of another type or out of range.
    """
    for key in ("quantization_config", "compression_config"):
        if found := config.get(key):
            method = found.get("quant_method", "") if isinstance(found, dict) else found
            fault = (
                "the weights are quantised, which are not read here; give the folder of the model before quantisation"
            )
            raise UserError(f"{where}: {key} ({method}): {fault}")
    try:
        family = config.get("model_type")
        if config.get("qstar_family") == "tiny":
            read = _from_tiny(config)
        elif family not in FAMILIES:
            raise UserError(f"{where}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
        elif family.endswith("t5"):
            return _from_t5(config, where)
        else:
            read = _from_decoder(config, where)
        if head := config.get("qstar_value_head"):
            read = read.replace(value_head=head)
        thoughts = config.get("qstar_thoughts")
        return read if thoughts is None else read.replace(thoughts=ThoughtConfig.from_dict(thoughts))
    except KeyError as e:
        raise UserError(f"{where}: key {e} is missing") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as e:
        raise UserError(f"{where}: a value has the wrong type or size ({e}); copy the file again") from None
    except UserError as e:
        raise e if str(e).startswith(where) else UserError(f"{where}: {e}") from None


def _read(c: dict[str, Any], where: str, keys: Sequence[Key], checked: Mapping[str, Field]) -> dict[str, Any]:
    """Returns the fields of a table's keys after checking all entries."""
    required = {k.name: k.kind for k in keys if k.default is ...}
    fields.check(c, where, required, {**{k.name: k.kind for k in keys}, **checked})
    return {k.field: k.default if c.get(k.name) is None else c[k.name] for k in keys}


def _from_decoder(c: dict[str, Any], where: str) -> ModelConfig:
    name = c["model_type"]
    family = _FAMILIES[name]
    found = {**family.fixed, **_read(c, where, family.keys, family.checked)}
    key = next(k.name for k in family.keys if k.field == "activation")
    if found["activation"] not in _ACTIVATIONS:
        raise UserError(f"{where}: {key}: activation {found['activation']!r} is not one of {', '.join(_ACTIVATIONS)}")
    found["activation"] = _ACTIVATIONS[found["activation"]]
    width, heads = found["hidden_size"], found["num_heads"]
    found["intermediate_size"] = found["intermediate_size"] or 4 * width
    found["num_kv_heads"] = found.get("num_kv_heads") or heads
    if not found.get("head_dim"):
        gpt = name.startswith("gpt")
        names = ("n_embd", "n_head") if gpt else ("hidden_size", "num_attention_heads")
        fits = name == "qwen3" or width % heads == 0
        sizes = f"{names[0]}={width} is not a multiple of {names[1]}={heads}"
        require((fits, f"{where}: {sizes}{'' if gpt else ', and head_dim is not given'}"))
        # 128 is transformers' default for Qwen3, whose heads need not divide the width.
        found["head_dim"] = 128 if name == "qwen3" else width // heads
    if name == "gpt2":
        for option, need in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
            require((c.get(option, need) == need, f"{where}: {option}={c.get(option)} is not supported"))
    elif name == "gptj":
        found["rotary_dim"] = found["rotary_dim"] or found["head_dim"]
    else:
        found |= rope.read_scaling(c, where, found["head_dim"])
        found["sliding_window"] = _window(c, where)
        # `attention_bias` covers q, k, v and o; Qwen2 has no bias at o.
        found["out_bias"] = name != "qwen2" and found.get("qkv_bias", False)
    return ModelConfig(family=name, **found, bos_id=c.get("bos_token_id"), **_end_ids(c.get("eos_token_id")))


def _end_ids(eos: int | list[int] | None) -> dict[str, Any]:
    first, *rest = eos if isinstance(eos, list) and eos else [eos]
    return {"eos_id": first, "also_eos": tuple(rest)}


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
        mixed = f"layers mix {' and '.join(sorted(set(kinds)))} (layer_types, max_window_layers)"
        raise UserError(f"{where}: {mixed}; only one kind of attention in all layers is supported")
    return c.get("sliding_window", 4096) if "sliding_attention" in kinds else None


def _from_tiny(c: dict[str, Any]) -> ModelConfig:
    names = {f.name for f in dataclasses.fields(ModelConfig)} - {"thoughts", "value_head"}
    scaling = c.get("rope_scaling")  # tuples that JSON turned into lists, which do not hash
    tuples = {"rope_scaling": scaling and tuple(map(tuple, scaling)), "also_eos": tuple(c.get("also_eos", ()))}
    return ModelConfig(**{k: v for k, v in c.items() if k in names} | tuples)


def _from_t5(c: dict[str, Any], where: str) -> EncDecConfig:
    family = c["model_type"]
    found = _read(c, where, _T5_KEYS, _T5_CHECKED)
    kind = c.get("feed_forward_proj") or ("relu" if family == "t5" else "gated-gelu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    name = "gelu_new" if kind == "gated-gelu" else name  # as transformers does: the tanh approximation
    if name not in _T5_ACTIVATIONS:
        raise UserError(f"{where}: feed_forward_proj {kind!r} is not supported; only {', '.join(_T5_ACTIVATIONS)}")
    found["num_decoder_layers"] = found["num_decoder_layers"] or found["num_layers"]
    # It does not say whether the head is tied (transformers 5 writes true for every T5; `hf.settle_head` compares the
    # tensors). In older files it says whether outputs are scaled; newer ones have `scale_decoder_outputs`.
    tied = c.get("tie_word_embeddings", True) is not False
    start = c.get("decoder_start_token_id")
    return EncDecConfig(
        family=family,
        **found,
        activation=_T5_ACTIVATIONS[name],
        gated_mlp=gated,
        tie_embeddings=bool(c.get("qstar_tied", tied)),
        scale_outputs=family != "mt5" and bool(c.get("scale_decoder_outputs", tied)),  # mT5 never does
        start_id=c.get("pad_token_id", 0) if start is None else start,
        **_end_ids(c.get("eos_token_id", 1)),
    )


def official_thoughts(raw: dict[str, Any]) -> ThoughtConfig:
    """Returns the thought config of a checkpoint of the official Quiet-STaR code."""
    # `max_thoughts` = n_ahead + n_ahead_talk + 1; n_ahead_talk is 4 in all of its scripts. The release has n_ahead 8.
    ahead = raw.get("max_thoughts", 13) - 5
    # The ids of its start and end tokens are the last of the vocabulary.
    new = (raw["vocab_size"] - 2, raw["vocab_size"] - 1)
    return ThoughtConfig.parity(thought_tokens=max(1, ahead - 3), forbidden_ids=new)


# ---------------------------------------------------------------------------------------------------- writing


def to_hf(config: ModelConfig | EncDecConfig) -> dict[str, Any]:
    """Writes a Hugging Face `config.json` that `from_hf` and transformers read back.

    A model with thoughts adds the key `qstar_thoughts`, a verifier with a head `qstar_value_head`; transformers ignores
    both. The file of family `tiny` has the fields of `ModelConfig`, beside the entries of the family of transformers
    that computes the same; where there is none, only qstar loads it.

    Raises:
      UserError: an activation that a T5's file cannot express.
    """
    if isinstance(config, EncDecConfig):
        return _to_t5(config)
    out = _to_decoder(config)
    if config.value_head:
        out["qstar_value_head"] = config.value_head
    return out if config.thoughts is None else {**out, "qstar_thoughts": dataclasses.asdict(config.thoughts)}


def _written(c: ModelConfig | EncDecConfig) -> dict[str, Any]:
    family = _FAMILIES[c.family]
    return {
        "architectures": [family.architecture],
        "model_type": c.family,
        **{k.name: getattr(c, k.field) for k in family.keys},
        "eos_token_id": [c.eos_id, *c.also_eos] if c.also_eos else c.eos_id,
        "torch_dtype": c.dtype,
    }


def _to_decoder(c: ModelConfig) -> dict[str, Any]:
    if c.family == "tiny":
        own = {"qstar_family": "tiny", **dataclasses.asdict(c.replace(thoughts=None, value_head=""))}
        if not c.portable_family:
            return {**own, "model_type": "qstar_tiny"}
        # The scaled copy of the embedding is another tensor than the head, so the pair is not tied in transformers.
        tied = c.tie_embeddings and not c.embed_scale
        theirs = c.replace(family=c.portable_family, embed_scale=False, tie_embeddings=tied)
        return {**_to_decoder(theirs), **own}  # no key has two meanings
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    out = {**_written(c), "bos_token_id": c.bos_id}
    out["activation_function" if c.family.startswith("gpt") else "hidden_act"] = names[c.activation]
    if c.family == "gpt2":
        return out
    if c.family == "gptj":
        return {**out, "rotary_dim": c.rotary_dim or c.head_dim}
    out |= {"max_position_embeddings": c.trained_positions or c.max_positions, "rope_theta": c.rope_theta}
    if c.rope_scaling:
        out["rope_scaling"] = dict(c.rope_scaling)
    if c.family == "mistral":
        out["sliding_window"] = c.sliding_window
    elif c.family.startswith("qwen"):
        # max_window_layers=0: the window, if any, begins at layer 0 instead of transformers' default of 28.
        used = c.sliding_window is not None
        out |= {"use_sliding_window": used, "sliding_window": c.sliding_window, "max_window_layers": 0}
    return out


def _to_t5(c: EncDecConfig) -> dict[str, Any]:
    name = {ours: theirs for theirs, ours in _T5_ACTIVATIONS.items()}[c.activation]
    if c.gated_mlp and name == "gelu":
        raise UserError("model config: a T5 cannot have a gated MLP with exact GELU: it reads back as gelu_tanh")
    kind = ("gated-gelu" if name == "gelu_new" else f"gated-{name}") if c.gated_mlp else name
    return {
        **_written(c),
        "is_encoder_decoder": True,
        "feed_forward_proj": kind,
        # transformers derives the scaling from it, and the tying from the weights.
        "tie_word_embeddings": c.scale_outputs,
        "scale_decoder_outputs": c.scale_outputs,
        "qstar_tied": c.tie_embeddings,
        "decoder_start_token_id": c.start_id,
        "pad_token_id": c.start_id,
    }
