"""Heads that read one number per token off the final hidden state: a verifier's judgement, and PPO's critic.

    value/kernel [E, 1]   value/bias [1]                               verifier, log-odds

It is a part of the decoder's parameter tree wherever `config.value_head` says so, so that training, checkpoints and the
Hugging Face layout know it like any other parameter (as `score`, the name that transformers gives to a token classifier's).

    value/in [E, 2E]   ReLU   value/out [2E, 1]                        critic, expected reward

The critic is a role of its own beside the policy ({"policy": ..., "value": ...}), of decoders and encoder-decoders alike: it
goes when training ends. It has a layer of its own because what is worth a reward is no linear feature of a language model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qstar.models.attention import precision
from qstar.models.config import ModelConfig
from qstar.models.layers import project
from qstar.types import Params

if TYPE_CHECKING:
    from qstar.models.model import Model


def add_value_head(model: Model, kind: str) -> Model:
    """Returns the model with a fresh value head: all zeros, so that every judgement is 1/2 at first.

    Args:
      kind: "orm" (judges the whole solution, at every token) or "prm" (judges what stands so far, after every step).
    """
    config = model.config.replace(value_head=kind)
    zeros = {"kernel": jnp.zeros((config.hidden_size, 1)), "bias": jnp.zeros((1,))}
    return model.replace(config=config, params={**model.params, "value": zeros})


def value_logits(params: Params, hidden: jax.Array) -> jax.Array:
    """Returns the head's float32 logits [...] of hidden states [..., E]."""
    kernel = params["value"]["kernel"].astype(hidden.dtype)
    out = jnp.matmul(hidden, kernel, precision=precision(hidden.dtype), preferred_element_type=jnp.float32)
    return (out + params["value"]["bias"].astype(jnp.float32))[..., 0]


def init_critic(width: int, key: jax.Array) -> Params:
    """Returns the parameters of width -> 2 width -> ReLU -> 1. The last layer starts at 0: no value before any evidence."""
    hidden = width**-0.5 * jax.random.normal(key, (width, 2 * width))
    return {
        "in": {"kernel": hidden, "bias": jnp.zeros((2 * width,))},
        "out": {"kernel": jnp.zeros((2 * width, 1)), "bias": jnp.zeros((1,))},
    }


def critic(params: Params, states: jax.Array) -> jax.Array:
    """Returns values [...] float32 of states [..., E]."""
    x = states.astype(jnp.float32)
    x = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"])
    return (x @ params["out"]["kernel"] + params["out"]["bias"])[..., 0]


def init_thoughts(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
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


def attach_thoughts(
    params: Params, config: ModelConfig, key: jax.Array, start_id: int, end_id: int | None = None
) -> Params:
    """Returns a trained decoder's parameters with fresh thinking parts, in the dtype of its embeddings.

    Args:
      start_id, end_id: tokens whose embeddings the vectors start from (the official code: both "---").
    """
    table = params["embed"]["table"]
    new = init_thoughts(config, key, table.dtype)
    ids = {"start": start_id, "end": start_id if end_id is None else end_id}
    new["thoughts"] = {k: table[i] / jnp.asarray(config.thoughts.embedding_scale, table.dtype) for k, i in ids.items()}
    return {**params, **new}


def thought_vector(params: Params, config: ModelConfig, name: str) -> jax.Array:
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
