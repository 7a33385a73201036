"""From logits to a token and its two log-probabilities, for one row (`vmap` adds the others).

The convention everywhere: `logprob` is under the model (temperature 1, the whole vocabulary), which is what a trainer
recomputes; `sample_logprob` is under the distribution the token was really drawn from (temperature, top-k, top-p,
greedy = 0). Confusing the two biases every importance ratio by the mass that a filter removed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 256  # of the two-level inverse CDF
NEG = -1e30


class Knobs(NamedTuple):
    """Sampling settings as dynamic scalars: a sweep over them does not recompile."""

    temperature: jax.Array  # float32; 0 = greedy
    top_k: jax.Array  # int32; 0 = off
    top_p: jax.Array  # float32; 1 = off

    @classmethod
    def make(cls, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Knobs:
        """Builds the scalars from Python numbers."""
        return cls(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


def draw(logits: jax.Array, u: jax.Array, knobs: Knobs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token by inverting the distribution function at `u`.

    One uniform number per token instead of V Gumbel variates: at 32,000 ids the random bits alone would cost a CPU more
    than the model does.

    Args:
      logits: [V] float32. u: scalar in [0, 1). knobs: unmapped scalars, so that the branches below stay branches.

    Returns:
      token (int32), its log-probability under the model, and under the distribution it was drawn from.
    """

    def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(logits).astype(jnp.int32), jnp.float32(0.0)

    def sampled(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled = logits / jnp.maximum(knobs.temperature, 1e-6)
        filtering = (knobs.top_k > 0) | (knobs.top_p < 1.0)
        kept = jax.lax.cond(filtering, lambda x: keep_top(x, knobs), lambda x: x, scaled)
        top = jnp.max(kept)
        weights = jnp.exp(kept - top)
        token = invert_cdf(weights, u)
        return token, kept[token] - top - jnp.log(jnp.sum(weights))

    token, sample_logprob = jax.lax.cond(knobs.temperature <= 0.0, greedy, sampled, logits)
    return token, logits[token] - jax.nn.logsumexp(logits), sample_logprob


def keep_top(logits: jax.Array, knobs: Knobs) -> jax.Array:
    """Returns logits [V] with what top-k, then top-p (of what top-k left) remove set to a large negative number.

    Top-p keeps the smallest set of most probable tokens whose mass reaches p; ties with the last one kept stay.
    """
    order = jnp.sort(logits, descending=True)
    rank = jnp.arange(logits.shape[0])
    by_k = jnp.where((knobs.top_k > 0) & (rank >= knobs.top_k), NEG, order)
    probs = jax.nn.softmax(by_k)
    before = jnp.cumsum(probs) - probs
    kept = (by_k > NEG / 2) & ((before < knobs.top_p) | (knobs.top_p >= 1) | (rank == 0))
    threshold = jnp.min(jnp.where(kept, order, jnp.inf))
    return jnp.where(logits >= threshold, logits, NEG)


def invert_cdf(weights: jax.Array, u: jax.Array) -> jax.Array:
    """Returns i with probability weights[i] / sum(weights), for non-negative weights [V] and u uniform in [0, 1).

    Two levels (blocks, then inside the block) keep the running sums short, hence exact enough for 100,000 ids.
    """
    size = weights.shape[0]
    blocks = jnp.pad(weights, (0, -size % BLOCK)).reshape(-1, BLOCK)
    masses = jnp.sum(blocks, axis=1)
    sums = jnp.cumsum(masses)
    target = u * sums[-1]
    b = _first_above(sums, target, masses)
    rest = target - jnp.where(b > 0, sums[b - 1], 0.0)
    return (b * BLOCK + _first_above(jnp.cumsum(blocks[b]), rest, blocks[b])).astype(jnp.int32)


def _first_above(sums: jax.Array, target: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the first index with mass whose running sum exceeds the target; the last one with mass if none does.

    Running sums are added up as a tree: in the last bit they may rise, or fall, where the weight is 0. Hence the look
    at the weights.
    """
    some = weights > 0
    hit = some & (sums > target)
    return jnp.where(jnp.any(hit), jnp.argmax(hit), weights.shape[0] - 1 - jnp.argmax(some[::-1]))
