"""Distillation of a model that thinks into one that does not (Fast Quiet-STaR, arXiv 2505.17746, its last stage).

The paper's stage rewards the student where its likelihood exceeds the teacher's. Here the student learns the teacher's
mixed distribution, averaged over the thoughts (forward KL), and the text itself, which needs no reward scale.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from qstar.models import decoder, vocabulary
from qstar.models.config import ModelConfig
from qstar.thoughts import forward, layout, rollout
from qstar.thoughts.chunked_replay import replay_states
from qstar.train.losses import SumWeight, hidden_states, likelihood
from qstar.types import Batch, Metrics, Params


def student_loss(
    params: dict[str, Params], batch: Batch, rng: jax.Array, *, config: ModelConfig, teacher: ModelConfig, weight: float
) -> tuple[SumWeight, Metrics]:
    """Returns (sum, weight) of NLL(text) + `weight` * KL(teacher with thoughts, student), and metrics.

    Args:
      params: {"policy": the student's, "teacher": a decoder's tree with `thoughts` and `mixing`, which does not train}.
      config: the student's. teacher: the teacher's, with `thoughts`. batch: rows [B, N].
    """
    frozen = jax.lax.stop_gradient(params["teacher"])
    positions = layout.all_positions(batch, predicting=True)
    positions, _, back = layout.spread(positions, batch.tokens.shape[1])
    texts = forward.read(frozen, teacher, batch)
    thoughts = rearrange(rollout.sample(frozen, teacher, batch, texts, positions, rng)[0], "s b p m -> b p m s")
    mixed = replay_states(frozen, teacher, batch, texts, positions, thoughts).mixed[..., 0, :]
    mixed = mixed[:, :, back]  # [B, P, N-1, D]
    _, weights = layout.text_targets(batch)
    # Both terms are over the same tokens, so they share one weight; and over the same states, computed once.
    hidden = hidden_states(params["policy"], config, batch)[:, :-1]
    (nll, count), metrics = likelihood(params["policy"], config, hidden, batch.tokens[:, 1:], weights)
    student_head, teacher_head = decoder.head(params["policy"], config), decoder.head(frozen, teacher)

    def divergence(hidden: jax.Array, mixed: jax.Array) -> jax.Array:
        log_q = vocabulary.log_distribution(hidden, student_head)
        # The teacher's prediction is the mean of the distributions, not of the logits, over its P thoughts.
        total = sum(jax.nn.softmax(vocabulary.head_logits(mixed[:, i], *teacher_head)) for i in range(mixed.shape[1]))
        p = total / mixed.shape[1]
        # A probability that underflowed to 0 adds 0 * log(1e-30) = 0, where 0 * log(0) is NaN.
        return jnp.sum(p * (jnp.log(jnp.maximum(p, 1e-30)) - log_q), axis=-1)

    mixed = rearrange(mixed, "b p n d -> b n p d")
    kl = jnp.sum(weights * vocabulary.map_chunks(divergence, hidden, mixed, vocab_size=config.vocab_size))
    total = nll + weight * kl
    metrics |= {"divergence": (kl, count), "loss": (total, count)}
    return (total, count), metrics
