"""The training loss: equal to the replay in full, whole under accumulation, and it trains."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar.models import vocabulary
from qstar.models.thought_config import ThoughtConfig
from qstar.text.packing import Example, pack
from qstar.thoughts import chunked_replay, forward, rollout
from qstar.thoughts import loss as thought_loss
from qstar.thoughts.layout import all_positions, text_batch
from qstar.thoughts.replay import replay
from qstar.train import optim
from qstar.train.state import create_state
from qstar.train.step import make_step
from qstar.types import Batch
from tests.thoughts.families import FAMILIES, LLAMA, N, V, params, texts, thoughts

KEY = jax.random.key(0)


def mean_loss(tree, config, batch, **options):
    (value, weight), metrics = thought_loss.loss({"policy": tree}, batch, KEY, config=config, **options)
    return value / weight, metrics


options = dict(static_argnums=1, static_argnames="schedule")
value_and_grad = jax.jit(jax.value_and_grad(mean_loss, has_aux=True), **options)
value_alone = jax.jit(mean_loss, **options)
CHOICES = {
    "default": dict(),
    "official": dict(nll_mean="nonzero", clip_negative=True, policy_reduce="mean", reward_tail=False),
    "sigmoid, base": dict(
        mixing="sigmoid", baseline="base", policy_temperature=3.0, base_weight=0.2, embedding_scale=9.0
    ),
}


@pytest.mark.parametrize(
    "choice,sizes,family",
    [
        ("default", (1, 1, 1), "llama"),
        ("default", (3, 1, 2), "llama"),
        ("official", (1, 3, 3), "llama"),
        ("sigmoid, base", (2, 2, 1), "llama"),
        ("sigmoid, base", (2, 2, 1), "gemma"),
    ],
)
def test_chunked_loss_and_gradients_are_those_of_the_replay_in_full(choice, sizes, family, monkeypatch):
    monkeypatch.setattr(vocabulary, "MIN_CHUNK", 5)
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 1)
    S, T, P = sizes
    t = ThoughtConfig(thought_tokens=S, talk_tokens=T, thoughts_per_position=P, forbidden_ids=(0,), **CHOICES[choice])
    config, tree, (tokens, mask) = FAMILIES[family].replace(thoughts=t), params(family), texts()
    mask = mask.at[1, 5:].set(0)
    thought_ids = thoughts(passes=P, tokens=S)

    def full(tree):
        return replay(tree, config, tokens, mask, thought_ids).loss

    everywhere = jnp.broadcast_to(jnp.arange(N), (2, N))
    options = dict(thoughts=thought_ids, positions=everywhere)
    (value, metrics), grads = value_and_grad(tree, config, text_batch(tokens, mask), **options)
    expected, theirs = jax.jit(jax.value_and_grad(full))(tree)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))
    assert all(np.isfinite(s) for s, _ in metrics.values())


def test_sampled_schedules_agree():
    """The joint rollout draws what the replay's does, and has its gradients."""
    batch = text_batch(*texts())
    (a, _), grads = value_and_grad(params("llama"), LLAMA, batch)  # "replay"
    (b, _), others = value_and_grad(params("llama"), LLAMA, batch, schedule="joint")
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(others)):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(np.abs(y).max())))


@functools.cache
def training(accumulate: int = 1, **changes):
    config = LLAMA.replace(thoughts=LLAMA.thoughts.replace(**changes))
    tx = optim.adamw(clip=1.0)
    return tx, make_step(functools.partial(thought_loss.loss, config=config), tx, accumulate)


def test_micro_batches_add_up_to_the_whole():
    tokens, mask = texts(4)
    batch = text_batch(tokens, mask.at[1, 4:].set(0).at[2, 3:].set(0))
    out = []
    for accumulate in (1, 4):
        tx, step = training(accumulate, temperature=0.0, baseline="base")
        state = create_state({"policy": params("llama")}, tx, seed=0)
        state, metrics = step(state, batch, np.float32(1e-2))
        out.append(jax.device_get((state.params, metrics)))
    for tree, metrics in out[1:]:
        assert metrics.keys() == out[0][1].keys()
        for k, v in metrics.items():
            np.testing.assert_allclose(v, out[0][1][k], rtol=1e-4, atol=1e-5, err_msg=k)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(out[0][0])):
            np.testing.assert_allclose(a, b, atol=2e-4)


def test_training_lowers_the_loss_and_a_resumed_run_is_bit_exact():
    tx, step = training()
    batch = text_batch(*texts(8))

    def go(state, steps):
        history = []
        for _ in range(steps):
            state, metrics = step(state, batch, np.float32(3e-3))
            history.append({k: float(v) for k, v in metrics.items()})
        return state, history

    whole, history = go(create_state({"policy": params("llama")}, tx, seed=3), 8)
    assert history[-1]["nll_talk"] < history[0]["nll_talk"] - 0.3
    half, _ = go(create_state({"policy": params("llama")}, tx, seed=3), 4)
    saved = jax.device_get((half.params, half.opt_state, half.step))
    resumed = create_state({"policy": params("llama")}, tx, seed=3).replace(
        params=saved[0], opt_state=saved[1], step=saved[2]
    )
    for a, b in zip(jax.tree.leaves(go(resumed, 4)[0].params), jax.tree.leaves(whole.params)):
        np.testing.assert_array_equal(a, b)


def test_some_positions_stand_for_all():
    """Over all random choices of a position, the loss is that of the full run on average."""
    config = LLAMA.replace(thoughts=LLAMA.thoughts.replace(baseline="base", talk_tokens=1))
    batch, thought_ids = text_batch(*texts(2, 5)), thoughts(2, 5)
    whole = value_alone(
        params("llama"), config, batch, thoughts=thought_ids[..., :4], positions=jnp.tile(jnp.arange(4), (2, 1))
    )
    each = [
        value_alone(params("llama"), config, batch, thoughts=thought_ids[..., [j]], positions=jnp.full((2, 1), j))[0]
        for j in range(4)
    ]
    np.testing.assert_allclose(np.mean(each), whole[0], rtol=1e-5)
    few = LLAMA.replace(thoughts=LLAMA.thoughts.replace(think_fraction=0.5))
    assert np.isfinite(value_alone(params("llama"), few, batch)[0])


def test_packed_documents_do_not_see_each_other():
    ids = np.random.default_rng(0).integers(2, V - 1, (3, 5)).tolist()
    packed = Batch(**pack([Example(r[:1], r[1:]) for r in ids], 15, packed=True))
    apart = Batch(**pack([Example(r[:1], r[1:]) for r in ids], 5, packed=False))
    t = LLAMA.thoughts.replace(temperature=0.0, baseline="base")
    config = LLAMA.replace(thoughts=t)
    a, b = (value_and_grad(params("llama"), config, x) for x in (packed, apart))
    np.testing.assert_allclose(a[0][0], b[0][0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1])):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(np.abs(y).max())))


def test_the_text_is_read_once_for_all_passes():
    """The base pass has no axis of passes, and no array of the step is as large as a dense mask would be."""
    batch = text_batch(*texts())
    jaxpr = str(jax.make_jaxpr(lambda p: forward.read(p, LLAMA, batch).hidden)(params("llama")))
    assert f"{2},{N},24" in jaxpr
    assert optax.global_norm(value_and_grad(params("llama"), LLAMA, batch)[1]) > 0


def same_gradients(a, b):
    np.testing.assert_allclose(a[0][0], b[0][0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1])):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("piece_tokens", [1, 40])
def test_the_gradient_in_pieces_is_that_of_all_threads_at_once(piece_tokens):
    """Pieces of one position each; and pieces that do not divide the positions."""
    batch = text_batch(*texts())
    whole = value_and_grad(params("llama"), LLAMA, batch)
    same_gradients(value_and_grad(params("llama"), LLAMA.replace(piece_tokens=piece_tokens), batch), whole)


def test_states_kept_from_the_rollout_give_the_gradient_of_states_found_anew():
    batch, tree, P = text_batch(*texts()), params("llama"), LLAMA.thoughts.thoughts_per_position
    positions = all_positions(batch, predicting=True)

    @jax.jit
    def think(tree):
        read = forward.read(tree, LLAMA, batch)
        return rollout.sample(tree, LLAMA, batch, read, positions, jax.random.split(KEY)[0], P)[0]

    drawn = think(tree)  # [S, B, P, M]
    thought_ids = drawn.reshape(drawn.shape[0], -1, drawn.shape[3])  # [S, B * P, M]
    anew = value_and_grad(tree, LLAMA, batch, thoughts=thought_ids, positions=positions)
    same_gradients(value_and_grad(tree, LLAMA, batch, positions=positions), anew)


def test_gradients_of_the_texts_keys_are_added_up_in_float32(monkeypatch):
    """512 pieces that each add 1: in bfloat16 the sum would stop at 256."""
    monkeypatch.setattr(chunked_replay, "_run", lambda config, batch, places, core, pairs, x: x * pairs)
    fed = jnp.ones((1, 1, 512, 1, 1), jnp.bfloat16)
    saved = ({}, None, jnp.ones((), jnp.bfloat16), jnp.zeros((1, 512), jnp.int32), fed)
    d_pairs = chunked_replay._pull_back(LLAMA.replace(piece_tokens=1), saved, fed)[2]
    assert d_pairs.dtype == jnp.bfloat16 and d_pairs == 512


def test_a_position_before_a_gap_in_the_mask_weighs_nothing_instead_of_a_million():
    config = LLAMA.replace(thoughts=ThoughtConfig(talk_tokens=2, forbidden_ids=(0,)))
    batch = text_batch(jnp.ones((2, 6), jnp.int32), jnp.ones((2, 6), jnp.int32))
    # Row 0 thinks where the next token is not counted, but the one after it is; row 1 has no gap there.
    batch = batch.replace(mask=batch.mask.at[0, 2].set(0))
    weights = thought_loss.loss_weights(config, batch, jnp.asarray([[1], [2]]), passes=1)
    assert weights.talk[0].max() == 0 and weights.policy[0].max() == 0
    np.testing.assert_allclose(weights.talk[1, 0], [5, 5])  # one position stands for the row's 5 tokens
