"""Learning from pairs: DPO, which trains V-STaR's verifier, and Iterative RPO, which trains a generator.

    margin = beta * [(log V(y+|x) - log G(y+|x)) - (log V(y-|x) - log G(y-|x))]
    DPO    = -log sigmoid(margin)                                   arXiv 2305.18290, equation 7; V-STaR, equation 2
    RPO    = DPO + alpha * -log V(y+|x) / |y+|                      arXiv 2404.19733, equation 3

Log-probabilities are sums over the tokens of a completion, EOS included, and those of the reference G are numbers that
were computed once, before the first update.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.train.losses import SumWeight, hidden_states, token_logprobs
from qstar.types import Batch, Metrics, Params, Preference


def dpo_loss(
    params: dict[str, Params],
    batch: Preference,
    rng: jax.Array,
    *,
    config: ModelConfig,
    beta: float = 0.1,
    alpha: float = 0.0,
) -> tuple[SumWeight, Metrics]:
    """Direct preference optimisation; with `alpha`, Iterative RPO (its NLL of the chosen completion, per token).

    Args:
      params: {"policy": ...}, the verifier. batch: packed or not, it is the same loss.
      beta: strength of the pull towards the reference.

    Returns:
      (sum over pairs, number of pairs). Metrics, means over pairs: `loss`, `accuracy` (share with a positive margin; half
      of a tie), `margin` (beta included), `chosen_drift` and `rejected_drift` (log-probability minus the reference's),
      `chosen_logprob`, `rejected_logprob`, and `nll` per token of the chosen one; `tokens`, a count.
    """
    del rng
    sums, lengths = pair_logprobs(params["policy"], config, batch.rows, batch.weight.shape[1])  # [B, P, 2]
    weight = batch.weight
    drift = sums - batch.reference
    margin = beta * (drift[..., 0] - drift[..., 1])
    nll = -sums[..., 0] / jnp.maximum(lengths[..., 0], 1)
    dpo = jax.nn.softplus(-margin)
    total, pairs = jnp.sum(weight * (dpo + alpha * nll)), jnp.sum(weight)
    wins = (margin > 0) + 0.5 * (margin == 0)
    named = {
        "accuracy": wins,
        "margin": margin,
        "chosen_drift": drift[..., 0],
        "rejected_drift": drift[..., 1],
        "chosen_logprob": sums[..., 0],
        "rejected_logprob": sums[..., 1],
        "nll": nll,
    }
    metrics: Metrics = {name: (jnp.sum(weight * x), pairs) for name, x in named.items()}
    return (total, pairs), {"loss": (total, pairs), **metrics, "tokens": (jnp.sum(lengths), jnp.float32(0))}


def pair_logprobs(params: Params, config: ModelConfig, rows: Batch, pairs: int) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of both completions of every pair [B, P, 2], and their numbers of tokens [B, P, 2]."""
    hidden = hidden_states(params, config, rows)
    B, T, E = hidden.shape
    kernel, bias = decoder.head(params, config)
    each = token_logprobs(hidden[:, :-1].reshape(-1, E), kernel, bias, rows.tokens[:, 1:].reshape(-1))
    mask = rows.mask[:, 1:]
    add = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=2 * pairs + 1))
    ids = rows.segment_ids[:, 1:]
    sums, lengths = add(jnp.where(mask > 0, each.reshape(B, T - 1), 0.0), ids), add(mask, ids)
    return sums[:, 1:].reshape(B, pairs, 2), lengths[:, 1:].reshape(B, pairs, 2)
