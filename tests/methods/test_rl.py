"""RL on a task: its reward is the evaluation's judgement, and the round that was best on validation is the one tested."""

import json

import jax
import numpy as np
import pytest

from qstar.methods import reinforce, rl
from qstar.models.config import preset
from qstar.models.model import Model
from qstar.runs import context, rollouts
from qstar.tasks import make_task
from qstar.text.tokenizer import load_tokenizer
from qstar.train import metrics
from qstar.types import Completion
from tests.methods import stub


def config(**train):
    """The smoke config of sums, tiny, chosen on validation."""
    from configs.grpo_arithmetic import get_config

    made = get_config("smoke")
    made.model.update(hidden_size=16, num_layers=1, num_heads=2)
    made.task.update(pool={"1": 40, "2": 100}, seeds={"1": (4, 0)}, eval_per_length=6)
    made.base.update(steps=2, batch_size=4)
    made.loop.rounds = 3
    made.evaluate.split = "val"
    made.train.update(updates=3, prompts=4, batch_size=32, max_new_tokens=4, save_every=1, lr=1e-2, **train)
    return made


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A run whose answers are scripted: play(right answers by round, ...) -> (folder, parameters of each measured round)."""

    def play(right, **train):
        seen = {}
        monkeypatch.setattr(context, "sample_rollouts", scripted(right, seen))
        monkeypatch.setattr(rl.TaskEnvironment, "score", by_lot)  # so that every update changes something
        rl.run(config(**train), tmp_path / "run", stub.Silent())
        return tmp_path / "run", seen

    return play


def by_lot(world, update, responses):
    scores = np.random.default_rng(update).random(sum(map(len, responses)), np.float32)
    return reinforce.RewardOutput(scores, {"correct": scores})


def scripted(right, seen):
    def attempt(model, task, problems, settings, *, iteration, stage, **_):
        seen[stage] = jax.device_get(model.params)
        texts = [p.solution if i < right[iteration] else "#" for i, p in enumerate(problems)]
        return [stub.rollout(task, p, t, iteration=iteration) for p, t in zip(problems, texts, strict=True)]

    return attempt


@pytest.mark.parametrize("right,best", [((0, 1, 2, 1), 2), ((0, 2, 1, 2), 1), ((1, 0, 1, 1), 0), ((0, 0, 1, 2), 3)])
def test_the_round_that_is_best_on_validation_is_tested(played, right, best):
    folder, seen = played(right)
    (row,) = [r for r in metrics.read(folder) if r["stage"] == "test"]
    assert row["iteration"] == best
    assert same(seen["test"], seen[f"iter_{best:03d}"])
    assert not same(seen["iter_000"], seen["iter_001"]) and not same(seen["iter_001"], seen["iter_002"])


def test_a_run_that_its_divergence_stops_is_tested_all_the_same(played):
    folder, seen = played((0, 1, 1, 2), max_kl=1e-9)
    status = json.loads((folder / "grpo" / "checkpoints" / "iter_003" / "summary.json").read_text())
    assert status["updates"] == 2 and "max_kl" in status["stopped"]
    (row,) = [r for r in metrics.read(folder) if r["stage"] == "test"]
    assert row["iteration"] == 3 and same(seen["test"], seen["iter_003"])


CONFIG = preset("tiny", vocab_size=16)
ANSWERS = {  # what a model writes before it goes on for ever -> whether it is right
    " 9*8=72\n#### 72\n\nQ: How many": True,
    " 9*8=72\n#### 72": False,  # cut off at the limit: it has not ended
    " 9*8=73\n#### 73\n\nQ: How many": False,
}


@pytest.mark.parametrize("text", ANSWERS)
def test_the_reward_is_the_judgement_of_the_evaluation(monkeypatch, tmp_path, shared, text):
    """Few-shot models write no EOS: an answer ends where the next question begins."""
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"How much is 9 times 8, {i}?", "answer": "9*8=72\n#### 72"} for i in range(4)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = make_task("gsm8k", train=str(data), test=str(data))
    problems = task.pool(0, 0)

    tokenizer = load_tokenizer(shared("weights/stories260k"))

    def completion(text, stopped):
        ids = tokenizer.encode(text)
        return Completion(text, ids, [-1.0] * len(ids), [-1.0] * len(ids), stopped)

    def stream(model, prompts, *, stop=(), **_):
        ends = [text.find(s) for s in stop if s in text]
        for i in range(len(prompts)):
            yield i, 0, completion(text[: min(ends, default=None)], bool(ends))

    monkeypatch.setattr(reinforce, "stream", stream)
    monkeypatch.setattr(rollouts, "stream", stream)
    world = rl.TaskEnvironment(task, 0, len(problems), None)
    settings = reinforce.ReinforceSettings(prompts=len(problems), batch_size=1)
    run = reinforce.Run(_Any(), world, rl.RLSettings(estimator="ppo", group=1), settings, 0, lambda p: [1])
    responses = reinforce.rollouts(run, None, world.prompts(0), 0)
    rewards = world.score(0, responses).scores
    how = dict(k=1, hinted=False, iteration=0, seed=0, folder=tmp_path / "stages", stage="x")
    judged = rollouts.sample_rollouts(
        Model(CONFIG, None, tokenizer), task, problems, rollouts.SampleSettings(slots=1), **how
    )
    assert [bool(r) for r in rewards] == [r.correct for r in judged] == [ANSWERS[text]] * len(problems)


class _Any:
    def replace(self, **_):
        return self
