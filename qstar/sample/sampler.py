"""The jitted half of sampling: prefix, refill and decode over a fixed set of slots.

A slot holds one completion in progress. Its keys live in three segments: the few-shot prefix (one copy for all slots),
the prompt (left aligned, one per slot), and the generated tokens. The last is a ring that all slots write at the *same*
column, `step mod R`: one contiguous update per layer and step, whatever each row's own length is. Which columns belong
to a row follows from the step at which it was born. A finished row's slot is refilled without touching the others.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from qstar import tree
from qstar.mesh import SAMPLING, constrain, constrain_tree, map_rows, mesh_jit
from qstar.models import decoder
from qstar.models.attention import text_mask
from qstar.models.config import ModelConfig
from qstar.sample.logits import NEG, SamplingParams, sample_token
from qstar.types import Params, RingKVCache, Segment

KVCache = list[tuple[jax.Array, jax.Array]]  # (keys, values) per layer


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The static side: hashable, so each set of shapes compiles once."""

    config: ModelConfig
    stop_ids: tuple[int, ...]
    slots: int  # B
    prompt_length: int  # Lp, padded
    max_new: int  # R, the ring's columns and the longest completion
    vocab_limit: int  # ids from here on have no text (a padded vocabulary): never drawn


@flax.struct.dataclass
class SampleState:
    """The dynamic side. B slots; caches hold one (keys, values) pair per layer."""

    prompt: Any  # per layer [B, G, Lp, K]
    ring: Any  # per layer [B, G, R, K]
    prompt_len: jax.Array  # [B] int32
    start_step: jax.Array  # [B] int32: `step` when the row was filled
    count: jax.Array  # [B] int32: tokens drawn so far
    limit: jax.Array  # [B] int32: most tokens to draw
    active: jax.Array  # [B] bool
    stopped: jax.Array  # [B] bool: drew a stop id
    token: jax.Array  # [B] int32: last token drawn, fed next
    key: jax.Array  # [B] random keys, one per request: draws do not depend on slot or neighbours
    tokens: jax.Array  # [B, R] int32
    logprobs: jax.Array  # [B, R] float32, under the model
    sample_logprobs: jax.Array  # [B, R] float32, under the distribution drawn from
    step: jax.Array  # [] int32


class Prefix(NamedTuple):
    """The shared few-shot prefix: keys and values [G, P, K] per layer, and how many of the P are real."""

    pairs: KVCache
    length: jax.Array  # [] int32


class PrefillBatch(NamedTuple):
    """N prompts to prefill and the M slots they go to (a slot number of B or more means: drop)."""

    tokens: jax.Array  # [N, Lp] int32, right padded
    lengths: jax.Array  # [N] int32
    slot: jax.Array  # [M] int32
    source: jax.Array  # [M] int32: which of the N prompts
    limit: jax.Array  # [M] int32
    request: jax.Array  # [M, 2] int32: which prompt, and which of its samples; folded into the seed


@partial(mesh_jit, static_argnames="config")
def prepare(params: Params, config: ModelConfig) -> Params:
    """Returns parameters as the decode loop reads them: matrices in the compute dtype, layers unstacked, split for it."""

    def cast(name: str, x: jax.Array) -> jax.Array:
        wide = name.endswith(("kernel", "table")) and x.dtype != jnp.int8
        return x.astype(config.dtype) if wide else x

    params = tree.map_named(cast, params)
    params = {**params, "layers": decoder.unstack(params["layers"], config)}
    return constrain_tree(params, decoder.PARAM_AXES, SAMPLING)


def empty_state(sampler: Sampler) -> SampleState:
    """Returns a state with no active row."""
    c, B, R = sampler.config, sampler.slots, sampler.max_new

    def cache(length: int) -> KVCache:
        shape = (B, c.num_kv_heads, length, c.head_dim)
        return [(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)) for _ in range(c.num_layers)]

    def zeros(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((B, *shape), dtype)

    return SampleState(
        prompt=cache(sampler.prompt_length),
        ring=cache(R),
        prompt_len=zeros(jnp.int32),
        start_step=zeros(jnp.int32),
        count=zeros(jnp.int32),
        limit=zeros(jnp.int32),
        active=zeros(bool),
        stopped=zeros(bool),
        token=zeros(jnp.int32),
        key=jax.random.split(jax.random.key(0), B),
        tokens=zeros(jnp.int32, R),
        logprobs=zeros(jnp.float32, R),
        sample_logprobs=zeros(jnp.float32, R),
        step=jnp.int32(0),
    )


@partial(mesh_jit, static_argnames="config")
def prefill_prefix(params: Params, config: ModelConfig, tokens: jax.Array, length: jax.Array) -> Prefix:
    """Runs the shared prefix once. tokens: [P] int32, right padded (P may be 0); length: how many are real."""
    if not tokens.shape[0]:
        none = jnp.zeros((config.num_kv_heads, 0, config.head_dim), config.dtype)
        return Prefix([(none, none)] * config.num_layers, length)
    mask = text_mask(None, tokens.shape[0], config.sliding_window)
    _, pairs = decoder.forward(params, config, tokens, jnp.arange(tokens.shape[0]), mask)
    return Prefix([tuple(constrain(x, ("heads", None, None), SAMPLING) for x in pair) for pair in pairs], length)


@partial(mesh_jit, static_argnames="sampler", donate_argnames="state")
def insert_requests(
    params: Params,
    sampler: Sampler,
    prefix: Prefix,
    state: SampleState,
    fill: PrefillBatch,
    seed: jax.Array,
    sampling_params: SamplingParams,
) -> SampleState:
    """Prefills N prompts, draws the first token of M rows (several samples share a prefill) and seats them."""
    config = sampler.config
    offsets = jnp.arange(sampler.prompt_length)
    own_mask = text_mask(None, sampler.prompt_length, config.sliding_window)

    def prefill(tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, KVCache]:
        positions = prefix.length + offsets
        past = [_prefix_segments(pair, prefix, positions, config) for pair in prefix.pairs]
        hidden, pairs = decoder.forward(params, config, tokens, positions, own_mask, past)
        return hidden[length - 1], pairs

    hidden, pairs = map_rows(prefill, rules=SAMPLING)(fill.tokens, fill.lengths)  # [N, E], per layer [N, G, Lp, K]
    keys = jax.vmap(lambda r: jax.random.fold_in(jax.random.fold_in(seed, r[0]), r[1]))(fill.request)
    logits = decoder.unembed(params, config, hidden)[fill.source]  # [M, V]
    token, logprob, sample_logprob = sample_tokens(logits, keys, jnp.zeros_like(fill.slot), sampling_params, sampler)

    def write_slot(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[fill.slot].set(new, mode="drop")

    stopped = is_stop(token, sampler)
    first = jnp.arange(sampler.max_new) == 0
    rows = fill.slot.shape[0]
    return state.replace(
        prompt=jax.tree.map(lambda old, new: write_slot(old, new[fill.source]), state.prompt, pairs),
        prompt_len=write_slot(state.prompt_len, fill.lengths[fill.source]),
        start_step=write_slot(state.start_step, jnp.broadcast_to(state.step, (rows,))),
        count=write_slot(state.count, jnp.ones(rows, jnp.int32)),
        limit=write_slot(state.limit, fill.limit),
        active=write_slot(state.active, ~stopped & (fill.limit > 1)),
        stopped=write_slot(state.stopped, stopped),
        token=write_slot(state.token, token),
        key=write_slot(state.key, keys),
        tokens=write_slot(state.tokens, jnp.where(first, token[:, None], 0)),
        logprobs=write_slot(state.logprobs, jnp.where(first, logprob[:, None], 0.0)),
        sample_logprobs=write_slot(state.sample_logprobs, jnp.where(first, sample_logprob[:, None], 0.0)),
    )


@partial(mesh_jit, static_argnames="sampler", donate_argnames="state")
def decode(
    params: Params,
    sampler: Sampler,
    prefix: Prefix,
    state: SampleState,
    sampling_params: SamplingParams,
    cancel: jax.Array,
    min_active_rows: jax.Array,
    max_steps: jax.Array,
) -> SampleState:
    """Decodes until no more than `min_active_rows` rows are active, or for `max_steps` steps.

    Args:
      cancel: [B] bool, rows that the host has ended (a stop string).
      leave_at: 0 runs to the end of every row; more leaves early, so that freed slots can be refilled.
    """
    state = state.replace(active=state.active & ~cancel)
    end = state.step + max_steps

    def going(s: SampleState) -> jax.Array:
        return (jnp.sum(s.active) > min_active_rows) & (s.step < end)

    return jax.lax.while_loop(going, lambda s: _step(params, sampler, prefix, s, sampling_params), state)


def _step(
    params: Params, sampler: Sampler, prefix: Prefix, state: SampleState, sampling_params: SamplingParams
) -> SampleState:
    """Feeds every row's last token and draws its next one."""
    config, R = sampler.config, sampler.max_new
    column = jnp.mod(state.step, R)
    age = jnp.mod(state.step - jnp.arange(R), R)  # steps since each column was written; 0 is this step's own

    def row(token, prompt_len, start_step, prompt, ring):
        fed = state.step - start_step  # tokens of this row in the ring before this one
        position = prefix.length + prompt_len + fed
        in_prompt = jnp.arange(sampler.prompt_length) < prompt_len
        in_ring = age <= fed
        if config.sliding_window is not None:
            in_prompt &= prompt_len + fed - jnp.arange(sampler.prompt_length) < config.sliding_window
            in_ring &= age < config.sliding_window
        past = [
            [
                *_prefix_segments(pre, prefix, position[None], config),
                Segment(*pro, in_prompt, positions=prefix.length + jnp.arange(sampler.prompt_length)),
                RingKVCache(*rin, in_ring, column, position - age),
            ]
            for pre, pro, rin in zip(prefix.pairs, prompt, ring)
        ]
        hidden, ring = decoder.forward(params, config, token[None], position[None], None, past)
        return hidden[0], ring

    hidden, ring = map_rows(row, rules=SAMPLING)(
        state.token, state.prompt_len, state.start_step, state.prompt, state.ring
    )
    logits = decoder.unembed(params, config, hidden)
    token, logprob, sample_logprob = sample_tokens(logits, state.key, state.count, sampling_params, sampler)
    here = (jnp.arange(R) == state.count[:, None]) & state.active[:, None]  # [B, R]
    count = state.count + state.active
    stopped = state.stopped | (state.active & is_stop(token, sampler))
    return state.replace(
        ring=ring,
        token=token,
        count=count,
        stopped=stopped,
        active=state.active & ~stopped & (count < state.limit),
        tokens=jnp.where(here, token[:, None], state.tokens),
        logprobs=jnp.where(here, logprob[:, None], state.logprobs),
        sample_logprobs=jnp.where(here, sample_logprob[:, None], state.sample_logprobs),
        step=state.step + 1,
    )


def _prefix_segments(
    pair: tuple[jax.Array, jax.Array], prefix: Prefix, positions: jax.Array, config: ModelConfig
) -> list[Segment]:
    """The prefix as queries at `positions` [T] see it: its real tokens, within the window; nothing if there is none."""
    index = jnp.arange(pair[0].shape[1])
    if not index.shape[0]:
        return []
    mask = jnp.broadcast_to(index < prefix.length, (positions.shape[0], index.shape[0]))
    if config.sliding_window is not None:
        mask &= positions[:, None] - index < config.sliding_window
    return [Segment(*pair, mask, positions=index)]


def sample_tokens(logits, keys, counts, sampling_params, sampler):
    """Draws a token per row: [B, V] logits, per-request keys, and how many tokens each request has drawn before."""
    if sampler.vocab_limit < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < sampler.vocab_limit, logits, NEG)
    # Made where the vocabulary's parts are; then a row's whole vocabulary to one device, rather than all rows' to all.
    logits = constrain(constrain(logits, ("batch", "vocab"), SAMPLING), ("rows", None))
    u = jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n)))(keys, counts)
    return jax.vmap(sample_token, in_axes=(0, 0, None))(logits, u, sampling_params)


def is_stop(token: jax.Array, sampler: Sampler) -> jax.Array:
    """Returns bool [B]: which of the tokens [B] end a completion."""
    if not sampler.stop_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.any(token[:, None] == jnp.asarray(sampler.stop_ids), axis=-1)
