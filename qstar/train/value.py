"""Verifiers with a head: whether a solution is right, judged at every token (ORM) or after every step (PRM).

    ORM  at every token t of a completion y:  BCE(sigmoid(w . h_t + b), [y is right])       arXiv 2110.14168, section 4
    PRM  at the last token of every step s:   BCE(sigmoid(w . h_s + b), [all is right so far])   2305.20050; 2312.08935
    the mean over judged tokens, plus lambda * the mean over tokens of the language-modelling loss of right solutions

Cobbe's verifier has a squared error on its value target and drops out 20% of the residual stream; cross-entropy is the
usual form now, and the dropout here is on what the head reads. The score of an ORM is its judgement at the last token; that
of a PRM is the least, or the product, of its steps'.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.models.heads import value_logits
from qstar.train.losses import SumWeight, hidden_states, token_nll
from qstar.types import Graded, Metrics, Params


def value_loss(
    params: dict[str, Params],
    batch: Graded,
    rng: jax.Array,
    *,
    config: ModelConfig,
    lm_weight: float = 0.1,
    dropout: float = 0.0,
) -> tuple[SumWeight, Metrics]:
    """Binary cross-entropy of the value head where `batch.weight` asks it, plus lm_weight times the NLL of `rows.mask`.

    Both are means over their own tokens, so that lm_weight means the same for an ORM, which judges every token, and for a
    PRM, which judges one per step. The sum that is returned has one divisor, the judged tokens; `batch.lm_scale`, a count
    over all data, brings the NLL to it, so that the update is the same however a batch is cut into micro-batches.

    Args:
      params: {"policy": ...}, of a `config` with a value head. rng: of the dropout.
      dropout: share of the head's inputs that are set to 0 (and the others scaled up) in training.

    Returns:
      (sum, number of judged tokens); metrics `loss`, `bce`, `accuracy` (judged on the right side of 1/2), `lm_nll` per token
      that is learnt, and `tokens`, a count of the judged ones.
    """
    policy = params["policy"]
    hidden = hidden_states(policy, config, batch.rows)
    read = hidden
    if dropout:
        kept = jax.random.bernoulli(rng, 1 - dropout, hidden.shape)
        read = jnp.where(kept, hidden / (1 - dropout), 0)
    logits = value_logits(policy, read)
    bce = jax.nn.softplus(logits) - batch.labels * logits
    asked = jnp.sum(batch.weight)
    judged = jnp.sum(batch.weight * bce)
    hits = jnp.sum(batch.weight * ((logits > 0) == (batch.labels > 0.5)))
    learnt = batch.rows.mask[:, 1:].reshape(-1)
    nll = jnp.float32(0)
    if lm_weight:
        kernel, bias = decoder.head(policy, config)
        targets = batch.rows.tokens[:, 1:].reshape(-1)
        nll, _ = token_nll(hidden[:, :-1].reshape(-1, config.hidden_size), kernel, bias, targets, learnt)
    scale = asked / jnp.maximum(jnp.sum(learnt), 1.0) if batch.lm_scale is None else batch.lm_scale[0]
    total = judged + lm_weight * scale * nll
    metrics: Metrics = {
        "loss": (total, asked),
        "bce": (judged, asked),
        "accuracy": (hits, asked),
        "lm_nll": (nll, jnp.sum(learnt)),
        "tokens": (asked, jnp.float32(0)),
    }
    return (total, asked), metrics
