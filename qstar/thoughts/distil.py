"""A student that does not think, from a teacher that does (Fast Quiet-STaR, arXiv 2505.17746, its last stage).

The paper's stage rewards the student where it beats the teacher's likelihood; its code draws the rewarded token from the
student. Here the student learns the teacher's whole prediction (forward KL on the mixed distribution, averaged over the
thoughts), beside the text itself: the usual distillation, which needs no reward scale.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.thoughts import forward, layout, rollout
from qstar.thoughts.paths import replay_states
from qstar.train.losses import chunks, hidden_states, sft_loss
from qstar.types import Batch, Metrics, Params


def student_loss(
    params: dict[str, Params], batch: Batch, rng: jax.Array, *, config: ModelConfig, teacher: ModelConfig, weight: float
) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
    """Returns (sum, weight) of NLL(text) + `weight` * KL(teacher with thoughts, student), and metrics.

    Args:
      params: {"policy": the student's, "teacher": a decoder's tree with `thoughts` and `mixing`, which does not train}.
      config: the student's. teacher: the teacher's, with `thoughts`. batch: rows [B, N].
    """
    teacher_params = jax.lax.stop_gradient(params["teacher"])
    positions = layout.all_positions(batch, predicting=True)
    texts = forward.read(teacher_params, teacher, batch)
    thoughts = jnp.moveaxis(rollout.sample(teacher_params, teacher, batch, texts, positions, rng)[0], 0, 3)
    mixed = replay_states(teacher_params, teacher, batch, texts, positions, thoughts).mixed[..., 0, :]  # [B, P, N-1, E]
    _, weights = layout.text_targets(batch)
    text = batch.replace(mask=jnp.pad(weights, ((0, 0), (1, 0))))  # both terms are over the same tokens
    (nll, count), metrics = sft_loss(params, text, rng, config=config)
    hidden = hidden_states(params["policy"], config, batch)[:, :-1]
    divergence = _divergence(params["policy"], teacher_params, config, teacher, hidden, mixed, weights)
    metrics["divergence"] = (divergence, count)
    metrics["loss"] = (nll + weight * divergence, count)
    return (nll + weight * divergence, count), metrics


def _divergence(policy, teacher_params, config, teacher, hidden, mixed, weights) -> jax.Array:
    """Weighted sum of KL(teacher, student) over positions; logits exist a chunk at a time."""
    P = mixed.shape[1]

    @jax.checkpoint
    def body(total: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        student, w, *states = xs
        logp = jax.nn.log_softmax(decoder.unembed(policy, config, student))
        p = sum(jax.nn.softmax(decoder.unembed(teacher_params, teacher, s)) for s in states) / P
        return total + jnp.sum(w * jnp.sum(p * (jnp.log(jnp.maximum(p, 1e-30)) - logp), axis=-1)), None

    E = hidden.shape[-1]
    flat = (hidden.reshape(-1, E), weights.reshape(-1), *(mixed[:, i].reshape(-1, E) for i in range(P)))
    return jax.lax.scan(body, jnp.float32(0), chunks(flat, config.vocab_size))[0]
