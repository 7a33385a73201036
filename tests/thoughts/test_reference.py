"""Greedy thoughts with one pass, padded rows, and grouped sizes against the official code spelled out (`reference.py`)."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from qstar.thoughts.replay import replay
from tests.thoughts import families, official, reference

CASES = {  # the second row is padded, the first is whole; without padding, the recorded case is its own (test_parity.py)
    "padded row": dict(passes=2, padded=True),
    "greedy, one pass, padded": dict(passes=1, padded=True),
    "one token each": dict(passes=3, S=1, T=1),
}


def inputs(passes=2, padded=False, S=3, T=3):
    z = official.arrays()
    tokens, mask = z["input_ids"].copy(), z["attention_mask"].copy()
    if padded:
        tokens[1, 8:], mask[1, 8:] = 2, 0
    thoughts = np.random.default_rng(0).integers(3, 62, (S, 2 * passes, 12)) if passes > 1 else None
    return tokens, mask, thoughts


def both_ways(f, params):
    _, pull, out = jax.vjp(f, params, has_aux=True)
    return out, pull((1.0, 0.0))[0], pull((0.0, 1.0))[0]


@functools.cache
def expected(case):
    """The reference's arrays and gradients. Of the recorded case the fixture is the judge."""
    options = CASES[case]
    tokens, mask, thoughts = inputs(**options)
    model = official.model(sizes(options))
    P = options.get("passes", 2)

    def f(params):
        out = reference.official(params, model.config, tokens, mask, thoughts, passes=P)
        return (out["loss_nll"], out["loss_policy"]), out

    return jax.device_get(jax.jit(lambda p: both_ways(f, p))(model.params))


def sizes(options):
    return official.THOUGHTS.replace(thought_tokens=options.get("S", 3), talk_tokens=options.get("T", 3))


def test_the_reference_reproduces_the_recorded_case():
    z, model = official.arrays(), official.model()
    out = jax.jit(lambda p: reference.official(p, model.config, z["input_ids"], z["attention_mask"], z["thought_ids"]))(
        model.params
    )
    for name in (
        "base_logits",
        "talk_mixed_logits",
        "talk_mix_weight",
        "reward",
        "advantage",
        "loss_nll",
        "loss_policy",
    ):
        np.testing.assert_allclose(out[name], z[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case,schedule", [*((case, "replay") for case in CASES), ("padded row", "joint")])
def test_values_and_gradients_are_those_of_the_dense_reference(case, schedule):
    options = CASES[case]
    (tokens, mask, _), (expected_side, *there_grads) = inputs(**options), expected(case)
    model = official.model(sizes(options))

    def f(params):
        out = replay(params, model.config, tokens, mask, expected_side["thoughts"], schedule=schedule)
        return (out.loss_nll, out.loss_policy), out

    out, *grads = jax.device_get(jax.jit(lambda p: both_ways(f, p))(model.params))
    real = np.repeat(mask, out.base_logits.shape[0] // 2, axis=0) > 0
    np.testing.assert_allclose(out.base_logits[real], expected_side["base_logits"][real], atol=1e-4)
    np.testing.assert_allclose(out.talk_mixed_logits[:, real], expected_side["talk_mixed_logits"][:, real], atol=1e-4)
    np.testing.assert_allclose(out.talk_mix_weight[:, real], expected_side["talk_mix_weight"][:, real], atol=1e-4)
    for name in ("base_nll", "reward", "advantage", "advantage_clipped", "loss_nll", "loss_policy"):
        np.testing.assert_allclose(getattr(out, name), expected_side[name], atol=1e-4, err_msg=name)
    for ours, theirs in zip(out.talk_nll_s, expected_side["talk_nll_s"]):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for a, b in zip(grads, there_grads):
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
            assert np.abs(x - y).max() <= 1e-3 * max(np.abs(y).max(), 1e-6), path


def test_greedy_thinking_is_the_reference_s():
    tokens, mask, _ = inputs(passes=1, padded=True)
    model, expected_side = official.model(), expected("greedy, one pass, padded")[0]
    think = jax.jit(functools.partial(families.think, passes=1, temperature=0.0), static_argnums=1)
    thoughts = think(model.params, model.config, tokens, mask, jax.random.key(0))
    real = mask > 0
    np.testing.assert_array_equal(thoughts.tokens[:, real], expected_side["thoughts"][:, real])
    assert not thoughts.sample_logprobs.any() and (thoughts.logprobs < 0).all()
