"""Completions with thoughts, from prompts: the host half of `decode`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qstar import tree
from qstar.errors import UserError, require
from qstar.mesh import put_global_batch, to_host
from qstar.models.model import Model
from qstar.models.thought_config import ThoughtConfig
from qstar.sample import batching, sampler
from qstar.sample.logits import SamplingParams
from qstar.thoughts import decode
from qstar.types import Completion

ROWS = 64  # texts written side by side


@dataclasses.dataclass(frozen=True)
class ThoughtfulCompletion(Completion):
    """A completion, and the thought that came before each of its tokens."""

    thoughts: list[list[int]]  # S tokens each
    mix_weights: list[float]  # of the thought, each


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    thoughts: ThoughtConfig | bool = True,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    n: int = 1,
    stop: Sequence[str] = (),
    seed: int = 0,
    prefix: str | Sequence[int] = "",
    slots: int | None = None,
) -> list[list[ThoughtfulCompletion]]:
    """Samples n completions of every prompt, thinking before every token (paper, section 4; majority votes take n > 1).

    Args:
      thoughts: how to think, or True for the model's own config; its `temperature` is that of the thoughts (0: greedy, as
        the paper evaluates). Its forbidden ids are not written either, the EOS excepted. The rest is as in
        `sample.batching.generate`.

    Returns:
      Per prompt, n `ThoughtfulCompletion`s: what `qstar.generate` returns, with the thoughts beside each token.

    Raises:
      UserError: a model that cannot think, or see `sample.batching.generate`.
    """
    t = model.config.thoughts if thoughts is True else thoughts
    require(
        (isinstance(t, ThoughtConfig), "thoughts=True needs a model whose config has thoughts; pass a ThoughtConfig")
    )
    missing = sorted({"thoughts", "mixing"} - model.params.keys())
    require(
        (
            not missing,
            f"the model has no parameters {' and '.join(missing)}; add them with models.heads.attach_thoughts",
        )
    )
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    batching._check_knobs(max_new_tokens, temperature, top_k, top_p, n, stop)
    if stop and model.tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this model has none; pass tokens and rely on the EOS id")
    shared, rows = batching._encode(model, prompts, prefix)
    rows = [[*shared, *row] for row in rows]
    batching._check_lengths(model, [], rows, max_new_tokens)
    sampler_config = _sampler_config(model, t, max_new_tokens)
    sampling_params, thought_temperature, key = (
        SamplingParams.make(temperature, top_k, top_p),
        jnp.float32(t.temperature),
        tree.random_key(seed),
    )
    params = sampler.prepare(model.params, model.config)
    out: list[list[tuple[int, ThoughtfulCompletion]]] = [[] for _ in prompts]
    requests = sorted(((i, k) for i in range(len(rows)) for k in range(n)), key=lambda r: len(rows[r[0]]))
    size = min(slots or ROWS, batching._power_of_two(len(requests)))
    for begin in range(0, len(requests), size):
        some = requests[begin : begin + size]
        padded = [*some, *[some[-1]] * (size - len(some))]
        tokens = np.zeros((size, batching.padded_length(max(len(rows[i]) for i, _ in some))), np.int32)
        for r, (i, _) in enumerate(padded):
            tokens[r, : len(rows[i])] = rows[i]
        lengths = np.asarray([len(rows[i]) for i, _ in padded], np.int32)
        keys = jax.vmap(lambda r: jax.random.fold_in(jax.random.fold_in(key, r[0]), r[1]))(jnp.asarray(padded))
        tokens, lengths = put_global_batch((tokens, lengths), model.mesh)
        output = to_host(
            decode.generate(params, sampler_config, tokens, lengths, keys, sampling_params, thought_temperature)
        )
        for r, (i, k) in enumerate(some):
            out[i].append((k, _completion(model, output, r, stop, rows[i])))
    return [[c for _, c in sorted(row, key=lambda pair: pair[0])] for row in out]


def _sampler_config(model: Model, t: ThoughtConfig, max_new: int) -> decode.ThoughtSamplerConfig:
    config, tokenizer = model.config, model.tokenizer
    limit = min(tokenizer.vocab_size, config.vocab_size) if tokenizer else config.vocab_size
    one = config.replace(thoughts=t.replace(talk_tokens=1))
    return decode.ThoughtSamplerConfig(one, model.stop_ids, max_new, limit)


def _completion(
    model: Model, output: decode.SamplerOutput, r: int, stop: tuple[str, ...], prompt: list[int]
) -> ThoughtfulCompletion:
    """Row r up to its end, or to the first stop string."""
    count, ended, text = int(output.count[r]), bool(output.stopped[r]), None
    ids = output.tokens[r, :count].tolist()
    if model.tokenizer is not None:
        text, count, ended = model.tokenizer.finish(ids, stop, after=prompt, stopped=ended)
    return ThoughtfulCompletion(
        text,
        ids[:count],
        output.logprobs[r, :count].tolist(),
        output.sample_logprobs[r, :count].tolist(),
        ended,
        output.thoughts[r, :count].tolist(),
        output.weights[r, :count].tolist(),
    )
