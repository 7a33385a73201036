"""The RL loop on a task that can be solved: every estimator learns it, and a run that was killed ends with the same bits."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar import preemption
from qstar.errors import UserError
from qstar.methods import reinforce as R
from qstar.models import scoring
from qstar.models.config import preset
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model
from qstar.runs.stages import Stage
from qstar.train.metrics import Writer, read
from qstar.train.rl import RLSettings
from qstar.train.state import create_state
from tests.train.problem import same

DECODER = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, vocab_size=6, eos_id=None)
T5 = EncDecConfig(vocab_size=6, hidden_size=16, num_layers=1, num_decoder_layers=1, num_heads=2, head_dim=8,
                  intermediate_size=16, eos_id=None)  # fmt: skip


class Next:
    """Reward: the share of a response's tokens that are the number after the prompt's last (5 is followed by 1)."""

    def prompts(self, update):
        return [[int(a), int(b)] for a, b in np.random.default_rng(update).integers(1, 6, (8, 2))]

    def score(self, update, responses):
        prompts = self.prompts(update)
        hits = [[np.mean([t == p[-1] % 5 + 1 for t in c.tokens]) for c in row] for p, row in zip(prompts, responses)]
        hits = np.asarray(hits, np.float32).reshape(-1)
        return R.RewardOutput(hits, {"next": hits})


@functools.cache
def start(config=DECODER):
    return Model(config, jax.jit(functools.partial(scoring.init, config))(jax.random.key(0)))


SETTINGS = R.ReinforceSettings(updates=40, prompts=8, batch_size=32, lr=2e-2, warmup=0, max_new_tokens=2, log_every=5)
RL = dict(group=4, kl_weight=0.01, no_eos_penalty=0.0)


def train(folder, rl, settings=SETTINGS, model=None, environment=None, watch=None):
    writer = Writer(folder)
    stage = Stage(folder / "arm", settings, settings.updates, 1, writer, {"arm": "x"})
    out = R.reinforce(model or start(), environment or Next(), rl, stage, watch)
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
    assert rows[-1]["kl"] > 0.05  # the policy departs from the reference


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


class Recorder(Next):
    """Records the updates that it scores; at one of them it sends SIGTERM."""

    def __init__(self, at=-1):
        self.at, self.asked = at, []

    def score(self, update, responses):
        self.asked.append(update)
        if update == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().score(update, responses)


def test_sigterm_saves_the_update_at_hand_and_the_next_one_is_the_very_next(tmp_path):
    rl = RLSettings(estimator="ppo", kl_target=0.01, kl_horizon=100, **RL)
    settings = dataclasses.replace(SETTINGS, updates=6)  # nothing is saved on the way
    whole, summary = train(tmp_path / "whole", rl, settings)
    first, second = Recorder(at=2), Recorder()
    with preemption.listening(), pytest.raises(preemption.Preempted, match="saved after update 3"):
        train(tmp_path / "stopped", rl, settings, environment=first)
    again, resumed = train(tmp_path / "stopped", rl, settings, environment=second)
    assert (first.asked, second.asked) == ([0, 1, 2], [3, 4, 5])
    same(again.params, whole.params)
    assert resumed == summary


def test_sigterm_while_a_round_is_measured_saves_too(tmp_path):
    def watch(update, params):
        if update == 2 and not seen:
            seen.append(update)
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the measurement went on")

    seen, settings, second = [], dataclasses.replace(SETTINGS, updates=4), Recorder()
    with preemption.listening(), pytest.raises(preemption.Preempted, match="saved after update 2"):
        train(tmp_path, RLSettings(**RL), settings, watch=watch)
    train(tmp_path, RLSettings(**RL), settings, watch=watch, environment=second)
    assert second.asked == [2, 3]


def test_minibatches_after_one_above_max_approx_kl_are_skipped():
    """Also in the first and only epoch; the stub of a step returns approx_kl."""
    made = []

    def step(state, rows, lr):
        made.append(len(rows.response))
        approx_kl = 5.0 if len(made) == 2 else 0.0
        return state, {k: jnp.float32(v) for k, v in (("approx_kl", approx_kl), ("skipped", 0), ("loss", 0))}

    for epochs, max_approx_kl, wanted in ((1, 0.1, 2), (2, 0.1, 2), (2, 0.0, 8), (1, 10.0, 4)):
        made.clear()
        settings = dataclasses.replace(SETTINGS, epochs=epochs, batch_size=8, max_approx_kl=max_approx_kl)
        run = R.Run(start(), Next(), RLSettings(**RL), settings, 0, list)
        state = create_state({"policy": start().params}, optax.identity(), seed=0)
        R.learn(run, step, state, R.sample(run, state.params, 0, 0.01), np.float32(0))
        assert made == [8] * wanted


@pytest.mark.parametrize(
    "change,key",
    [(dict(settings={"lr": 1e-3}), "settings.lr"), (dict(rl={"clip": 0.5}), "rl.clip"), (dict(world=1), "data_hash")],
)
def test_a_folder_of_another_call_is_refused(tmp_path, change, key):
    class Other(Next):
        def prompts(self, update):
            return [[1, 1]] * 8

    settings = dataclasses.replace(SETTINGS, updates=1)
    model, _ = train(tmp_path, RLSettings(**RL), settings)
    with pytest.raises(UserError, match=f"arm: was made with {key}=.*name another folder"):
        rl, other = RLSettings(**{**RL, **change.get("rl", {})}), Other() if "world" in change else None
        train(tmp_path, rl, dataclasses.replace(settings, **change.get("settings", {})), environment=other)
    loaded, _ = train(tmp_path, RLSettings(**RL), dataclasses.replace(settings, save_every=3))  # changes no result
    same(loaded.params, model.params)


def test_minibatches_that_do_not_divide_are_named(tmp_path):
    with pytest.raises(UserError, match="batch_size=24"):
        train(tmp_path, RLSettings(**RL), dataclasses.replace(SETTINGS, batch_size=24))
