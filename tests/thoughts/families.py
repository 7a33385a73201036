"""One small model of every kind of decoder, all of which think."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qstar.models import decoder
from qstar.models.config import ModelConfig, preset
from qstar.models.thought_config import ThoughtConfig
from qstar.thoughts import forward, layout, rollout

V, B, N, S, T, P = 30, 2, 7, 2, 2, 2
THOUGHTS = ThoughtConfig(thought_tokens=S, talk_tokens=T, thoughts_per_position=P, forbidden_ids=(0, 29))
_GPT = dict(norm="layer", activation="gelu_tanh", gated_mlp=False, mlp_bias=True, num_kv_heads=4, head_dim=6)
LLAMA = ModelConfig(
    vocab_size=V,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=32,
    max_positions=16,
    init_std=0.3,
    tie_embeddings=False,
    eos_id=1,
    thoughts=THOUGHTS,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA.replace(family="mistral", sliding_window=4),
    "qwen2": LLAMA.replace(family="qwen2", qkv_bias=True, tie_embeddings=True, num_kv_heads=1),
    "qwen3": LLAMA.replace(family="qwen3", qk_norm=True, head_dim=4),
    "gemma": LLAMA.replace(  # Gemma 2 and 3 at once, and a layer without rotary positions
        family="tiny",
        num_layers=3,
        windowed=(True, False, True),
        sliding_window=3,
        window_theta=50.0,
        rotated=(True, True, False),
        query_scalar=5.0,
        attn_softcap=2.0,
        final_softcap=3.0,
        norm_place="both",
        norm_offset=True,
        qk_norm=True,
        embed_scale=True,
        tie_embeddings=True,
        activation="gelu_tanh",
    ),
    "gpt2": LLAMA.replace(family="gpt2", position="learned", qkv_bias=True, out_bias=True, tie_embeddings=True, **_GPT),
    "gptj": LLAMA.replace(
        family="gptj", parallel_block=True, head_bias=True, rotary_dim=4, rope_interleaved=True, **_GPT
    ),
    "tiny": preset("tiny", hidden_size=24, num_layers=2, vocab_size=V, thoughts=THOUGHTS, init_std=0.3),
}


@functools.cache
def params(family: str):
    """Random parameters in which nothing is 0 or 1 that usually is, the mixing head's last layer included."""
    tree = jax.jit(decoder.init, static_argnums=0)(FAMILIES[family], jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(tree)))
    keys = jax.tree.unflatten(jax.tree.structure(tree), list(keys))
    return jax.tree.map(lambda p, k: p + 0.15 * jax.random.normal(k, p.shape), tree, keys)


def texts(rows: int = B, length: int = N, seed: int = 0):
    """Tokens [rows, length], and a mask of ones."""
    tokens = np.random.default_rng(seed).integers(2, V - 1, (rows, length))
    return jnp.asarray(tokens, jnp.int32), jnp.ones((rows, length), jnp.int32)


def thoughts(rows: int = B, length: int = N, passes: int = P, tokens: int = S, seed: int = 1):
    """Random thoughts [tokens, rows * passes, length]."""
    return jnp.asarray(np.random.default_rng(seed).integers(1, V - 1, (tokens, rows * passes, length)), jnp.int32)


class Thoughts(NamedTuple):
    tokens: jax.Array
    logprobs: jax.Array
    sample_logprobs: jax.Array


def think(params, config, tokens, mask, key, *, passes=None, positions=None, temperature=None):
    """`rollout.sample` of texts [B, N] at positions [M] (default all): its tokens and log-probabilities, [S, B*P, M]."""
    batch = layout.text_batch(tokens, mask)
    positions = layout.all_positions(batch) if positions is None else jnp.asarray(positions, jnp.int32)
    positions = jnp.broadcast_to(positions, (len(batch.tokens), positions.shape[-1]))
    positions, _, back = layout.spread(positions, batch.tokens.shape[1])
    texts = forward.read(params, config, batch)
    records = rollout.sample(params, config, batch, texts, positions, key, passes, temperature)
    return Thoughts(*(rearrange(x, "s b p m -> s (b p) m")[..., back] for x in records))
