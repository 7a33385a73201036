"""Log-probabilities and logits of text, written once for decoders and encoder-decoders.

Functions of parameters come first, from a prompt [I] and a response [R] to a state [D] per response token: RL and
distillation train through these. Functions of a `Model` follow, which score lists of texts in buckets of similar length.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qstar import distributed
from qstar.errors import UserError, require
from qstar.mesh import map_rows, mesh_jit, put_global_batch, to_host
from qstar.models import decoder, encdec
from qstar.models.attention import causal_mask, document_starts, within_window
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.heads import value_logits
from qstar.models.model import Model
from qstar.models.vocabulary import TokenScores, token_logprobs
from qstar.text.chat import PROMPTS, as_text, text_or_ids
from qstar.types import Params

AnyConfig = ModelConfig | EncDecConfig
_Pairs = list[tuple[list[int], list[int]]]  # prompts and completions
CHUNK_TOKENS = 16_384  # tokens per forward pass of `logprobs`
MIN_LENGTH = 16  # the shortest length bucket; the others are powers of two
SHARED_TOKENS = 1024  # at most, of a row whose completions share their prompt: its mask has the square of this


def init(config: AnyConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters: `encdec.init` or `decoder.init`."""
    return (encdec if isinstance(config, EncDecConfig) else decoder).init(config, key, dtype)


def response_states(params: Params, config: AnyConfig, prompt: Array, prompt_mask: Array, response: Array) -> Array:
    """Returns final states [B, R, D]: row t predicts response token t from the prompt and the response before it.

    Args:
      prompt: [B, I] int32. prompt_mask: [B, I], 1 for real tokens. A decoder's prompts are padded on the LEFT, so that
        all responses begin in one column; an encoder-decoder's on the right (positions count from the first column).
      response: [B, R] int32, padded on the right with any ids: no state depends on the tokens after it.
    """
    I, R = prompt.shape[1], response.shape[1]

    if isinstance(config, EncDecConfig):

        def encdec_row(tokens: Array, real: Array, response: Array) -> Array:
            states = encdec.encode(params, config, tokens, real)
            # y[t-1] is fed at t, so state t predicts y[t].
            fed = jnp.concatenate([jnp.full((1,), config.start_id, response.dtype), response[:-1]])
            return encdec.decode(params, config, fed, states, real)

        return map_rows(encdec_row)(prompt, prompt_mask, response)

    def decoder_row(tokens: Array, real: Array, response: Array) -> Array:
        tokens = jnp.concatenate([tokens, response[:-1]])  # the last token predicts nothing
        # Prompts are padded on the left: column I - 1 holds the last token of all, which predicts the response's first.
        real = jnp.concatenate([real.astype(jnp.int32), jnp.ones_like(response[:-1])])
        return _row_states(params, config, tokens, real)[I - 1 : I - 1 + R]

    return map_rows(decoder_row)(prompt, prompt_mask, response)


def hidden_states(params: Params, config: ModelConfig, tokens: Array, mask: Array, shared: bool = False) -> Array:
    """Returns final hidden states [B, T, D] of tokens [B, T]; mask [B, T] is 1 for real tokens, 0 for padding.

    Padding may be on either side: real tokens neither attend to it nor count it in their positions.

    With `shared`, a row holds a text (1 in the mask) and continuations of it (2, 3, ...) one behind the other, then
    padding: each continuation attends to the text and to itself, at the positions that follow the text.
    """
    states = functools.partial(_shared_states if shared else _row_states, params, config)
    return map_rows(states)(tokens, mask.astype(jnp.int32))


def _row_states(params: Params, config: ModelConfig, tokens: Array, real: Array) -> Array:
    # Without `one_text`, which promises padding on the right: here it may be on the left.
    positions = jnp.maximum(jnp.cumsum(real) - 1, 0)
    return decoder.forward(params, config, tokens, positions, causal_mask(config, real))[0]


def _shared_states(params: Params, config: ModelConfig, tokens: Array, part: Array) -> Array:
    column = jnp.arange(tokens.shape[0])
    behind = jnp.sum(part == 1) + column - document_starts(part)
    positions = jnp.where(part > 1, behind, jnp.where(part == 1, column, 0))
    # A token that is predicted and not read may lie one position behind the context, which learned positions lack.
    positions = jnp.minimum(positions, config.max_positions - 1)
    visible = (column <= column[:, None]) & ((part == part[:, None]) | (part == 1))
    mask = within_window(config, visible, positions[:, None] - positions)
    return decoder.forward(params, config, tokens, positions, mask)[0]


def text_limit(config: AnyConfig, tokenizer: Any = None) -> int:
    """Returns the first id that has no text and is never drawn (a padded vocabulary), or the vocabulary's size."""
    size = config.text_ids if isinstance(config, EncDecConfig) else config.vocab_size
    return size if tokenizer is None else min(size, tokenizer.vocab_size)


def pad_prompts(config: AnyConfig, rows: list[list[int]], length: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as arrays (tokens, mask), each [B, length] int32, padded as `response_states` requires."""
    tokens, mask = np.full((len(rows), length), fill, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if isinstance(config, EncDecConfig) else slice(length - len(row), length)
        tokens[i, part], mask[i, part] = row, 1
    return tokens, mask


def pad_responses(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids int32 and their mask float32, each [B, R] with R = `length`, padded on the right."""
    response, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.float32)
    for i, ids in enumerate(rows):
        response[i, : len(ids)], mask[i, : len(ids)] = ids, 1.0
    return response, mask


# ----------------------------------------------------------------------------------------------- functions of a model


@functools.partial(mesh_jit, static_argnames="config")
def _logits(params: Params, config: ModelConfig, tokens: Array, mask: Array) -> Array:
    return decoder.unembed(params, config, hidden_states(params, config, tokens, mask))


@functools.partial(mesh_jit, static_argnames=("config", "shared"))
def next_logprobs(params: Params, config: ModelConfig, tokens: Array, mask: Array, read: Array, shared: bool) -> Array:
    """Returns [B, T]: at t, the log-probability of token t + 1; valid where `read` [B, T] is not 0."""
    hidden = hidden_states(params, config, tokens, mask, shared)
    return token_logprobs(hidden, decoder.head(params, config), jnp.roll(tokens, -1, axis=1), read=read).logprobs


@functools.partial(mesh_jit, static_argnames=("config", "shared"))
def next_scores(params: Params, config: ModelConfig, tokens: Array, mask: Array, read: Array, shared: bool) -> Any:
    """Returns `TokenScores` [B, T - 1]: at t, of token t + 1. Rows are padded on the right; their last token is not fed."""
    hidden = hidden_states(params, config, tokens[:, :-1], mask[:, :-1] if shared else mask[:, 1:], shared)
    return token_logprobs(hidden, decoder.head(params, config), tokens[:, 1:], read=read[:, :-1])


@functools.partial(mesh_jit, static_argnames="config")
def _encdec_logits(params: Params, config: EncDecConfig, source: Array, source_mask: Array, tokens: Array) -> Array:
    def one(source: Array, real: Array, tokens: Array) -> Array:
        states = encdec.encode(params, config, source, real)
        return decoder.unembed(params, config, encdec.decode(params, config, tokens, states, real))

    return map_rows(one)(source, source_mask, tokens)


@functools.partial(mesh_jit, static_argnames="config")
def _response_scores(params: Params, config: EncDecConfig, prompt: Array, mask: Array, response: Array) -> TokenScores:
    states = response_states(params, config, prompt, mask, response)
    return token_logprobs(states, decoder.head(params, config), response)


def logits(
    model: Model, tokens: Any, mask: Any = None, *, encoder_tokens: Any = None, encoder_mask: Any = None
) -> Array:
    """Returns float32 logits [B, T, V]: row t predicts token t + 1.

    Args:
      tokens: [B, T] ids (nested lists of one length, or an array).
      mask: [B, T], 1 for real tokens and 0 for padding, on either side of a row; default: all real. Logits at
        padding have no meaning.
      encoder_tokens, encoder_mask: [B, C] likewise, the input of an encoder-decoder, padded on the right. Its `tokens`
        are the decoder's inputs: they begin with `config.start_id`, and need no mask.

    Raises:
      UserError: a row has more real tokens than the model's context, ids outside the vocabulary, or not [B, T].
    """
    c = model.config
    tokens = tokens if isinstance(tokens, Array) else _as_tokens(tokens, c)
    if not isinstance(mask, Array):
        mask = np.ones(tokens.shape, np.int32) if mask is None else np.asarray(mask)
    if tokens.ndim != 2 or mask.shape != tokens.shape or not tokens.shape[1]:
        raise UserError(f"tokens {tokens.shape} and mask {mask.shape} must both have shape [B, T], T at least 1")
    if isinstance(c, EncDecConfig):
        if encoder_tokens is None:
            raise UserError("an encoder-decoder needs encoder_tokens beside the decoder's tokens; pass both")
        source = _as_tokens(encoder_tokens, c)
        real = np.ones(source.shape, np.int32) if encoder_mask is None else np.asarray(encoder_mask)
        fits = source.ndim == 2 and source.shape[0] == tokens.shape[0] and real.shape == source.shape
        shapes = f"encoder_tokens {source.shape}, encoder_mask {real.shape} and tokens {tokens.shape}"
        require((fits, f"{shapes} must have shapes [B, C], [B, C] and [B, T]"))
        longest = max(source.shape[1], tokens.shape[1])
        fault = f"{longest} tokens exceed max_positions={c.max_positions}; shorten the text"
        require((longest <= c.max_positions, fault))
        return _encdec_logits(model.params, c, *put_global_batch((source, real, np.asarray(tokens)), model.mesh))
    if encoder_tokens is not None:
        raise UserError("encoder_tokens are for encoder-decoders, and this model is a decoder; leave them out")
    if tokens.shape[1] > c.max_positions:
        counts = np.asarray(mask != 0).sum(axis=1)
        _check_length(int(counts.argmax()), int(counts.max()), c)
    return _logits(model.params, c, *put_global_batch((tokens, mask), model.mesh))


def _as_tokens(tokens: Any, config: AnyConfig) -> np.ndarray:
    try:
        tokens = np.asarray(tokens)
    except ValueError as e:
        raise UserError(f"tokens must be a rectangle [B, T] of ids ({e}); pad the rows, with a `mask`") from None
    fault = f"tokens must be ids, whole numbers, and these are {tokens.dtype}: {tokens.ravel()[:1].tolist()}"
    require((not tokens.size or tokens.dtype.kind in "iu", fault))
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        bad = next(t for t in tokens.ravel().tolist() if not 0 <= t < config.vocab_size)
        raise UserError(f"token id {bad} is outside the model's vocabulary of {config.vocab_size}")
    return tokens.astype(np.int32)


def _check_length(row: int, length: int, config: AnyConfig) -> None:
    fault = f"prompt {row} has {length} tokens, but max_positions, the model's context, is {config.max_positions}"
    require((length <= config.max_positions, f"{fault}; shorten it"))


def logprobs(model: Model, prompts: Sequence[Any], completions: Sequence[Any]) -> list[np.ndarray]:
    """Scores completions: the log-probability of each of their tokens, given the prompt and the tokens before it.

    Args:
      prompts: texts (a BOS token is put in front where the tokenizer has one), lists of chat messages (see
        `text.chat`), or lists of token ids as they are.
      completions: texts or lists of token ids, one per prompt. A text continues its prompt's text, so the two are
        encoded together, unless that changes the prompt's ids.

    Returns:
      One float32 array per pair, of the completion's length.

    Raises:
      UserError: text for a model without tokenizer, an empty prompt, or a pair longer than the model's context.
    """
    return score_tokens(model, prompts, completions, next_logprobs)


def token_scores(model: Model, prompts: Sequence[Any], completions: Sequence[Any]) -> list[TokenScores]:
    """Scores completions like `logprobs`, and says of each token whether no other is more probable (`hits`).

    The last token is not read: a pair may have one token more than the model's context.
    """
    return score_tokens(model, prompts, completions, next_scores, _response_scores, unread=1)


def score_tokens(
    model: Model,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    score: Callable[..., Any],
    encdec_score: Callable[..., Any] = lambda *arguments: _response_scores(*arguments).logprobs,
    unread: int = 0,
) -> list[Any]:
    """Returns `score(params, config, tokens, mask, read, shared)` on the tokens of each completion, arrays of [B, T].

    A token's score is in the column before it. A decoder reads a prompt of several completions once for as many of
    them as a row holds (see `hidden_states`).

    Args:
      score: may return a pytree of arrays; then each result is one, too. encdec_score: that of encoder-decoders.
      unread: tokens at the end of a row that `score` does not feed to the model.
    """
    if isinstance(prompts, str) or isinstance(completions, str):
        raise UserError("prompts and completions are lists, one completion per prompt: put the text in [ ]")
    prompts, completions = list(prompts), list(completions)
    if len(prompts) != len(completions):
        raise UserError(f"{len(prompts)} prompts but {len(completions)} completions; give one per prompt")
    pairs = [_encode_pair(model, i, p, c, unread) for i, (p, c) in enumerate(zip(prompts, completions))]
    c, encdec_ = model.config, isinstance(model.config, EncDecConfig)
    out: list[Any] = [np.zeros(0, np.float32)] * len(pairs)
    rows = [[i] for i in range(len(pairs))] if encdec_ else _rows(pairs)
    sizes = [len(pairs[row[0]][0]) - 1 + sum(1 + len(pairs[i][1]) for i in row) - unread for row in rows]
    # Lone pairs apart: attention kernels support their causal masks.
    for shared in (False, True):
        some = [k for k, row in enumerate(rows) if (len(row) > 1) == shared]
        for length, chunk in _chunks([sizes[k] for k in some]):
            distributed.return_freed_memory()
            members = [rows[some[k]] for k in chunk]
            if encdec_:
                arrays = put_global_batch(_encdec_arrays([pairs[i] for (i,) in members]), model.mesh)
                scores = to_host(encdec_score(model.params, c, *arrays))
            else:
                tokens, mask, read = _padded([_parts(pairs, row) for row in members], length + unread)
                for _, place in _places(pairs, members):
                    read[place] = 1
                arrays = put_global_batch((tokens, mask, read), model.mesh)
                scores = to_host(score(model.params, c, *arrays, shared))
            for i, place in _places(pairs, members, from_start=encdec_):
                # Copied, because a view would keep the chunk's whole array alive.
                out[i] = jax.tree.map(lambda x: x[place].copy(), scores)  # noqa: B023
    return out


def _places(pairs: _Pairs, rows: list[list[int]], from_start: bool = False) -> Iterator[tuple[int, Any]]:
    """Yields each pair and the place of its completion's scores: the row, and the columns before its tokens."""
    for r, row in enumerate(rows):
        start = 0 if from_start else len(pairs[row[0]][0]) - 1
        for i in row:
            end = start + len(pairs[i][1])
            yield i, (r, slice(start, end))
            start = end + 1


def _rows(pairs: _Pairs) -> list[list[int]]:
    """Returns the pairs of each row: as many of one prompt as fit into `shared_length`, else a pair alone."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (prompt, _) in enumerate(pairs):
        groups[tuple(prompt)].append(i)
    rows: list[list[int]] = []
    for key, members in groups.items():
        size = room = shared_length(len(key) + max(len(pairs[i][1]) for i in members))
        for i in members:
            more = 1 + len(pairs[i][1])
            if size + more > room:
                rows.append([])
                size = len(key) - 1
            rows[-1].append(i)
            size += more
    return rows


def shared_length(longest: int) -> int:
    """Returns the most tokens of a row of several completions, of which the longest with its prompt has `longest`."""
    # Attention grows with the square of a row, so that rows of more than a few texts would cost small models time.
    return min(SHARED_TOKENS, power_of_two(4 * longest))


def _parts(pairs: _Pairs, row: list[int]) -> list[list[int]]:
    """Returns the texts of a row: of several completions each begins with the prompt's last token, which predicts it."""
    prompt = pairs[row[0]][0]
    if len(row) == 1:
        return [prompt + pairs[row[0]][1]]
    return [prompt[:-1], *([prompt[-1], *pairs[i][1]] for i in row)]


def _encdec_arrays(pairs: _Pairs) -> tuple[np.ndarray, ...]:
    """Returns prompts, their mask and responses, the first two [B, I] and the last [B, R], buckets of their own."""
    prompts, responses = zip(*pairs)
    I, R = (max(MIN_LENGTH, power_of_two(max(map(len, half)))) for half in (prompts, responses))
    return *_padded([[ids] for ids in prompts], I)[:2], _padded([[ids] for ids in responses], R)[0]


def _padded(rows: list[list[list[int]]], length: int) -> np.ndarray:
    """Returns tokens, mask and zeros [3, B, length] of rows, padded on the right; the mask numbers a row's parts from 1."""
    # As many rows as a power of two: few shapes to compile.
    out = np.zeros((3, power_of_two(len(rows)), length), np.int32)
    for r, parts in enumerate(rows):
        ids = [token for part in parts for token in part]
        out[0, r, : len(ids)] = ids
        out[1, r, : len(ids)] = np.repeat(np.arange(len(parts)) + 1, [len(part) for part in parts])
    return out


def _encode_pair(model: Model, i: int, prompt: Any, completion: Any, unread: int) -> tuple[list[int], list[int]]:
    tokenizer, c = model.tokenizer, model.config
    head: Any = text_or_ids(tokenizer, as_text(tokenizer, prompt), f"prompt {i} {PROMPTS}")
    tail: Any = text_or_ids(tokenizer, completion, f"completion {i} must be text or a list of token ids")
    if tokenizer is not None and isinstance(head, str) and isinstance(tail, str):
        head, tail = tokenizer.encode_pair(head, tail)
    elif tokenizer is not None:
        head = tokenizer.encode_prompt(head) if isinstance(head, str) else head
        tail = tokenizer.encode_behind(head, tail) if isinstance(tail, str) else tail
    why = " (there is no BOS token to start from)" if isinstance(prompt, str) else ""
    require((bool(head), f"prompt {i} is empty: give it at least one token{why}"))
    _check_length(i, len(head) + len(tail) - unread, c)
    _as_tokens(head + tail, c)
    return head, tail


def power_of_two(n: int) -> int:
    """Returns the smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def _chunks(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    # Rows of similar length together, so that little is padding; at most CHUNK_TOKENS tokens bound the memory.
    buckets: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        buckets.setdefault(max(MIN_LENGTH, power_of_two(n)), []).append(i)
    for length, members in sorted(buckets.items()):
        rows = max(1, CHUNK_TOKENS // length)
        yield from ((length, members[k : k + rows]) for k in range(0, len(members), rows))


@functools.partial(mesh_jit, static_argnames=("config", "shared"))
def _values(params: Params, config: ModelConfig, tokens: Array, mask: Array, _: Array, shared: bool) -> Array:
    # Rolled, so that a token's value is in the column of its log-probability, where `score_tokens` reads.
    return jnp.roll(value_logits(params, hidden_states(params, config, tokens, mask, shared)), -1, axis=1)


def values(model: Model, prompts: Sequence[Any], completions: Sequence[Any]) -> list[np.ndarray]:
    """Returns the value head's log-odds (float32) after every token of each completion; arguments as in `logprobs`.

    Raises:
      UserError: the model has no value head; or see `logprobs`.
    """
    if not model.config.value_head:
        raise UserError("this model has no value head (config.json names no qstar_value_head); score by log-likelihood")
    return score_tokens(model, prompts, completions, _values)
