"""Distillation on responses: the likelihood of a teacher's text, or a divergence from its prediction at every token.

    hard          -log q(y)                              y is the teacher's, kept if its answer was right (2404.03414)
    forward_kl    KL(p, q), p the teacher                covers the teacher's modes; y from anywhere
    reverse_kl    KL(q, p)                               seeks one of them (2306.08543)
    jsd           b KL(p, m) + (1 - b) KL(q, m), m = b p + (1 - b) q      GKD (2306.13649); b = 0 is forward, 1 reverse

Soft losses are times T^2, as Hinton's (1503.02531), and may be mixed with the hard one. Whether y was written by the
teacher or by the student itself (GKD, on-policy distillation) is the caller's choice (`methods.distillation`).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from qstar.errors import Settings, bounded, require
from qstar.models import decoder, scoring
from qstar.models.scores import NEG
from qstar.models.vocabulary import log_distribution, map_chunks, token_logprobs
from qstar.train.losses import SumWeight
from qstar.types import Metrics, Params, Responses

KINDS = ("hard", "forward_kl", "reverse_kl", "jsd")


@dataclasses.dataclass(frozen=True)
class DistilSettings(Settings):
    """The loss, and whose text it is on. A config's `distil` section. Hashable: static under `jit`."""

    kind: str = bounded("hard", choices=KINDS)
    beta: float = bounded(0.5, ge=0, le=1)  # of `jsd`
    temperature: float = bounded(1.0, gt=0)  # softens both predictions of a soft loss
    soft_share: float = bounded(1.0, ge=0, le=1)  # of a soft loss; the rest is the hard one, on the same text
    on_policy: float = bounded(0.0, ge=0, le=1)  # share of the steps on the student's own text (soft losses only)

    def __post_init__(self):
        super().__post_init__()
        soft = self.kind != "hard" or self.on_policy == 0
        require((soft, f"on_policy={self.on_policy} needs a soft loss: a student's own text is no target to imitate"))


class Lesson(Responses):
    """Responses to learn from, and the teacher's own prompts (which may show the answer, or ask for more)."""

    teacher_prompt: jax.Array  # [B, C] int32
    teacher_mask: jax.Array  # [B, C] int32


def divergence(log_p: jax.Array, log_q: jax.Array, kind: str, beta: float = 0.5) -> jax.Array:
    """Returns the divergence [...] in nats of student q from teacher p, log-probabilities [..., V] float32."""
    if kind == "forward_kl" or kind == "jsd" and beta == 0.0:
        return _kl(log_p, log_q)
    if kind == "reverse_kl" or kind == "jsd" and beta == 1.0:
        return _kl(log_q, log_p)
    # At the ends log(0) would raise; there the two KLs are the limits of the divergence scaled by 1 / b or 1 / (1 - b).
    log_m = jnp.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    real = log_a > NEG / 2  # ids that cannot be drawn have no mass, and 0 log 0 is 0
    return jnp.sum(jnp.where(real, jnp.exp(log_a) * (log_a - jnp.where(real, log_b, 0.0)), 0.0), axis=-1)


def distil_loss(
    params: dict[str, Params],
    batch: Lesson,
    rng: jax.Array,
    *,
    config: scoring.AnyConfig,
    teacher: scoring.AnyConfig,
    settings: DistilSettings,
    limit: int,
) -> tuple[SumWeight, Metrics]:
    """Sum over the response tokens of the loss that `settings.kind` names, and their number.

    Args: params: {"policy": the student's, "teacher": for the soft losses}. limit: ids from here on have no text.
    """
    del rng
    s, mask = settings, batch.mask
    states = scoring.response_states(params["policy"], config, batch.prompt, batch.prompt_mask, batch.response)
    head = decoder.head(params["policy"], config)
    logprobs, _, entropy = token_logprobs(states, head, batch.response, limit=limit, entropy=True)
    nll = -jnp.sum(jnp.where(mask > 0, logprobs * mask, 0.0))
    weight = jnp.sum(mask)
    metrics = {"nll": (nll, weight), "entropy": (jnp.sum(entropy * mask), weight)}
    total = nll
    if s.kind != "hard":
        # For callers that differentiate all roles.
        frozen = jax.lax.stop_gradient(params["teacher"])
        theirs = batch.teacher_prompt, batch.teacher_mask
        teacher_states = scoring.response_states(frozen, teacher, *theirs, batch.response)
        teacher_head = decoder.head(frozen, teacher)

        def soft_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
            log_q = log_distribution(student, head, temperature=s.temperature, limit=limit)
            log_p = log_distribution(teacher, teacher_head, temperature=s.temperature, limit=limit)
            return divergence(log_p, log_q, s.kind, s.beta)

        each = map_chunks(soft_loss, states, teacher_states, vocab_size=config.vocab_size)
        soft = jnp.sum(jnp.where(mask > 0, each * mask, 0.0))
        metrics["divergence"] = (soft, weight)
        # Gradients of a soft loss fall as 1 / T^2: the factor keeps its share when T changes (1503.02531, section 2).
        total = s.soft_share * s.temperature**2 * soft + (1.0 - s.soft_share) * nll
    metrics |= {"loss": (total, weight), "tokens": (weight, jnp.float32(0))}
    return (total, weight), metrics
