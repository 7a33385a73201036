"""The output projection and what is computed from its logits, a chunk of tokens at a time.

Fine-tuning, scoring, thoughts, RL and distillation get logits here: no large array [B, T, V] exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from qstar.mesh import constrain, count_batch_shards
from qstar.models.attention import precision
from qstar.models.scores import NEG, soft_cap

# Bytes of float32 logits that exist at a time on a device: they fit in a CPU's cache; accelerators lose nothing by it.
CHUNK_BYTES = 8 * 2**20
# Tokens: with fewer, reading and writing the kernel and its gradient costs more than the products.
MIN_CHUNK = 512
LEAST_CHUNKS, LEAST_TOKENS = 4, 128  # if chunks can be skipped: so many, of so many tokens each


class Head(NamedTuple):
    """The output projection: logits of a state h are c tanh(h W / c) + b, or h W + b without a soft cap c."""

    kernel: jax.Array  # W [D, V]
    bias: jax.Array | None = None  # b [V]
    cap: float | None = None


class TokenScores(NamedTuple):
    """Scores of every token, float32 of the targets' shape."""

    logprobs: jax.Array
    hits: jax.Array  # 1 where no id is more probable than the target
    entropy: Any  # of the distribution that the token is scored under, in nats; None if not asked for


def token_logprobs(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    limit: int | None = None,
    entropy: bool = False,
    read: jax.Array | None = None,
) -> TokenScores:
    """Scores targets int32 [...] under the distributions that states [..., D] predict; gradients flow.

    For scoring and for losses like DPO's; for a weighted sum of log-probabilities `train.losses.token_nll` is faster.

    Args:
      head: see `decoder.head`.
      temperature, limit: see `log_distribution`. read: see `map_chunks`.
    """
    kernel = head[0]
    # Rounded as it is multiplied, but kept in its own dtype: the chunks' gradients add up in float32.
    head = Head(gathered_kernel(kernel, hidden.dtype).astype(kernel.dtype), *head[1:])

    def score(hidden: jax.Array, targets: jax.Array) -> TokenScores:
        logits = _limited(head_logits(hidden, *head) / temperature, limit)
        # Without the entropy, log Z is enough, and no array of log-probabilities is needed.
        logp = jax.nn.log_softmax(logits) if entropy else logits
        chosen = jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
        hits = (chosen >= jnp.max(logp, axis=-1)).astype(jnp.float32)
        if not entropy:
            # The maximum cancels out of log Z, so no gradient needs to flow through it.
            top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
            logz = top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))
            return TokenScores(chosen - logz, hits, None)
        return TokenScores(chosen, hits, -jnp.sum(jnp.where(logp > NEG / 2, jnp.exp(logp) * logp, 0.0), axis=-1))

    # The batches of RL are small: where one chunk holds them, its logits are kept, which saves a product.
    return map_chunks(score, hidden, targets, vocab_size=kernel.shape[1], keep_one=entropy, read=read)


def log_distribution(hidden: jax.Array, head: Head, *, temperature: float = 1.0, limit: int | None = None) -> jax.Array:
    """Returns log-probabilities float32 [..., V] after states [..., D], at a temperature, over ids below `limit`."""
    # Ids from `limit` on (a vocabulary padded beyond its tokenizer) are never drawn: scores are of what was sampled.
    return jax.nn.log_softmax(_limited(head_logits(hidden, *head) / temperature, limit))


def _limited(logits: jax.Array, limit: int | None) -> jax.Array:
    if limit is None or limit >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, NEG)


def head_logits(
    hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, cap: float | None = None
) -> jax.Array:
    """Returns logits float32 [..., V]: products in the dtype of the states, sums in float32."""
    exact = precision(hidden.dtype)
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), precision=exact, preferred_element_type=jnp.float32)
    logits = soft_cap(logits, cap)
    return logits if bias is None else logits + bias.astype(jnp.float32)


def gathered_kernel(kernel: jax.Array, dtype: Any) -> jax.Array:
    """Returns the head's kernel [D, V] in the compute dtype, all rows on every device: once, before the chunks."""
    # Cast before it is gathered: half the bytes between devices in bfloat16.
    low = constrain(kernel.astype(dtype), ("embed", "vocab"))
    return constrain(low, (None, "vocab"))


def map_chunks(
    f: Callable[..., Any],
    hidden: jax.Array,
    *arrays: jax.Array,
    vocab_size: int,
    keep_one: bool = False,
    read: jax.Array | None = None,
) -> Any:
    """Returns f(hidden [n, D], *arrays [n, ...]), whose results lead with n, over a chunk of tokens at a time.

    Args:
      hidden: [..., D]. arrays: with the same leading axes, which the results have, too.
      keep_one: do not compute the logits of a lone chunk again in the backward pass.
      read: [...] 0 for tokens whose results are not read: whole chunks of them are not computed, and give 0.
    """
    lead = hidden.shape[:-1]
    flat = [x.reshape(-1, *x.shape[len(lead) :]) for x in (hidden, *arrays, *(() if read is None else (read,)))]
    order = None if read is None else read_first(flat[-1])
    xs, count = chunks(flat, vocab_size, order), 1 + len(arrays)

    def one(xs: Any) -> Any:
        if order is None:
            return f(*xs[:count])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *xs[:count]))
        return jax.lax.cond(jnp.any(xs[-1] != 0), lambda: f(*xs[:count]), lambda: zeros)

    if keep_one and xs[0].shape[0] == 1:
        found = f(*flat[:count])
    else:
        # Logits are computed again in the backward pass: kept for all chunks, they would be the whole [N, V].
        found = jax.lax.map(jax.checkpoint(one), xs)
        found = jax.tree.map(lambda x: unchunk(x, flat[0].shape[0], order), found)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def read_first(read: jax.Array) -> jax.Array | None:
    """Returns an order of tokens [N] that begins with those that are read, so that the last chunks hold none of them."""
    # Prompts and padding are most of a row, and logits a large part of a small model's FLOPs. None where several devices
    # share the tokens: an order of all of them would move states between devices.
    alone = jax.sharding.get_abstract_mesh().size <= 1
    return jnp.argsort(read == 0, stable=True) if alone else None


def chunks(arrays: Any, vocab_size: int, order: jax.Array | None = None) -> Any:
    """Cuts the token axis [N, ...] into equal chunks [C, n, ...]; what is padded on must weigh nothing."""
    # A chunk takes tokens of each device: tokens that are split over devices stay split within each chunk.
    N = arrays[0].shape[0]
    shards = count_batch_shards()
    per_shard = -(-N // shards)
    n = min(per_shard, max(MIN_CHUNK, CHUNK_BYTES // (4 * vocab_size)))
    count = -(-per_shard // n)
    if order is not None:
        count = max(count, min(LEAST_CHUNKS, N // LEAST_TOKENS))
    n = -(-per_shard // count)

    def cut(x: jax.Array) -> jax.Array:
        x = x if order is None else _permuted(jnp.asarray(x), order)
        if N < per_shard * shards:
            x = jnp.pad(x, [(0, per_shard * shards - N)] + [(0, 0)] * (x.ndim - 1))
        x = rearrange(x, "(shard token) ... -> shard token ...", shard=shards)
        x = jnp.pad(x, [(0, 0), (0, count * n - per_shard)] + [(0, 0)] * (x.ndim - 2))
        x = rearrange(x, "shard (chunk token) ... -> chunk (shard token) ...", chunk=count)
        return constrain(x, (None, "batch") + (None,) * (x.ndim - 2))

    return jax.tree.map(cut, arrays)


def unchunk(x: jax.Array, count: int, order: jax.Array | None = None) -> jax.Array:
    """Returns [count, ...] from chunks [C, n, ...] of `chunks`."""
    shards = count_batch_shards()
    x = rearrange(x, "chunk (shard token) ... -> shard (chunk token) ...", shard=shards)
    x = rearrange(x[:, : -(-count // shards)], "shard token ... -> (shard token) ...")[:count]
    return x if order is None else _permuted(x, jnp.argsort(order))


def _permuted(x: jax.Array, order: jax.Array) -> jax.Array:
    # Without the promise, the gradient is a scatter that has to allow for repeated indices.
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")
