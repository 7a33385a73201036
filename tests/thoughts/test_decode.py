"""Text with thoughts, cached, against the slow way: the whole prefix through the parallel forward for every token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qstar
from qstar import UserError
from qstar.models.model import Model
from qstar.thoughts.replay import replay
from tests.thoughts import families
from tests.thoughts.families import FAMILIES, S, params

NEW = 4
PROMPTS = [[5, 9, 3], [7], [4, 4, 8, 21, 2]]
GREEDY = dict(temperature=0.0, talk_tokens=1)


def model_of(family: str) -> Model:
    return Model(FAMILIES[family].replace(max_positions=64, eos_id=None), tree_of(family))


def tree_of(family: str):
    tree = params(family)
    if "positions" not in tree:
        return tree
    table = jnp.concatenate([tree["positions"]["table"]] * 4)
    return {**tree, "positions": {"table": table}}


@functools.cache
def programs():
    think = jax.jit(functools.partial(families.think, passes=1), static_argnums=1)
    return think, jax.jit(replay, static_argnums=1)


def parallel(model: Model, rows: list[list[int]], thoughts=None):
    """The mixed logits [rows, V], thoughts [rows, S] and weights [rows] at the end of each text."""
    think, run = programs()
    config = model.config.replace(thoughts=model.config.thoughts.replace(**GREEDY))
    tokens, mask = np.zeros((2, len(rows), 12), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    thought_ids = think(model.params, config, tokens, mask, jax.random.key(0)).tokens
    last = [len(row) - 1 for row in rows]
    if thoughts is not None:
        thought_ids = thought_ids.at[:, np.arange(len(rows)), last].set(np.asarray(thoughts).T)
    out, each = run(model.params, config, tokens, mask, thought_ids), np.arange(len(rows))
    return out.talk_mixed_logits[0, each, last], thought_ids[:, each, last].T, out.talk_mix_weight[0, each, last]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "gpt2", "gptj", "tiny"])
def test_cached_generation_equals_the_parallel_forward(family):
    model = model_of(family)
    t = model.config.thoughts.replace(temperature=0.0)
    done = qstar.generate(model, PROMPTS, max_new_tokens=NEW, temperature=0.0, thoughts=t)
    rows = [list(p) for p in PROMPTS]
    for k in range(NEW):
        logits, thoughts, weights = parallel(model, rows)
        logits = jnp.where(jnp.isin(jnp.arange(logits.shape[1]), jnp.asarray(t.forbidden_ids)), -1e30, logits)
        for i, row in enumerate(rows):
            mine = done[i][0]
            assert mine.thoughts[k] == thoughts[i].tolist()
            assert mine.tokens[k] == int(logits[i].argmax())
            np.testing.assert_allclose(mine.mix_weights[k], weights[i], atol=1e-5)
            np.testing.assert_allclose(mine.logprobs[k], jax.nn.log_softmax(logits[i])[mine.tokens[k]], atol=1e-4)
            row.append(mine.tokens[k])


def test_sampled_thoughts_samples_and_neighbours():
    model = model_of("llama")
    done = qstar.generate(model, PROMPTS, max_new_tokens=NEW, n=3, seed=4, thoughts=True)
    assert [len(row) for row in done] == [3, 3, 3]
    assert len({str(c.thoughts) for row in done for c in row}) > 6
    alone = qstar.generate(model, PROMPTS[:1], max_new_tokens=NEW, n=3, seed=4, thoughts=True)
    assert [c.tokens for c in alone[0]] == [c.tokens for c in done[0]]  # whoever else is in the batch
    assert [c.thoughts for c in alone[0]] == [c.thoughts for c in done[0]]
    for prompt, row in zip(PROMPTS, done):
        for c in row:
            assert np.shape(c.thoughts) == (NEW, S) and not np.isin(c.thoughts, (0, 29)).any()
            assert not np.isin(c.tokens, (0, 29)).any()  # no marker of a thought is ever written
            logits, _, _ = parallel(model, [prompt], [c.thoughts[0]])
            logits = logits[0].at[jnp.asarray([0, 29])].set(-1e30)
            np.testing.assert_allclose(c.logprobs[0], jax.nn.log_softmax(logits)[c.tokens[0]], atol=1e-4)


def test_the_end_of_text_stops_a_row():
    model = model_of("llama")
    first = qstar.generate(model, PROMPTS, max_new_tokens=NEW, temperature=0.0, thoughts=True, seed=1)
    eos = first[0][0].tokens[1]
    again = qstar.generate(
        model.replace(config=model.config.replace(eos_id=eos)),
        PROMPTS,
        max_new_tokens=NEW,
        temperature=0.0,
        thoughts=True,
        seed=1,
    )
    c = again[0][0]
    assert c.stopped and c.tokens == first[0][0].tokens[: first[0][0].tokens.index(eos) + 1]
    assert len(c.logprobs) == len(c.thoughts) == len(c.tokens)


def test_who_cannot_think_is_told_so():
    model = model_of("llama")
    bare = Model(model.config.replace(thoughts=None), {k: v for k, v in model.params.items() if k != "mixing"})
    with pytest.raises(UserError, match="ThoughtConfig"):
        qstar.generate(bare, PROMPTS, max_new_tokens=1, thoughts=True)
    with pytest.raises(UserError, match="mixing"):
        qstar.generate(bare, PROMPTS, max_new_tokens=1, thoughts=model.config.thoughts)
    # The start and end vectors are stored divided by their scale, and the mixing head's output has one reading.
    for name, value in (("embedding_scale", 7.0), ("mixing", "sigmoid")):
        other = model.config.thoughts.replace(**{name: value})
        assert getattr(model.config.thoughts, name) != value
        with pytest.raises(UserError, match=f"{name}={value!r}, but the model was trained with"):
            qstar.generate(model, PROMPTS, max_new_tokens=1, thoughts=other)
