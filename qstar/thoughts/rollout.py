"""Sampling of thoughts without a gradient, after every position of a batch or after chosen ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import repeat

from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.models.vocabulary import map_chunks
from qstar.sample.logits import NEG, SamplingParams, sample_token
from qstar.thoughts import forward, layout
from qstar.types import Batch, Params


def sample(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    texts: forward.PrefixCache,
    positions: jax.Array,
    key: jax.Array,
    passes: int | None = None,
    temperature: float | jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Samples thoughts after a base pass, without forbidden ids (paper, algorithm 1; official code: iterations 1 .. S).

    Args:
      params: a decoder's tree with `thoughts`. config: with `thoughts`. batch: rows [B, N]; texts: `forward.read` of it.
      positions: [B, M] int32, where to think. The cost is in proportion.
      key: draws depend on it and on (step, sequence, pass, position) alone: thoughts at chosen positions are those of
        the full run.
      passes: P, default `thoughts_per_position`. temperature: default `config.thoughts.temperature`; 0 is greedy.

    Returns:
      Each [S, B, P, M]: tokens int32; their log-probabilities under the model without the forbidden ids, temperature 1;
      and under the distribution drawn from.
    """
    passes = passes or config.required_thoughts.thoughts_per_position
    # REINFORCE needs no gradient through the draws, and none of the rollout's activations are then kept.
    params, texts = jax.lax.stop_gradient((params, texts))
    draw = sampler(params, config, batch, positions, key, passes, temperature)
    return forward.rollout(params, config, batch, texts, positions, passes, draw).records


def sampler(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    positions: jax.Array,
    key: jax.Array,
    passes: int,
    temperature: float | jax.Array | None = None,
) -> forward.SampleFn:
    """Returns the `draw` of `forward.rollout` that samples, with one uniform number per thread and step."""
    B, N = batch.tokens.shape
    temperature = config.required_thoughts.temperature if temperature is None else temperature
    sampling_params, index = SamplingParams.make(temperature), repeat(positions, "b m -> b p m", p=passes)

    def draw(i: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Any]:
        # Drawn for all positions, so that the choice of positions does not change the draws of any of them.
        u = jax.random.uniform(jax.random.fold_in(key, i), (B, passes, N))
        record = draw_tokens(params, config, hidden, jnp.take_along_axis(u, index, axis=2), sampling_params)
        return record[0], record

    return draw


def draw_tokens(
    params: Params, config: ModelConfig, hidden: jax.Array, u: jax.Array, sampling_params: SamplingParams
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws a token from each of the states [B, P, M, D], at uniform numbers u [B, P, M]; never a forbidden id.

    Returns:
      token int32 [B, P, M], its log-probability under the model, and under the distribution drawn from.
    """
    logit_bias = forbidden_bias(config)

    def sample(hidden: jax.Array, u: jax.Array) -> Any:
        logits = decoder.unembed(params, config, hidden)
        # Before the softmax, so that the recorded log-probabilities are of the distribution without the forbidden ids.
        logits = logits if logit_bias is None else logits + logit_bias
        return jax.vmap(partial(sample_token, sampling_params=sampling_params))(logits, u)

    return layout.by_position(partial(map_chunks, sample, vocab_size=config.vocab_size))(
        jax.lax.stop_gradient(hidden), u
    )


def forbidden_bias(config: ModelConfig) -> jax.Array | None:
    """Returns what is added to the logits of a thought's tokens, [V] float32: very negative for forbidden ids."""
    ids = config.required_thoughts.forbidden_ids
    return jnp.zeros((config.vocab_size,), jnp.float32).at[jnp.asarray(ids)].set(NEG) if ids else None
