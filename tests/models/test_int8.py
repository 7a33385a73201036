"""Weights in 8 bits: what they are off by, and that sampling reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qstar
from qstar import UserError, tree
from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.models.int8 import quantise
from qstar.models.layers import Linear
from qstar.models.model import Model
from qstar.models.scoring import logits

CONFIG = ModelConfig(vocab_size=40, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
                     intermediate_size=48, init_std=0.15, qkv_bias=True)  # fmt: skip
PARAMS = decoder.init(CONFIG, jax.random.key(0))


def test_no_weight_is_off_by_more_than_half_a_step_of_its_column():
    kernels = dict(tree.named_leaves(PARAMS))
    small = dict(tree.named_leaves(quantise(PARAMS)))
    wide = [n for n in kernels if n.startswith("layers/") and n.endswith("kernel")]
    assert len(wide) == 7
    for name, x in kernels.items():
        if name not in wide:  # embedding, head, norms, biases
            np.testing.assert_array_equal(small[name], x)
            continue
        q, scale = np.asarray(small[name]), np.asarray(small[name.replace("kernel", "scale")])
        assert q.dtype == np.int8 and scale.shape == (1, x.shape[-1]) and np.abs(q).max(axis=1).min() == 127
        assert (np.abs(q * scale[:, None] - x) <= 0.501 * scale[:, None]).all()


def test_a_product_is_off_by_no_more_than_its_bound_and_zeros_stay_zeros():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(32, 6)).astype(np.float32), rng.normal(size=(5, 32)).astype(np.float32)
    w[:, 2] = 0
    leaves = quantise({"layers": {"q": {"kernel": jnp.asarray(w)}}})["layers"]["q"]
    found = Linear(6, False, 0.02).apply({"params": leaves}, x)
    bound = np.abs(w).max(axis=0) / 254 * np.abs(x).sum(axis=1, keepdims=True)
    assert (np.abs(found - x @ w) <= bound + 1e-5).all() and (np.asarray(found)[:, 2] == 0).all()
    assert np.abs(found - x @ w).max() > 1e-4  # and it is not exact


def test_sampling_reads_them():
    """Greedy tokens are those of a model whose weights are the rounded ones, written out in float32."""
    small = quantise(PARAMS)
    wide = {**small, "layers": {
        n: {**{k: v for k, v in leaves.items() if k != "scale"}, "kernel": leaves["kernel"] * leaves["scale"][:, None]}
        if "kernel" in leaves else leaves for n, leaves in small["layers"].items()}}  # fmt: skip
    prompts = [[1, 2, 3], [7, 8, 9]]
    found = qstar.generate(Model(CONFIG, PARAMS), prompts, weights="int8", max_new_tokens=6, temperature=0)
    tokens = np.asarray([prompt + c.tokens for prompt, (c,) in zip(prompts, found)], np.int32)
    each = np.asarray(jax.nn.log_softmax(logits(Model(CONFIG, wide), tokens)))[:, 2:-1]
    np.testing.assert_array_equal(each.argmax(-1), tokens[:, 3:])
    np.testing.assert_allclose(each.max(-1), [c.logprobs for (c,) in found], atol=1e-4)
    exact = np.asarray(jax.nn.log_softmax(logits(Model(CONFIG, PARAMS), tokens)))[:, 2:-1]
    assert 1e-5 < np.abs(exact - each).max() < 0.1


def test_another_kind_of_weights_is_named():
    with pytest.raises(UserError, match="weights='int4' is not one of int8"):
        qstar.generate(Model(CONFIG, PARAMS), [[1]], max_new_tokens=1, weights="int4")
