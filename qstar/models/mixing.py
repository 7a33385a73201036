"""The parts that thinking adds to a decoder: start and end vectors, and the head that weighs the thought.

    thoughts/{start,end} [E]   mixing/in/{kernel [2E, E], bias [E]}   mixing/hidden/{kernel [E, E], bias [E]}
    mixing/out/kernel [E, 1]

They live in the decoder's own tree, whose functions ignore them, so that whatever loads, saves, shards or trains a
decoder does the same with them (the official code loses both on loading: quiet-star issue of re-initialised vectors).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qstar.models.config import ModelConfig
from qstar.models.layers import project
from qstar.types import Params


def init(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Returns {"thoughts", "mixing"} of a `config.thoughts`: random vectors, and a head whose last layer is 0.

    So an unbounded weight is 0 at first, and the model with thoughts is exactly the model without.
    """
    t, E, keys = config.thoughts, config.hidden_size, jax.random.split(key, 4)

    def linear(key: jax.Array, inputs: int) -> Params:
        std = inputs**-0.5 if t.mixing_init_std is None else t.mixing_init_std
        return {"kernel": std * jax.random.normal(key, (inputs, E)), "bias": jnp.zeros((E,))}

    def vector(key: jax.Array) -> jax.Array:
        return config.init_std / t.embedding_scale * jax.random.normal(key, (E,))

    mixing = {"in": linear(keys[2], 2 * E), "hidden": linear(keys[3], E), "out": {"kernel": jnp.zeros((E, 1))}}
    params = {"thoughts": {"start": vector(keys[0]), "end": vector(keys[1])}, "mixing": mixing}
    return jax.tree.map(lambda p: p.astype(dtype), params)


def attach(params: Params, config: ModelConfig, key: jax.Array, start_id: int, end_id: int | None = None) -> Params:
    """Returns a trained decoder's parameters with fresh thinking parts, in the dtype of its embeddings.

    Args:
      start_id, end_id: tokens whose embeddings the vectors start from (the official code: both "---").
    """
    table = params["embed"]["table"]
    new = init(config, key, table.dtype)
    ids = {"start": start_id, "end": start_id if end_id is None else end_id}
    new["thoughts"] = {k: table[i] / jnp.asarray(config.thoughts.embedding_scale, table.dtype) for k, i in ids.items()}
    return {**params, **new}


def vector(params: Params, config: ModelConfig, name: str) -> jax.Array:
    """Returns the start or end vector [E] as it is fed: what is stored, times `embedding_scale`."""
    return params["thoughts"][name] * jnp.asarray(config.thoughts.embedding_scale, params["thoughts"][name].dtype)


def mix(params: Params, config: ModelConfig, base: jax.Array, thread: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighs states with a thought against those without (paper, section 4.3; official code: hidden-space mixing).

    Args:
      base: [T, E] final states of the text alone. thread: [T, E] those after a thought. In the compute dtype.

    Returns:
      (1 - w) base + w thread [T, E], and w [T] float32, the weight of the *thought* (the paper's w weighs the base).
    """
    m, E = params["mixing"], config.hidden_size
    kernel = m["in"]["kernel"].astype(base.dtype)
    # Two products and not one of a concatenation: the text's half is then computed once for all passes.
    h = project(base, kernel[:E]) + project(thread, kernel[E:]) + m["in"]["bias"].astype(base.dtype)
    h = project(jax.nn.relu(h), m["hidden"]["kernel"].astype(h.dtype)) + m["hidden"]["bias"].astype(h.dtype)
    w = project(jax.nn.relu(h), m["out"]["kernel"].astype(h.dtype))[:, 0].astype(jnp.float32)
    if config.thoughts.mixing == "sigmoid":
        w = jax.nn.sigmoid(w)
    share = w[:, None].astype(base.dtype)
    return (1 - share) * base + share * thread, w
