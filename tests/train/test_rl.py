"""RL: the estimators, the loss and the divergence against formulas by hand and exact expectations."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar.errors import UserError
from qstar.models import decoder, heads, scoring, vocabulary
from qstar.models.config import preset
from qstar.models.encdec import EncDecConfig
from qstar.train import rl
from qstar.train.optim import adamw
from qstar.train.rl import Experience, RLSettings
from qstar.train.state import create_state
from qstar.train.step import make_step

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]], np.float32)
VALUES, REWARDS = (RNG.normal(size=(4, 4)).astype(np.float32) * MASK for _ in range(2))


# ------------------------------------------------------------------------------------------------------ estimators


def test_gae_with_lambda_1_and_gamma_1_is_returns_to_go_less_the_value():
    to_go = np.cumsum(REWARDS[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(rl.gae(REWARDS, VALUES, MASK, 1.0, 1.0), (to_go - VALUES) * MASK, atol=1e-6)


def test_gae_with_lambda_0_is_the_one_step_error_and_otherwise_the_definition():
    after = np.concatenate([VALUES[:, 1:], np.zeros((4, 1))], axis=1)
    delta = (REWARDS + 0.9 * after - VALUES) * MASK
    np.testing.assert_allclose(rl.gae(REWARDS, VALUES, MASK, 0.9, 0.0), delta, atol=1e-6)
    by_hand = np.array([[sum((0.9 * 0.8) ** k * d[t + k] for k in range(4 - t)) for t in range(4)] for d in delta])
    np.testing.assert_allclose(rl.gae(REWARDS, VALUES, MASK, 0.9, 0.8), by_hand * MASK, atol=1e-6)


def test_leave_one_out_sums_to_0_in_every_group_and_is_what_its_name_says():
    scores = RNG.normal(size=12).astype(np.float32)
    found = np.asarray(rl.leave_one_out(scores, 4)).reshape(3, 4)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-5)
    groups = scores.reshape(3, 4)
    by_hand = [[g[i] - np.mean(np.delete(g, i)) for i in range(4)] for g in groups]
    np.testing.assert_allclose(found, by_hand, atol=1e-5)


def test_group_normalisation_and_a_group_of_equal_scores():
    scores = np.array([1, 0, 0, 1, 3, 3, 3, 3], np.float32)
    found = np.asarray(rl.group_normalised(scores, 4))
    by_hand = (scores[:4] - 0.5) / (np.std(scores[:4], ddof=1) + 1e-4)
    np.testing.assert_allclose(found, [*by_hand, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(rl.group_normalised(scores, 4, False)[:4], scores[:4] - 0.5)


def test_rewards_are_float32_and_the_score_comes_at_the_last_token():
    scores = rl.score_with_penalty([1, 0, 3, -30], [True, False, True, True], RLSettings(no_eos_penalty=0.7))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, [1, -0.7, 3, -10])  # fractions stay, and the last is clipped
    k1 = np.ones((4, 4), np.float32)
    found = rl.token_rewards(scores, k1, MASK, 0.1)
    expected = -0.1 * MASK
    expected[[0, 1, 2, 3], [3, 1, 0, 2]] += np.asarray(scores)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_whitening_a_lone_token_gives_0_and_no_nan():
    lone = np.zeros_like(MASK)
    lone[1, 0] = 1
    assert np.all(np.asarray(rl.whitened(VALUES + 5, lone)) == 0)
    found = np.asarray(rl.whitened(VALUES, MASK))[MASK > 0]
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-5)


def test_an_adaptive_weight_moves_towards_its_target_and_a_fixed_one_does_not():
    s = RLSettings(kl_target=6.0, kl_horizon=1000)
    assert rl.adapted(0.1, 60.0, 100, s) == pytest.approx(0.1 * 1.02)
    assert rl.adapted(0.1, 0.0, 100, s) == pytest.approx(0.1 * 0.98)
    assert rl.adapted(0.1, 6.6, 100, s) == pytest.approx(0.1 * 1.01)
    assert rl.adapted(0.1, 60.0, 100, RLSettings()) == 0.1


# ------------------------------------------------------------- the loss on a categorical, by exact expectation

THETA, PHI = RNG.normal(size=6).astype(np.float32), RNG.normal(size=6).astype(np.float32)
PI, REF = (jnp.exp(jax.nn.log_softmax(x)) for x in (jnp.asarray(THETA), jnp.asarray(PHI)))


def reverse_kl(theta):
    logp = jax.nn.log_softmax(theta)
    return jnp.sum(jnp.exp(logp) * (logp - jnp.log(REF)))


def forward_kl(theta):
    return jnp.sum(REF * (jnp.log(REF) - jax.nn.log_softmax(theta)))


def expected_gradient(place: str, beta: float = 0.3):
    """Gradient of the loss over all six actions, each weighted by its probability under the policy that drew it."""
    s = RLSettings(estimator="ppo", kl_in=place, group=1, kl_weight=beta, whiten=False, lam=1.0, value_weight=0.0)
    mask = np.asarray(PI)[:, None]  # the weight of a token is the probability of drawing it
    old, ref = np.log(np.asarray(PI))[:, None], np.log(np.asarray(REF))[:, None]
    zero, one = np.zeros((6, 1), np.float32), np.ones((6, 1), np.float32)
    advantages, returns = rl.estimate(np.zeros(6, np.float32), old, ref, zero, one, beta, s)
    batch = Experience(zero, zero, zero, mask, old, ref, zero, advantages, returns, np.full(6, beta, np.float32))

    def loss(theta):
        (total, weight), _ = rl.surrogate(jax.nn.log_softmax(theta)[:, None], zero, zero, batch, s)
        return total / weight

    return np.asarray(jax.grad(loss)(jnp.asarray(THETA))) / beta


@pytest.mark.parametrize("place", ["reward", "k2", "ratio_k3"])
def test_every_place_of_the_divergence_has_the_gradient_of_reverse_kl(place):
    true = np.asarray(jax.grad(reverse_kl)(jnp.asarray(THETA)))
    assert np.abs(true).max() > 0.05
    np.testing.assert_allclose(expected_gradient(place), true, atol=1e-6)


def test_the_places_that_are_not_offered_have_other_gradients():
    """k1 as a loss has none; k3 as a loss has that of forward KL; k3 in the reward has neither (the spec's table)."""
    logp = jax.nn.log_softmax

    def as_loss(term):
        return np.asarray(jax.grad(lambda th: jnp.sum(PI * term(logp(th), jnp.log(REF))))(jnp.asarray(THETA)))

    def in_reward(term):
        worth = term(jnp.log(PI), jnp.log(REF))
        return np.asarray(jax.grad(lambda th: jnp.sum(PI * worth * logp(th)))(jnp.asarray(THETA)))

    k3 = lambda lp, lr: jnp.exp(lr - lp) - 1 - (lr - lp)  # noqa: E731
    reverse, forward = (np.asarray(jax.grad(f)(jnp.asarray(THETA))) for f in (reverse_kl, forward_kl))
    np.testing.assert_allclose(as_loss(lambda lp, lr: lp - lr), 0, atol=1e-6)
    np.testing.assert_allclose(as_loss(k3), forward, atol=1e-6)
    assert np.abs(in_reward(k3) - reverse).max() > 0.05 and np.abs(forward - reverse).max() > 0.05
    np.testing.assert_allclose(in_reward(lambda lp, lr: lp - lr), reverse, atol=1e-6)


def record(advantages, logprobs, **changes):
    zero = np.zeros_like(MASK)
    fields = dict(prompt=zero, prompt_mask=zero, response=zero, mask=MASK, old_logprobs=logprobs, ref_logprobs=logprobs,
                  values=VALUES, advantages=advantages, returns=VALUES, kl_weight=np.zeros(4, np.float32))  # fmt: skip
    return Experience(**{**fields, **changes})


@pytest.mark.parametrize("estimator", rl.ESTIMATORS)
def test_at_ratio_1_the_loss_is_minus_the_mean_advantage(estimator):
    logprobs, advantages = (RNG.normal(size=(4, 4)).astype(np.float32) for _ in range(2))
    batch = record(advantages, logprobs)
    s = RLSettings(estimator=estimator, group=2, kl_in="none")
    (total, weight), metrics = rl.surrogate(logprobs, MASK, VALUES, batch, s)
    assert float(total / weight) == pytest.approx(-(advantages * MASK).sum() / MASK.sum(), abs=1e-6)
    assert float(metrics["clip_fraction"][0]) == float(metrics["approx_kl"][0]) == 0
    (total, weight), _ = rl.surrogate(logprobs, MASK, VALUES, batch, dataclasses.replace(s, mean_over="sequences"))
    means = (advantages * MASK).sum(axis=1) / MASK.sum(axis=1)
    assert float(total / weight) == pytest.approx(-means.mean(), abs=1e-6)


def test_clipping_is_the_papers_and_the_value_loss_is_clipped_likewise():
    old = np.zeros_like(MASK)
    log_ratio, advantages = np.log(np.linspace(0.5, 1.6, 16).reshape(4, 4)), RNG.normal(size=(4, 4))
    values = VALUES + RNG.normal(size=(4, 4))
    returns = RNG.normal(size=(4, 4))
    batch = record(advantages, old, returns=returns)
    s = RLSettings(estimator="ppo", kl_in="none", value_weight=0.5)
    (total, weight), metrics = rl.surrogate(log_ratio, MASK, values, batch, s)
    rho = np.exp(log_ratio)
    each = np.maximum(-advantages * rho, -advantages * np.clip(rho, 0.8, 1.2))
    near = VALUES + np.clip(values - VALUES, -0.2, 0.2)
    each_v = 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2)
    n = MASK.sum()
    assert float(total / weight) == pytest.approx(((each + 0.5 * each_v) * MASK).sum() / n, abs=1e-5)
    assert float(metrics["clip_fraction"][0]) == ((np.abs(rho - 1) > 0.2) * MASK).sum()


# -------------------------------------------------------------------------------------------------- with a model

DECODER = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, vocab_size=11)
T5 = EncDecConfig(vocab_size=11, hidden_size=16, num_layers=1, num_decoder_layers=1, num_heads=2, head_dim=8,
                  intermediate_size=16)  # fmt: skip


def model_batch(config, s, params):
    rng = np.random.default_rng(5)
    ids = [rng.integers(2, 11, n).tolist() for n in (3, 5, 2, 4)]
    prompt, prompt_mask = scoring.pad_prompts(config, ids, 6)
    response = rng.integers(2, 11, (4, 4)).astype(np.int32)
    static = dict(config=config, settings=s, limit=10)
    old, _, values = rl.measure_jit(params, prompt, prompt_mask, response, **static)
    scores = np.array([1, 0, 2, 0], np.float32)
    advantages, returns = rl.estimate(scores, old * MASK, old * MASK, values * MASK, MASK, 0.1, s)
    weight = np.full(4, 0.1, np.float32)
    return Experience(prompt, prompt_mask, response, MASK, old, old, values, advantages, returns, weight), static


@pytest.mark.parametrize("config", [DECODER, T5], ids=["decoder", "encoder-decoder"])
def test_scores_equal_those_of_one_response_after_its_prompt_alone(config):
    """Padding, batching and the side on which prompts are padded change nothing; no id from the limit on has mass."""
    params = {"policy": scoring.init(config, jax.random.key(1))}
    batch, static = model_batch(config, RLSettings(group=2), params)
    from qstar.models.model import Model
    from qstar.models.scoring import logits

    for i, n in enumerate((3, 5, 2, 4)):
        prompt = batch.prompt[i][batch.prompt_mask[i] > 0].tolist()
        out = batch.response[i].tolist()
        model = Model(config, params["policy"])
        if config is T5:
            rows = logits(model, [[0, *out[:-1]]], encoder_tokens=[prompt])[0]
        else:
            rows = logits(model, [prompt + out[:-1]])[0, n - 1 :]
        logp = jax.nn.log_softmax(rows[:, :10])
        alone = [float(logp[t, y]) if y < 10 else None for t, y in enumerate(out)]
        for t, x in enumerate(alone):
            assert x is None or float(batch.old_logprobs[i, t]) == pytest.approx(x, abs=1e-4)
            assert x is not None or float(batch.old_logprobs[i, t]) < -1e20


@pytest.mark.parametrize("config", [DECODER, T5], ids=["decoder", "encoder-decoder"])
def test_old_equal_to_new_without_advantage_or_divergence_changes_nothing_in_the_policy(config):
    s = RLSettings(estimator="ppo", group=2, kl_in="none", value_trunk=False)
    params = {"policy": scoring.init(config, jax.random.key(1)), "value": heads.init_critic(16, jax.random.key(2))}
    batch, static = model_batch(config, s, params)
    batch = batch.replace(advantages=np.zeros_like(MASK), returns=MASK)

    def loss(p, b, r):
        return rl.rl_loss(p, b, r, **static)

    tx = adamw()
    state, metrics = make_step(loss, tx)(create_state(params, tx, seed=0), batch, np.float32(0.1))
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params["policy"], params["policy"]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, state.params["value"], params["value"]))
    assert float(metrics["approx_kl"]) == pytest.approx(0, abs=1e-6) and float(metrics["clip_fraction"]) == 0
    assert float(metrics["skipped"]) == 0


def test_log_probabilities_in_blocks_are_those_at_once(monkeypatch):
    params = scoring.init(DECODER, jax.random.key(3))
    states, targets = jax.random.normal(jax.random.key(4), (3, 5, 16)), RNG.integers(0, 11, (3, 5))

    def both(p):
        head = decoder.head(p, DECODER)
        logp, _, entropy = vocabulary.token_logprobs(states, head, targets, temperature=0.7, entropy=True)
        return jnp.sum(logp * jnp.arange(5)) + jnp.sum(entropy), (logp, entropy)

    grads, whole = jax.grad(both, has_aux=True)(params)
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4)
    monkeypatch.setattr(vocabulary, "MIN_CHUNK", 4)
    cut_grads, cut = jax.grad(both, has_aux=True)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), (grads, whole), (cut_grads, cut))
    p = np.asarray(jax.nn.softmax(decoder.unembed(params, DECODER, states) / 0.7))
    np.testing.assert_allclose(whole[1], -(p * np.log(p)).sum(-1), atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [dict(estimator="pro"), dict(group=1), dict(kl_in="k1"), dict(gamma=1.5), dict(clip=0)]
)
def test_settings_that_make_no_sense_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        RLSettings(**wrong)
