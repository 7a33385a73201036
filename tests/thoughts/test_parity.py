"""The recorded case of the official code: every value, and the gradients of every parameter."""

from __future__ import annotations

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar.thoughts import loss as thought_loss
from qstar.thoughts.layout import text_batch
from qstar.thoughts.replay import replay
from tests.thoughts import official

WAYS = [("replay", "none"), ("replay", "block"), ("joint", "none"), ("joint", "block")]
ids = pytest.mark.parametrize("schedule,remat", WAYS)


def inputs():
    z = official.arrays()
    return z["input_ids"], z["attention_mask"], z["thought_ids"]


@functools.cache
def outcome(schedule, remat):
    """The replay, and its two gradients."""
    model = official.model()
    config = model.config.replace(remat=remat)

    @jax.jit
    def run(params):
        def losses(params):
            out = replay(params, config, *inputs(), schedule=schedule)
            return (out.loss_nll, out.loss_policy), out

        _, pull, out = jax.vjp(losses, params, has_aux=True)
        return out, (pull((1.0, 0.0))[0], pull((0.0, 1.0))[0])

    return jax.device_get(run(model.params))


def relative(a, b):
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)


def all_close(grads, expected, tolerance=1e-3):
    ours = official.under_official_names(grads)
    assert ours.keys() == expected.keys()
    wrong = {k: relative(ours[k], v) for k, v in expected.items() if relative(ours[k], v) > tolerance}
    assert not wrong


@ids
def test_every_value_of_the_recorded_case(schedule, remat):
    z, out = official.arrays(), outcome(schedule, remat)[0]
    for name in ("base_logits", "talk_mix_weight", "base_nll", "reward", "advantage", "advantage_clipped", "loss_nll"):
        np.testing.assert_allclose(getattr(out, name), z[name], atol=1e-4, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(out.talk_mixed_logits, z["talk_mixed_logits"], atol=1e-4)  # wrapped positions, too
    np.testing.assert_allclose(out.talk_thought_logits, z["talk_thought_logits"], atol=1e-4)
    np.testing.assert_allclose(out.thought_logp, z["thought_logp_T3"], atol=1e-4)
    np.testing.assert_allclose(out.thought_logits[..., :62], z["thought_logits"][..., :62], atol=1e-4)
    for s, nll in enumerate(out.talk_nll_s):
        np.testing.assert_allclose(nll, z[f"talk_nll_{s}"], atol=1e-4)
    np.testing.assert_allclose(out.loss_base, z["loss_base_mean"], atol=1e-4)
    np.testing.assert_allclose(out.loss_talk, z["loss_talk_means"], atol=1e-4)
    np.testing.assert_allclose(out.loss_policy, z["loss_policy"], atol=1e-4)
    np.testing.assert_allclose(out.loss, z["loss_total_beta1e6"], rtol=1e-4)


@ids
def test_the_gradients_of_every_parameter(schedule, remat):
    nll, policy = outcome(schedule, remat)[1]
    all_close(nll, official.named("grad_nll"))
    all_close(policy, official.named("grad_policy"))


@pytest.mark.parametrize("schedule", ["replay", "joint"])
def test_the_training_loss_is_the_recorded_one(schedule):
    model, (tokens, mask, thoughts) = official.model(), inputs()
    z, N = official.arrays(), tokens.shape[1]
    places = jnp.broadcast_to(jnp.arange(N - 1), (2, N - 1))
    for weight, expected in ((0.0, z["loss_nll"]), (1e6, z["loss_total_beta1e6"])):
        config = model.config.replace(thoughts=official.THOUGHTS.replace(policy_weight=weight))
        f = partial(thought_loss.loss, config=config, schedule=schedule, thoughts=thoughts[:, :, :-1], positions=places)

        def total(params, f=f):
            (value, weight), _ = f({"policy": params}, text_batch(tokens, mask), jax.random.key(0))
            return value / weight

        value, grads = jax.jit(jax.value_and_grad(total))(model.params)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        nll, policy = official.named("grad_nll"), official.named("grad_policy")
        all_close(grads, {k: nll[k] + weight * policy[k] for k in nll})
