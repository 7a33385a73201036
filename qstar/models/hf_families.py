"""The entries of config.json of each family of models, and the field of a model's config that each holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qstar.models import fields, rope
from qstar.models.fields import DEPTH, EPSILON, FLAG, ID, IDS, LENGTH, TEXT, WIDTH, Field


class Key(NamedTuple):
    """An entry of config.json that holds a field of our config."""

    name: str
    field: str
    kind: Field
    default: Any = ...  # of an entry that is absent or null; `...`: the entry is required
    null: bool = False  # null means None, and not the default


TOKENS = {"eos_token_id": IDS, "bos_token_id": ID}
KINDS = ("full_attention", "sliding_attention")
_LLAMA_CHECKED = {
    **TOKENS,
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), LENGTH),
    "use_sliding_window": FLAG,
    "max_window_layers": ID,
    "partial_rotary_factor": rope.WHOLE,
    "layer_types": Field(
        lambda kinds: isinstance(kinds, list) and set(map(str, kinds)) <= set(KINDS),
        "a list of full_attention and sliding_attention, one per layer",
    ),
}


class Family(NamedTuple):
    """The config.json of one `model_type`."""

    architecture: str
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any] = {}  # fields that every model of the family has
    checked: Mapping[str, Field] = _LLAMA_CHECKED  # further entries, which `hf_config` and `rope` read
    needs: Mapping[str, bool] = {}  # switches of which one position is supported, the default
    written: Mapping[str, Any] = {}  # further entries of every file
    theta: float = 10000.0  # the rotary base where config.json has none
    positions: int = 2048  # the context where config.json has none


def _llama_keys(act: str = "hidden_act", **defaults: Any) -> tuple[Key, ...]:
    keys = (
        Key("vocab_size", "vocab_size", WIDTH),
        Key("hidden_size", "hidden_size", WIDTH),
        Key("num_hidden_layers", "num_layers", DEPTH),
        Key("num_attention_heads", "num_heads", WIDTH),
        Key("intermediate_size", "intermediate_size", WIDTH),
        Key("num_key_value_heads", "num_kv_heads", WIDTH, None),  # None: as many as query heads
        Key("head_dim", "head_dim", WIDTH, None),  # None: the width over the heads
        Key("rms_norm_eps", "norm_eps", EPSILON, 1e-6),
        Key(act, "activation", TEXT, "silu"),
        Key("tie_word_embeddings", "tie_embeddings", FLAG, False),
    )
    return tuple(k._replace(default=defaults.get(k.field, k.default)) for k in keys)


_LLAMA_KEYS = _llama_keys()
_ATTENTION_BIAS = Key("attention_bias", "qkv_bias", FLAG, False)
_BIASES = (_ATTENTION_BIAS, Key("mlp_bias", "mlp_bias", FLAG, False))
_PHI3_CHECKED = {
    **_LLAMA_CHECKED,
    "original_max_position_embeddings": LENGTH,
    "partial_rotary_factor": rope.PART,
}
_SMOLLM3_CHECKED = {**_LLAMA_CHECKED, "no_rope_layers": IDS, "no_rope_layer_interval": WIDTH}


def _gemma(architecture: str, attn_cap: float | None, final_cap: float | None, **defaults: Any) -> Family:
    usual = {"num_kv_heads": 4, "head_dim": 256, "activation": "gelu_pytorch_tanh", "tie_embeddings": True}
    positive = fields.number(1e-6, 1e9)
    keys = (
        *_llama_keys("hidden_activation", **usual, **defaults),
        _ATTENTION_BIAS,
        Key("query_pre_attn_scalar", "query_scalar", positive, 256),
        Key("attn_logit_softcapping", "attn_softcap", positive, attn_cap, null=True),
        Key("final_logit_softcapping", "final_softcap", positive, final_cap, null=True),
    )
    fixed = {"norm_offset": True, "norm_place": "both", "embed_scale": True}
    checked = {**_LLAMA_CHECKED, "sliding_window_pattern": WIDTH, "rope_local_base_freq": fields.number(1, 1e15)}
    return Family(architecture, keys, fixed, checked, {"use_bidirectional_attention": False})


# The classes' own default may be beyond a small vocabulary.
_NO_PADDING = {"pad_token_id": None}
_OLMO2_FIXED = {"norm_place": "post", "qk_norm_wide": True}
_GEMMA3 = _gemma("Gemma3ForCausalLM", None, None, vocab_size=262_208, num_heads=8)
# No class of transformers applies a cap to the attention of Gemma 3, though its config has the entry.
_GEMMA3 = _GEMMA3._replace(needs={**_GEMMA3.needs, "attn_logit_softcapping": False})
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
_GPT2_NEEDS = {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}
_GPT2_KEYS = (
    *_GPT_KEYS,
    Key("n_positions", "max_positions", WIDTH, 1024),
    Key("tie_word_embeddings", "tie_embeddings", FLAG, True),
)
_GPTJ_KEYS = (
    *_GPT_KEYS,
    Key("n_positions", "max_positions", WIDTH, 2048),
    Key("rotary_dim", "rotary_dim", WIDTH, 64, null=True),  # null: the whole head
    Key("tie_word_embeddings", "tie_embeddings", FLAG, False),
)
T5_KEYS = (
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
T5_CHECKED = {
    **TOKENS,
    "feed_forward_proj": TEXT,
    **dict.fromkeys(("tie_word_embeddings", "scale_decoder_outputs", "qstar_tied"), FLAG),
    **dict.fromkeys(("decoder_start_token_id", "pad_token_id"), ID),
}
TABLE = {
    "llama": Family("LlamaForCausalLM", _LLAMA_KEYS + _BIASES),
    "arcee": Family("ArceeForCausalLM", _LLAMA_KEYS + _BIASES),  # written for `tiny`, never read
    "mistral": Family("MistralForCausalLM", _LLAMA_KEYS),
    "ministral": Family("MinistralForCausalLM", _LLAMA_KEYS),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA_KEYS, {"qkv_bias": True}),
    # Heads of Qwen3 need not divide the width.
    "qwen3": Family("Qwen3ForCausalLM", (*_llama_keys(head_dim=128), _ATTENTION_BIAS), {"qk_norm": True}),
    "gemma2": _gemma("Gemma2ForCausalLM", 50.0, 30.0)._replace(positions=8192),
    "gemma3_text": _GEMMA3._replace(fixed={**_GEMMA3.fixed, "qk_norm": True}, theta=1e6, positions=131_072),
    "phi3": Family(
        "Phi3ForCausalLM", _llama_keys(norm_eps=1e-5), {}, _PHI3_CHECKED, written=_NO_PADDING, positions=4096
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", (*_llama_keys(norm_eps=1e-5), _ATTENTION_BIAS), _OLMO2_FIXED, written=_NO_PADDING
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _llama_keys(num_kv_heads=4, tie_embeddings=True) + _BIASES,
        {},
        _SMOLLM3_CHECKED,
        written=_NO_PADDING,
        theta=2e6,
        positions=32_768,
    ),
    "gpt2": Family("GPT2LMHeadModel", _GPT2_KEYS, _GPT2_FIXED, TOKENS, _GPT2_NEEDS),
    "gptj": Family("GPTJForCausalLM", _GPTJ_KEYS, _GPTJ_FIXED, TOKENS),
    "t5": Family("T5ForConditionalGeneration", T5_KEYS, {}, T5_CHECKED),
    "mt5": Family("MT5ForConditionalGeneration", T5_KEYS, {}, T5_CHECKED),
    "umt5": Family("UMT5ForConditionalGeneration", T5_KEYS, {}, T5_CHECKED),
}
# Families whose layers may have a sliding window, and its width where config.json does not say. (null: no window)
WINDOWS = {
    **dict.fromkeys(("mistral", "ministral", "qwen2", "qwen3", "gemma2", "gemma3_text"), 4096),
    **dict.fromkeys(("phi3", "smollm3")),
}
ONE_KIND = ("mistral", "phi3")  # whose layers all have it; transformers does not read their `layer_types`
SWITCHED = ("qwen2", "qwen3", "smollm3")  # that have a window with `use_sliding_window` alone
# Names of activations in config.json -> ours; of two names for one function the first is written.
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
T5_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
