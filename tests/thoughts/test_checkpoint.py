"""Checkpoints of the official code load, and what thinking adds to a decoder survives every round trip."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import qstar
from qstar import UserError
from qstar.models import heads
from qstar.models.model import Model
from qstar.models.thought_config import ThoughtConfig
from tests.thoughts import official
from tests.thoughts.families import FAMILIES, params


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y)


def test_an_official_checkpoint_loads_and_is_written_back_as_it_was(tmp_path):
    model = qstar.load(official.write(tmp_path / "official"))
    assert model.config.thoughts == ThoughtConfig.parity(thought_tokens=3, forbidden_ids=(62, 63))
    stored = official.named("param")
    np.testing.assert_array_equal(model.params["thoughts"]["start"], stored["start_embedding"][0])
    np.testing.assert_array_equal(model.params["mixing"]["in"]["kernel"], stored["talk_head.0.0.weight"].T)
    qstar.save(model, tmp_path / "copy")
    written = load_file(tmp_path / "copy" / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, x in stored.items():
        spare = name in ("start_embedding", "end_embedding")
        np.testing.assert_array_equal(written[name][: 1 if spare else None], x[: 1 if spare else None], err_msg=name)
        assert not spare or not written[name][1].any()
    again = qstar.load(tmp_path / "copy")
    assert again.config == model.config
    same(again.params, model.params)


def test_a_release_whose_config_says_nothing_is_taken_for_n_ahead_8_or_for_what_the_caller_says(tmp_path):
    folder = official.write(tmp_path / "m", max_thoughts=13)
    assert qstar.load(folder).config.thoughts.thought_tokens == 8 - 3  # of n_ahead, three are not content
    assert qstar.load(folder, thoughts=official.THOUGHTS).config.thoughts is official.THOUGHTS


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_keeps_its_thoughts(family, tmp_path):
    model = Model(FAMILIES[family], params(family))
    qstar.save(model, tmp_path / "m")
    back = qstar.load(tmp_path / "m")
    assert back.config.thoughts == model.config.thoughts
    same(back.params, model.params)


def test_thinking_parts_are_added_to_a_trained_model():
    config = FAMILIES["llama"].replace(thoughts=ThoughtConfig.parity())
    bare = {k: v for k, v in params("llama").items() if k not in ("thoughts", "mixing")}
    tree = heads.attach_thoughts(bare, config, jax.random.key(0), start_id=7)
    for name in ("start", "end"):
        np.testing.assert_allclose(heads.thought_vector(tree, config, name), bare["embed"]["table"][7], rtol=1e-6)
    assert not tree["mixing"]["out"]["kernel"].any() and tree["mixing"]["in"]["kernel"].std() < 0.03


def test_lengths_of_the_official_code_and_mistakes_are_named():
    t = ThoughtConfig.parity()  # n_ahead 12, n_ahead_talk 4
    assert (t.thought_tokens, t.talk_tokens) == (9, 4)
    for wrong, word in (
        (dict(thought_tokens=0), "thought_tokens"),
        (dict(mixing="soft"), "mixing"),
        (dict(temperature=-1.0), "temperature"),
        (dict(think_fraction=0.0), "think_fraction"),
    ):
        with pytest.raises(UserError, match=word):
            ThoughtConfig(**wrong)
    with pytest.raises(UserError, match="surprise"):
        ThoughtConfig.from_dict({"surprise": 1})
    # Models of versions whose loss had these two terms.
    assert ThoughtConfig.from_dict({"entropy_weight": 0.1, "kl_weight": 5.0}) == ThoughtConfig()
