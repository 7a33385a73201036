"""LM-Guided CoT on real HotpotQA rows: a small T5 learns, a large model answers through a real HTTP server."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import shared

import qstar
from configs.guided_cot_hotpotqa import get_config
from qstar.data.sources import read_jsonl
from qstar.errors import UserError
from qstar.methods import guided_cot as G
from qstar.methods.guided_hotpotqa import MultiHop, MultiHopSettings
from qstar.models import scoring
from qstar.models.encdec import EncDecConfig
from qstar.tasks import make_task
from qstar.text.tokenizer import load_tokenizer
from qstar.train import metrics
from qstar.train.stats import paired
from tests.methods.stub import FunctionAnswerer, Silent
from tests.methods.test_answerer import Server

LARGE = {"url": "http://y", "model": "m"}
SMALL = EncDecConfig(vocab_size=512, hidden_size=16, num_layers=1, num_decoder_layers=1, num_heads=2, head_dim=8,
                     intermediate_size=16)  # fmt: skip


@pytest.fixture(scope="module")
def files():
    return {
        "train": str(shared("data/hotpotqa/train_100.json")),
        "test": str(shared("data/hotpotqa/dev_sample_500.jsonl")),
    }


@pytest.fixture(scope="module")
def golds(files):
    task = make_task("hotpotqa", **files)
    return {p.question: p.meta["answer"] for s in ("train", "val", "test") for p in task.problems(s)}


@pytest.fixture
def server(golds):
    """Explains every question and is right about those of even length; guided, it says what the rationale begins with."""

    def say(prompts):
        out = []
        for p in prompts:
            question = p.rpartition("Question: ")[2].partition(" Reasoning:")[0].partition(" Answer:")[0]
            if "step by step" in p:
                right = golds[question] if len(question) % 2 == 0 else "nobody knows"
                out.append(f"The paragraphs say so. They agree. So the answer is {right}.")
            else:
                out.append(golds[question] if len(question) % 3 == 0 else "something")
        return out

    made = Server(answer=say)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "t5"
    params = jax.jit(functools.partial(scoring.init, SMALL))(jax.random.key(0))
    qstar.save(qstar.Model(SMALL, params, load_tokenizer(shared("weights/stories260k"))), folder)
    return folder


def config_for(server, small, files):
    config = get_config(f"smoke,small={small},url={server.url},name=big,train={files['train']},test={files['test']}")
    config.guided.update(test_questions=6, small_limit=900, large_limit=400, votes=2, teacher_questions=10)
    config.arms = {"kd": {"filter": "em", "steps": 3}, "rl": {"start": "kd", "rl": {"estimator": "ppo", "group": 2}}}
    return config


def test_distillation_rl_and_guided_answers_run_end_to_end_over_http(server, small, files, golds, tmp_path):
    config = config_for(server, small, files)
    G.run(config, tmp_path, Silent())
    rows = read_jsonl(tmp_path / "student_0" / "teacher.jsonl")
    assert len(rows) == 10 and all(r["rationale"] == "The paragraphs say so. They agree." for r in rows)
    buffer = json.loads((tmp_path / "student_0" / "kd" / "buffer.json").read_text())
    even = [len(r["prompt"].rpartition("Question: ")[2].removesuffix(" Reasoning:")) % 2 == 0 for r in rows]
    assert buffer["kept"] == sum(even) and 0 < buffer["keep_rate"] < 1
    assert any(k.startswith("keep_rate/") for k in buffer)
    found = {row["arm"]: row for row in json.loads((tmp_path / "results.json").read_text())["arms"]}
    test = make_task("hotpotqa", **files).problems("test")[:6]
    assert found["standard"]["mean"] == pytest.approx(100 * np.mean([len(p.question) % 3 == 0 for p in test]))
    assert found["own CoT"]["mean"] == pytest.approx(100 * np.mean([len(p.question) % 2 == 0 for p in test]))
    said = json.loads((tmp_path / "student_0" / "rl" / "evaluation.json").read_text())
    assert (
        said["accuracy"] == said["em"] == said["self_consistency"] == found["standard"]["mean"]
    )  # it ignores rationales
    assert {"coverage", "bare_answer", "f1", "includes", "student_tokens", "answerer_tokens"} <= said.keys()
    assert said["prompt_truncated"] > 0
    rl_rows = [r for r in metrics.read(tmp_path) if r["stage"] == "rl"]
    named = {"reward/accuracy", "reward/aspect/fluency", "reward/bare_answer", "value_loss"}
    assert len(rl_rows) == 2 and named <= rl_rows[0].keys()
    asked = len(server.bodies)
    everything = [p for b in server.bodies for p in b["prompt"]]
    assert len(everything) == len(set(everything))  # every prompt was asked once
    (tmp_path / "results.json").unlink()
    G.run(config, tmp_path, Silent())  # all stages are done: nothing is asked or trained again
    assert len(server.bodies) == asked and (tmp_path / "results.json").exists()


def test_the_teachers_questions_and_those_of_rl_and_test_are_never_the_same(files, tmp_path):
    task = make_task("hotpotqa", **files)
    world = MultiHop(MultiHopSettings(small="x", large=LARGE), task, 3, tmp_path)
    teacher, rl, test = ({p.id for p in ps} for ps in (world.teacher_problems(), world.rl_problems(), world.test))
    assert not teacher & rl and not (teacher | rl) & test and len(teacher) + len(rl) == len(task.problems("train"))
    again = MultiHop(MultiHopSettings(small="x", large=LARGE, teacher_questions=5), task, 3, tmp_path)
    assert {p.id for p in again.teacher_problems()} < teacher
    told = [("1", "It is so.", "cork."), ("1", "It is so.", "cork."), ("2", "  ", "Cork"), ("3", "It is.", None)]
    told += [("4", "So.", "Cork city")]
    rows = [{"prompt": p, "rationale": r, "answer": a, "gold": "Cork"} for p, r, a in told]
    kept = {rule: [r["prompt"] for r in world.keep(rows, rule)] for rule in ("em", "f1", "includes", "none")}
    assert kept == {
        "em": ["1"],
        "f1": ["1", "4"],
        "includes": ["1", "4"],
        "none": ["1", "3", "4"],
    }  # once each, none empty


def test_an_endpoint_that_is_away_is_one_line(server, small, files, tmp_path):
    config = config_for(server, small, files)
    config.guided.large.update(url="http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(UserError, match="127.0.0.1:9/v1/completions is away after 2 attempts"):
        G.run(config, tmp_path, Silent())


@pytest.mark.parametrize("wrong, word", [
    ({"arms": {"x": {"rl": {"group": 2}}}}, "arms.x"), ({"arms": {"x": {"start": "y"}}}, "'y' is neither"),
    ({"arms": {"x": {"filter": "perfect"}}}, "filter='perfect'"), ({"task": {"name": "gsm8k"}}, "no paragraphs"),
    ({"arms": {"x": {"filter": "parity"}}}, "config.arms.x.filter='parity' is for two-hop questions"),
    ({"train": {"prompts": 4, "batch_size": 7}}, "train.batch_size=7 does not divide"),
    ({"distil": {"kind": "soft"}}, "kind='soft'"), ({"students": 0}, "students=0"),
    ({"guided": {"small": "x", "large": {"url": "http://y"}}}, "config.guided.large.model is missing"),
    ({"guided": {"small": "x", "large": {"path": "y", "slot": 8}}}, "config.guided.large.slot is unknown .did you mean slots"),
    ({"guided": {"small": "x", "large": {"path": "y", "slots": 0}}}, "config.guided.large.slots=0 must be at least 1"),
])  # fmt: skip
def test_mistakes_are_found_before_anything_is_written(wrong, word, tmp_path):
    config = get_config("smoke")
    for key, value in wrong.items():
        config[key] = value
    with pytest.raises(UserError, match=word):
        G.GuidedContext.make(config, tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limit", [2, 20])
def test_a_rationale_has_one_end_unless_it_is_cut(limit):
    small = SimpleNamespace(tokenizer=load_tokenizer(shared("weights/stories260k")), config=SMALL)
    small.tokenizer.encoder_end = small.tokenizer.eos_id
    rows = [{"prompt": "Q:", "rationale": text} for text in ("They agree.", "They agree.</s>")]
    one, other = MultiHop.to_pairs(SimpleNamespace(small=small, max_new_tokens=limit), rows)
    ids = small.tokenizer.encode("They agree.")
    assert one == other and one.response == (*ids, small.tokenizer.eos_id)[:limit]


def test_paired_intervals_are_narrower_than_those_of_two_separate_arms():
    rng = np.random.default_rng(0)
    before = (rng.random(500) < 0.5).astype(float)
    after = np.where(rng.random(500) < 0.1, 1.0, before)
    low, middle, high = paired(before, after)
    assert low < middle < high and middle == pytest.approx((after - before).mean()) and low > 0
    assert high - low < 0.06 and paired(before, before) == (0, 0, 0)


def test_a_teachers_chain_of_several_lines_is_kept_whole(files, tmp_path):
    """As models behind HTTP write them; the question that they invent next is cut off."""
    said = "Cork is in Ireland.\n\nSo it is not in France.\nThe answer is Cork."
    world = MultiHop(
        MultiHopSettings(small="x", large=LARGE, teacher_questions=2), make_task("hotpotqa", **files), 3, tmp_path
    )

    def large(max_new_tokens, stop=("\n",)):
        text = said + "\nQuestion: Where is Nice?\nThe answer is France."
        end = min([text.find(s) for s in stop if s in text], default=len(text))
        return FunctionAnswerer(lambda prompts: [text[:end]] * len(prompts))

    world.__dict__.update(_large=large, small=None)
    world.prompt = lambda p, style, **_: f"{style} {p.question}"
    rows = world.teacher_rows(0)
    assert [(r["rationale"], r["answer"]) for r in rows] == [(said.rpartition("\n")[0], "Cork")] * 2
