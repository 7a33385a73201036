"""The jitted half of sampling from a decoder: prefix, prefill and decode over a fixed set of slots.

A slot holds one completion in progress. Its keys are in three segments: the few-shot prefix (one copy for all slots),
the prompt (left aligned, one per slot), and the generated tokens. The last is a ring that all slots write at the *same*
column, `step mod R`: one contiguous update per layer and step, whatever each row's own length is. Which columns belong
to a row follows from `start_step`, the step at which its slot was filled. A refill touches no other slot.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat

from qstar import tree
from qstar.mesh import SAMPLING, constrain, constrain_tree, map_rows, mesh_jit
from qstar.models import decoder
from qstar.models.attention import text_mask, within_window
from qstar.models.config import ModelConfig
from qstar.models.layers import with_adapters
from qstar.sample.logits import NEG, SamplingParams, sample_token
from qstar.types import Params, RingKVCache, Segment

KVCache = list[tuple[jax.Array, jax.Array]]  # (keys, values) per layer


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The static arguments: hashable, so each set of shapes compiles once."""

    config: Any  # ModelConfig; EncDecConfig in `sample.seq2seq`
    stop_ids: tuple[int, ...]
    slots: int  # B
    prompt_length: int  # I, padded
    max_new: int  # R, the ring's columns and the longest completion
    vocab_limit: int  # ids from here on have no text (a padded vocabulary): never drawn


class SampleState(flax.struct.PyTreeNode):
    """The dynamic arguments. B slots; caches hold one (keys, values) pair per layer."""

    prompt: Any  # per layer [B, G, I, K]
    ring: Any  # per layer [B, G, R, K]
    prompt_len: jax.Array  # [B] int32
    start_step: jax.Array  # [B] int32: `step` when the slot was filled
    count: jax.Array  # [B] int32: tokens drawn so far
    active: jax.Array  # [B] bool
    stopped: jax.Array  # [B] bool: drew a stop id
    token: jax.Array  # [B] int32: last token drawn, fed next
    key: jax.Array  # [B] random keys, one per request: draws do not depend on slot or neighbours
    tokens: jax.Array  # [B, R] int32
    logprobs: jax.Array  # [B, R] float32, under the model
    sample_logprobs: jax.Array  # [B, R] float32, under the distribution drawn from
    step: jax.Array  # [] int32


class Prefix(NamedTuple):
    """The shared few-shot prefix: keys and values [G, C, K] per layer, and how many of the C are real."""

    pairs: KVCache
    length: jax.Array  # [] int32


class PrefillBatch(NamedTuple):
    """Prompts to prefill, and the rows (requests) that they are for."""

    tokens: np.ndarray  # [prompts, I] int32, right padded
    lengths: np.ndarray  # [prompts] int32
    slot: np.ndarray  # [rows] int32; B or more: the row is dropped
    source: np.ndarray  # [rows] int32: which of the prompts
    request: np.ndarray  # [rows, 2] int32: index of the prompt, and which of its samples; folded into the seed


@partial(mesh_jit, static_argnames="config")
def prepare(params: Params, config: ModelConfig) -> Params:
    """Returns parameters for decoding: matrices in the compute dtype, layers as a list, sharded by `SAMPLING`.

    Adapters beside kernels (`lora.attach`) are merged into them.
    """

    def cast(name: str, x: jax.Array) -> jax.Array:
        # A cast would undo the int8 quantisation.
        matrix = name.endswith(("kernel", "table")) and x.dtype != jnp.int8
        return x.astype(config.dtype) if matrix else x

    params = tree.map_named(cast, params)
    # After the cast: in a kernel's stored bfloat16 a small change would round to nothing.
    params = {**params, "layers": with_adapters(params["layers"])}
    # A scan over stacked layers would slice each layer's matrices out of the stacks at every token: a list takes 1.25
    # to 1.5 times less per token on a CPU (bench generation with thoughts, 4 layers), and caches are updated in place.
    params = {**params, "layers": decoder.unstack(params["layers"])}
    return constrain_tree(params, decoder.PARAM_AXES, SAMPLING)


def empty_state(sampler: Sampler) -> SampleState:
    """Returns a state with no active row."""
    c, B, R = sampler.config, sampler.slots, sampler.max_new

    def cache(length: int) -> KVCache:
        shape = (B, c.num_kv_heads, length, c.head_dim)
        return [(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)) for _ in range(c.num_layers)]

    ints = dict.fromkeys(("prompt_len", "start_step", "count", "token"), jnp.zeros((B,), jnp.int32))
    flags = dict.fromkeys(("active", "stopped"), jnp.zeros((B,), bool))
    floats = dict.fromkeys(("logprobs", "sample_logprobs"), jnp.zeros((B, R), jnp.float32))
    # The state is donated, so no two fields may share a buffer.
    rows = jax.tree.map(jnp.copy, {**ints, **flags, **floats})
    return SampleState(
        prompt=cache(sampler.prompt_length),
        ring=cache(R),
        key=jax.random.split(jax.random.key(0), B),
        tokens=jnp.zeros((B, R), jnp.int32),
        step=jnp.int32(0),
        **rows,
    )


@partial(mesh_jit, static_argnames="config")
def prefill_prefix(params: Params, config: ModelConfig, tokens: jax.Array, length: jax.Array) -> Prefix:
    """Runs the shared prefix once. tokens: [C] int32, right padded (C may be 0); length: how many are real."""
    if not tokens.shape[0]:
        none = jnp.zeros((config.num_kv_heads, 0, config.head_dim), config.dtype)
        return Prefix([(none, none)] * config.num_layers, length)
    mask = text_mask(None, tokens.shape[0], config)
    _, pairs = decoder.forward(params, config, tokens, jnp.arange(tokens.shape[0]), mask)
    split = partial(constrain, axes=("heads", None, None), rules=SAMPLING)
    return Prefix([(split(keys), split(values)) for keys, values in pairs], length)


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
    """Prefills prompts (once for all samples of each), draws the first token of their rows, and fills slots."""
    config = sampler.config
    offsets = jnp.arange(sampler.prompt_length)
    prompt_mask = text_mask(None, sampler.prompt_length, config)

    def prefill(tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, KVCache]:
        positions = prefix.length + offsets
        past = [_prefix_segments(pair, prefix, positions, config) for pair in prefix.pairs]
        hidden, pairs = decoder.forward(params, config, tokens, positions, prompt_mask, past)
        # Padding is on the right: the causal mask alone hides it from the real tokens.
        return hidden[length - 1], pairs

    hidden, pairs = map_rows(prefill, rules=SAMPLING)(fill.tokens, fill.lengths)  # [prompts, D]
    keys = jax.vmap(lambda r: jax.random.fold_in(jax.random.fold_in(seed, r[0]), r[1]))(fill.request)
    # Gathered after the product, which the samples of a prompt share.
    logits = decoder.unembed(params, config, hidden)[fill.source]  # [rows, V]
    token, logprob, sample_logprob = sample_tokens(logits, keys, jnp.zeros_like(fill.slot), sampling_params, sampler)
    stopped = is_stop(token, sampler)

    def first_column(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(sampler.max_new) == 0, x[:, None], jnp.zeros((), x.dtype))

    new = {
        "prompt": jax.tree.map(lambda x: x[fill.source], pairs),
        "prompt_len": fill.lengths[fill.source],
        "start_step": repeat(state.step, "-> rows", rows=fill.slot.shape[0]),
        "count": jnp.ones_like(fill.slot),
        "active": ~stopped & (sampler.max_new > 1),
        "stopped": stopped,
        "token": token,
        "key": keys,
        "tokens": first_column(token),
        "logprobs": first_column(logprob),
        "sample_logprobs": first_column(sample_logprob),
    }
    old = {name: getattr(state, name) for name in new}
    return state.replace(**jax.tree.map(lambda old, new: old.at[fill.slot].set(new, mode="drop"), old, new))


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
      min_active_rows: 0 runs to the end of every row; more ends early, so that freed slots can be refilled.
    """
    state = state.replace(active=state.active & ~cancel)
    end = state.step + max_steps

    def going(s: SampleState) -> jax.Array:
        return (jnp.sum(s.active) > min_active_rows) & (s.step < end)

    return jax.lax.while_loop(going, lambda s: _step(params, sampler, prefix, s, sampling_params), state)


@mesh_jit
def keep_rows(state: SampleState, rows: jax.Array) -> SampleState:
    """Returns the state of fewer slots: those at `rows` [b] int32."""
    return jax.tree.map(lambda x: x[rows] if x.ndim else x, state)


def _step(
    params: Params, sampler: Sampler, prefix: Prefix, state: SampleState, sampling_params: SamplingParams
) -> SampleState:
    config, R = sampler.config, sampler.max_new
    column = jnp.mod(state.step, R)
    age = jnp.mod(state.step - jnp.arange(R), R)  # steps since each column was written; 0 is this step's own
    index = jnp.arange(sampler.prompt_length)

    def row(token: jax.Array, prompt_len: jax.Array, start_step: jax.Array, prompt: KVCache, ring: KVCache) -> Any:
        fed = state.step - start_step  # tokens of this row in the ring before this one
        position = prefix.length + prompt_len + fed
        # Older columns are of the row that had the slot before.
        in_prompt = within_window(config, index < prompt_len, prompt_len + fed - index)
        in_ring = within_window(config, age <= fed, age)
        past = [
            [
                *_prefix_segments(prefix_pair, prefix, position[None], config),
                Segment(*prompt_pair, in_prompt, positions=prefix.length + index),
                RingKVCache(*ring_pair, in_ring, column, position - age),
            ]
            for prefix_pair, prompt_pair, ring_pair in zip(prefix.pairs, prompt, ring)
        ]
        hidden, ring = decoder.forward(params, config, token[None], position[None], None, past)
        return hidden[0], ring

    rows = (state.token, state.prompt_len, state.start_step, state.prompt, state.ring)
    hidden, ring = map_rows(row, rules=SAMPLING)(*rows)
    logits = decoder.unembed(params, config, hidden)
    # Drawn by the row's own count, not by `step`: when a slot was filled does not change its draws.
    token, logprob, sample_logprob = sample_tokens(logits, state.key, state.count, sampling_params, sampler)
    # Rows that have ended are computed as well, for fixed shapes; their draws are not written.
    here = (jnp.arange(R) == state.count[:, None]) & state.active[:, None]  # [B, R]
    count = state.count + state.active
    stopped = state.stopped | (state.active & is_stop(token, sampler))
    return state.replace(
        ring=ring,
        token=token,
        count=count,
        stopped=stopped,
        active=state.active & ~stopped & (count < R),
        tokens=jnp.where(here, token[:, None], state.tokens),
        logprobs=jnp.where(here, logprob[:, None], state.logprobs),
        sample_logprobs=jnp.where(here, sample_logprob[:, None], state.sample_logprobs),
        step=state.step + 1,
    )


def _prefix_segments(
    pair: tuple[jax.Array, jax.Array], prefix: Prefix, positions: jax.Array, config: ModelConfig
) -> list[Segment]:
    index = jnp.arange(pair[0].shape[1])
    if not index.shape[0]:
        return []
    mask = repeat(index < prefix.length, "c -> t c", t=positions.shape[0])
    return [Segment(*pair, within_window(config, mask, positions[:, None] - index), positions=index)]


def sample_tokens(
    logits: jax.Array, keys: jax.Array, counts: jax.Array, sampling_params: SamplingParams, sampler: Sampler
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws a token per row: [B, V] logits, per-request keys, and how many tokens each request has drawn before."""
    if sampler.vocab_limit < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < sampler.vocab_limit, logits, NEG)
    # Computed where the vocabulary's shards are; then a row's whole vocabulary goes to one device only.
    logits = constrain(constrain(logits, ("batch", "vocab"), SAMPLING), ("rows", None))
    u = jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n)))(keys, counts)
    return jax.vmap(sample_token, in_axes=(0, 0, None))(logits, u, sampling_params)


def is_stop(token: jax.Array, sampler: Sampler) -> jax.Array:
    """Returns bool [B]: which of the tokens [B] end a completion."""
    return jnp.isin(token, jnp.asarray(sampler.stop_ids, jnp.int32))
