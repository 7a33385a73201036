"""Terms on the thoughts' own distribution, off by default: their entropy, and how far they go from a reference model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.thoughts import forward
from qstar.thoughts.paths import replay_states
from qstar.thoughts.rollout import forbidden_bias
from qstar.train.losses import chunks
from qstar.types import Batch, Params


def penalty(
    params: dict[str, Params],
    config: ModelConfig,
    batch: Batch,
    positions: jax.Array,
    think: jax.Array,
    thought_ids: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Returns kl_weight * KL(policy, reference) - entropy_weight * H(policy), weighted sums over the thoughts' tokens.

    Both are exact sums over the vocabulary for the tokens that were drawn, not estimates from these.

    Args:
      params: {"policy", and "reference" if `kl_weight` is not 0}. think: [B, P, M, S, E] states of the policy that the
        thoughts own [B, P, M, S] were drawn from. weights: [B, P, M, S].
    """
    t, value = config.thoughts, jnp.float32(0)
    flat = think.reshape(-1, think.shape[-1])
    if t.entropy_weight:
        value -= t.entropy_weight * _total(_entropy, (params["policy"],), (flat,), weights, config)
    if t.kl_weight:
        reference = jax.lax.stop_gradient(params["reference"])
        texts = forward.read(reference, config, batch)
        reference_logprobs = replay_states(reference, config, batch, texts, positions, thought_ids).think
        both = (flat, reference_logprobs.reshape(flat.shape))
        value += t.kl_weight * _total(_divergence, (params["policy"], reference), both, weights, config)
    return value


def _entropy(logp: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def _divergence(logp: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(logp) * (logp - reference_logprobs), axis=-1)


def _total(
    measure: Callable[..., jax.Array],
    models: tuple[Params, ...],
    hidden: tuple[jax.Array, ...],
    weights: jax.Array,
    config: ModelConfig,
) -> jax.Array:
    """Returns the weighted sum of `measure` of log-probabilities [n, V], whose logits exist one chunk at a time."""
    logit_bias = forbidden_bias(config)

    @jax.checkpoint
    def body(total: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        *states, w = xs
        logps = []
        for model, h in zip(models, states):
            logits = decoder.unembed(model, config, h)
            # Banned ids have the same finite log-probability everywhere, so that 0 times it is 0.
            logps.append(jax.nn.log_softmax(logits if logit_bias is None else jnp.where(logit_bias < 0, -1e4, logits)))
        return total + jnp.sum(w * measure(*logps)), None

    xs = chunks((*hidden, weights.reshape(-1)), config.vocab_size)
    return jax.lax.scan(body, jnp.float32(0), xs)[0]
