"""Drawing a token: the inverse CDF against the softmax, the filters against transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qstar.sample.logits import NEG, SamplingParams, filter_top_k_top_p, invert_cdf, sample_token

invert = jax.jit(jax.vmap(lambda w, u: invert_cdf(jnp.log(w), u)[0], (None, 0)))
draw_grid = jax.jit(jax.vmap(sample_token, (None, 0, None)))
KNOBS = [
    (1.0, 0, 1.0),
    (0.3, 0, 1.0),
    (2.5, 0, 1.0),
    (1.0, 5, 1.0),
    (0.7, 0, 0.6),
    (1.3, 20, 0.8),
    (1.0, 1, 1.0),
    (1.0, 1000, 1.0),
    (0.5, 0, 1e-6),
]


def warped(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities [V] that transformers would sample from, in float64."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    out = steps(None, torch.tensor(logits, dtype=torch.float64)[None])[0]
    return torch.softmax(out, -1).numpy()


@pytest.fixture(scope="module", params=[10, 256, 640, 700])
def logits(request):
    return np.random.default_rng(request.param).normal(0, 3, request.param).astype(np.float32)


@pytest.mark.parametrize("sampling_params", KNOBS, ids=str)
def test_frequencies_over_all_uniform_numbers_are_the_filtered_softmax(logits, sampling_params):
    """u runs over a grid of n midpoints, which integrates exactly: each token's share is right to 1 / n."""
    n = 20_000
    u = (np.arange(n, dtype=np.float32) + 0.5) / n
    tokens, logprobs, sample_logprobs = map(np.asarray, draw_grid(logits, u, SamplingParams.make(*sampling_params)))
    expected = warped(logits, *sampling_params)
    share = np.bincount(tokens, minlength=len(logits)) / n
    np.testing.assert_allclose(share, expected, atol=1.5 / n)
    assert (expected[tokens] > 0).all()
    np.testing.assert_allclose(sample_logprobs, np.log(expected[tokens]), atol=1e-4)
    model = torch.log_softmax(torch.tensor(logits), -1).numpy()
    np.testing.assert_allclose(logprobs, model[tokens], atol=1e-5)


def test_greedy_takes_the_largest_with_probability_one(logits):
    tokens, logprobs, sample_logprobs = draw_grid(
        logits, jnp.array([0.0, 0.5, 0.999]), SamplingParams.make(0.0, 3, 0.5)
    )
    assert (tokens == logits.argmax()).all() and (sample_logprobs == 0).all()
    np.testing.assert_allclose(logprobs, torch.log_softmax(torch.tensor(logits), -1).max().item(), atol=1e-5)


@pytest.mark.parametrize("top_k,top_p", [(0, 0.9), (7, 1.0), (50, 0.5), (3, 0.99), (0, 0.01)])
def test_the_same_tokens_survive_as_in_transformers(logits, top_k, top_p):
    kept = np.asarray(filter_top_k_top_p(jnp.asarray(logits), SamplingParams.make(1.0, min(top_k, len(logits)), top_p)))
    expected = warped(logits, 1.0, top_k, top_p) > 0
    np.testing.assert_array_equal(kept > NEG / 2, expected)
    np.testing.assert_array_equal(kept[expected], logits[expected])  # and keep their logits


def test_top_p_of_one_keeps_what_top_k_keeps_however_improbable():
    logits = jnp.array([40.0, 0.0, -1.0, -2.0, -3.0])  # after the first the running sum is 1 to the last bit
    assert (
        (filter_top_k_top_p(logits, SamplingParams.make(1.0, 4, 1.0)) > NEG / 2) == jnp.array([1, 1, 1, 1, 0], bool)
    ).all()


@pytest.mark.parametrize("V", [1, 5, 256, 300, 640, 1000, 20_000])
def test_a_token_without_weight_is_never_returned(V):
    """Not at 0, nor just below 1, nor on any seam between two tokens, where running sums may be off by a bit."""
    rng = np.random.default_rng(V)
    for _ in range(10):
        w = rng.exponential(size=V).astype(np.float32) ** 3
        w[rng.random(V) < 0.7] = 0
        for start in range(0, V, 256):  # whole blocks without weight, the last one too
            if rng.random() < 0.4:
                w[start : start + 256] = 0
        if not w.any():
            w[V // 2] = 1
        seams = np.cumsum(w, dtype=np.float64) / w.sum(dtype=np.float64)
        seams = np.unique(seams.astype(np.float32))
        one, below = np.float32(1), np.nextafter(np.float32(1), np.float32(0))
        u = np.concatenate([[0, below], seams, np.nextafter(seams, 0 * one), np.nextafter(seams, one)])
        u = np.resize(u.clip(0, below).astype(np.float32), min(3 * V + 5, 30_000))  # of one length: compiled once
        tokens = np.asarray(invert(w, u))
        assert tokens.min() >= 0 and tokens.max() < V and (w[tokens] > 0).all()
        edges = np.concatenate([[0], np.cumsum(w, dtype=np.float64)]) / w.sum(dtype=np.float64)
        assert (edges[tokens] <= u + 1e-6).all() and (u <= edges[tokens + 1] + 1e-6).all()


def test_one_uniform_number_cannot_reach_past_a_padded_vocabulary():
    logits = jnp.full(300, NEG).at[299].set(0.0).at[3].set(0.0)
    u = jnp.linspace(0, 1, 999, endpoint=False)
    for sampling_params in ((1.0, 0, 1.0), (9.0, 5, 0.9)):
        tokens, _, sample_logprobs = draw_grid(logits, u, SamplingParams.make(*sampling_params))
        assert set(tokens.tolist()) == {3, 299}
        np.testing.assert_allclose(sample_logprobs, np.log(0.5), atol=1e-6)
