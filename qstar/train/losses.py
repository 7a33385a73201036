"""Supervised losses. Each returns `(sum, weight), metrics`, all sums with weights, which only `step.py` divides.

So the normalisation is exact: one batch of 32, four accumulated batches of 8 and eight devices give the same update.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qstar.mesh import constrain, map_rows
from qstar.models import decoder, scoring, vocabulary
from qstar.models.attention import causal_mask, precision
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.layers import project
from qstar.models.vocabulary import Head
from qstar.types import Batch, Metrics, Params, Responses

SumWeight = tuple[jax.Array, jax.Array]


def nonzero(weight: jax.Array) -> jax.Array:
    """Returns a divisor: 1 in place of 0, so that sums over no token are 0, not NaN."""
    return jnp.where(weight > 0, weight, 1.0)


def sft_loss(
    params: dict[str, Params],
    batch: Batch,
    rng: jax.Array,
    *,
    config: ModelConfig,
    z_loss: float = 0.0,
    one_text: bool = False,
) -> tuple[SumWeight, Metrics]:
    """Negative log-likelihood of the tokens of `batch.mask` (STaR: the completions, EOS included).

    Args:
      params: {"policy": ...}. batch: rows [B, T]; the mask is on the token to be predicted.
      z_loss: weight of log(Z)^2 per token (STaR's release trains with 1e-4).
      one_text: rows hold one document each, padded on the right: the masks that cuDNN's attention supports.
    """
    del rng
    hidden = hidden_states(params["policy"], config, batch, one_text)[:, :-1]
    return likelihood(params["policy"], config, hidden, batch.tokens[:, 1:], batch.mask[:, 1:], z_loss)


def response_loss(
    params: dict[str, Params], batch: Responses, rng: jax.Array, *, config: EncDecConfig, z_loss: float = 0.0
) -> tuple[SumWeight, Metrics]:
    """`sft_loss` of an encoder-decoder: the likelihood of the responses, given the encoded prompts."""
    del rng
    p = params["policy"]
    states = scoring.response_states(p, config, batch.prompt, batch.prompt_mask, batch.response)
    return likelihood(p, config, states, batch.response, batch.mask, z_loss)


def likelihood(
    params: Params, config: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float = 0.0
) -> tuple[SumWeight, Metrics]:
    """Returns (sum, weight) of the targets' [B, T] negative log-likelihood given the final states [B, T, D], and metrics."""
    nll, hits, _ = token_nll(hidden, decoder.head(params, config), targets, weights, z_loss, skip=True)
    weight = jnp.sum(weights)
    count = (weight, jnp.float32(0))  # weight 0: not divided, so accumulated micro-batches add up
    return (nll, weight), {"loss": (nll, weight), "accuracy": (hits, weight), "tokens": count}


def hidden_states(params: Params, config: ModelConfig, batch: Batch, one_text: bool = False) -> jax.Array:
    """Returns the decoder's final states [B, T, D] of a batch, packed or not (`one_text`)."""

    def one(tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        mask = causal_mask(config, segment_ids, one_text=one_text, must=True)
        return decoder.forward(params, config, tokens, positions, mask)[0]

    return map_rows(one)(batch.tokens, batch.positions, batch.segment_ids)


def token_nll(
    hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array, z_loss: float = 0.0, skip: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sum of -log softmax(hidden @ kernel + bias)[target], and of the greedy hits.

    In plain terms, with gradients through the first sum alone:

        scores = vocabulary.token_logprobs(hidden, head, targets)
        return jnp.sum(-weights * scores.logprobs), jnp.sum(weights * scores.hits), -scores.logprobs

    Args:
      hidden: [..., D]. head: see `decoder.head`. targets: [...] int32.
      weights: [...] float32, constants. z_loss: weight of log(Z)^2, added to the first sum.
      skip: do not compute the logits of tokens of weight 0, as far as whole chunks hold no other; their NLL is then 0.

    Returns:
      (sum of weight * nll, sum of weight * hit, every token's nll [...], a constant), float32.
    """
    # The cotangents of a weighted sum are known in the forward pass, so it computes the gradient as well, while the
    # logits of a chunk exist: three products with the kernel, where recomputing the logits takes four (13% of a
    # Quiet-STaR step at 32,002 ids, 3% at 512, on a CPU).
    kernel, bias, cap = Head(*head)
    bias = jnp.zeros((kernel.shape[1],), jnp.float32) if bias is None else bias
    flat = rearrange(hidden, "... d -> (...) d"), targets.reshape(-1), jax.lax.stop_gradient(weights.reshape(-1))
    nll, hits, each = _token_nll(flat[0], kernel, bias, *flat[1:], z_loss, cap, skip)
    return nll, hits, jax.lax.stop_gradient(each.reshape(targets.shape))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _token_nll(hidden, kernel, bias, targets, weights, z_loss, cap, skip):
    # XLA drops the gradient, which nothing reads.
    return _forward(hidden, kernel, bias, targets, weights, z_loss, cap, skip)[0]


def _forward(hidden, kernel, bias, targets, weights, z_loss, cap, skip):
    low, exact = vocabulary.gathered_kernel(kernel, hidden.dtype), precision(hidden.dtype)

    def body(carry, xs):
        nll_sum, hit_sum, d_kernel, d_bias = carry
        h, t, w = xs
        logits = vocabulary.head_logits(h, low, bias, cap)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        logz = top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))
        picked = jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0]
        nll_sum += jnp.sum(w * (logz - picked + z_loss * jnp.square(logz)))
        # Not argmax, which is another pass over the logits: the maximum is at hand.
        hit_sum += jnp.sum(w * (picked >= top).astype(jnp.float32))
        d_logits = jnp.exp(logits - logz[:, None]) * (w * (1 + 2 * z_loss * logz))[:, None]
        # A comparison selects the target's logit: no one-hot array, and no scatter.
        d_logits = jnp.where(jnp.arange(logits.shape[1]) == t[:, None], d_logits - w[:, None], d_logits)
        d_bias = d_bias + jnp.sum(d_logits, axis=0)
        if cap is not None:  # d c tanh(x / c) = (1 - tanh(x / c)^2) dx; the bias is added after the cap
            d_logits = d_logits * (1 - jnp.square((logits - bias) / cap))
        # Products in the compute dtype, but their sum over chunks in float32, where small terms are not lost.
        d_low = d_logits.astype(h.dtype)
        d_hidden = project(d_low, low, transposed=True)
        d_kernel += jnp.matmul(h.T, d_low, precision=exact, preferred_element_type=jnp.float32)
        # Sharded like the kernel: no device carries the whole float32 gradient through the scan.
        d_kernel = constrain(d_kernel, ("embed", "vocab"))
        return (nll_sum, hit_sum, d_kernel, d_bias), (d_hidden, logz - picked)

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32))
    order = vocabulary.read_first(weights) if skip else None
    xs = vocabulary.chunks((hidden, targets, weights), kernel.shape[1], order)

    def skipping(carry, xs):
        nothing = carry, (jnp.zeros_like(xs[0]), jnp.zeros_like(xs[2]))
        return jax.lax.cond(jnp.any(xs[2] != 0), lambda: body(carry, xs), lambda: nothing)

    (nll, hits, d_kernel, d_bias), outs = jax.lax.scan(body if order is None else skipping, start, xs)
    d_hidden, each = (vocabulary.unchunk(x, hidden.shape[0], order) for x in outs)
    return (nll, hits, each), (d_hidden, d_kernel.astype(kernel.dtype), d_bias.astype(bias.dtype), targets, weights)


def _backward(z_loss, cap, skip, saved, cotangents):
    del z_loss, cap, skip
    d_hidden, d_kernel, d_bias, targets, weights = saved
    # Only the first sum has a gradient: it is linear in its cotangent, a factor. JAX wants float0 for integers.
    g = cotangents[0]
    return (
        d_hidden * g.astype(d_hidden.dtype),
        d_kernel * g.astype(d_kernel.dtype),
        d_bias * g.astype(d_bias.dtype),
        np.zeros(targets.shape, jax.dtypes.float0),
        jnp.zeros_like(weights),
    )


_token_nll.defvjp(_forward, _backward)
