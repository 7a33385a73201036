"""The RL loop on a task that can be solved: every estimator learns it, and a run that was killed ends with the same bits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qstar.errors import UserError
from qstar.methods import reinforce as R
from qstar.models import policy
from qstar.models.config import preset
from qstar.models.encdec_config import EncDecConfig
from qstar.models.model import Model
from qstar.train.metrics import Writer, read
from qstar.train.rl import RLSettings
from tests.train.problem import same

DECODER = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, vocab_size=6, eos_id=None)
T5 = EncDecConfig(vocab_size=6, hidden_size=16, num_layers=1, num_decoder_layers=1, num_heads=2, head_dim=8,
                  intermediate_size=16, eos_id=None)  # fmt: skip


class Next:
    """Worth: the share of a response's tokens that are the number after the prompt's last (5 is followed by 1)."""

    def prompts(self, update):
        return [[int(a), int(b)] for a, b in np.random.default_rng(update).integers(1, 6, (8, 2))]

    def score(self, update, responses):
        prompts = self.prompts(update)
        hits = [[np.mean([t == p[-1] % 5 + 1 for t in c.tokens]) for c in row] for p, row in zip(prompts, responses)]
        hits = np.asarray(hits, np.float32).reshape(-1)
        return R.Scored(hits, {"next": hits})


@functools.cache
def start(config=DECODER):
    return Model(config, jax.jit(functools.partial(policy.init, config))(jax.random.key(0)))


SETTINGS = R.ReinforceSettings(updates=40, prompts=8, batch_size=32, lr=2e-2, warmup=0, max_new_tokens=2, log_every=5)
RL = dict(group=4, kl_weight=0.01, no_eos_penalty=0.0)


def train(folder, rl, settings=SETTINGS, model=None, environment=None):
    writer = Writer(folder)
    where = dict(folder=folder / "arm", writer=writer, label={"arm": "x"})
    out = R.reinforce(model or start(), environment or Next(), rl, settings, seed=1, **where)
    writer.close()
    return out


@pytest.mark.parametrize("estimator", ["ppo", "rloo", "grpo"])
def test_every_estimator_learns_a_task_that_can_be_solved(estimator, tmp_path):
    model, summary = train(tmp_path, RLSettings(estimator=estimator, **RL))
    rows = [r for r in read(tmp_path) if r["stage"] == "rl"]
    assert [r["step"] for r in rows] == list(range(5, 41, 5))
    assert summary["score_first"] < 0.35 and rows[-1]["score"] > summary["score_first"] + 0.35, summary
    assert rows[-1]["reward/next"] == rows[-1]["score"] and rows[-1]["skipped"] == 0
    assert ("value_loss" in rows[-1]) == (estimator == "ppo") and "value" not in model.params
    assert rows[-1]["kl"] > 0.05  # it moved away from the reference, and says so


def test_an_encoder_decoder_learns_it_too(tmp_path):
    settings = dataclasses.replace(SETTINGS, updates=30, lr=1e-2)
    _, summary = train(tmp_path, RLSettings(estimator="rloo", **RL), settings, model=start(T5))
    assert summary["score_last"] > summary["score_first"] + 0.3, summary


class Killed(Exception):
    pass


class Fatal(Next):
    def __init__(self, at):
        self.at = at

    def score(self, update, responses):
        if update == self.at:
            raise Killed
        return super().score(update, responses)


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    rl = RLSettings(estimator="ppo", kl_target=0.01, kl_horizon=100, **RL)
    settings = dataclasses.replace(SETTINGS, updates=7, save_every=2, epochs=2, batch_size=16)
    whole, summary = train(tmp_path / "whole", rl, settings)
    for at in (3, 5):
        with pytest.raises(Killed):
            train(tmp_path / "killed", rl, settings, environment=Fatal(at))
    again, resumed = train(tmp_path / "killed", rl, settings)
    same(again.params, whole.params)
    assert resumed == summary
    loaded, third = train(tmp_path / "killed", rl, settings, environment=Fatal(0))  # finished: only loads
    same(loaded.params, whole.params)


def test_minibatches_that_do_not_divide_are_named(tmp_path):
    with pytest.raises(UserError, match="batch_size=24"):
        train(tmp_path, RLSettings(**RL), dataclasses.replace(SETTINGS, batch_size=24))
