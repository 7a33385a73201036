"""`qstar.reinforce`: the example of its documentation, what it refuses, and a run folder that is read again."""

import json

import jax
import pytest

import qstar
from qstar.models.config import preset
from qstar.models.model import Model
from qstar.report import read
from qstar.report.pages import rl as page
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.tokenizer import char_tokenizer
from tests.train.problem import same

TOKENIZER = char_tokenizer(ALPHABET, pad=PAD, eos=EOS)
HOW = dict(updates=8, group=4, max_new_tokens=3, lr=2e-2, kl_weight=0.0)


@pytest.fixture(scope="module")
def model():
    from qstar.models import decoder

    config = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, vocab_size=TOKENIZER.vocab_size)
    return Model(config, jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0)), TOKENIZER)


def nines(completions):
    return [text.count("9") for text in completions]


def test_a_reward_is_raised_in_one_call(model):
    trained, history = qstar.reinforce(model, ["1+1=", "2+3=", "4+4="], nines, **HOW)
    assert [row["step"] for row in history] == list(range(1, 9))
    assert history[-1]["score"] > history[0]["score"] + 0.5 and history[-1]["reward/nines"] == history[-1]["score"]
    texts = [c.text for row in qstar.generate(trained, ["1+1="], max_new_tokens=3, n=20) for c in row]
    assert sum(t.count("9") for t in texts) > 10


def test_records_reach_the_reward_and_a_run_folder_is_read_again(model, tmp_path):
    def near(completions, records, prompts):
        asked.append((prompts[0], records[0]["gold"]))
        return {"gold": [float(r["gold"] in text) for text, r in zip(completions, records)], "one": [1] * len(records)}

    asked, prompts, records = [], ["1+1=", "2+3="], [{"gold": "2"}, {"gold": "5"}]
    how = {**HOW, "updates": 2, "workdir": tmp_path / "run", "lora_rank": 2}
    trained, history = qstar.reinforce(model, prompts, near, records=records, **how)
    assert set(asked) <= {("1+1=", "2"), ("2+3=", "5")} and history[0]["reward/one"] == 1
    again, _ = qstar.reinforce(model, prompts, near, records=records, **how)
    same(again.params, trained.params)
    assert len(asked) == 2  # of the first call: the second only loads
    run = read.read_run(tmp_path / "run")
    assert run.status == "done" and sorted(run.arms[0].completions) == [1, 2]
    rows = [dict(zip(page.COLUMNS, row)) for row in page.embedded(run)["rows"]]
    assert len(rows) == 16 and {r["update"] for r in rows} == {1, 2} and json.dumps(rows)
    with pytest.raises(qstar.UserError, match="was made with config.train.lr=0.02, now it is 0.1"):
        qstar.reinforce(model, prompts, near, records=records, **{**how, "lr": 0.1})
    with pytest.raises(qstar.UserError, match="was made with config.reward.hash of near='.*', now it is '.absent.'"):
        qstar.reinforce(model, prompts, nines, records=records, **how)


@pytest.mark.parametrize(
    "prompts,reward,how,line",
    [
        (["1"], nines, {"updatse": 3}, "option 'updatse' is unknown .did you mean updates"),
        (["1"], nines, {"lr": -1.0}, "lr=-1.0 must be 0 or more"),
        (["1"], nines, {"group": 1}, "group=1 must be at least 2"),
        ([], nines, {}, "prompts is a list with at least one prompt"),
        ("1", nines, {}, "prompts is a list with at least one prompt"),
        (["1"], "correct", {}, "reward=correct: missing a required argument: 'correct'; it is called with prompts"),
        (["1"], nines, {"records": []}, "records must have an entry per prompt"),
        ([[{"role": "user", "content": "1"}]], nines, {}, "tokenizer has no chat template"),
        (["1"], lambda completions: 1 / 0, {}, "update 1: reward=.*test_prompt_rl.py:.*: ZeroDivisionError"),
    ],
)
def test_mistakes_are_one_line(model, prompts, reward, how, line):
    with pytest.raises(qstar.UserError, match=line) as e:
        qstar.reinforce(model, prompts, reward, **how)
    assert "\n" not in str(e.value)
