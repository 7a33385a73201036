"""The jitted half of sampling from an encoder-decoder: a prompt is encoded once, for all its samples.

Rows of a batch begin together, so the cache column is the step for all of them, and no slot is refilled. Draws depend
on (seed, prompt, sample) alone, as in `sample.sampler`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from qstar import tree
from qstar.mesh import SAMPLING, Rules, constrain_tree, map_rows, mesh_jit
from qstar.models import decoder, encdec
from qstar.sample.logits import SamplingParams
from qstar.sample.sampler import Sampler, is_stop, sample_tokens
from qstar.types import Params


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
    """Reads B prompts and writes n responses to each, until all have stopped or `sampler.max_new` tokens are there.

    Args:
      params: as `prepare` returns them. tokens: [B, I] int32, padded on the right. lengths: [B].
      requests: [B, n, 2] int32, (prompt, sample) of each row; folded into the seed.

    Returns:
      tokens int32, logprobs and sample_logprobs float32 [B, n, R] (0 after the end); count and stopped [B, n].
    """
    c, (B, n), R = sampler.config, requests.shape[:2], sampler.max_new

    def read(tokens: jax.Array, length: jax.Array) -> list[Any]:
        real = jnp.arange(tokens.shape[0]) < length
        return encdec.cross_sources(params, c, encdec.encode(params, c, tokens, real), real)

    sources = map_rows(read)(tokens, lengths)
    step_row = partial(encdec.decode_step, params, c)
    # Samples share the sources of their prompt: the inner map leaves them whole.
    step_all = map_rows(jax.vmap(step_row, in_axes=(0, None, None, 0)), in_axes=(0, None, 0, 0), rules=SAMPLING)
    flat = rearrange(requests, "b n pair -> (b n) pair")
    keys = jax.vmap(lambda r: jax.random.fold_in(jax.random.fold_in(seed, r[0]), r[1]))(flat)
    empty = jnp.zeros((B, n, c.num_heads, R, c.head_dim), c.dtype)
    state = {
        "step": jnp.int32(0),
        "token": jnp.full((B, n), c.start_id, jnp.int32),
        "rings": [(empty, empty)] * c.num_decoder_layers,
        "active": repeat(lengths > 0, "b -> b n", n=n),
        "stopped": jnp.zeros((B, n), bool),
        "count": jnp.zeros((B, n), jnp.int32),
        "tokens": jnp.zeros((B, n, R), jnp.int32),
        "logprobs": jnp.zeros((B, n, R), jnp.float32),
        "sample_logprobs": jnp.zeros((B, n, R), jnp.float32),
    }

    def body(s: dict[str, Any]) -> dict[str, Any]:
        hidden, rings = step_all(s["token"], s["step"], sources, s["rings"])  # [B, n, D]
        logits = rearrange(decoder.unembed(params, c, hidden), "b n v -> (b n) v")
        drawn = sample_tokens(logits, keys, repeat(s["step"], "-> rows", rows=B * n), sampling_params, sampler)
        token, logprob, sample_logprob = (rearrange(x, "(b n) -> b n", n=n) for x in drawn)
        ended = s["active"] & rearrange(is_stop(drawn[0], sampler), "(b n) -> b n", n=n)

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
    """Returns parameters for decoding: matrices in the compute dtype, the decoder's layers as a list."""

    def cast(name: str, x: jax.Array) -> jax.Array:
        return x.astype(config.dtype) if name.endswith("kernel") or name == "embed/table" else x

    params = encdec.unstack(tree.map_named(cast, params))
    return {k: constrain_tree({k: v}, decoder.PARAM_AXES, rules_of(k))[k] for k, v in params.items()}


def rules_of(part: str) -> Rules:
    """Returns how a part of the parameters is sharded for sampling."""
    # The encoder as in training: it reads many tokens at once, for which gathering its parameters pays.
    return Rules() if part == "encoder" else SAMPLING
