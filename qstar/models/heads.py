"""Heads beside a decoder: value head and critic, and Quiet-STaR's start and end vectors with the thought mixer.

    value/kernel [D, 1]   value/bias [1]                                            verifier, log-odds
    value/in [D, 2D]   ReLU   value/out [2D, 1]                                     critic, expected reward
    thoughts/{start,end} [D]   mixing/in [2D, D]   mixing/hidden [D, D]   mixing/out/kernel [D, 1]

All but the critic are in the decoder's own tree, whose functions ignore them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from qstar.models.attention import precision
from qstar.models.config import ModelConfig
from qstar.models.layers import from_init_key, project
from qstar.types import Params

if TYPE_CHECKING:
    from qstar.models.model import Model


class ValueHead(nn.Module):
    """Linear head of a verifier."""

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """Returns float32 logits [...] of hidden states [..., D]."""
        # Zeros, so that every solution has probability 1/2 before training.
        kernel = self.param("kernel", nn.initializers.zeros, (hidden.shape[-1], 1)).astype(hidden.dtype)
        bias = self.param("bias", nn.initializers.zeros, (1,)).astype(jnp.float32)
        out = jnp.matmul(hidden, kernel, precision=precision(hidden.dtype), preferred_element_type=jnp.float32)
        return (out + bias)[..., 0]


def add_value_head(model: Model, kind: str) -> Model:
    """Returns the model with a fresh value head.

    Args:
      kind: "orm" (judges the whole solution, at every token) or "prm" (judges the solution so far, after every step).
    """
    config = model.config.replace(value_head=kind)
    value = ValueHead().init(jax.random.key(0), jnp.zeros((config.hidden_size,)))["params"]
    # In the decoder's own tree, like the thoughts: what loads, saves, shards or trains a decoder then includes it.
    # (The official Quiet-STaR code re-initialises its vectors on loading.)
    return model.replace(config=config, params={**model.params, "value": value})


def value_logits(params: Params, hidden: Array) -> Array:
    """Returns the value head's float32 logits [...] of hidden states [..., D]."""
    return cast(Array, ValueHead().apply({"params": params["value"]}, hidden))


class Critic(nn.Module):
    """Two layers from a state to its expected reward: a role beside the policy, {"policy": ..., "value": ...}."""

    @nn.compact
    def __call__(self, states: Array) -> Array:
        """Returns values [...] float32 of states [..., D]."""
        D = states.shape[-1]
        # A hidden layer, because expected reward is no linear feature of a language model. The last layer starts at 0:
        # no value is predicted before training.
        hidden = self.param("in", from_init_key(self, _dense), D, 2 * D, D**-0.5)
        out = self.param("out", from_init_key(self, _dense), 2 * D, 1, 0.0)
        x = states.astype(jnp.float32)
        x = jax.nn.relu(x @ hidden["kernel"] + hidden["bias"])
        return (x @ out["kernel"] + out["bias"])[..., 0]


def _dense(key: Array, inputs: int, outputs: int, std: float) -> Params:
    kernel = std * jax.random.normal(key, (inputs, outputs)) if std else jnp.zeros((inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros((outputs,))}


def init_critic(width: int, key: Array) -> Params:
    """Returns the critic's parameters for states of a width."""
    return Critic().init(key, jnp.zeros((width,)))["params"]


def critic(params: Params, states: Array) -> Array:
    """Returns values [...] float32 of states [..., D]."""
    return cast(Array, Critic().apply({"params": params}, states))


# ------------------------------------------------------------------------------------------- thoughts (Quiet-STaR)


class ThoughtMixer(nn.Module):
    """Weighs states with a thought against those without (paper, section 4.3; official code: hidden-space mixing)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, base: Array, thought: Array) -> tuple[Array, Array]:
        """Returns (1 - w) base + w thought [T, D], and w [T] float32: here of the thought, in the paper of the base.

        Args:
          base: [T, D] final states of the text alone. thought: [T, D] those after a thought. In the compute dtype.
        """
        t, D = self.config.required_thoughts, self.config.hidden_size

        def std(inputs: int) -> float:
            return inputs**-0.5 if t.mixing_init_std is None else t.mixing_init_std

        first = self.param("in", from_init_key(self, _dense, 2, 4), 2 * D, D, std(2 * D))
        second = self.param("hidden", from_init_key(self, _dense, 3, 4), D, D, std(D))
        # Zeros: an unbounded weight is 0 at first, and the model with thoughts is exactly the model without.
        last = self.param("out", lambda _: {"kernel": jnp.zeros((D, 1))})
        kernel = first["kernel"].astype(base.dtype)
        # Two products and not one of a concatenation: the text's half is then computed once for all passes.
        h = project(base, kernel[:D]) + project(thought, kernel[D:]) + first["bias"].astype(base.dtype)
        h = project(jax.nn.relu(h), second["kernel"].astype(h.dtype)) + second["bias"].astype(h.dtype)
        w = project(jax.nn.relu(h), last["kernel"].astype(h.dtype))[:, 0].astype(jnp.float32)
        if t.mixing == "sigmoid":
            w = jax.nn.sigmoid(w)
        # Cast here and not before, because w itself stays float32 for metrics.
        share = w[:, None].astype(base.dtype)
        return (1 - share) * base + share * thought, w


def init_thoughts(config: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Returns {"thoughts", "mixing"} of a `config.thoughts`: random vectors and a fresh mixer."""
    x = jnp.zeros((1, config.hidden_size))
    std = config.init_std / config.required_thoughts.embedding_scale
    keys = zip(("start", "end"), jax.random.split(key, 4))  # the other two are the mixer's
    vectors = {name: std * jax.random.normal(k, (config.hidden_size,)) for name, k in keys}
    params = {"thoughts": vectors, "mixing": ThoughtMixer(config).init(key, x, x)["params"]}
    return jax.tree.map(lambda p: p.astype(dtype), params)


def attach_thoughts(params: Params, config: ModelConfig, key: Array, start_id: int) -> Params:
    """Returns a trained decoder's parameters with fresh vectors and mixer, in the dtype of its embeddings.

    `start_id`: the token whose embedding both vectors start from (the official code: "---").
    """
    table = params["embed"]["table"]
    new = init_thoughts(config, key, table.dtype)
    vector = table[start_id] / jnp.asarray(config.required_thoughts.embedding_scale, table.dtype)
    return {**params, **new, "thoughts": {"start": vector, "end": vector}}


def thought_vector(params: Params, config: ModelConfig, name: str) -> Array:
    """Returns the start or end vector [D] as it is fed: the parameter times `embedding_scale`."""
    vector = params["thoughts"][name]
    return vector * jnp.asarray(config.required_thoughts.embedding_scale, vector.dtype)


def mix(params: Params, config: ModelConfig, base: Array, thought: Array) -> tuple[Array, Array]:
    """Returns the mixed states [T, D] and the weights [T] of `ThoughtMixer`."""
    return cast(tuple[Array, Array], ThoughtMixer(config).apply({"params": params["mixing"]}, base, thought))
