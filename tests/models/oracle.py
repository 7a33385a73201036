"""Random Hugging Face models of every family: the independent reference for graphs, weight names and config.json."""

from __future__ import annotations

import numpy as np
import torch
import transformers

V = 50  # vocabulary
_LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
_ROPE3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # of 8 frequencies some are kept, some blended, some stretched
_LINEAR = dict(rope_type="linear", rope_theta=500.0, factor=4.0)
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=8.0)
_MSCALE = dict(_YARN, mscale=0.7, mscale_all_dim=1.3, truncate=False)
_LONG = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    original_max_position_embeddings=16,
    short_factor=[1.0, 1.1, 1.3, 2.0],
    long_factor=[1.0, 2.0, 3.0, 5.0],
)

_LLAMA4 = dict(_LLAMA, num_hidden_layers=4)
_MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_GEMMA = dict(_LLAMA4, head_dim=8, sliding_window=4, query_pre_attn_scalar=12)
_GEMMA3_ROPE = dict(
    full_attention=dict(rope_type="linear", rope_theta=5e4, factor=4.0),
    sliding_attention=dict(rope_type="default", rope_theta=500.0),
)

CASES = {
    "llama": ("Llama", dict(_LLAMA)),
    "llama biased tied": (
        "Llama",
        dict(_LLAMA, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama rope llama3": ("Llama", dict(_LLAMA, head_dim=16, num_key_value_heads=4, rope_parameters=_ROPE3)),
    "llama rope linear": ("Llama", dict(_LLAMA, num_key_value_heads=1, rope_parameters=_LINEAR)),
    "llama rope yarn": ("Llama", dict(_LLAMA, rope_parameters=_YARN)),
    "qwen2 rope yarn mscale": ("Qwen2", dict(_LLAMA, rope_parameters=_MSCALE)),
    "llama rope dynamic": (
        "Llama",
        dict(
            _LLAMA, max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", rope_theta=1000.0, factor=4.0)
        ),
    ),
    "mistral rope longrope": ("Mistral", dict(_LLAMA, sliding_window=None, rope_parameters=_LONG)),
    "mistral window": ("Mistral", dict(_LLAMA, sliding_window=5, hidden_act="gelu")),
    "mistral full": ("Mistral", dict(_LLAMA, sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", dict(_LLAMA, tie_word_embeddings=True)),
    "qwen2 window": ("Qwen2", dict(_LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=0)),
    "qwen3": ("Qwen3", dict(_LLAMA, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "qwen3 biased": ("Qwen3", dict(_LLAMA, head_dim=8, attention_bias=True)),
    "qwen3 mixed": ("Qwen3", dict(_LLAMA4, head_dim=8, use_sliding_window=True, sliding_window=4, layer_types=_MIXED)),
    "ministral": ("Ministral", dict(_LLAMA4, head_dim=8, sliding_window=4, layer_types=_MIXED)),
    "gemma2": ("Gemma2", dict(_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3Text", dict(_GEMMA, num_hidden_layers=6, rope_parameters=_GEMMA3_ROPE)),
    "gemma3 capped, untied": (
        "Gemma3Text",
        dict(_GEMMA, layer_types=_MIXED, final_logit_softcapping=3.0, attention_bias=True, tie_word_embeddings=False),
    ),
    "phi3": ("Phi3", dict(_LLAMA, sliding_window=5, pad_token_id=None)),
    "phi3 longrope, partly rotated": (
        "Phi3",
        dict(
            _LLAMA,
            head_dim=16,
            num_attention_heads=2,
            tie_word_embeddings=True,
            pad_token_id=None,
            original_max_position_embeddings=16,
            rope_parameters=dict(_LONG, partial_rotary_factor=0.5),
        ),
    ),
    "olmo2": ("Olmo2", dict(_LLAMA, pad_token_id=None)),
    "olmo2 biased": ("Olmo2", dict(_LLAMA, attention_bias=True, num_key_value_heads=4, pad_token_id=None)),
    "smollm3": ("SmolLM3", dict(_LLAMA4, pad_token_id=None)),
    "smollm3 window": (
        "SmolLM3",
        dict(_LLAMA4, pad_token_id=None, use_sliding_window=True, sliding_window=4, no_rope_layers=[0, 1, 1, 0]),
    ),
    "gpt2": ("GPT2LMHead", dict(_GPT)),
    "gpt2 untied": ("GPT2LMHead", dict(_GPT, tie_word_embeddings=False, n_inner=48, activation_function="gelu")),
    "gptj": ("GPTJ", dict(_GPT, rotary_dim=4)),
    "gptj tied": ("GPTJ", dict(_GPT, rotary_dim=8, tie_word_embeddings=True, n_inner=48)),
}


def torch_model(case: str) -> torch.nn.Module:
    """Returns a random model in which no bias is 0, no norm is 1, and logits are of the order of 1."""
    name, options = CASES[case]
    config = getattr(transformers, name.removesuffix("LMHead") + "Config")(**options)
    for_lm = "GPT2LMHeadModel" if name == "GPT2LMHead" else name.removesuffix("Text") + "ForCausalLM"
    model = getattr(transformers, for_lm)(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, case)))
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if "norm" in key and p.ndim == 1 or "ln_" in key and key.endswith("weight") else 0.0
            p.copy_(centre + 0.3 * torch.randn(p.shape, generator=generator))
    return model


def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Returns float32 logits [B, T, V] of tokens [B, T]."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens, np.int64))).logits.float().numpy()


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns ids below V."""
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)
