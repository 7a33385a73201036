"""Shapes of published models, so that what they need can be planned where their weights are not.

Each entry is what the model's own config.json says, read by `hf_config.from_hf` like any other, and the dtype its files keep.
"""

from __future__ import annotations

import pathlib
from typing import Any

from qstar.errors import unknown
from qstar.models.config import ModelConfig
from qstar.models.encdec_config import EncDecConfig, flan_t5
from qstar.models.hf_config import from_hf

_LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt-j-6b": {
        "model_type": "gptj",
        "vocab_size": 50400,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    "mistral-7b-v0.1": {
        **_LLAMA_7B,
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "llama-2-7b": _LLAMA_7B,
    "llama-2-13b": {
        **_LLAMA_7B,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "codellama-7b": {**_LLAMA_7B, "vocab_size": 32016, "max_position_embeddings": 16384, "rope_theta": 1e6},
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}
_STORED = {"gpt-j-6b": "float32", "llama-2-7b": "float16", "llama-2-13b": "float16"}  # else bfloat16, FLAN-T5 float32
_FLAN = "flan-t5-"
NAMES = (*_CONFIGS, *(_FLAN + size for size in ("small", "base", "large", "xl", "xxl")))


def published(name: str) -> tuple[ModelConfig | EncDecConfig, str]:
    """Returns the shape of a published model and the dtype of its files, by the name of its folder.

    Case, the folders above and the ending "-hf" do not matter: `models/Llama-2-7b-hf` is llama-2-7b.

    Raises:
      UserError: a model that is not known here.
    """
    key = pathlib.PurePath(name).name.lower().removesuffix("-hf")
    if key.startswith(_FLAN) and key in NAMES:
        return flan_t5(key.removeprefix(_FLAN)), "float32"
    if key not in _CONFIGS:
        raise unknown(f"model {name!r} is no folder here, and as a published model", key, NAMES)
    return from_hf(_CONFIGS[key], key), _STORED.get(key, "bfloat16")
