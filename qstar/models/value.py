"""A value head: how much reward the policy may still expect at a state, float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qstar.types import Params


def init(width: int, key: jax.Array) -> Params:
    """Returns the parameters of width -> 2 width -> ReLU -> 1. The last layer starts at 0: no value before any evidence."""
    hidden = width**-0.5 * jax.random.normal(key, (width, 2 * width))
    return {
        "in": {"kernel": hidden, "bias": jnp.zeros((2 * width,))},
        "out": {"kernel": jnp.zeros((2 * width, 1)), "bias": jnp.zeros((1,))},
    }


def apply(params: Params, states: jax.Array) -> jax.Array:
    """Returns values [..., ] float32 of states [..., E]."""
    x = states.astype(jnp.float32)
    x = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"])
    return (x @ params["out"]["kernel"] + params["out"]["bias"])[..., 0]
