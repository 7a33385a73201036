"""Text, one token at a time, with a thought before each: the text is cached, the thought's own cache is dropped.

A thought at the last position needs that text's keys and values alone, which no thought ever changes. So an emitted token
costs one text token and S + 2 thread tokens, whatever the length of the text (the official code runs the whole text with
thoughts at every position, for every token). It equals the parallel forward: `replay` with T = 1, at that position.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qstar.mesh import map_rows, mesh_jit
from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.sample.logits import NEG, SamplingParams, sample_token
from qstar.thoughts import forward as thought_forward
from qstar.thoughts import layout
from qstar.thoughts.paths import joint_states
from qstar.thoughts.rollout import draw_tokens
from qstar.types import Batch, Params, Segment


@dataclasses.dataclass(frozen=True)
class ThoughtSamplerConfig:
    """The static side of text generation with thoughts: each set of shapes compiles once."""

    config: ModelConfig  # with thoughts, T = 1
    stop_ids: tuple[int, ...]
    max_new: int
    vocab_limit: int  # ids from here on are never written


class SamplerOutput(NamedTuple):
    """What was written and thought: B rows, of which the first `count` tokens each are real."""

    tokens: jax.Array  # [B, max_new] int32
    logprobs: jax.Array  # [B, max_new] float32, under the model with its thought
    sample_logprobs: jax.Array  # [B, max_new] float32, under the distribution drawn from
    weights: jax.Array  # [B, max_new] float32, mixing weight of the thought before each token
    thoughts: jax.Array  # [B, max_new, S] int32
    count: jax.Array  # [B] int32
    stopped: jax.Array  # [B] bool: the last token is a stop id


class _State(NamedTuple):
    step: jax.Array  # []
    batch: Batch  # [B, N + max_new]: the text so far; what comes is padding
    texts: thought_forward.PrefixCache  # hidden [B, N + max_new, E], pairs of as many tokens
    length: jax.Array  # [B] tokens of the text so far
    active: jax.Array  # [B]
    out: SamplerOutput


@partial(mesh_jit, static_argnames="sampler")
def generate(
    params: Params,
    sampler: ThoughtSamplerConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    sampling_params: SamplingParams,
    temperature: jax.Array,
) -> SamplerOutput:
    """Continues texts, with one thought before every token.

    Args:
      params: a decoder's tree with `thoughts` and `mixing`, its layers listed (`sampler.prepare`) or stacked.
      tokens: [B, N] int32, padded on the right. lengths: [B]. keys: [B] random keys, one per row: a row's draws depend
        on its own key and the count of its tokens, not on its neighbours.
      sampling_params: of the text. temperature: [] temperature of the thoughts, 0 = greedy.
    """
    state = _first(params, sampler, tokens, lengths)
    going = lambda s: jnp.any(s.active) & (s.step < sampler.max_new)  # noqa: E731
    return jax.lax.while_loop(going, partial(_next, params, sampler, keys, sampling_params, temperature), state).out


def _first(params: Params, sampler: ThoughtSamplerConfig, tokens: jax.Array, lengths: jax.Array) -> _State:
    """Reads the prompts; room for what will be written is there from the start."""
    (B, N), new, c = tokens.shape, sampler.max_new, sampler.config
    batch = layout.text_batch(tokens, jnp.arange(N) < lengths[:, None])
    texts = thought_forward.read(params, c, batch)
    pairs = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, new), (0, 0)]), texts.pairs)
    texts = thought_forward.PrefixCache(jnp.pad(texts.hidden, [(0, 0), (0, new), (0, 0)]), pairs)
    batch = layout.text_batch(jnp.pad(tokens, [(0, 0), (0, new)]), jnp.arange(N + new) < lengths[:, None])
    zeros = partial(jnp.zeros, (B, new))
    out = SamplerOutput(
        zeros(jnp.int32),
        zeros(jnp.float32),
        zeros(jnp.float32),
        zeros(jnp.float32),
        jnp.zeros((B, new, c.thoughts.thought_tokens), jnp.int32),
        jnp.zeros((B,), jnp.int32),
        jnp.zeros((B,), bool),
    )
    return _State(jnp.int32(0), batch, texts, lengths, jnp.ones((B,), bool), out)


def _next(
    params: Params,
    sampler: ThoughtSamplerConfig,
    keys: jax.Array,
    sampling_params: SamplingParams,
    temperature: jax.Array,
    state: _State,
) -> _State:
    """Thinks at the last position of every text, draws its next token, and reads it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
    last = state.length - 1
    thought, hidden, weight = think_last(params, sampler.config, state.batch, state.texts, last, keys, temperature)
    logits = decoder.unembed(params, sampler.config, hidden)
    logits = jnp.where(_writable(sampler), logits, NEG)
    u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, sampler.config.thoughts.thought_tokens)))(keys)
    token, logprob, sample_logprob = jax.vmap(sample_token, (0, 0, None))(logits, u, sampling_params)
    stop = jnp.isin(token, jnp.asarray(sampler.stop_ids)) if sampler.stop_ids else jnp.zeros_like(state.active)
    active, out = state.active, state.out

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        kept = active.reshape(-1, *[1] * (new.ndim - 1))
        return old.at[:, state.step].set(jnp.where(kept, new, 0))

    out = SamplerOutput(
        put(out.tokens, token),
        put(out.logprobs, logprob),
        put(out.sample_logprobs, sample_logprob),
        put(out.weights, weight),
        put(out.thoughts, thought),
        out.count + active,
        out.stopped | (active & stop),
    )
    batch, texts = map_rows(partial(_append, params, sampler.config))(state.batch, state.texts, state.length, token)
    return _State(state.step + 1, batch, texts, state.length + 1, active & ~stop, out)


def _writable(sampler: ThoughtSamplerConfig) -> jax.Array:
    """Returns bool [V]: ids that have text, or end it."""
    ids = jnp.arange(sampler.config.vocab_size)
    hidden = [i for i in sampler.config.thoughts.forbidden_ids if i not in sampler.stop_ids]
    return (ids < sampler.vocab_limit) & ~jnp.isin(ids, jnp.asarray(hidden, jnp.int32))


def think_last(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    texts: thought_forward.PrefixCache,
    last: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One thought at position last [B] of each text: its tokens [B, S], the mixed state [B, E], its weight [B]."""
    config = config.replace(thoughts=config.thoughts.replace(talk_tokens=1))
    sampling_params = SamplingParams.make(1.0)._replace(temperature=temperature)

    def choose(i: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Any]:
        u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, i)))(keys)
        token = draw_tokens(params, config, hidden, u[:, None, None], sampling_params)[0]
        return token, token

    states, tokens = joint_states(params, config, batch, texts, last[:, None], 1, choose)
    return tokens[:, :, 0, 0].T, states.mixed[:, 0, 0, 0], states.weight[:, 0, 0, 0]


def _append(
    params: Params,
    config: ModelConfig,
    row: Batch,
    text: thought_forward.PrefixCache,
    length: jax.Array,
    token: jax.Array,
) -> tuple[Batch, thought_forward.PrefixCache]:
    """Reads one more token of one text, at index `length`, into its caches."""
    position = row.positions[length]
    seen = jnp.arange(row.tokens.shape[0]) < length
    if config.sliding_window is not None:
        seen &= length - jnp.arange(row.tokens.shape[0]) < config.sliding_window
    past = thought_forward.past_of(params, lambda pair: [Segment(*pair, seen[None])], text.pairs)
    hidden, new = decoder.forward(params, config, token[None], position[None], None, past)

    def put(old: jax.Array, new: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), length, axis)

    pairs = jax.tree.map(lambda o, n: put(o, n, o.ndim - 2), text.pairs, new)
    one = jnp.ones((1,), jnp.int32)
    row = Batch(put(row.tokens, token[None]), put(row.mask, one), put(row.segment_ids, one), row.positions)
    return row, thought_forward.PrefixCache(put(text.hidden, hidden), pairs)
