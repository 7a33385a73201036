"""Rewards of one's own: what a function is given, how terms are summed, and one line for every mistake."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qstar.data.sources import read_jsonl
from qstar.errors import TrainingFailed, UserError
from qstar.methods import reinforce, rewards, rl
from qstar.train import metrics
from tests.methods import stub
from tests.methods.test_rl import config

FILE = '''"""Rewards of a user."""
import numpy as np


def brevity(completions):
    return [-len(text) / 10 for text in completions]


def parts(records, completions, **others):
    assert set(others) == {"prompts", "answers", "correct", "tokens", "truncated"}
    assert all(set(r) == {"id", "question", "gold", "meta"} for r in records) and len(records) == len(completions)
    return {"gold": np.asarray([float(r["gold"]) for r in records], np.float32), "short": [True] * len(records)}


def needs_more(completions, weather):
    return completions


def raises(completions):
    return [1 / (len(text) - len(text)) for text in completions]


def too_few(completions):
    return [1.0]


def not_finite(completions):
    return [float("nan")] * len(completions)


def texts(completions):
    return completions


def nothing(completions):
    pass
'''
GIVEN = {"completions": ["ab", "abcd"], "answers": ["1", None], "correct": [True, False]}


@pytest.fixture(autouse=True)
def user_file(tmp_path, monkeypatch):
    (tmp_path / "r.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)


def read(text):
    return rewards.read_rewards(text, "config.rl.reward", tuple(GIVEN))


@pytest.mark.parametrize(
    "text,wanted",
    [
        ("correct", [1, 0]),
        ("correct + 0.5 * format", [1.5, 0]),
        ("correct - 1e-1 * format", [0.9, 0]),
        ("r.py:brevity", [-0.2, -0.4]),
        ("2 * correct + 0.5*r.py:brevity", [1.9, -0.2]),
        ("-1 * format + correct", [0, 0]),
    ],
)
def test_terms_are_weighted_and_summed_and_their_parts_are_not(text, wanted):
    found, parts = rewards.score(read(text), 0, **GIVEN)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    if "brevity" in parts:
        np.testing.assert_allclose(parts["brevity"], [-0.2, -0.4], atol=1e-6)


@pytest.mark.parametrize(
    "text,line",
    [
        ("corect", "config.rl.reward=corect is unknown (did you mean correct?); there are correct, format, file.py:function"),
        ("correct + ", "config.rl.reward=correct + is unknown"),
        ("x * format", "config.rl.reward=x * format is unknown"),
        ("1.2.3 * format", "config.rl.reward: '1.2.3 * format' is not a reward or WEIGHT * REWARD"),
        ("correct + correct", "config.rl.reward=correct + correct: two terms are named 'correct'"),
        ("no.py:f", "config.rl.reward=no.py: no such file"),
        ("r.py:brevty", "config.rl.reward=r.py:brevty: name 'brevty' is unknown (did you mean brevity?)"),
        ("r.py:needs_more", "missing a required argument: 'weather'; it is called with completions, answers, correct, by name"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_read_is_one_line(text, line):
    with pytest.raises(UserError) as e:
        read(text)
    assert line in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name,line",
    [
        ("raises", "update 3: config.rl.reward=r.py:20: ZeroDivisionError: division by zero; mend the file"),
        ("too_few", "update 3: config.rl.reward=r.py:too_few returned 1 values; it must return a list of 2 numbers, one per completion"),
        ("not_finite", "update 3: config.rl.reward=r.py:not_finite returned nan for completion 1 of 2, which is not a finite number"),
        ("texts", "update 3: config.rl.reward=r.py:texts returned 'ab' for completion 1 of 2, which is not a finite number"),
        ("nothing", "update 3: config.rl.reward=r.py:nothing returned None; it must return a list of 2 numbers, one per completion"),
    ],
)  # fmt: skip
def test_a_result_that_is_no_reward_is_one_line_with_function_and_update(name, line):
    with pytest.raises(UserError) as e:
        rewards.score(read(f"r.py:{name}"), 2, **GIVEN)
    assert str(e.value) == line


def test_a_run_with_a_reward_of_its_own_logs_parts_and_completions_and_refuses_another_file(tmp_path, monkeypatch):
    made = config()
    made.rl.reward = "correct + 0.01 * r.py:parts"
    rl.run(made, tmp_path / "run", stub.Silent())
    rows = [r for r in metrics.read(tmp_path / "run") if r["stage"] == "rl"]
    assert all(r["reward/short"] == 1 and r["reward/gold"] > 1 and "reward/correct" in r for r in rows)
    for n in (1, 2, 3):
        logged = read_jsonl(tmp_path / "run" / "grpo" / "completions" / f"update_{n:06d}.jsonl")
        assert len(logged) == 32 and {r["update"] for r in logged} == {n} and {r["arm"] for r in logged} == {"grpo"}
        for r in logged:
            assert r["rewards"]["gold"] == float(r["gold"])
            assert r["score"] == pytest.approx(r["rewards"]["correct"] + 0.01 * (1 + float(r["gold"])), abs=1e-5)
    (tmp_path / "r.py").write_text(FILE + "\n# changed\n")
    with pytest.raises(UserError, match=r"made with reward\.hash of r\.py:parts='\w+', now it is '\w+'; name another"):
        rl.run(made, tmp_path / "run", stub.Silent())


def test_the_default_reward_needs_no_record(tmp_path):
    assert rewards.made_with(read("correct")) == {}
    assert rewards.made_with(read("0.5 * correct")) == {"reward": {"weight of correct": 0.5}}


def test_a_function_from_python_is_a_reward():
    (one,) = rewards.read_rewards(lambda completions: np.ones(len(completions)), "reward", ("completions",))
    assert rewards.score([one], 0, **GIVEN)[0].tolist() == [1, 1] and one.fingerprint


def test_an_arm_that_diverges_does_not_end_the_others(tmp_path, monkeypatch):
    made = config()
    made.arms = {"bad": {"estimator": "grpo", "train": {"lr": 1.0, "max_bad": 1}}, "good": {"estimator": "grpo"}}

    def learn(run, step, state, sampled, lr):
        state, found = original(run, step, state, sampled, lr)
        return state, {**found, "skipped": 1.0} if run.settings.max_bad == 1 and int(state.step) > 1 else found

    original = reinforce.learn
    monkeypatch.setattr(reinforce, "learn", learn)
    with pytest.raises(TrainingFailed, match="^arm bad, round 2: 1 updates in a row were not finite, up to step 2"):
        rl.run(made, tmp_path / "run", stub.Silent())
    status = {arm: json.loads((tmp_path / "run" / arm / "status.json").read_text())["status"] for arm in made.arms}
    assert status == {"bad": "stopped", "good": "finished"}
    found = [
        (r["arm"], r["iteration"], r["updates"]) for r in metrics.read(tmp_path / "run") if r["stage"] == "iteration"
    ]
    assert found == [("bad", 0, 0), ("bad", 1, 1), *(("good", n, n) for n in range(4))]
    assert {r["arm"] for r in metrics.read(tmp_path / "run") if r["stage"] == "test"} == {"bad", "good"}
