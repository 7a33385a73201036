"""Losses. Each returns `(sum, weight), metrics`, all of them sums with weights: `step.py` alone divides.

So the normalisation is exact: one batch of 32, four accumulated batches of 8 and eight devices give the same update.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.mesh import constrain, count_batch_shards, map_rows
from qstar.models import decoder, scoring
from qstar.models.attention import causal_mask, precision
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.types import Batch, Metrics, Params, Responses

CHUNK_BYTES = (
    8 * 2**20
)  # of float32 logits alive at once per device: fits in a CPU's cache, costs an accelerator nothing
MIN_CHUNK = 512  # tokens: below that the kernel and its gradient would be read and written for too little work

SumWeight = tuple[jax.Array, jax.Array]


def sft_loss(
    params: dict[str, Params],
    batch: Batch,
    rng: jax.Array,
    *,
    config: ModelConfig,
    z_loss: float = 0.0,
    one_text: bool = False,
) -> tuple[SumWeight, Metrics]:
    """Negative log-likelihood of the tokens that `batch.mask` marks (STaR: the completions, EOS included).

    Args:
      params: {"policy": ...}. batch: rows [B, T]; the mask is on the token to be predicted.
      z_loss: weight of log(Z)^2 per token (the release trains with 1e-4; 0 here).
      one_text: rows hold one document each, padded on the right (which cuDNN's attention needs to know).

    Returns:
      (sum of nll, number of tokens), and the metric `accuracy` (teacher-forced greedy hits).
    """
    del rng
    hidden = hidden_states(params["policy"], config, batch, one_text)[:, :-1]
    return _likelihood(params["policy"], config, hidden, batch.tokens[:, 1:], batch.mask[:, 1:], z_loss)


def response_loss(
    params: dict[str, Params], batch: Responses, rng: jax.Array, *, config: EncDecConfig, z_loss: float = 0.0
) -> tuple[SumWeight, Metrics]:
    """`sft_loss` of an encoder-decoder: the likelihood of the responses, given what the encoder reads of the prompts."""
    del rng
    p = params["policy"]
    states = scoring.response_states(p, config, batch.prompt, batch.prompt_mask, batch.response)
    return _likelihood(p, config, states, batch.response, batch.mask, z_loss)


def _likelihood(params, config, hidden, targets, weights, z_loss):
    """Sums of the nll and of the greedy hits of targets [B, T] after hidden states [B, T, E], with their weights."""
    kernel, bias = decoder.head(params, config)
    hidden, targets, weights = hidden.reshape(-1, config.hidden_size), targets.reshape(-1), weights.reshape(-1)
    nll, hits = token_nll(hidden, kernel, bias, targets, weights, z_loss)
    weight = jnp.sum(weights)
    count = (weight, jnp.float32(0))  # weight 0: not divided, so accumulated micro-batches add up
    return (nll, weight), {"loss": (nll, weight), "accuracy": (hits, weight), "tokens": count}


def hidden_states(params: Params, config: ModelConfig, batch: Batch, one_text: bool = False) -> jax.Array:
    """Returns [B, T, E]: the decoder, written for one sequence, over the rows of a batch, packed or not (`one_text`)."""

    def one(tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        mask = causal_mask(config, segment_ids, one_text=one_text, must=True)
        return decoder.forward(params, config, tokens, positions, mask)[0]

    return map_rows(one)(batch.tokens, batch.positions, batch.segment_ids)


# ---------------------------------------------------------------------------------- vocabulary loss in chunks of tokens


def token_nll(
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
) -> SumWeight:
    """Weighted sum of -log softmax(hidden @ kernel + bias)[target], and of the greedy hits.

    The logits exist one chunk of tokens at a time. When a gradient is wanted the forward pass forms it too, chunk by
    chunk while the logits are at hand, so that nothing is computed twice: three products in all, as without chunks.

    Args:
      hidden: [N, E]. kernel: [E, V]. bias: [V] or None. targets: [N] int32. weights: [N] float32 (not differentiated).

    Returns:
      (sum of weight * nll, sum of weight * hit), float32 scalars.
    """
    return scored_nll(hidden, kernel, bias, targets, weights, z_loss)[:2]


def scored_nll(
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Like `token_nll`, and third every token's nll [N] float32: a record, through which no gradient flows."""
    if bias is None:
        bias = jnp.zeros((kernel.shape[1],), jnp.float32)
    nll, hits, each = _token_nll(hidden, kernel, bias, targets, jax.lax.stop_gradient(weights), z_loss)
    return nll, hits, jax.lax.stop_gradient(each)


def token_logprobs(hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array) -> jax.Array:
    """Returns every token's log-probability [N] float32, through which gradients flow.

    For losses that are no sum of them (pairs, ratios). Their cotangents are not known in the forward pass, so the backward
    pass makes the logits of a chunk again: four products where `token_nll` has three.
    """
    if bias is None:
        bias = jnp.zeros((kernel.shape[1],), jnp.float32)

    kernel = _gathered(kernel, hidden.dtype)

    @jax.checkpoint
    def one(xs: Any) -> jax.Array:
        h, t = xs
        logits, _, logz = _logits(h, kernel, bias)
        return jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0] - logz

    each = jax.lax.map(one, chunks((hidden, targets), kernel.shape[1]))
    return unchunk(each, targets.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _token_nll(hidden, kernel, bias, targets, weights, z_loss):
    def body(carry, xs):
        h, t, w = xs
        logits, top, logz = _logits(h, kernel, bias)
        nll, hits, each = _nll(logits, top, logz, t, w, z_loss)
        return (carry[0] + nll, carry[1] + hits), each

    kernel = _gathered(kernel, hidden.dtype)
    zero = jnp.zeros((), jnp.float32)
    (nll, hits), each = jax.lax.scan(body, (zero, zero), chunks((hidden, targets, weights), kernel.shape[1]))
    return nll, hits, unchunk(each, targets.shape[0])


def _forward(hidden, kernel, bias, targets, weights, z_loss):
    """The sums, and the gradients of the first sum (a factor, its cotangent, is applied in `_backward`)."""

    def body(carry, xs):
        nll_sum, hit_sum, d_kernel, d_bias = carry
        h, t, w = xs
        logits, top, logz = _logits(h, low, bias)
        nll, hits, each = _nll(logits, top, logz, t, w, z_loss)
        d_logits = jnp.exp(logits - logz[:, None]) * (w * (1 + 2 * z_loss * logz))[:, None]
        d_logits = jnp.where(jnp.arange(logits.shape[1]) == t[:, None], d_logits - w[:, None], d_logits)
        d_low = d_logits.astype(h.dtype)
        exact = precision(h.dtype)
        d_hidden = jnp.matmul(d_low, low.T, precision=exact)
        d_kernel = d_kernel + jnp.matmul(h.T, d_low, precision=exact, preferred_element_type=jnp.float32)
        d_kernel = constrain(d_kernel, ("embed", "vocab"))
        return (nll_sum + nll, hit_sum + hits, d_kernel, d_bias + jnp.sum(d_logits, axis=0)), (d_hidden, each)

    low = _gathered(kernel, hidden.dtype)
    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32))
    xs = chunks((hidden, targets, weights), kernel.shape[1])
    (nll, hits, d_kernel, d_bias), (d_hidden, each) = jax.lax.scan(body, start, xs)
    d_hidden, each = (unchunk(x, hidden.shape[0]) for x in (d_hidden, each))
    return (nll, hits, each), (d_hidden, d_kernel.astype(kernel.dtype), d_bias.astype(bias.dtype), targets, weights)


def _backward(z_loss, saved, cotangents):
    del z_loss
    d_hidden, d_kernel, d_bias, targets, weights = saved
    g = cotangents[0]
    return (
        d_hidden * g.astype(d_hidden.dtype),
        d_kernel * g.astype(d_kernel.dtype),
        d_bias * g.astype(d_bias.dtype),
        np.zeros(targets.shape, jax.dtypes.float0),
        jnp.zeros_like(weights),
    )


_token_nll.defvjp(_forward, _backward)


def _gathered(kernel: jax.Array, dtype: Any) -> jax.Array:
    """The kernel [E, V] in the compute dtype, all of its rows on every device: once, before the chunks."""
    low = constrain(kernel.astype(dtype), ("embed", "vocab"))  # or it would be gathered first and cast then
    return constrain(low, (None, "vocab"))


def _logits(h, kernel, bias):
    logits = jnp.matmul(h, kernel.astype(h.dtype), precision=precision(h.dtype), preferred_element_type=jnp.float32)
    logits = logits + bias
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    return logits, top, top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))


def _nll(logits, top, logz, targets, weights, z_loss):
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    hits = (picked >= top).astype(jnp.float32)  # not argmax: the maximum is at hand
    nll = logz - picked
    return jnp.sum(weights * (nll + z_loss * jnp.square(logz))), jnp.sum(weights * hits), nll


def chunks(arrays: Any, vocab: int) -> Any:
    """Cuts the token axis [N, ...] into equal chunks [C, n, ...]; what is padded on weighs nothing.

    A chunk takes every C-th token of each device, so that tokens which are split over devices stay split within each chunk.
    """
    N = arrays[0].shape[0]
    parts = count_batch_shards(N)
    own = N // parts
    n = min(own, max(MIN_CHUNK, CHUNK_BYTES // (4 * vocab)))
    count = -(-own // n)
    n = -(-own // count)

    def cut(x: jax.Array) -> jax.Array:
        rest = x.shape[1:]
        padded = jnp.pad(x.reshape(parts, own, *rest), [(0, 0), (0, count * n - own)] + [(0, 0)] * len(rest))
        chunk = jnp.moveaxis(padded.reshape(parts, n, count, *rest), 2, 0).reshape(count, parts * n, *rest)
        return constrain(chunk, (None, "batch") + (None,) * len(rest))

    return jax.tree.map(cut, arrays)


def unchunk(x: jax.Array, count: int) -> jax.Array:
    """Returns [count, ...] from chunks [C, n, ...] of `chunks`."""
    parts, rest = count_batch_shards(count), x.shape[2:]
    x = jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *rest), 0, 2)  # [parts, n, C, ...]
    return x.reshape(parts, -1, *rest)[:, : count // parts].reshape(count, *rest)
