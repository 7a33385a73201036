"""Shapes of published models, so that a job can be planned before their weights are downloaded.

Each entry is the model's own config.json, read by `hf_config.from_hf` like any other; `torch_dtype` is that of its files.
"""

from __future__ import annotations

import pathlib
from typing import Any

from qstar.errors import unknown
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.hf_config import from_hf

_LLAMA_7B = {
    "model_type": "llama",
    "torch_dtype": "float16",
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
_FLAN_T5 = {
    "model_type": "t5",
    "torch_dtype": "float32",
    "vocab_size": 32128,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_FLAN_SIZES = {  # width, MLP, layers of each stack, heads
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt-j-6b": {
        "model_type": "gptj",
        "torch_dtype": "float32",
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
        "torch_dtype": "bfloat16",
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
    "codellama-7b": {
        **_LLAMA_7B,
        "torch_dtype": "bfloat16",
        "vocab_size": 32016,
        "max_position_embeddings": 16384,
        "rope_theta": 1e6,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
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
    **{
        f"flan-t5-{size}": {**_FLAN_T5, "d_model": width, "d_ff": mlp, "num_layers": layers, "num_heads": heads}
        for size, (width, mlp, layers, heads) in _FLAN_SIZES.items()
    },
}
NAMES = tuple(_CONFIGS)


def published(name: str) -> tuple[ModelConfig | EncDecConfig, str]:
    """Returns the config of a published model and the dtype of its files, by the name of its folder.

    Case, the folders above and the ending "-hf" do not matter: `models/Llama-2-7b-hf` is llama-2-7b.

    Raises:
      UserError: a model that is not in the table.
    """
    key = pathlib.PurePath(name).name.lower().removesuffix("-hf")
    if key not in _CONFIGS:
        raise unknown(f"model {name!r} is no folder here, and as a published model", key, NAMES)
    return from_hf(_CONFIGS[key], key), _CONFIGS[key]["torch_dtype"]
