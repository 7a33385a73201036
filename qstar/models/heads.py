"""Heads that read one number per token off the final hidden state: a verifier's judgement, and PPO's critic.

    value/kernel [E, 1]   value/bias [1]                               verifier, log-odds

It is a part of the decoder's parameter tree wherever `config.value_head` says so, so that training, checkpoints and the
Hugging Face layout know it like any other parameter (as `score`, the name that transformers gives to a token classifier's).

    value/in [E, 2E]   ReLU   value/out [2E, 1]                        critic, expected reward

The critic is a role of its own beside the policy ({"policy": ..., "value": ...}), of decoders and encoder-decoders alike: it
goes when training ends. It has a layer of its own because what is worth a reward is no linear feature of a language model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.errors import UserError
from qstar.mesh import mesh_jit
from qstar.models.attention import precision
from qstar.models.config import ModelConfig
from qstar.models.model import Model, hidden_states, score_tokens
from qstar.types import Params


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


@functools.partial(mesh_jit, static_argnames="config")
def _values(params: Params, config: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns [B, T]: at t, the head's logit after token t + 1 (so that it lines up with log-probabilities)."""
    return jnp.roll(value_logits(params, hidden_states(params, config, tokens, mask)), -1, axis=1)


def values(model: Model, prompts: Sequence[Any], completions: Sequence[Any]) -> list[np.ndarray]:
    """Returns the head's judgement after every token of each completion, as log-odds: float32 arrays.

    Args:
      prompts, completions: as in `model.logprobs`.

    Raises:
      UserError: the model has no value head; or see `model.logprobs`.
    """
    if not model.config.value_head:
        raise UserError("this model has no value head (config.json names no qstar_value_head); score by log-likelihood")
    return score_tokens(model, prompts, completions, _values)


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
