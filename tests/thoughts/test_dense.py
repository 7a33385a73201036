"""The dense form that `qstar bench quiet_star` measures beside ours computes the same thing."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qstar.bench import dense
from qstar.thoughts import loss as thought_loss
from qstar.thoughts.layout import text_batch
from tests.thoughts.families import LLAMA, params, texts


@pytest.mark.parametrize("nll_mean", ["tokens", "nonzero"])
def test_the_dense_form_has_the_same_loss_and_gradients(nll_mean):
    config = LLAMA.replace(thoughts=LLAMA.thoughts.replace(nll_mean=nll_mean))
    batch, key = text_batch(*texts()), jax.random.key(3)
    (ours, grads), (theirs, their_grads) = (
        jax.jit(jax.value_and_grad(lambda p, loss=loss: loss({"policy": p}, batch, key, config=config)[0][0]))(
            params("llama")
        )
        for loss in (thought_loss.loss, dense.loss)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(their_grads)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())
