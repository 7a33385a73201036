"""Relative positions of decoders: what they add, where they begin, and that cached decoding adds the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qstar
from qstar.errors import UserError
from qstar.models import decoder
from qstar.models.attention import attend
from qstar.models.config import preset
from qstar.models.thought_config import ThoughtConfig
from qstar.types import Segment

CONFIG = preset("tiny", hidden_size=32, num_layers=2, vocab_size=38, position="learned", max_positions=34,
                relative_bias=True, local_init=5.0, eos_id=1)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    params = jax.jit(decoder.init, static_argnums=0)(CONFIG, jax.random.key(0))
    table = params["layers"]["relative"]["table"]
    params["layers"]["relative"]["table"] = table + jax.random.normal(jax.random.key(1), table.shape)
    return qstar.Model(CONFIG, params)


def test_a_bias_is_added_to_the_scores_of_its_segment():
    rng = np.random.default_rng(0)
    q, (k, v), bias = rng.normal(size=(5, 4, 8)), rng.normal(size=(2, 2, 6, 8)), rng.normal(size=(4, 5, 6))
    found = attend(
        *(jnp.asarray(q, jnp.float32), [Segment(*map(jnp.float32, (k, v)), None, jnp.float32(bias))]), scale=0.5
    )
    for h in range(4):  # two key heads, each of two query heads
        scores = 0.5 * q[:, h] @ k[h // 2].T + bias[h]
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(found[:, h], weights @ v[h // 2], atol=1e-5)


def test_layer_0_begins_by_looking_back_and_the_others_everywhere():
    table = decoder.init(CONFIG, jax.random.key(0))["layers"]["relative"]["table"]
    expected = np.zeros((2, 4, 34))
    expected[0, [0, 1, 2], [0, 1, 2]] = 5.0
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize("prefix", [[], [4, 5, 6]])
def test_cached_decoding_adds_what_one_pass_adds(model, prefix):
    rows = [[5, 6, 7, 8, 9], [9, 8, 7], [10] * 11]
    found = qstar.generate(model, rows, max_new_tokens=8, n=2, seed=1, prefix=prefix)
    for row, completions in zip(rows, found):
        for c in completions:
            score = qstar.logprobs(model, [prefix + row], [c.tokens])[0]
            np.testing.assert_allclose(c.logprobs, score, atol=1e-5)


def test_it_is_saved_and_loaded(model, tmp_path):
    qstar.save(model, tmp_path / "m")
    back = qstar.load(tmp_path / "m")
    assert back.config == model.config and jax.tree.all(jax.tree.map(np.array_equal, back.params, model.params))


def test_it_does_not_go_with_thoughts():
    with pytest.raises(UserError, match="relative_bias"):
        CONFIG.replace(thoughts=ThoughtConfig())
