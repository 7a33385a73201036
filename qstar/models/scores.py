"""The mask value and the soft cap of attention scores and logits, for all forms of attention and the vocabulary."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

# Finite instead of -inf: a row without visible keys then gives numbers, not NaN from inf - inf.
NEG = -1e30


def soft_cap(x: Array, cap: float | None) -> Array:
    """Returns cap * tanh(x / cap), or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
