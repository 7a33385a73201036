"""FLOPs that the mathematics of a program needs, peak rates of devices, and the model FLOPs utilisation (MFU) of a run.

    needed = 6 per matmul parameter and token (2 forward, 4 backward; 4 in all with frozen weights, under adapters)
           + 12 L H K per pair of a token and one that it attends to (causal, within its document and its window)
    MFU    = needed / (seconds x devices x peak)

Only real tokens count: padding, rematerialisation, and what two devices both compute lower the MFU. A thought counts as
its tokens, each of which attends to its text and to its thread. The peak is that of dense bfloat16 products, whatever
the run computes in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig

Needed = tuple[float, str]  # FLOPs, and the rule that counts them

# The first match counts, so a longer name comes before its beginning ("TPU v5 lite" before "TPU v5").
# Start of a device kind (or, for GPUs, part of it) -> dense bfloat16 FLOP/s of one chip, from the vendors' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,  # a device of JAX is one of the chip's two chiplets
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak(kind: str) -> float | None:
    """Returns the peak of a device kind (`jax.Device.device_kind`) in FLOP/s, or None where it is not in the table."""
    return next((flops for name, flops in PEAKS.items() if name in kind), None)


def update_flops(config: ModelConfig, batch: Any, *, frozen: bool = False, with_thoughts: bool = False) -> float:
    """Returns the FLOPs that one update on a host batch needs.

    Args:
      batch: a `Batch`, or what holds one as `rows` (`Preference`, `Graded`). frozen: only adapters train.
      with_thoughts: whether those of `config.thoughts` follow every position.
    """
    rows = getattr(batch, "rows", batch)
    real, before = np.asarray(rows.segment_ids) > 0, np.asarray(rows.positions) + 1
    if config.sliding_window is not None:
        near = config.windowed_share
        before = near * np.minimum(before, config.sliding_window) + (1 - near) * before
    return count(config, float(real.sum()), float((before * real).sum()), frozen=frozen, with_thoughts=with_thoughts)


def count(
    config: ModelConfig, tokens: float, pairs: float, *, frozen: bool = False, with_thoughts: bool = False
) -> float:
    """Returns the FLOPs of an update on so many tokens, which attend to so many others in all; see `update_flops`."""
    c = config
    head, pair = c.vocab_size * c.hidden_size, 2 * c.num_layers * c.num_heads * c.head_dim
    weights, attention = c.matmul_params * tokens, pair * pairs
    if with_thoughts:
        t = c.required_thoughts
        S, A, P = t.thought_tokens, t.talk_tokens, t.thoughts_per_position * t.think_fraction
        U = S + A + 1  # token u of a thread attends to the text up to its position, and to u tokens of the thread
        # Only S + A states of a thread are multiplied with the vocabulary; 3 D^2 is the mixing head's.
        weights += P * tokens * (U * (c.matmul_params - head) + (S + A) * head + 3 * c.hidden_size**2 * A)
        attention += P * pair * (U * pairs + tokens * U * (U + 1) / 2)
    # Attention has no weights to freeze: under adapters its backward pass costs the same.
    return (4 if frozen else 6) * weights + 6 * attention


# ------------------------------------------------------------------------------------------------ from sizes alone


def forward(config: Any, rows: int, length: int, *, context: int = 0, predicted: int = 0) -> Needed:
    """A forward pass over full rows, after a context, with the vocabulary's product at `predicted` tokens in all."""
    core = config.matmul_params - config.vocab_size * config.hidden_size
    pairs = _causal_pairs(length, config) + length * context
    attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs
    vocabulary = 2.0 * config.vocab_size * config.hidden_size * predicted
    return 2.0 * core * rows * length + rows * attention + vocabulary, "2 N per token"


def update(config: Any, rows: int, length: int, *, lora: bool = False, with_thoughts: bool = False) -> Needed:
    """An update on full rows; with `with_thoughts`, those of `config.thoughts` at `think_fraction` of the positions."""
    pairs = rows * _causal_pairs(length, config)
    rule = "4 N per token (LoRA)" if lora else "6 N per token of text and threads" if with_thoughts else "6 N per token"
    return count(config, rows * length, pairs, frozen=lora, with_thoughts=with_thoughts), rule


def thoughts(config: Any, rows: int, length: int) -> Needed:
    """A forward pass with one thought at every position: a third of an update."""
    one = config.replace(thoughts=config.thoughts.replace(thoughts_per_position=1, think_fraction=1.0))
    return update(one, rows, length, with_thoughts=True)[0] / 3, "2 N per token of text and threads"


def respond(config: Any, rows: int, prompt: int, response: int, back: bool = False, lora: bool = False) -> Needed:
    """Reading prompts and writing (or scoring) responses to them; with `back`, an update, with `lora` of adapters."""
    vocabulary = 2.0 * config.vocab_size * config.hidden_size * rows * response
    if isinstance(config, EncDecConfig):
        encoder, decoder = _t5_matmul_params(config)
        width = 4.0 * config.num_heads * config.head_dim
        pairs = config.num_layers * prompt**2 + config.num_decoder_layers * response * (response / 2 + prompt)
        once = rows * (2.0 * (encoder * prompt + decoder * response) + width * pairs) + vocabulary
    else:
        once = forward(config, rows, prompt + response)[0] + vocabulary
    if back and lora:  # as in `count`
        core = config.matmul_params - config.vocab_size * config.hidden_size
        return 3.0 * once - vocabulary - 2.0 * core * rows * (prompt + response), "4 N per token (LoRA)"
    return (3.0 * once, "6 N per token") if back else (once, "2 N per token")


def _causal_pairs(length: int, config: ModelConfig) -> float:
    # The first w tokens attend to 1 .. w tokens, themselves included; each later one to w. A mean over the layers.
    near = config.windowed_share
    windows = (min(length, config.sliding_window or length), near), (length, 1 - near)
    return sum(share * (w * (w + 1) / 2 + (length - w) * w) for w, share in windows)


def _t5_matmul_params(c: EncDecConfig) -> tuple[float, float]:
    # Cross-attention counts as the decoder's, its keys as well, although they are computed once per encoder token.
    attention = 4 * c.hidden_size * c.num_heads * c.head_dim
    mlp = (3 if c.gated_mlp else 2) * c.hidden_size * c.intermediate_size
    return c.num_layers * (attention + mlp), c.num_decoder_layers * (2 * attention + mlp)
