"""A model in one hand: config, parameters and tokenizer; loading, saving, and scoring text.

model = load("stories260k")
logits(model, tokens)                                   # [B, T, V]
logprobs(model, ["The cat sat on"], [" the mat."])      # one number per completion token
save(model, "copy")
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qstar import tree
from qstar.errors import QstarWarning, UserError, require
from qstar.mesh import map_rows, mesh_jit, put_global_batch, to_host
from qstar.models import decoder, encdec, hf, scoring
from qstar.models.attention import causal_mask
from qstar.models.config import DTYPES, ModelConfig
from qstar.models.encdec_config import EncDecConfig
from qstar.models.hf_config import from_hf, official_thoughts, to_hf
from qstar.models.thought_config import ThoughtConfig
from qstar.text.tokenizer import Tokenizer, load_tokenizer
from qstar.types import Params

CHUNK_TOKENS = 16_384  # tokens per forward pass of `logprobs`
CHUNK_LOGITS = 2**26  # most logits alive at once there: 256 MiB
MIN_LENGTH = 16  # the shortest length bucket; the others are powers of two


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder or an encoder-decoder with its weights. The mesh, if any, is the one that the parameters are sharded over."""

    config: ModelConfig | EncDecConfig
    params: Params
    tokenizer: Tokenizer | None = None
    mesh: Mesh | None = None

    def replace(self, **changes: Any) -> Model:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the tokenizer's EOS, and those of config.json and generation_config.json."""
        first = self.tokenizer.eos_id if self.tokenizer else None
        ids = (first, self.config.eos_id, *self.config.also_eos)
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def __repr__(self) -> str:
        c = self.config
        text = "no tokenizer" if self.tokenizer is None else f"tokenizer of {self.tokenizer.vocab_size}"
        count = f"{tree.size(self.params):,}"
        return f"Model({c.family}, {count} parameters, {c.dtype}, {text}, mesh={self.mesh})"


def load(
    path: str | os.PathLike, mesh: Mesh | None = None, dtype: Any = None, thoughts: ThoughtConfig | None = None
) -> Model:
    """Loads a model folder in the Hugging Face layout.

    Args:
      path: a local folder with config.json, safetensors and (not necessarily) tokenizer files.
      mesh: where to put the parameters, each created directly in its sharding (see `mesh.make_mesh`).
      dtype: of the computation: float32, bfloat16 or float16. None takes bfloat16 for models whose config.json says
        that they are kept in half precision, and float32 otherwise. Parameters keep their stored dtype.
      thoughts: how a model that thinks does so, instead of what its config.json says. Checkpoints of the official
        Quiet-STaR code say next to nothing: without this they are taken for ones like the release (n_ahead 8).

    Raises:
      UserError: a missing, broken or unsupported file; the line names it.
    """
    folder = pathlib.Path(path).expanduser()
    raw = hf.read_config(folder)
    config = from_hf(raw, where=str(folder / "config.json")).replace(dtype=_compute_dtype(raw, dtype))
    if isinstance(config, EncDecConfig):
        require((thoughts is None, f"{folder}: an encoder-decoder cannot think before it speaks; leave `thoughts` out"))
    elif thoughts is not None or config.thoughts is None and hf.has_thought_head(folder):
        config = config.replace(thoughts=thoughts or official_thoughts(raw))
    config = hf.settle_head(folder, config)
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and isinstance(config, EncDecConfig):
        tokenizer.encoder_end = config.eos_id
    if tokenizer is not None:
        scoring.check_vocabulary(config, tokenizer, str(folder))
    return Model(config, hf.read_params(folder, config, mesh), tokenizer, mesh)


def _compute_dtype(raw: dict[str, Any], dtype: Any) -> str:
    if dtype is None:
        half = ("bfloat16", "float16")  # float16 overflows in the residual stream of many models
        return "bfloat16" if raw.get("dtype", raw.get("torch_dtype")) in half else "float32"
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return name


def save(model: Model, path: str | os.PathLike) -> None:
    """Writes a folder that `load` and transformers' `from_pretrained` read: all of it or nothing.

    Raises:
      UserError: the folder holds something else than an earlier export, the config has options that its family's
        config.json cannot express, or the disk refuses.
    """
    _check_expressible(model.config)
    if model.config.family == "tiny" and not model.config.portable_family:
        warnings.warn(
            f"{path}: no other program can load this model: no family of transformers is like it", QstarWarning, 2
        )
    hf.write_params(path, model.config, model.params, extras=functools.partial(_write_extras, model))


def _write_extras(model: Model, folder: pathlib.Path) -> None:
    """Tokenizer files and generation_config.json, where the tokenizer (if any) says what ends a text."""
    bos, ends = model.config.bos_id, model.stop_ids
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
        bos = model.tokenizer.bos_id
    ids = {"bos_token_id": bos, "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None)}
    if isinstance(model.config, EncDecConfig):  # `generate` of transformers reads the start here and nowhere else
        ids |= dict.fromkeys(("decoder_start_token_id", "pad_token_id"), model.config.start_id)
    hf.write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})


def _check_expressible(config: ModelConfig) -> None:
    """Raises UserError where config.json would read back as another graph (say, a Llama with scaled embeddings)."""
    if isinstance(config, EncDecConfig):
        to_hf(config)  # says what it cannot express
        return
    # No part of the graph:
    run = {
        "dtype": "float32",
        "attention": "auto",
        "remat": "none",
        "scan_unroll": 1,
        "piece_tokens": 2048,
        "init_std": 0.02,
    }
    there = config.replace(**run, rotary_dim=config.rotary_dim or config.head_dim)
    back = from_hf(to_hf(config)).replace(**run)
    back = back.replace(rotary_dim=back.rotary_dim or back.head_dim)
    for field in dataclasses.fields(config):
        a, b = getattr(there, field.name), getattr(back, field.name)
        if a != b:
            raise UserError(
                f"model config: {field.name}={a!r} cannot be written as a {config.family!r} "
                f"model (it would read back as {b!r}); use family 'tiny'"
            )


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
def _next_logprobs(params: Params, config: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
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
    return scoring.response_scores(params, config, *arrays)[0]


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
    return score_tokens(model, prompts, completions, _next_logprobs)


def score_tokens(
    model: Model, prompts: Sequence[Any], completions: Sequence[Any], score: Callable[..., jax.Array]
) -> list[np.ndarray]:
    """Returns `score(params, config, tokens [B, T], mask [B, T]) -> [B, T]` on the tokens of each completion.

    The column of a token is the one before it, where `_next_logprobs` keeps its log-probability.
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
        prompt, real = scoring.pad_prompts(model.config, [pairs[i][0] for i in rows] + [[]] * (count - len(rows)), P)
        response = np.zeros((count, R), np.int32)
        for r, i in enumerate(rows):
            response[r, : len(pairs[i][1])] = pairs[i][1]
        arrays = _place(model, prompt, real, response)
        scores = to_host(_response_logprobs(model.params, model.config, *arrays))
        for r, i in enumerate(rows):
            out[i] = scores[r, : len(pairs[i][1])].copy()
    return out


def encoder_ids(model: Model, text: str) -> list[int]:
    """Returns the ids of a text as an encoder reads it: T5 was trained with an end-of-text token after every input."""
    return [*model.tokenizer.encode(text), model.config.eos_id]


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
