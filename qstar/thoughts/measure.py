"""Per-token effect of thoughts, for evaluation, diagnostics and the viewer. No logits outlive their chunk."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qstar.mesh import mesh_jit
from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.thoughts import forward, layout, rollout, select
from qstar.thoughts.paths import replay_states
from qstar.train.losses import chunks, unchunk
from qstar.types import Batch, Params


class Scores(NamedTuple):
    """Of the token after each position (float32 unless said otherwise); P thoughts per position, M positions."""

    base_nll: jax.Array  # [B, M] in nats, without a thought
    base_hit: jax.Array  # [B, M] bool: the model's first choice is the token
    entropy: jax.Array  # [B, M] of the prediction without a thought, in nats
    nll: jax.Array  # [B, P, M] with a thought mixed in
    hit: jax.Array  # [B, P, M] bool
    reward: jax.Array  # [B, P, M] over all T talk tokens
    weight: jax.Array  # [B, P, M] of the thought, at the first talk token
    thoughts: jax.Array  # [B, P, M, S] int32
    thought_nll: jax.Array  # [B, P, M] mean over the thought's tokens, as they were drawn; nan for given thoughts
    counted: jax.Array  # [B, M] bool: there is a token to predict


@partial(mesh_jit, static_argnames=("config", "passes"))
def score(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    key: jax.Array,
    *,
    passes: int = 1,
    temperature: jax.Array | float = 1.0,
    thoughts: jax.Array | None = None,
) -> Scores:
    """Thinks at all positions but the last of every row, and scores the token after each.

    Args:
      params: a decoder's tree with `thoughts` and `mixing`; config: with `thoughts`. batch: rows [B, N].
      temperature: of the thoughts; 0 is greedy.
      thoughts: [B, P, N-1, S] to score in place of sampled ones (controls).
    """
    positions = layout.all_positions(batch, predicting=True)  # [B, M]
    texts = forward.read(params, config, batch)
    if thoughts is None:
        drawn = rollout.sample(params, config, batch, texts, positions, key, passes, temperature)
        thought_ids, thought_nll = jnp.moveaxis(drawn[0], 0, 3), -jnp.mean(drawn[1], axis=0)
    else:
        thought_ids, thought_nll = thoughts, jnp.full(thoughts.shape[:3], jnp.nan)
    states = replay_states(params, config, batch, texts, positions, thought_ids)
    target_ids, weights = layout.talk_targets(batch, positions, config.thoughts.talk_tokens)  # [B, M, T]
    base_nll, base_hit = token_scores(params, config, texts.hidden[:, :-1], target_ids[..., 0])
    entropy = select.entropy(params, config, texts.hidden[:, :-1])
    nll, hit = token_scores(
        params, config, states.mixed, jnp.broadcast_to(target_ids[:, None], states.mixed.shape[:-1])
    )
    gain = _later(base_nll, positions, config.thoughts.talk_tokens)[:, None] - nll
    reward = jnp.sum(jnp.where(weights[:, None] > 0, gain, 0.0), axis=-1)
    first = (nll[..., 0], hit[..., 0])
    counted = weights[..., 0] > 0
    return Scores(base_nll, base_hit, entropy, *first, reward, states.weight[..., 0], thought_ids, thought_nll, counted)


@partial(mesh_jit, static_argnames="config")
def score_text(params: Params, config: ModelConfig, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for a model that does not think: nll [B, N-1], hit, counted."""
    texts = forward.read(params, config, batch)
    targets, weights = layout.text_targets(batch)
    return *token_scores(params, config, texts.hidden[:, :-1], targets), weights > 0


def token_scores(
    params: Params, config: ModelConfig, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns nll float32 and whether the target is the first choice, both [...], of states [..., E], a chunk at a time."""

    def some(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = decoder.unembed(params, config, xs[0])
        picked = jnp.take_along_axis(logits, xs[1][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked, picked >= jnp.max(logits, axis=-1)

    flat = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    found = jax.lax.map(some, chunks(flat, config.vocab_size))
    return tuple(unchunk(x, flat[0].shape[0]).reshape(targets.shape) for x in found)


def random_thoughts(key: jax.Array, config: ModelConfig, shape: tuple[int, ...]) -> jax.Array:
    """Returns int32 ids of the given shape, uniform over those a thought may hold: a control."""
    allowed = np.setdiff1d(np.arange(config.vocab_size), np.asarray(config.thoughts.forbidden_ids, np.int64))
    return jnp.asarray(allowed, jnp.int32)[jax.random.randint(key, shape, 0, len(allowed))]


def _later(base_nll: jax.Array, positions: jax.Array, talk_tokens: int) -> jax.Array:
    """Returns base_nll [B, M, T] of the T tokens after each position (clipped at the end of the row)."""
    index = jnp.minimum(positions[..., None] + jnp.arange(talk_tokens), base_nll.shape[1] - 1)
    return jax.vmap(lambda x, at: x[at])(base_nll, index)
