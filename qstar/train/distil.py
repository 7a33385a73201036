"""Distillation on responses: imitate a teacher's text, or its whole prediction at every token of somebody's text.

    hard          -log q(y)                                     y is the teacher's, kept if its answer was right (2404.03414)
    forward_kl    KL(p, q), p the teacher                       covers the teacher's modes; y from anywhere
    reverse_kl    KL(q, p)                                      seeks one of them (2306.08543)
    jsd           b KL(p, m) + (1 - b) KL(q, m), m = b p + (1 - b) q      GKD (2306.13649); b = 0 is forward, 1 reverse

Soft losses are times T^2, as Hinton's (1503.02531), and may be mixed with the hard one. Whether y was written by the teacher
or by the student itself (GKD, on-policy distillation) is the caller's choice: `methods.distillation` draws it per step.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from qstar.errors import require
from qstar.models import scoring
from qstar.models.attention import NEG
from qstar.types import Metrics, Params, Responses

KINDS = ("hard", "forward_kl", "reverse_kl", "jsd")


@dataclasses.dataclass(frozen=True)
class DistilSettings:
    """What is imitated, and on whose text. A config's `distil` section. Hashable: static under `jit`."""

    kind: str = "hard"
    beta: float = 0.5  # of `jsd`
    temperature: float = 1.0  # softens both predictions of a soft loss
    soft_share: float = 1.0  # of a soft loss; the rest is the hard one, on the same text
    on_policy: float = 0.0  # share of the steps on the student's own text (soft losses only)

    def __post_init__(self):
        shares = {n: getattr(self, n) for n in ("beta", "soft_share", "on_policy")}
        own = self.kind != "hard" or self.on_policy == 0
        require(
            (self.kind in KINDS, f"kind={self.kind!r} is not one of {', '.join(KINDS)}"),
            *((0 <= v <= 1, f"{n}={v} must be in [0, 1]") for n, v in shares.items()),
            (0 < self.temperature < math.inf, f"temperature={self.temperature} must be above 0"),
            (own, f"on_policy={self.on_policy} needs a soft loss: a student's own text is no target to imitate"),
        )


@flax.struct.dataclass
class Lesson(Responses):
    """Responses to learn from. The teacher may read a prompt of its own (one that shows the answer, or asks for more)."""

    teacher_prompt: jax.Array  # [B, Q] int32
    teacher_mask: jax.Array  # [B, Q] int32


def divergence(log_p: jax.Array, log_q: jax.Array, kind: str, beta: float = 0.5) -> jax.Array:
    """Returns the divergence [...] in nats of student q from teacher p, log-probabilities [..., V] float32."""
    if kind == "forward_kl" or kind == "jsd" and beta == 0.0:
        return _kl(log_p, log_q)
    if kind == "reverse_kl" or kind == "jsd" and beta == 1.0:
        return _kl(log_q, log_p)
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
) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
    """Sum over the response tokens of the loss that `settings.kind` names, and their number.

    Args:
      params: {"policy": the student's, "teacher": read by the soft losses alone, and never trained}.
      config, teacher: their shapes; the vocabulary must be one. limit: ids from here on have no text.
    """
    del rng
    s, mask = settings, batch.mask
    states = scoring.response_states(params["policy"], config, batch.prompt, batch.prompt_mask, batch.response)
    logprobs, entropy = scoring.token_scores(params["policy"], config, states, batch.response, limit=limit)
    nll = -jnp.sum(jnp.where(mask > 0, logprobs * mask, 0.0))
    weight = jnp.sum(mask)
    metrics = {"nll": (nll, weight), "entropy": (jnp.sum(entropy * mask), weight)}
    total = nll
    if s.kind != "hard":
        frozen = jax.lax.stop_gradient(params["teacher"])
        teacher_states = scoring.response_states(
            frozen, teacher, batch.teacher_prompt, batch.teacher_mask, batch.response
        )
        soft = _soft(params["policy"], frozen, states, teacher_states, mask, config, teacher, s, limit)
        metrics["divergence"] = (soft, weight)
        total = s.soft_share * s.temperature**2 * soft + (1.0 - s.soft_share) * nll
    metrics |= {"loss": (total, weight), "tokens": (weight, jnp.float32(0))}
    return (total, weight), metrics


def _soft(student, frozen, states, teacher_states, mask, config, teacher, s, limit) -> jax.Array:
    """Sum over tokens of the divergence; one response's logits exist at a time (and are made again for the gradient)."""
    spread = functools.partial(scoring.log_distribution, temperature=s.temperature, limit=limit)

    @jax.checkpoint
    def one(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        mine, theirs, m = xs
        each = divergence(spread(frozen, teacher, theirs), spread(student, config, mine), s.kind, s.beta)
        return total + jnp.sum(jnp.where(m > 0, each * m, 0.0)), None

    return jax.lax.scan(one, jnp.float32(0), (states, teacher_states, mask))[0]
