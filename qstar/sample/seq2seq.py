"""Sampling from an encoder-decoder: prompts are read once, and all samples of a prompt share what was read.

Rows of a batch begin together, so that the cache column is the step for all of them and nothing is refilled. Draws depend on
(seed, prompt, sample) alone, as in `sample.sampler`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar import tree
from qstar.errors import UserError
from qstar.mesh import SAMPLING, Rules, constrain_tree, map_rows, mesh_jit, put_global_batch, to_host
from qstar.models import decoder, encdec, scoring
from qstar.models.model import Model, encoder_ids
from qstar.sample.logits import SamplingParams
from qstar.sample.sampler import Sampler, is_stop, sample_tokens
from qstar.types import Completion, Params


@partial(mesh_jit, static_argnames="sampler")
def sample_rows(
    params: Params,
    sampler: Sampler,
    tokens: jax.Array,
    lengths: jax.Array,
    requests: jax.Array,
    seed: jax.Array,
    sampling_params: SamplingParams,
) -> dict[str, jax.Array]:
    """Reads N prompts and writes n responses to each, until all have stopped or `sampler.max_new` tokens are there.

    Args:
      params: as `prepare` returns them. tokens: [N, S] int32, padded on the right. lengths: [N].
      requests: [N, n, 2] int32, (prompt, sample) of each row; folded into the seed.

    Returns:
      tokens [N, n, R] int32, logprobs and sample_logprobs [N, n, R] float32 (0 after the end), count [N, n], stopped [N, n].
    """
    c, (N, n), R = sampler.config, requests.shape[:2], sampler.max_new

    def read(tokens: jax.Array, length: jax.Array) -> list[Any]:
        real = jnp.arange(tokens.shape[0]) < length
        return encdec.cross_sources(params, c, encdec.encode(params, c, tokens, real), real)

    sources = map_rows(read)(tokens, lengths)
    step_row = partial(encdec.decode_step, params, c)
    # Samples share the sources of their prompt: the inner map leaves them whole.
    step_all = map_rows(jax.vmap(step_row, in_axes=(0, None, None, 0)), in_axes=(0, None, 0, 0), rules=SAMPLING)
    keys = jax.vmap(lambda r: jax.random.fold_in(jax.random.fold_in(seed, r[0]), r[1]))(requests.reshape(N * n, 2))
    empty = jnp.zeros((N, n, c.num_heads, R, c.head_dim), c.dtype)
    state = {
        "step": jnp.int32(0),
        "token": jnp.full((N, n), c.start_id, jnp.int32),
        "rings": [(empty, empty)] * c.num_decoder_layers,
        "active": jnp.broadcast_to(lengths[:, None] > 0, (N, n)),
        "stopped": jnp.zeros((N, n), bool),
        "count": jnp.zeros((N, n), jnp.int32),
        "tokens": jnp.zeros((N, n, R), jnp.int32),
        "logprobs": jnp.zeros((N, n, R), jnp.float32),
        "sample_logprobs": jnp.zeros((N, n, R), jnp.float32),
    }

    def body(s: dict[str, Any]) -> dict[str, Any]:
        hidden, rings = step_all(s["token"], s["step"], sources, s["rings"])  # [N, n, E]
        logits = decoder.unembed(params, c, hidden).reshape(N * n, -1)
        drawn = sample_tokens(logits, keys, jnp.broadcast_to(s["step"], (N * n,)), sampling_params, sampler)
        token, logprob, sample_logprob = (x.reshape(N, n) for x in drawn)
        ended = s["active"] & is_stop(token.reshape(-1), sampler).reshape(N, n)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[:, :, s["step"]].set(jnp.where(s["active"], new, 0))

        return {
            "step": s["step"] + 1,
            "token": token,
            "rings": rings,
            "active": s["active"] & ~ended,
            "stopped": s["stopped"] | ended,
            "count": s["count"] + s["active"],
            "tokens": put(s["tokens"], token),
            "logprobs": put(s["logprobs"], logprob),
            "sample_logprobs": put(s["sample_logprobs"], sample_logprob),
        }

    state = jax.lax.while_loop(lambda s: jnp.any(s["active"]) & (s["step"] < R), body, state)
    return {k: state[k] for k in ("tokens", "logprobs", "sample_logprobs", "count", "stopped")}


@partial(mesh_jit, static_argnames="config")
def prepare(params: Params, config: Any) -> Params:
    """Returns parameters as decoding reads them: matrices in the compute dtype, the decoder's layers unstacked."""

    def cast(name: str, x: jax.Array) -> jax.Array:
        return x.astype(config.dtype) if name.endswith("kernel") or name == "embed/table" else x

    params = encdec.unstack(tree.map_named(cast, params), config)
    return {k: constrain_tree({k: v}, decoder.PARAM_AXES, rules_of(k))[k] for k, v in params.items()}


def rules_of(part: str) -> Rules:
    """Returns how a part of the parameters is split: reading many tokens at once is like training, writing is not."""
    return Rules() if part == "encoder" else SAMPLING


def encode_prompts(model: Model, prompts: Sequence[Any], prefix: Any = "") -> list[list[int]]:
    """Returns what the encoder reads of each prompt; a text gets an end-of-text token, lists of ids are taken as they are.

    Raises:
      UserError: text for a model without tokenizer, an empty prompt, an id outside the vocabulary, or too long a one.
    """
    if isinstance(prompts, str):
        raise UserError("prompts is a list of texts, or of lists of token ids: put the text in [ ]")
    text = any(isinstance(p, str) for p in prompts) or isinstance(prefix, str) and prefix
    if model.tokenizer is None and text:
        raise UserError("this model has no tokenizer (no tokenizer files in its folder): pass lists of token ids")
    rows = []
    for i, p in enumerate(prompts):
        if isinstance(p, str) and isinstance(prefix, str):
            rows.append(encoder_ids(model, prefix + p))
        else:
            head = model.tokenizer.encode(prefix) if isinstance(prefix, str) and prefix else list(prefix)
            rows.append([*head, *(encoder_ids(model, p) if isinstance(p, str) else map(int, p))])
        if not rows[-1]:
            raise UserError(f"prompt {i} is empty: give it at least one token")
        bad = next((t for t in rows[-1] if not 0 <= t < model.config.vocab_size), None)
        if bad is not None:
            raise UserError(
                f"prompt {i}: token id {bad} is outside the model's vocabulary of {model.config.vocab_size}"
            )
        if len(rows[-1]) > (limit := model.config.max_positions):
            raise UserError(f"prompt {i}: {len(rows[-1])} tokens exceed the model's {limit}; shorten the prompt")
    return rows


def stream(
    model: Model,
    rows: Sequence[Sequence[int]],
    buckets: Sequence[tuple[int, Sequence[int]]],
    *,
    max_new_tokens: int,
    sampling_params: SamplingParams,
    n: int,
    stop: tuple[str, ...],
    seed: int,
    slots: int,
) -> Iterator[tuple[int, int, Completion]]:
    """Yields (prompt index, sample index, completion), a batch of prompts at a time.

    Args:
      rows: ids per prompt. buckets: (padded length, prompt indices). slots: rows decoded side by side.
    """
    c = model.config
    params = prepare(model.params, c)
    group = max(1, slots // n)
    for length, members in buckets:
        sampler = Sampler(
            config=c,
            stop_ids=model.stop_ids,
            slots=group * n,
            prompt_length=length,
            max_new=max_new_tokens,
            vocab_limit=scoring.text_limit(c, model.tokenizer),
        )
        for at in range(0, len(members), group):
            chosen = list(members[at : at + group])
            tokens, lengths = np.zeros((group, length), np.int32), np.zeros(group, np.int32)
            for r, i in enumerate(chosen):
                tokens[r, : len(rows[i])], lengths[r] = rows[i], len(rows[i])
            ids = np.asarray(chosen + [0] * (group - len(chosen)), np.int32)
            requests = np.stack(np.broadcast_arrays(ids[:, None], np.arange(n, dtype=np.int32)[None]), axis=-1)
            arrays = put_global_batch((tokens, lengths, requests), model.mesh)
            found = to_host(sample_rows(params, sampler, *arrays, tree.random_key(seed), sampling_params))
            for r, i in enumerate(chosen):
                for j in range(n):
                    yield i, j, _completion(model, {k: v[r, j] for k, v in found.items()}, stop)


def _completion(model: Model, row: dict[str, Any], stop: tuple[str, ...]) -> Completion:
    count, ended = int(row["count"]), bool(row["stopped"])
    ids = row["tokens"][:count].tolist()
    text = None
    if model.tokenizer is not None:
        text, count, ended = model.tokenizer.finish(ids, stop, stopped=ended)
    probs = (row[k][:count].tolist() for k in ("logprobs", "sample_logprobs"))
    return Completion(text, ids[:count], *probs, ended)
