"""Pytrees and records that cross floors.

Shape letters used throughout: B sequences (rows), T tokens of one sequence, S keys, V vocabulary, E model width,
H query heads, G key/value heads, K head width, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax

Params = dict[str, Any]  # a plain nested dict of arrays
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight); only `train.step` divides


class Segment(NamedTuple):
    """Keys and values that a query may attend to, with what it may see of them.

    Attention joins the *scores* of a list of segments, never their keys, so that a segment shared by many queries
    (a few-shot prefix, the text under a thought) is stored once and stays unmapped under `vmap`.
    """

    keys: jax.Array  # [G, S, K]
    values: jax.Array  # [G, S, K]
    mask: jax.Array | None  # bool, broadcastable to [T, S]; None = everything is visible
    bias: jax.Array | None = None  # float32 [H, T, S] added to the scores (relative positions)
    positions: jax.Array | None = None  # [S] int32: where the keys stand; decoders with relative positions need it


class Shared(NamedTuple):
    """A `Segment` that `vmap` is to lift over many threads which see parts of the same text: see `models.shared`."""

    keys: jax.Array  # [G, S, K]
    values: jax.Array  # [G, S, K]
    mask: jax.Array  # bool [T, S]


class RingKVCache(NamedTuple):
    """Keys and values that a block first writes its own token into, and then attends to.

    Writing before reading is what lets XLA update the cache in place: a block that attends to the old cache and
    returns the new token apart costs a copy of the whole cache at every step.
    """

    keys: jax.Array  # [G, R, K]
    values: jax.Array  # [G, R, K]
    mask: jax.Array  # bool [R]: what the token sees, its own column included
    column: jax.Array  # [] int32: where the token goes, the same for all rows that are decoded together
    positions: jax.Array | None = None  # [R] int32, as in `Segment`


@flax.struct.dataclass
class Batch:
    """Training rows. `mask` is 1 where the token itself is to be predicted (from the tokens before it)."""

    tokens: jax.Array  # [B, T] int32
    mask: jax.Array  # [B, T] float32
    segment_ids: jax.Array  # [B, T] int32; 1.. per document of the row, 0 = padding
    positions: jax.Array  # [B, T] int32; from 0 in every document


@flax.struct.dataclass
class Responses:
    """Training rows of an encoder-decoder, or of whatever is trained on prompts and responses apart."""

    prompt: jax.Array  # [B, P] int32
    prompt_mask: jax.Array  # [B, P] int32, see `policy.response_states`
    response: jax.Array  # [B, R] int32
    mask: jax.Array  # [B, R] float32: 1 for the response's tokens, EOS among them


@flax.struct.dataclass
class Preference:
    """Pairs of a better and a worse completion. A pair stands in one row, so that any cut of the rows keeps it whole.

    In a row, segment 2p + 1 is the chosen and segment 2p + 2 the rejected completion of pair p, each after its prompt.
    """

    rows: Batch  # [B, T]; the mask is 1 on completions, EOS included
    reference: jax.Array  # [B, P, 2] float32: log p(chosen), log p(rejected) under the reference
    weight: jax.Array  # [B, P] float32: 1 where there is a pair


@flax.struct.dataclass
class Graded:
    """Completions with a judgement of some of their tokens: what a value head learns from."""

    rows: Batch  # [B, T]; the mask is on the tokens whose likelihood is learnt beside (see `value.value_loss`)
    labels: jax.Array  # [B, T] float32 in [0, 1]: the chance that what stands up to this token is (or ends) right
    weight: jax.Array  # [B, T] float32: 1 where the head is asked
    lm_scale: jax.Array | None = None  # [B], one number: judged tokens per learnt one over all data; None: of the batch


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    text: str | None  # None for a model without tokenizer
    tokens: list[int]  # as sampled, with the stop token if one was drawn; a stop string may end within the last
    logprobs: list[float]  # of each token under the model (temperature 1, no filter)
    sample_logprobs: list[float]  # of each token under the distribution it was really drawn from
    stopped: bool  # False: cut off by max_new_tokens


@dataclasses.dataclass
class Rollout:
    """One scored attempt at a problem: a row of `rationales/iter_NNN.jsonl` (no arrays, no times: resume is byte-exact)."""

    problem_id: str
    iteration: int
    sample: int
    hinted: bool
    group: str
    prompt: str
    completion: str
    answer: str | None
    gold: str
    correct: bool
    verdict: str  # "kept", "rationalised" or "rejected"
    reason: str
    truncated: bool
    valid: bool | None  # every step exactly right, where the task can tell
    logprob: float  # sum over the completion's tokens, under the model
    n_tokens: int
    tokens: list[int] | None = None  # of the completion as sampled, and what ends it; None in runs of older versions

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as a plain dict, in order."""
        return dataclasses.asdict(self)
