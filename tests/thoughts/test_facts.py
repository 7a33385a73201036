"""What a thread sees, and what it does not; and that the routine means what the method says."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar.models import decoder
from qstar.models.attention import text_mask
from qstar.thoughts import forward, layout
from qstar.thoughts.layout import text_batch
from qstar.thoughts.replay import replay
from tests.thoughts.families import FAMILIES, LLAMA, N, P, S, T, V, params, texts, think, thoughts

run = jax.jit(replay, static_argnums=1, static_argnames="schedule")
families = pytest.mark.parametrize("family", list(FAMILIES))


def explicit(tree, config, text, thought, future):
    """One thread written out as an ordinary sequence: states [S, E] that draw its tokens and [T, E] that talk."""
    scale, table, length = config.thoughts.embedding_scale, tree["embed"]["table"], len(text) + S + T + 1
    start, end = (scale * tree["thoughts"][k][None] for k in ("start", "end"))
    rows = jnp.concatenate([table[text], start, table[thought], end, table[future]])
    positions = jnp.minimum(jnp.arange(length), config.max_positions - 1)
    x = decoder.embed_tokens(tree, config, rows, positions)
    hidden, _ = decoder.run(tree, config, x, positions, text_mask(None, length, config))
    return hidden[len(text) : len(text) + S], hidden[len(text) + S + 1 :]


@families
def test_prefix_and_thread_written_out_as_a_sequence_give_the_same_logits(family):
    config, tree = FAMILIES[family], params(family)
    if family == "gpt2":  # and past the table of learned positions
        config = config.replace(max_positions=N + 3)
        tree = {**tree, "positions": {"table": tree["positions"]["table"][: N + 3]}}
    (tokens, mask), thought_ids = texts(), thoughts()
    out = run(tree, config, tokens, mask, thought_ids)
    follow = jax.jit(explicit, static_argnums=1)
    for j in (0, 4, N - T) if family in ("llama", "gpt2") else (N - T,):  # each is a length of its own to compile
        for row in range(2 * P):
            text = tokens[row // P]
            think, talk = follow(tree, config, text[: j + 1], thought_ids[:, row, j], text[j + 1 : j + T])
            for states, ours in ((think, out.thought_logits), (talk, out.talk_thought_logits)):
                theirs = decoder.unembed(tree, config, states)
                np.testing.assert_allclose(ours[:, row, j, 1 : V - 1], theirs[:, 1 : V - 1], atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "gpt2"])
def test_reinforce_gradients_are_those_of_the_written_out_sequences(family):
    config, tree, (tokens, mask), thought_ids = FAMILIES[family], params(family), texts(1, 5), thoughts(1, 5, 1)
    factor = np.random.default_rng(3).normal(size=5).astype(np.float32)

    def ours(tree):
        return jnp.sum(replay(tree, config, tokens, mask, thought_ids).thought_logp * factor)

    def theirs(tree):
        total = 0.0
        for j in range(5):
            think, _ = explicit(tree, config, tokens[0, : j + 1], thought_ids[:, 0, j], jnp.ones(T - 1, jnp.int32))
            logits = decoder.unembed(tree, config, think).at[:, jnp.asarray([0, 29])].set(-1e30)
            total += factor[j] * jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(S), thought_ids[:, 0, j]])
        return total

    for a, b in zip(*(jax.tree.leaves(jax.jit(jax.grad(f))(tree)) for f in (ours, theirs))):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def test_a_thread_sees_its_text_up_to_its_position_and_itself_and_nothing_else():
    tree, (tokens, mask), thought_ids = params("llama"), texts(), thoughts()
    j, row = 3, 2  # a thread of sequence 1
    out = run(tree, LLAMA, tokens, mask, thought_ids)

    def seen(tokens, thought_ids):
        new = run(tree, LLAMA, tokens, mask, thought_ids)
        same = [
            np.array_equal(getattr(new, n)[:, row, j], getattr(out, n)[:, row, j])
            for n in ("thought_logits", "talk_thought_logits")
        ]
        return [not s for s in same]

    def other(x, *at):
        return x.at[at].set((x[at] + 1 - 2) % (V - 3) + 2)

    for k in range(N):  # the thought sees x[..3]; talk step 1 is fed x[4]
        assert seen(other(tokens, 1, k), thought_ids) == [k <= j, k <= j + T - 1]
        assert seen(other(tokens, 0, k), thought_ids) == [False, False]  # another sequence
    for r in range(2 * P):
        for at in range(N):
            for c in range(S):
                mine = (r, at) == (row, j)
                assert seen(tokens, other(thought_ids, c, r, at)) == [mine and c < S - 1, mine]


@families
def test_a_mixing_weight_of_0_gives_the_base_logits_exactly(family):
    config, tree = FAMILIES[family], params(family)
    tree = {**tree, "mixing": {**tree["mixing"], "out": {"kernel": jnp.zeros_like(tree["mixing"]["out"]["kernel"])}}}
    out = run(tree, config, *texts(), thoughts())
    assert not out.talk_mix_weight.any()
    np.testing.assert_array_equal(out.talk_mixed_logits[0], out.base_logits)
    np.testing.assert_array_equal(out.talk_mixed_logits[1][:, :-1], out.base_logits[:, 1:])
    assert not out.reward.any() and not out.loss_policy.any()


def test_permuting_the_passes_changes_no_loss():
    tree, thought_ids = params("llama"), thoughts(passes=3)
    order = jnp.asarray([2, 0, 1, 4, 5, 3])
    a, b = (run(tree, LLAMA, *texts(), x) for x in (thought_ids, thought_ids[:, order]))
    for name in ("loss_nll", "loss_policy", "loss"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5)
    np.testing.assert_allclose(a.reward[order], b.reward, atol=1e-5)
    assert abs(float(a.loss_policy)) > 1e-3


@families
def test_both_schedules_are_one_mathematics(family):
    args = params(family), FAMILIES[family], *texts(), thoughts()
    a, b = run(*args), run(*args, schedule="joint")  # the first is "replay", and compiled already
    for name, x, y in zip(a._fields, a, b):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4, err_msg=name), x, y)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(family, side):
    config, tree, (tokens, mask), thought_ids = FAMILIES[family], params(family), texts(), thoughts()
    out = run(tree, config, tokens, mask, thought_ids)
    at = slice(3, None) if side == "left" else slice(None, N)
    widths = (3, 0) if side == "left" else (0, 3)
    wide, real, thought_ids = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [widths]) for x in (tokens, mask, thought_ids))
    padded = run(tree, config, wide, real, thought_ids)
    np.testing.assert_allclose(padded.talk_mix_weight[0][:, at], out.talk_mix_weight[0], atol=1e-5)
    np.testing.assert_allclose(padded.thought_logp[:, :, at], out.thought_logp, atol=1e-5)
    for name in ("loss_nll", "loss_policy"):
        np.testing.assert_allclose(getattr(padded, name), getattr(out, name), atol=1e-5)


def test_chosen_positions_are_those_of_the_full_run():
    tree, (tokens, mask), thought_ids = params("mistral"), texts(), thoughts()
    config, chosen = FAMILIES["mistral"], jnp.asarray([[0, 3, 5], [1, 2, 4]])
    rows = jnp.repeat(chosen, P, axis=0)  # [R, 3]
    some_own = jnp.take_along_axis(thought_ids, rows[None], axis=2)
    whole, some = (
        run(tree, config, tokens, mask, thought_ids),
        run(tree, config, tokens, mask, some_own, positions=chosen),
    )
    for name in ("thought_logp", "talk_mix_weight"):
        expected = jnp.take_along_axis(getattr(whole, name), rows[None], axis=2)
        np.testing.assert_allclose(getattr(some, name), expected, atol=1e-5)
    np.testing.assert_allclose(some.reward, jnp.take_along_axis(whole.reward, rows, axis=1), atol=1e-5)
    sampled = jax.jit(think, static_argnums=1)
    key = jax.random.key(5)
    drawn = sampled(tree, config, tokens, mask, key)
    few = sampled(tree, config, tokens, mask, key, positions=chosen)
    np.testing.assert_array_equal(few.tokens, jnp.take_along_axis(drawn.tokens, rows[None], axis=2))


def test_log_probabilities_of_thinking_are_those_of_the_replay_and_forbidden_ids_never_come():
    tree, (tokens, mask) = params("llama"), texts(4)
    drawn = jax.jit(think, static_argnums=1)(tree, LLAMA, tokens, mask, jax.random.key(0))
    out = run(tree, LLAMA, tokens, mask, drawn.tokens)
    np.testing.assert_allclose(drawn.logprobs, out.thought_logp, atol=1e-5)
    np.testing.assert_allclose(drawn.sample_logprobs, drawn.logprobs, atol=1e-5)
    assert not np.isin(drawn.tokens, LLAMA.thoughts.forbidden_ids).any()
    assert drawn.tokens.shape == (S, 4 * P, N) and len(np.unique(drawn.tokens)) > 10


def test_a_thought_is_drawn_from_its_distribution():
    tree, (tokens, mask) = params("llama"), texts(1, 2)
    many = jax.jit(functools.partial(think, passes=4000), static_argnums=1)
    drawn = many(tree, LLAMA, tokens, mask, jax.random.key(0)).tokens[0, :, 1]
    logits = run(tree, LLAMA, tokens, mask, jnp.ones((S, 1, 2), jnp.int32)).thought_logits[0, 0, 1]
    share = np.bincount(drawn, minlength=V) / 4000
    assert np.abs(share - jax.nn.softmax(logits)).max() < 0.03


def test_where_to_think():
    mask = jnp.asarray([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(layout.positions_of_mask(mask > 0, 2, -jnp.arange(6.0) + 0 * mask), [[0, 1], [0, 4]])
    score = jnp.asarray([[0.0, 3.0, 9.0, 1.0, 2.0, 5.0]] * 2)
    np.testing.assert_array_equal(layout.positions_of_mask(mask > 0, 3, score)[0], [1, 4, 5])
    tree, (tokens, real) = params("llama"), texts()
    out = run(tree, LLAMA, tokens, real, thoughts())
    logp = jax.nn.log_softmax(out.base_logits[::P, :-1])
    config = LLAMA.replace(thoughts=LLAMA.thoughts.replace(think_fraction=0.5, think_where="entropy"))
    batch = text_batch(tokens, real)
    hidden = forward.read(tree, config, batch).hidden
    places = layout.choose_positions(tree, config, batch, hidden, jax.random.key(0))
    expected = np.sort(np.argsort(jnp.sum(jnp.exp(logp) * logp, axis=-1), axis=1)[:, :3], axis=1)
    np.testing.assert_array_equal(places, expected)
