"""Per-token effect of thoughts, for evaluation, diagnostics and the viewer."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat

from qstar.mesh import mesh_jit
from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.models.vocabulary import token_logprobs
from qstar.thoughts import forward, layout, rollout
from qstar.thoughts.chunked_replay import replay_states
from qstar.thoughts.loss import rewards
from qstar.types import Batch, Params


class Scores(NamedTuple):
    """Scores of the token after each position (float32 unless said otherwise); P thoughts per position, M positions."""

    base_nll: jax.Array  # [B, M] in nats, without a thought
    base_hit: jax.Array  # [B, M] bool: no token is more probable
    nll: jax.Array  # [B, P, M] with a thought mixed in
    hit: jax.Array  # [B, P, M] bool
    reward: jax.Array  # [B, P, M] over all A talk tokens
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
    positions: jax.Array | None = None,
) -> Scores:
    """Samples thoughts at positions of every row, and scores the token after each position with and without them.

    Args:
      params: a decoder's tree with `thoughts` and `mixing`; config: with `thoughts`. batch: rows [B, N].
      temperature: of the thoughts; 0 is greedy.
      thoughts: [B, P, M, S] to score in place of sampled ones (controls).
      positions: [B, M] int32; None: all but the last, M = N - 1.
    """
    texts = forward.read(params, config, batch)
    if positions is None:
        positions = layout.all_positions(batch, predicting=True)
    positions, order, back = layout.spread(positions, batch.tokens.shape[1])
    if thoughts is None:
        drawn = rollout.sample(params, config, batch, texts, positions, key, passes, temperature)
        thoughts, thought_nll = rearrange(drawn[0], "s b p m -> b p m s"), -reduce(drawn[1], "s b p m -> b p m", "mean")
    else:
        thoughts = thoughts[:, :, order]
        # Given thoughts were not drawn here and have no recorded log-probability: NaN, because 0 would mean certainty.
        thought_nll = jnp.full(thoughts.shape[:3], jnp.nan)
    states = replay_states(params, config, batch, texts, positions, thoughts)
    target_ids, weights = layout.talk_targets(batch, positions, config.required_thoughts.talk_tokens)  # [B, M, A]
    head = decoder.head(params, config)
    # Of all tokens: the reward of a thought is over the A tokens after it.
    base = token_logprobs(texts.hidden[:, :-1], head, batch.tokens[:, 1:])
    here = partial(layout.take_rows, index=positions)
    score_mixed = layout.by_position(lambda hidden, ids: token_logprobs(hidden, head, ids))
    mixed = score_mixed(states.mixed, repeat(target_ids, "b m a -> b p m a", p=thoughts.shape[1]))
    found = Scores(
        base_nll=-here(base.logprobs),
        base_hit=here(base.hits) > 0,
        nll=-mixed.logprobs[..., 0],
        hit=mixed.hits[..., 0] > 0,
        reward=rewards(-base.logprobs, -mixed.logprobs, weights > 0, positions),
        weight=states.weight[..., 0],
        thoughts=thoughts,
        thought_nll=thought_nll,
        counted=weights[..., 0] > 0,
    )
    return Scores(*(x[:, back] if x.ndim == 2 else x[:, :, back] for x in found))


@partial(mesh_jit, static_argnames="config")
def score_text(params: Params, config: ModelConfig, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores the text without thoughts: nll [B, N-1], whether no token is more probable, and `counted`."""
    texts = forward.read(params, config, batch)
    targets, weights = layout.text_targets(batch)
    scores = token_logprobs(texts.hidden[:, :-1], decoder.head(params, config), targets)
    return -scores.logprobs, scores.hits > 0, weights > 0


def random_thoughts(key: jax.Array, config: ModelConfig, shape: tuple[int, ...]) -> jax.Array:
    """Returns int32 ids of the given shape, uniform over those a thought may hold: a control."""
    allowed = np.setdiff1d(np.arange(config.vocab_size), np.asarray(config.required_thoughts.forbidden_ids, np.int64))
    return jnp.asarray(allowed, jnp.int32)[jax.random.randint(key, shape, 0, len(allowed))]
