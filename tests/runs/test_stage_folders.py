"""The folder of a training stage answers the call that it was made by, and no other."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qstar import tree
from qstar.errors import UserError
from qstar.models import decoder
from qstar.models.config import preset
from qstar.models.model import Model
from qstar.runs.stages import Stage, TrainSettings, fine_tune
from qstar.text.packing import Example
from qstar.train.loop import Diverged
from qstar.train.metrics import Writer

CONFIG = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, vocab_size=12, eos_id=1)
ROWS = [Example([3, 4], [5, 6, 7, 1]), Example([8], [9, 10, 1])]
SETTINGS = TrainSettings(batch_size=2, lr=1e-2, warmup=1, row_length=12, packed=False)


@functools.cache
def model(seed=0):
    return Model(CONFIG, jax.jit(functools.partial(decoder.init, CONFIG))(jax.random.key(seed)))


def call(folder, start=None, rows=ROWS, settings=SETTINGS, steps=2, seed=0, mix=None):
    stage = Stage(folder / "stage", settings, steps, seed, Writer(folder))
    return fine_tune(start or model(), rows, stage, mix=mix)


@pytest.mark.parametrize(
    "change,key",
    [
        (dict(rows=[ROWS[1], ROWS[1]]), "data_hash"),
        (dict(mix=(ROWS, 0.5)), "data_hash"),
        (dict(settings=dataclasses.replace(SETTINGS, lr=1e-3)), "settings.lr=0.01, now it is 0.001"),
        (dict(steps=3), "steps=2, now it is 3"),
        (dict(seed=1), "seed"),
        (dict(start=model(1)), "start_norm_and_sum"),
    ],
    ids=["rows", "mixed rows", "rate", "steps", "seed", "first model"],
)
def test_another_call_is_refused_and_named(tmp_path, change, key):
    first, _ = call(tmp_path)
    with pytest.raises(UserError, match=f"stage: was made with {key}.*name another folder"):
        call(tmp_path, **change)
    again, _ = call(
        tmp_path, settings=dataclasses.replace(SETTINGS, log_every=1, save_every=1)
    )  # what changes no result
    assert all(map(np.array_equal, jax.tree.leaves(again.params), jax.tree.leaves(first.params)))


def test_a_stage_that_learnt_nothing_is_not_finished(tmp_path):
    """A model that computes NaN, and rows whose completions are empty."""
    broken = model().replace(params=jax.tree.map(lambda x: x * np.float32(np.nan), model().params))
    for name, how in (("nan", dict(start=broken)), ("empty", dict(rows=[Example([3, 4], [])]))):
        for _ in range(2):
            with pytest.raises(Diverged, match="none of 2 updates was finite and had a token to learn from"):
                call(tmp_path / name, **how)
        assert not (tmp_path / name / "stage" / "summary.json").exists()


def test_a_model_in_bfloat16_trains_in_float32_and_has_one_float32_copy_meanwhile(tmp_path):
    low = model().replace(params=tree.cast(model().params, "bfloat16"))
    shape, found = low.params["embed"]["table"].shape, []

    def copies(*_):
        found.append(sum(x.shape == shape and x.dtype == np.float32 for x in jax.live_arrays()))

    copies()
    settings = dataclasses.replace(SETTINGS, log_every=1)
    stage = Stage(tmp_path / "low", settings, 2, 0, Writer(tmp_path), progress=copies)
    trained, _ = fine_tune(low, ROWS, stage)
    assert {x.dtype for x in jax.tree.leaves(trained.params)} == {np.dtype("float32")}
    assert found[1] - found[0] == 3  # after an update: the state's parameters and two moments
    wide = low.replace(params=tree.cast(low.params, "float32"))
    there, _ = call(tmp_path / "wide", start=wide)
    again, _ = fine_tune(low, ROWS, stage)  # only loaded
    for other in (there, again):
        for x, y in zip(jax.tree.leaves(trained.params), jax.tree.leaves(other.params), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y)
