"""Choice of the positions that think: all, a random part, those of highest entropy, or those of a mask."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.thoughts import layout
from qstar.train.losses import chunks, unchunk
from qstar.types import Batch, Params


def choose(params: Params, config: ModelConfig, batch: Batch, hidden: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the positions [B, M] int32 that think in training, by the config's `think_fraction` and `think_where`.

    Only those which predict a token are of use: M = ceil(fraction * (N - 1)), the same for all rows (shapes are static).

    Args:
      hidden: [B, N, E] final states of the text, for the entropy.
    """
    t = config.thoughts
    if t.think_fraction == 1.0:
        return layout.all_positions(batch, predicting=True)
    _, weights = layout.text_targets(batch)
    if t.think_where == "entropy":
        score = entropy(params, config, hidden[:, :-1])
    else:
        score = jax.random.uniform(key, weights.shape)
    return of_mask(weights > 0, math.ceil(t.think_fraction * weights.shape[1]), score)


def of_mask(mask: jax.Array, count: int, score: jax.Array | None = None) -> jax.Array:
    """Returns `count` positions [B, count] int32 of each row of mask [B, N], in order.

    Those with the highest score [B, N] go first (without one, the first). A row whose mask has fewer fills up with
    positions outside it.
    """
    score = -jnp.arange(mask.shape[1]) + jnp.zeros(mask.shape) if score is None else score
    ranked = jnp.where(mask, score, -jnp.inf)
    return jnp.sort(jax.lax.top_k(ranked, count)[1], axis=1).astype(jnp.int32)


def entropy(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Returns the entropy in nats, float32 [...], of the next-token distributions of states [..., E]; a constant."""

    def some(xs: tuple[jax.Array]) -> jax.Array:
        logp = jax.nn.log_softmax(decoder.unembed(params, config, xs[0]))
        return -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    params, flat = jax.lax.stop_gradient((params, hidden.reshape(-1, hidden.shape[-1])))
    out = jax.lax.map(some, chunks((flat,), config.vocab_size))
    return unchunk(out, flat.shape[0]).reshape(hidden.shape[:-1])
