"""FLOPs that an update needs, peak rates of devices, and the model FLOPs utilisation (MFU) of a run.

    needed = 6 per matmul parameter and token (2 forward, 4 backward; 4 in all where the weights are frozen, under adapters)
           + 12 L H K per pair of a token and one that it sees (attention, causal, within its document and its window)
    MFU    = needed / (seconds x devices x peak)

Only real tokens count: padding, and what rematerialisation does again, lower the MFU. A thought is counted as its tokens,
each of which sees its text and itself. The peak is that of dense bfloat16 products, whatever the run computes in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qstar.models.config import ModelConfig

# Start of a device kind (or, for GPUs, part of it) -> dense bfloat16 FLOP/s of one chip, from the vendors' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak(kind: str) -> float | None:
    """Returns the peak of a device kind (`jax.Device.device_kind`) in FLOP/s, or None where it is not in the table."""
    return next((flops for name, flops in PEAKS.items() if name in kind), None)


def update_flops(config: ModelConfig, batch: Any, *, frozen: bool = False, thinks: bool = False) -> float:
    """Returns the FLOPs that one update on a host batch needs.

    Args:
      batch: a `Batch`, or what holds one as `rows` (`Preference`, `Graded`). frozen: adapters train beside frozen weights.
      thinks: threads of `config.thoughts` follow every position.
    """
    rows = getattr(batch, "rows", batch)
    real, before = np.asarray(rows.segment_ids) > 0, np.asarray(rows.positions) + 1
    if config.sliding_window is not None:
        before = np.minimum(before, config.sliding_window)
    return count(config, float(real.sum()), float((before * real).sum()), frozen=frozen, thinks=thinks)


def seen(length: int, window: int | None = None) -> float:
    """Returns the pairs of a token and one that it sees (itself, too) in a text of so many tokens."""
    w = min(length, window or length)
    return w * (w + 1) / 2 + (length - w) * w


def count(config: ModelConfig, tokens: float, seen: float, *, frozen: bool = False, thinks: bool = False) -> float:
    """Returns the FLOPs that an update needs on so many tokens, which see so many others; for the rest see `update_flops`."""
    c = config
    head, pair = c.vocab_size * c.hidden_size, 2 * c.num_layers * c.num_heads * c.head_dim
    weights, attention = c.matmul_params * tokens, pair * seen
    if thinks:
        t = c.thoughts
        S, T, P = t.thought_tokens, t.talk_tokens, t.thoughts_per_position * t.think_fraction
        n = S + T + 1  # tokens of a thread; the one at i sees the text up to its position and i of the thread
        weights += P * tokens * (n * (c.matmul_params - head) + (S + T) * head + 3 * c.hidden_size**2 * T)
        attention += P * pair * (n * seen + tokens * n * (n + 1) / 2)
    return (4 if frozen else 6) * weights + 6 * attention
