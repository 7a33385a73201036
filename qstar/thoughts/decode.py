"""Generation with a thought before every token: the text is cached, and each thought's own cache is discarded.

A thought at the last position needs only that text's keys and values, which no thought changes. So an emitted token
costs one text token and S + 2 thread tokens, whatever the length of the text (the official code runs the whole text
with thoughts at every position, for every token). The result equals `replay` with A = 1 at that position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qstar import tree
from qstar.errors import UserError, require
from qstar.mesh import count_shards, map_rows, mesh_jit, put_global_batch, to_host
from qstar.models import decoder
from qstar.models.attention import within_window
from qstar.models.config import ModelConfig
from qstar.models.model import Model
from qstar.models.scoring import power_of_two, text_limit
from qstar.models.thought_config import ThoughtConfig
from qstar.sample import batching
from qstar.sample.logits import NEG, SamplingParams, sample_token
from qstar.sample.sampler import Sampler, is_stop, prepare
from qstar.thoughts import forward, layout
from qstar.thoughts.rollout import draw_tokens
from qstar.types import Batch, Completion, Params, Segment

ROWS = 64  # texts continued side by side


@dataclasses.dataclass(frozen=True)
class ThoughtfulCompletion(Completion):
    """A completion, and the thought before each of its tokens."""

    thoughts: list[list[int]]  # S tokens each
    mix_weights: list[float]  # of the thought, each


class SamplerOutput(NamedTuple):
    """Tokens and thoughts of B rows (R = max_new), of which the first `count` of each are real."""

    tokens: jax.Array  # [B, R] int32
    logprobs: jax.Array  # [B, R] float32, under the model with its thought
    sample_logprobs: jax.Array  # [B, R] float32, under the distribution drawn from
    weights: jax.Array  # [B, R] float32, mixing weight of the thought before each token
    thoughts: jax.Array  # [B, R, S] int32
    count: jax.Array  # type: ignore[assignment]  # [B] int32; hides `tuple.count`, which nothing calls
    stopped: jax.Array  # [B] bool: the last token is a stop id


class _State(NamedTuple):
    step: jax.Array  # []
    batch: Batch  # [B, N + R]: the text so far, then padding
    texts: forward.PrefixCache  # hidden [B, N + R, D], pairs of as many tokens
    length: jax.Array  # [B] tokens of the text so far
    active: jax.Array  # [B]
    out: SamplerOutput


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    thoughts: ThoughtConfig | bool = True,
    **options: Any,
) -> list[list[ThoughtfulCompletion]]:
    """Samples n completions of every prompt, with a thought before every token.

    Args:
      thoughts: a config, or True for the model's own; `temperature` is that of the thoughts (0: greedy, as the paper
        evaluates). Its forbidden ids are not written either, except stop ids.
      options: see `sample.batching.SamplingOptions`.

    Returns:
      Per prompt, n `ThoughtfulCompletion`s: what `qstar.generate` returns, with the thought before each token.

    Raises:
      UserError: a model that cannot think, or was trained to think otherwise, or see `sample.batching.generate`.
    """
    t = model.config.thoughts if thoughts is True else thoughts
    if not isinstance(t, ThoughtConfig):
        raise UserError("thoughts=True needs a model whose config has thoughts; pass a ThoughtConfig")
    missing = " and ".join(sorted({"thoughts", "mixing"} - model.params.keys()))
    o = batching.SamplingOptions(**options)
    require(
        (not missing, f"the model has no parameters {missing}; add them with models.heads.attach_thoughts"),
        (not o.weights, "weights='int8' samples without thoughts; leave it out"),
    )
    t.check_trained(model.config.thoughts)
    shared, rows = batching.encode_prompts(model, prompts, o)
    stop_ids, texts = batching.split_stops(model, o.stop)
    # No shared prefix cache here: thoughts read one cache per row, which therefore holds the prefix as well.
    rows = [[*shared, *row] for row in rows]
    assert isinstance(model.config, ModelConfig), "an encoder-decoder has no parameters of thoughts"
    # Only the next token is predicted, so no true tokens follow the end vector.
    config = model.config.replace(thoughts=t.replace(talk_tokens=1))
    limit = text_limit(config, model.tokenizer)
    settings = o.sampling_params(), jnp.float32(t.temperature)
    params, key = prepare(model.params, model.config), tree.random_key(o.seed)
    out: list[list[Any]] = [[None] * o.n for _ in rows]
    # By length: the rows of a chunk are padded to its longest prompt.
    requests = sorted(((i, k) for i in range(len(rows)) for k in range(o.n)), key=lambda r: len(rows[r[0]]))
    # Rows that do not divide over the mesh would be computed by every device.
    shards = count_shards(model.mesh)
    size = -(-min(o.slots or ROWS, power_of_two(len(requests))) // shards) * shards
    for begin in range(0, len(requests), size):
        some = requests[begin : begin + size]
        # The last chunk repeats a request: all chunks have one number of rows, so no other batch size is compiled.
        padded = [*some, *[some[-1]] * (size - len(some))]
        tokens = np.zeros((size, batching.padded_length(max(len(rows[i]) for i, _ in some))), np.int32)
        for r, (i, _) in enumerate(padded):
            tokens[r, : len(rows[i])] = rows[i]
        sampler = Sampler(config, stop_ids, *tokens.shape, o.max_new_tokens, limit)
        lengths = np.asarray([len(rows[i]) for i, _ in padded], np.int32)
        # Keys by (prompt, sample): draws do not depend on the chunk that a request is in.
        keys = jax.vmap(lambda r: jax.random.fold_in(jax.random.fold_in(key, r[0]), r[1]))(jnp.asarray(padded))
        tokens, lengths = put_global_batch((tokens, lengths), model.mesh)
        output = to_host(generate_rows(params, sampler, tokens, lengths, keys, *settings))
        for r, (i, k) in enumerate(some):
            row = {name: x[r] for name, x in output._asdict().items()}
            plain = batching.completion(model, row, texts, rows[i])
            own_thoughts, mix_weights = (row[k][: len(plain.tokens)].tolist() for k in ("thoughts", "weights"))
            out[i][k] = ThoughtfulCompletion(**vars(plain), thoughts=own_thoughts, mix_weights=mix_weights)
    return out


@partial(mesh_jit, static_argnames="sampler")
def generate_rows(
    params: Params,
    sampler: Sampler,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    sampling_params: SamplingParams,
    temperature: jax.Array,
) -> SamplerOutput:
    """Continues texts, with one thought before every token.

    Args:
      params: a decoder's tree with `thoughts` and `mixing`, its layers a list (`sampler.prepare`) or stacked.
      sampler: its config with thoughts, of one talk token.
      tokens: [B, N] int32, padded on the right. lengths: [B]. keys: [B] random keys, one per row: a row's draws depend
        on its own key and the count of its tokens, not on other rows.
      sampling_params: of the text. temperature: [] temperature of the thoughts, 0 = greedy.
    """

    def going(s: _State) -> jax.Array:
        return jnp.any(s.active) & (s.step < sampler.max_new)

    state = _first(params, sampler, tokens, lengths)
    return jax.lax.while_loop(going, partial(_next, params, sampler, keys, sampling_params, temperature), state).out


def _first(params: Params, sampler: Sampler, tokens: jax.Array, lengths: jax.Array) -> _State:
    (B, N), R, c = tokens.shape, sampler.max_new, sampler.config
    # Caches have their final length from the start, because the carry of `while_loop` has fixed shapes.
    texts = forward.read(params, c, layout.text_batch(tokens, jnp.arange(N) < lengths[:, None]))
    pairs = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, R), (0, 0)]), texts.pairs)
    texts = forward.PrefixCache(jnp.pad(texts.hidden, [(0, 0), (0, R), (0, 0)]), pairs)
    batch = layout.text_batch(jnp.pad(tokens, [(0, 0), (0, R)]), jnp.arange(N + R) < lengths[:, None])
    ids, numbers = (jnp.zeros((B, R), dtype) for dtype in (jnp.int32, jnp.float32))
    thoughts = jnp.zeros((B, R, c.required_thoughts.thought_tokens), jnp.int32)
    out = SamplerOutput(ids, numbers, numbers, numbers, thoughts, jnp.zeros((B,), jnp.int32), jnp.zeros((B,), bool))
    return _State(jnp.int32(0), batch, texts, lengths, jnp.ones((B,), bool), out)


def _next(
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    sampling_params: SamplingParams,
    temperature: jax.Array,
    state: _State,
) -> _State:
    config, thought_params = sampler.config, SamplingParams.make(temperature)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)

    # Numbers 0 .. S-1 of a step draw the thought, number S the token: no number is used twice.
    def uniform(i: Any) -> jax.Array:
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, i)))(keys)

    def draw(i: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Any]:
        token = draw_tokens(params, config, hidden, uniform(i)[:, None, None], thought_params)[0]
        return token, token

    last = state.length[:, None] - 1
    threads, thoughts = forward.rollout_and_talk(params, config, state.batch, state.texts, last, 1, draw)
    states = forward.thought_states(params, config, state.batch, state.texts, last, threads)
    thought, weight = rearrange(thoughts, "s b 1 1 -> b s"), states.weight[:, 0, 0, 0]
    logits = jnp.where(_writable(sampler), decoder.unembed(params, config, states.mixed[:, 0, 0, 0]), NEG)
    u = uniform(config.required_thoughts.thought_tokens)
    token, logprob, sample_logprob = jax.vmap(sample_token, (0, 0, None))(logits, u, sampling_params)
    active, out, stop = state.active, state.out, is_stop(token, sampler)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, 0)
        return old.at[:, state.step].set(new)

    written = [put(old, new) for old, new in zip(out, (token, logprob, sample_logprob, weight, thought))]
    out = SamplerOutput(*[*written, out.count + active, out.stopped | (active & stop)])
    batch, texts = map_rows(partial(_append, params, config))(state.batch, state.texts, state.length, token)
    return _State(state.step + 1, batch, texts, state.length + 1, active & ~stop, out)


def _writable(sampler: Sampler) -> jax.Array:
    # A stop id may be forbidden in thoughts, but the text needs it to end.
    ids = jnp.arange(sampler.config.vocab_size)
    hidden = [i for i in sampler.config.required_thoughts.forbidden_ids if i not in sampler.stop_ids]
    return (ids < sampler.vocab_limit) & ~jnp.isin(ids, jnp.asarray(hidden, jnp.int32))


def _append(
    params: Params, config: ModelConfig, row: Batch, text: forward.PrefixCache, length: jax.Array, token: jax.Array
) -> tuple[Batch, forward.PrefixCache]:
    # The cache is read below index `length` only: the new token attends to itself through the keys of this very call.
    position, index = row.positions[length], jnp.arange(row.tokens.shape[0])
    visible = within_window(config, (index < length)[None], length - index)
    past = forward.past_of(params, lambda pair: [Segment(pair[0], pair[1], visible)], text.pairs)
    hidden, new = decoder.forward(params, config, token[None], position[None], None, past)

    def put(old: jax.Array, new: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), length, axis)

    pairs = jax.tree.map(lambda o, n: put(o, n, o.ndim - 2), text.pairs, new)
    one = jnp.ones((1,), jnp.int32)
    row = Batch(put(row.tokens, token[None]), put(row.mask, one), put(row.segment_ids, one), row.positions)
    return row, forward.PrefixCache(put(text.hidden, hidden), pairs)
