"""Losses of verifiers: DPO on pairs of solutions (V-STaR), Iterative RPO, and a value head (ORM, PRM).

    margin = beta * [(log V(y+|x) - log G(y+|x)) - (log V(y-|x) - log G(y-|x))]
    DPO    = -log sigmoid(margin)                                   arXiv 2305.18290, equation 7; V-STaR, equation 2
    RPO    = DPO + alpha * -log V(y+|x) / |y+|                      arXiv 2404.19733, equation 3

    ORM  at every token t of a completion y:  BCE(sigmoid(w . h_t + b), [y is right])       arXiv 2110.14168, section 4
    PRM  at the last token of every step s:   BCE(sigmoid(w . h_s + b), [all up to s are right])  2305.20050, 2312.08935
    the mean over scored tokens, plus lambda * the mean over tokens of the language-modelling loss of right solutions

Log-probabilities are sums over the tokens of a completion, EOS included; those of the reference G are computed once,
before the first update. The score of an ORM is that of the last token; of a PRM, the minimum or product over steps.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.models.heads import value_logits
from qstar.models.vocabulary import token_logprobs
from qstar.train.losses import SumWeight, hidden_states, token_nll
from qstar.types import Batch, Graded, Metrics, Params, Preference


def dpo_loss(
    params: dict[str, Params],
    batch: Preference,
    rng: jax.Array,
    *,
    config: ModelConfig,
    beta: float = 0.1,
    alpha: float = 0.0,
) -> tuple[SumWeight, Metrics]:
    """DPO; with `alpha`, Iterative RPO, which adds the NLL of the chosen completion per token.

    Args:
      params: {"policy": ...}, the verifier. batch: packed or not, with the same loss.
      beta: strength of the KL penalty towards the reference.

    Returns:
      (sum over pairs, number of pairs). Metrics are means over pairs; `margin` includes beta, `nll` is per token.
    """
    del rng
    sums, lengths = pair_logprobs(params["policy"], config, batch.rows, batch.weight.shape[1])  # [B, X, 2]
    weight = batch.weight
    log_ratio = sums - batch.reference
    margin = beta * (log_ratio[..., 0] - log_ratio[..., 1])
    # A slot without a pair has no token, and weight 0: the divisor 1 avoids 0 / 0, which weight 0 would not remove.
    nll = -sums[..., 0] / jnp.maximum(lengths[..., 0], 1)
    # -log sigmoid(margin); as softplus it does not overflow where the margin is very negative.
    dpo = jax.nn.softplus(-margin)
    total, pairs = jnp.sum(weight * (dpo + alpha * nll)), jnp.sum(weight)
    # Before the first update policy and reference agree, so every margin is 0: half a win is the chance level.
    wins = (margin > 0) + 0.5 * (margin == 0)
    named = {
        "accuracy": wins,
        "margin": margin,
        "chosen_logratio": log_ratio[..., 0],
        "rejected_logratio": log_ratio[..., 1],
        "chosen_logprob": sums[..., 0],
        "rejected_logprob": sums[..., 1],
        "nll": nll,
    }
    metrics: Metrics = {name: (jnp.sum(weight * x), pairs) for name, x in named.items()}
    return (total, pairs), {"loss": (total, pairs), **metrics, "tokens": (jnp.sum(lengths), jnp.float32(0))}


def pair_logprobs(params: Params, config: ModelConfig, rows: Batch, pairs: int) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of both completions of every pair, and their numbers of tokens, each [B, X, 2]."""
    hidden = hidden_states(params, config, rows)[:, :-1]
    mask, ids = rows.mask[:, 1:], rows.segment_ids[:, 1:]
    logprobs = token_logprobs(hidden, decoder.head(params, config), rows.tokens[:, 1:], read=mask).logprobs
    add = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=2 * pairs + 1))
    # Segment 0 is padding; 2x + 1 and 2x + 2 are the completions of pair x.
    sums, lengths = add(jnp.where(mask > 0, logprobs, 0.0), ids), add(mask, ids)

    def by_pair(x: jax.Array) -> jax.Array:
        return rearrange(x[:, 1:], "b (x pair) -> b x pair", pair=2)

    return by_pair(sums), by_pair(lengths)


def value_loss(
    params: dict[str, Params],
    batch: Graded,
    rng: jax.Array,
    *,
    config: ModelConfig,
    lm_weight: float = 0.1,
    dropout: float = 0.0,
) -> tuple[SumWeight, Metrics]:
    """Binary cross-entropy of the value head at the tokens of `batch.weight`, plus lm_weight * NLL of `rows.mask`.

    Args:
      params: {"policy": ...}, of a `config` with a value head. rng: of the dropout.
      dropout: share of the head's inputs that are set to 0 (and the others scaled up) in training.
    """
    policy = params["policy"]
    hidden = hidden_states(policy, config, batch.rows)
    inputs = hidden
    # Cobbe et al. drop out 20% of the residual stream; here it is on the input of the head.
    if dropout:
        kept = jax.random.bernoulli(rng, 1 - dropout, hidden.shape)
        inputs = jnp.where(kept, hidden / (1 - dropout), 0)
    logits = value_logits(policy, inputs)
    # Cobbe et al. take a squared error; cross-entropy is the usual form. From logits, where log(sigmoid) would be -inf.
    bce = jax.nn.softplus(logits) - batch.labels * logits
    count, bce_sum = jnp.sum(batch.weight), jnp.sum(batch.weight * bce)
    hits = jnp.sum(batch.weight * ((logits > 0) == (batch.labels > 0.5)))
    learnt, nll = batch.rows.mask[:, 1:], jnp.float32(0)
    if lm_weight:
        targets = batch.rows.tokens[:, 1:]
        nll, _, _ = token_nll(hidden[:, :-1], decoder.head(policy, config), targets, learnt, skip=True)
    # Both terms are means over their own tokens, so that lm_weight means the same for an ORM, which scores every token,
    # and for a PRM, which scores one per step.
    # The sum has one divisor, the scored tokens. `lm_scale`, a ratio of counts over all data, brings the NLL to it, so
    # that the update is the same however a batch is split into micro-batches.
    scale = count / jnp.maximum(jnp.sum(learnt), 1.0) if batch.lm_scale is None else batch.lm_scale[0]
    total = bce_sum + lm_weight * scale * nll
    metrics: Metrics = {
        "loss": (total, count),
        "bce": (bce_sum, count),
        "accuracy": (hits, count),
        "lm_nll": (nll, jnp.sum(learnt)),
        "tokens": (count, jnp.float32(0)),
    }
    return (total, count), metrics
