"""Records that several packages share, and the table of axis letters.

Shapes in docstrings use these letters; einops patterns use the same letters in lower case.

    B  sequences (rows) of a batch          N  positions of a text
    T  tokens of a sequence (queries)       M  those of the N positions with thoughts
    C  keys attended to (context)           P  passes: thoughts sampled per position
    D  features: width of the model         S  steps: content tokens of a thought
    F  features inside the MLP              A  talk tokens: tokens ahead that a thought is to predict
    H  query heads                          U  tokens of a thread: start, S, end, A - 1
    G  key/value heads                      I  tokens of a prompt (input)
    Q  query heads per key/value head       R  tokens of a response; columns of a ring cache
    K  size of a head                       X  pairs (chosen, rejected) of a row
    L  layers                               V  vocabulary
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax

Params = dict[str, Any]  # a plain nested dict of arrays
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight); only `train.step` divides


class Segment(NamedTuple):
    """Keys and values that queries attend to, with their mask.

    Attention concatenates the scores of a list of segments, never their keys.
    """

    # So a segment that many queries share (a few-shot prefix, the text under a thought) is stored once and stays
    # unmapped under `vmap`.
    keys: jax.Array  # [G, C, K]
    values: jax.Array  # [G, C, K]
    # Bool, broadcastable to [T, C], or `models.layers.Mask`; None = all keys are visible.
    mask: Any
    bias: jax.Array | None = None  # float32 [H, T, C] added to the scores (relative positions)
    positions: jax.Array | None = None  # [C] int32, of the keys; only decoders with relative positions need them


class Shared(NamedTuple):
    """A `Segment` whose mask is a range of keys per query, computed in tiles: see `models.prefix_attention`."""

    keys: jax.Array  # [G, C, K]
    values: jax.Array  # [G, C, K]
    mask: Any  # int32 [T, 2]: query t attends to keys mask[t, 0] <= c < mask[t, 1]; or `models.attention.LayerMasks`


class RingKVCache(NamedTuple):
    """Keys and values that a block first writes its own token into, and then attends to."""

    # Written before it is read, so that XLA updates the cache in place: a block that attends to the old cache and
    # returns the new token separately costs a copy of the whole cache at every step.
    keys: jax.Array  # [G, R, K]
    values: jax.Array  # [G, R, K]
    mask: Any  # bool [R] or `models.layers.Mask`: columns that the token attends to, its own included
    column: jax.Array  # [] int32: column of the token, the same for all rows that are decoded together
    positions: jax.Array | None = None  # [R] int32, as in `Segment`


class Batch(flax.struct.PyTreeNode):
    """Training rows. `mask` is 1 where the token itself is to be predicted (from the tokens before it)."""

    tokens: jax.Array  # [B, T] int32
    mask: jax.Array  # [B, T] float32
    segment_ids: jax.Array  # [B, T] int32; 1.. per document of the row, 0 = padding
    positions: jax.Array  # [B, T] int32; from 0 in every document


class Responses(flax.struct.PyTreeNode):
    """Training rows with prompt and response in separate arrays: encoder-decoders, RL, distillation."""

    prompt: jax.Array  # [B, I] int32
    prompt_mask: jax.Array  # [B, I] int32, see `scoring.response_states`
    response: jax.Array  # [B, R] int32
    mask: jax.Array  # [B, R] float32: 1 for the response's tokens, EOS among them


class Preference(flax.struct.PyTreeNode):
    """Pairs of a chosen and a rejected completion, each pair within one row, so that any split of the rows keeps it whole.

    In a row, segment 2x + 1 is the chosen and segment 2x + 2 the rejected completion of pair x, each after its prompt.
    """

    rows: Batch  # [B, T]; the mask is 1 on completions, EOS included
    reference: jax.Array  # [B, X, 2] float32: log p(chosen), log p(rejected) under the reference
    weight: jax.Array  # [B, X] float32: 1 where there is a pair


class Graded(flax.struct.PyTreeNode):
    """Completions with labels of correctness at some of their tokens: training rows of a value head."""

    rows: Batch  # [B, T]; the mask is on the tokens of the language-model loss (see `train.preference.value_loss`)
    labels: jax.Array  # [B, T] float32 in [0, 1]: probability that the solution up to this token is (or ends) correct
    weight: jax.Array  # [B, T] float32: 1 where the value head is trained
    lm_scale: jax.Array | None = None  # [B], one number: labelled tokens per LM token over all data; None: of the batch


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    text: str | None  # None for a model without a tokenizer
    tokens: list[int]  # as sampled, with the stop token if one was drawn; a stop string may end within the last
    logprobs: list[float]  # of each token under the model (temperature 1, no filter)
    sample_logprobs: list[float]  # of each token under the distribution it was sampled from
    stopped: bool  # False: cut off by max_new_tokens


@dataclasses.dataclass
class Rollout:
    """One scored attempt at a problem: a row of a run folder's rationales, evaluations and sampling stages."""

    # No times, so that the file is byte-identical after a resume.
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
    verdict: str  # "kept", "rationalised" or "rejected"; "" until `runs.rollouts.select` has decided
    reason: str
    truncated: bool
    valid: bool | None  # whether every step is correct; None where the task cannot check steps
    logprob: float  # sum over the sampled tokens, under the model; also of those behind the kept text
    n_tokens: int  # sampled; `completion` may end before them
    tokens: list[int] | None = None  # of `completion` and its end, to train on: see `runs.rollouts.kept_tokens`
