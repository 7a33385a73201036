"""Weights of the blocks in 8 bits, for sampling: half of bfloat16's bytes to read at every decode step.

    kernel [in, out]  ~  q [in, out] int8 x scale [out] float32        scale = max over a column of |kernel| / 127

Symmetric, one scale per output channel. Embedding, head, norms, biases, activations and cache keep their precision.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qstar.models.layers import with_adapters
from qstar.types import Params

KINDS = ("", "int8")  # "": as stored


@jax.jit
def quantise(params: Params) -> Params:
    """Returns a decoder's parameters, adapters merged, its blocks' kernels as {"kernel": int8, "scale": float32}."""

    def one(leaves: dict[str, Any]) -> dict[str, Any]:
        if "kernel" not in leaves:
            return leaves
        w = leaves["kernel"].astype(jnp.float32)
        largest = jnp.max(jnp.abs(w), axis=-2)
        # A column of zeros has scale 1 instead of 0, whose quotient would be NaN.
        scale = jnp.where(largest > 0, largest, 127.0) / 127.0
        # Rounded to nearest (a cast truncates): no entry is off by more than scale / 2.
        return {**leaves, "kernel": jnp.round(w / scale[..., None, :]).astype(jnp.int8), "scale": scale}

    return {**params, "layers": {name: one(leaves) for name, leaves in with_adapters(params["layers"]).items()}}
