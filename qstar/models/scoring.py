"""Common interface of decoders and encoder-decoders: parameters, and the states that predict a response to a prompt.

Training on responses (RL, distillation) is written once, for both: a prompt [P] and a response [R] go in, a state [E] per
response token comes out, and `decoder.unembed` makes logits of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.errors import UserError, require
from qstar.mesh import map_rows, mesh_jit, put_global_batch, to_host
from qstar.models import decoder, encdec
from qstar.models.attention import NEG, causal_mask
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.heads import value_logits
from qstar.models.model import Model, encoder_ids
from qstar.types import Params

AnyConfig = ModelConfig | EncDecConfig
CHUNK_TOKENS = 16_384  # tokens per forward pass of `logprobs`
CHUNK_LOGITS = 2**26  # most logits alive at once there: 256 MiB
MIN_LENGTH = 16  # the shortest length bucket; the others are powers of two
BLOCK_LOGITS = 2**22  # most logits alive at once (16 MiB)
MIN_CHUNK = 64  # tokens, however large the vocabulary is


def init(config: AnyConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters: `encdec.init` or `decoder.init`."""
    return (encdec if isinstance(config, EncDecConfig) else decoder).init(config, key, dtype)


def response_states(
    params: Params, config: AnyConfig, prompt: jax.Array, prompt_mask: jax.Array, response: jax.Array
) -> jax.Array:
    """Returns final states [B, R, E]: row t predicts response token t from the prompt and the response before it.

    Args:
      prompt: [B, P] int32. prompt_mask: [B, P], 1 for real tokens. A decoder's prompts are padded on the LEFT, so that all
        responses begin in one column; an encoder-decoder's on the right (its positions count from the first column).
      response: [B, R] int32, padded on the right with anything: what stands after a token never reaches its state.
    """
    if isinstance(config, EncDecConfig):

        def one(tokens: jax.Array, real: jax.Array, out: jax.Array) -> jax.Array:
            states = encdec.encode(params, config, tokens, real)
            fed = jnp.concatenate(
                [jnp.full((1,), config.start_id, out.dtype), out[:-1]]
            )  # y[t-1] stands at t: no offset
            return encdec.decode(params, config, fed, states, real)

        return map_rows(one)(prompt, prompt_mask, response)

    P, R = prompt.shape[1], response.shape[1]
    tokens = jnp.concatenate([prompt, response[:, :-1]], axis=1)  # the last token predicts nothing
    real = jnp.concatenate([prompt_mask.astype(jnp.int32), jnp.ones_like(response[:, :-1])], axis=1)

    def row(tokens: jax.Array, real: jax.Array) -> jax.Array:
        positions = jnp.maximum(jnp.cumsum(real) - 1, 0)
        return decoder.forward(params, config, tokens, positions, causal_mask(config, real))[0][P - 1 : P - 1 + R]

    return map_rows(row)(tokens, real)


def response_scores(
    params: Params,
    config: AnyConfig,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    response: jax.Array,
    *,
    temperature: float = 1.0,
    limit: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of every response token and the entropy there (nats), both float32 [B, R].

    Args:
      temperature, limit: of the distribution that the response was drawn from (ids from `limit` on cannot be drawn): what
        is scored must be what was sampled.
    """
    states = response_states(params, config, prompt, prompt_mask, response)
    return token_scores(params, config, states, response, temperature=temperature, limit=limit)


def token_scores(
    params: Params,
    config: AnyConfig,
    states: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    limit: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Like `response_scores`, from the states [B, R, E]. No array [B, R, V] exists where it would be large."""

    def score(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logp = log_distribution(params, config, block[0], temperature=temperature, limit=limit)
        chosen = jnp.take_along_axis(logp, block[1][:, None], axis=-1)[:, 0]
        return chosen, -jnp.sum(jnp.where(logp > NEG / 2, jnp.exp(logp) * logp, 0.0), axis=-1)

    N = targets.size
    n = min(N, max(MIN_CHUNK, BLOCK_LOGITS // config.vocab_size))
    count = -(-N // n)
    flat = (states.reshape(N, -1), targets.reshape(N))
    if count == 1:
        found = score(flat)
    else:  # a block's logits are made again for the gradient, not kept
        cut = [jnp.pad(x, [(0, count * n - N)] + [(0, 0)] * (x.ndim - 1)).reshape(count, n, *x.shape[1:]) for x in flat]
        found = [x.reshape(-1)[:N] for x in jax.lax.map(jax.checkpoint(score), tuple(cut))]
    return tuple(x.reshape(targets.shape) for x in found)


def log_distribution(
    params: Params, config: AnyConfig, states: jax.Array, *, temperature: float = 1.0, limit: int | None = None
) -> jax.Array:
    """Returns log-probabilities [..., V] float32 of states [..., E] at a temperature, over the ids below `limit`."""
    logits = decoder.unembed(params, config, states) / temperature
    if limit is not None and limit < config.vocab_size:
        logits = jnp.where(jnp.arange(config.vocab_size) < limit, logits, NEG)
    return jax.nn.log_softmax(logits)


def text_limit(config: AnyConfig, tokenizer: Any = None) -> int:
    """Returns the first id that has no text and is never drawn (a padded vocabulary), or the vocabulary's size."""
    own = config.text_ids if isinstance(config, EncDecConfig) else config.vocab_size
    return own if tokenizer is None else min(own, tokenizer.vocab_size)


def pad_prompts(config: AnyConfig, rows: list[list[int]], length: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as arrays (tokens, mask), each [B, length] int32, padded on the side that `response_states` wants."""
    tokens, mask = np.full((len(rows), length), fill, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if isinstance(config, EncDecConfig) else slice(length - len(row), length)
        tokens[i, part], mask[i, part] = row, 1
    return tokens, mask


# ---------------------------------------------------------------------------------------------------- scoring


def hidden_states(params: Params, config: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns final hidden states [B, T, E] of tokens [B, T]; mask [B, T] is 1 for real tokens, 0 for padding.

    Padding may stand on either side: real tokens neither see it nor count it in their positions.
    """

    def one(tokens: jax.Array, real: jax.Array) -> jax.Array:
        positions = jnp.maximum(jnp.cumsum(real) - 1, 0)
        return decoder.forward(params, config, tokens, positions, causal_mask(config, real))[0]

    return map_rows(one)(tokens, mask.astype(jnp.int32))


@functools.partial(mesh_jit, static_argnames="config")
def _logits(params: Params, config: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return decoder.unembed(params, config, hidden_states(params, config, tokens, mask))


@functools.partial(mesh_jit, static_argnames="config")
def next_logprobs(params: Params, config: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns [B, T]: at t, the log-probability of token t + 1 (the last column means nothing).

    The vocabulary product runs over blocks of time: [B, T, V] never exists.
    """
    B, T = tokens.shape
    width = 1
    while 2 * width <= T and T % (2 * width) == 0 and 2 * width * B * config.vocab_size <= CHUNK_LOGITS:
        width *= 2

    def blocks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, T // width, width, *x.shape[2:]), 1, 0)  # [T / width, B, width, ...]

    def score(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = block
        logits = decoder.unembed(params, config, hidden)  # [B, width, V]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    hidden = hidden_states(params, config, tokens, mask)
    out = jax.lax.map(score, (blocks(hidden), blocks(jnp.roll(tokens, -1, axis=1))))
    return jnp.moveaxis(out, 0, 1).reshape(B, T)


def _place(model: Model, *arrays: Any) -> tuple[Any, ...]:
    return arrays if model.mesh is None else put_global_batch(arrays, model.mesh)


@functools.partial(mesh_jit, static_argnames="config")
def _encdec_logits(
    params: Params, config: EncDecConfig, source: jax.Array, source_mask: jax.Array, tokens: jax.Array
) -> jax.Array:
    def one(source: jax.Array, real: jax.Array, tokens: jax.Array) -> jax.Array:
        states = encdec.encode(params, config, source, real)
        return decoder.unembed(params, config, encdec.decode(params, config, tokens, states, real))

    return map_rows(one)(source, source_mask, tokens)


@functools.partial(mesh_jit, static_argnames="config")
def _response_logprobs(params: Params, config: EncDecConfig, *arrays: jax.Array) -> jax.Array:
    return response_scores(params, config, *arrays)[0]


def logits(
    model: Model, tokens: Any, mask: Any = None, *, encoder_tokens: Any = None, encoder_mask: Any = None
) -> jax.Array:
    """Returns float32 logits [B, T, V]: row t is about token t + 1.

    Args:
      tokens: [B, T] ids (nested lists of one length, or an array).
      mask: [B, T], 1 for real tokens and 0 for padding, on either side of a row; default: all real. Logits at
        padding mean nothing.
      encoder_tokens, encoder_mask: [B, S] likewise, what an encoder-decoder reads, padded on the right. Its `tokens` are
        the decoder's inputs: they begin with `config.start_id`, and need no mask.

    Raises:
      UserError: a row has more real tokens than the model's context, ids outside the vocabulary, or not [B, T].
    """
    if not isinstance(tokens, jax.Array):
        tokens = _as_tokens(tokens, model.config)
    if not isinstance(mask, jax.Array):
        mask = np.ones(tokens.shape, np.int32) if mask is None else np.asarray(mask)
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise UserError(f"tokens {tokens.shape} and mask {mask.shape} must both have shape [B, T]")
    limit = model.config.max_positions
    if isinstance(model.config, EncDecConfig):
        return _read_and_write(model, tokens, encoder_tokens, encoder_mask)
    require(
        (encoder_tokens is None, "encoder_tokens are for encoder-decoders, and this model is a decoder; leave them out")
    )
    if tokens.shape[1] > limit:
        counts = np.asarray(mask != 0).sum(axis=1)
        if counts.max() > limit:
            raise _overflow(int(counts.argmax()), int(counts.max()), limit)
    return _logits(model.params, model.config, *_place(model, tokens, mask))


def _read_and_write(model: Model, tokens: Any, source: Any, source_mask: Any) -> jax.Array:
    """`logits` of an encoder-decoder."""
    require((source is not None, "an encoder-decoder needs encoder_tokens beside the decoder's tokens; pass both"))
    source = _as_tokens(source, model.config)
    real = np.ones(source.shape, np.int32) if source_mask is None else np.asarray(source_mask)
    fits = source.ndim == 2 and source.shape[0] == tokens.shape[0] and real.shape == source.shape
    shapes = f"encoder_tokens {source.shape}, encoder_mask {real.shape} and tokens {tokens.shape}"
    require((fits, f"{shapes} must have shapes [B, S], [B, S] and [B, T]"))
    longest, limit = max(source.shape[1], tokens.shape[1]), model.config.max_positions
    require((longest <= limit, f"{longest} tokens exceed the model's max_positions of {limit}; shorten the text"))
    return _encdec_logits(model.params, model.config, *_place(model, source, real, np.asarray(tokens)))


def _as_tokens(tokens: Any, config: ModelConfig) -> np.ndarray:
    try:
        tokens = np.asarray(tokens, np.int32)
    except (TypeError, ValueError) as e:
        raise UserError(f"tokens must be a rectangle [B, T] of ids ({e}); pad the rows, with a `mask`") from None
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        bad = next(t for t in tokens.ravel().tolist() if not 0 <= t < config.vocab_size)
        raise UserError(f"token id {bad} is outside the model's vocabulary of {config.vocab_size}")
    return tokens


def _overflow(row: int, length: int, limit: int) -> UserError:
    return UserError(
        f"prompt {row} has {length} tokens, but max_positions, the model's context, is {limit}; shorten it"
    )


def logprobs(model: Model, prompts: Sequence[Any], completions: Sequence[Any]) -> list[np.ndarray]:
    """Scores completions: the log-probability of each of their tokens, given the prompt and the tokens before it.

    Args:
      prompts: texts (a BOS token is put in front where the tokenizer has one), or lists of token ids as they are.
      completions: texts or lists of token ids, one per prompt. A text goes on where its prompt's text ends, so it
        is encoded together with it, as long as that leaves the prompt's own ids alone.

    Returns:
      One float32 array per pair, of the completion's length.

    Raises:
      UserError: text for a model without tokenizer, an empty prompt, or a pair longer than the model's context.
    """
    return score_tokens(model, prompts, completions, next_logprobs)


def score_tokens(
    model: Model, prompts: Sequence[Any], completions: Sequence[Any], score: Callable[..., jax.Array]
) -> list[np.ndarray]:
    """Returns `score(params, config, tokens [B, T], mask [B, T]) -> [B, T]` on the tokens of each completion.

    The column of a token is the one before it, where `next_logprobs` keeps its log-probability.
    """
    if isinstance(prompts, str) or isinstance(completions, str):
        raise UserError("prompts and completions are lists, one completion per prompt: put the text in [ ]")
    if len(prompts) != len(completions):
        raise UserError(f"{len(prompts)} prompts but {len(completions)} completions; give one per prompt")
    pairs = [_encode_pair(model, i, p, c) for i, (p, c) in enumerate(zip(prompts, completions))]
    if isinstance(model.config, EncDecConfig):
        return _encdec_logprobs(model, pairs)
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(pairs)
    for length, rows in _chunks([len(p) + len(c) for p, c in pairs]):
        count = 1 << (len(rows) - 1).bit_length()  # a power of two: few shapes to compile
        tokens, mask = np.zeros((2, count, length), np.int32)
        for r, i in enumerate(rows):
            ids = [*pairs[i][0], *pairs[i][1]]
            tokens[r, : len(ids)], mask[r, : len(ids)] = ids, 1
        scores = to_host(score(model.params, model.config, *_place(model, tokens, mask)))
        for r, i in enumerate(rows):
            start = len(pairs[i][0]) - 1
            out[i] = scores[r, start : start + len(pairs[i][1])].copy()
    return out


def _encdec_logprobs(model: Model, pairs: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    """`logprobs` of an encoder-decoder: rows of like total length together, each half padded to its own bucket."""
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(pairs)
    for _, rows in _chunks([len(p) + len(c) for p, c in pairs]):
        P, R = (max(MIN_LENGTH, 1 << (max(len(pairs[i][k]) for i in rows) - 1).bit_length()) for k in (0, 1))
        count = 1 << (len(rows) - 1).bit_length()
        prompt, real = pad_prompts(model.config, [pairs[i][0] for i in rows] + [[]] * (count - len(rows)), P)
        response = np.zeros((count, R), np.int32)
        for r, i in enumerate(rows):
            response[r, : len(pairs[i][1])] = pairs[i][1]
        arrays = _place(model, prompt, real, response)
        scores = to_host(_response_logprobs(model.params, model.config, *arrays))
        for r, i in enumerate(rows):
            out[i] = scores[r, : len(pairs[i][1])].copy()
    return out


def _encode_pair(model: Model, i: int, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
    tokenizer = model.tokenizer
    if tokenizer is None and (isinstance(prompt, str) or isinstance(completion, str)):
        raise UserError(
            "this model has no tokenizer (no tokenizer files in its folder): pass lists of token ids, not text"
        )
    if isinstance(model.config, EncDecConfig):
        head = encoder_ids(model, prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        tail = tokenizer.encode(completion) if isinstance(completion, str) else [int(t) for t in completion]
    elif isinstance(prompt, str) and isinstance(completion, str):
        head, tail = tokenizer.encode_pair(prompt, completion)
    else:
        head = tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else [int(t) for t in prompt]
        tail = tokenizer.encode(completion) if isinstance(completion, str) else [int(t) for t in completion]
    if not head:
        raise UserError(f"prompt {i} is empty: give it at least one token (there is no BOS token to start from)")
    if len(head) + len(tail) > model.config.max_positions:
        raise _overflow(i, len(head) + len(tail), model.config.max_positions)
    _as_tokens(head + tail, model.config)
    return head, tail


def _chunks(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Returns [(bucket length, indices)]: rows of like length together, at most CHUNK_TOKENS tokens at a time."""
    buckets: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        buckets.setdefault(max(MIN_LENGTH, 1 << (n - 1).bit_length()), []).append(i)
    out = []
    for length, members in sorted(buckets.items()):
        rows = max(1, CHUNK_TOKENS // length)
        out += [(length, members[k : k + rows]) for k in range(0, len(members), rows)]
    return out


@functools.partial(mesh_jit, static_argnames="config")
def _values(params: Params, config: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns [B, T]: at t, the head's logit after token t + 1 (so that it lines up with log-probabilities)."""
    return jnp.roll(value_logits(params, hidden_states(params, config, tokens, mask)), -1, axis=1)


def values(model: Model, prompts: Sequence[Any], completions: Sequence[Any]) -> list[np.ndarray]:
    """Returns the head's judgement after every token of each completion, as log-odds: float32 arrays.

    Args:
      prompts, completions: as in `model.logprobs`.

    Raises:
      UserError: the model has no value head; or see `model.logprobs`.
    """
    if not model.config.value_head:
        raise UserError("this model has no value head (config.json names no qstar_value_head); score by log-likelihood")
    return score_tokens(model, prompts, completions, _values)
