"""Chat messages as prompts: of `generate`, `logprobs`, training rows and `qstar sample --chat`."""

import json
import warnings

import numpy as np
import pytest

import qstar
from qstar.__main__ import main
from qstar.errors import QstarWarning, UserError
from qstar.runs import rollouts
from qstar.runs.rollouts import SampleSettings, sample_rollouts, to_example
from qstar.tasks import make_task
from qstar.tasks.prompts import formatted
from qstar.types import Completion
from tests.text.test_chat import INST, TALK, ZEPHYR

ASK = TALK[:1]


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    made, source = tmp_path_factory.mktemp("chat"), shared("weights/stories260k")
    for file in source.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    (made / "chat_template.jinja").write_text(INST)
    return made


@pytest.fixture(scope="module")
def model(folder):
    return qstar.load(folder)


def test_messages_are_prompts_in_the_ids_of_transformers(model):
    ids = model.tokenizer.hf.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    how = {"max_new_tokens": 8, "temperature": 0.0}
    found, wanted = qstar.generate(model, [ASK, "Once"], **how), qstar.generate(model, [ids, "Once"], **how)
    assert [x[0].tokens for x in found] == [x[0].tokens for x in wanted]
    for score in (qstar.logprobs, qstar.score):
        assert np.allclose(*(score(model, [p], [" Yes"])[0] for p in (ASK, model.tokenizer.chat.render(ASK))))
    row = to_example(model.tokenizer, ASK, " Yes")
    assert row.prompt == ids and row.completion[-1] == model.tokenizer.eos_id


def test_the_end_of_a_turn_stops_and_is_exported(model, tmp_path):
    tokenizer = model.tokenizer
    hf, template = tokenizer.hf, tokenizer.hf.chat_template
    try:
        hf.chat_template = ZEPHYR.replace("eos_token", "unk_token")
        tokenizer.__dict__.pop("chat", None)
        assert model.stop_ids == (tokenizer.eos_id, hf.unk_token_id)
        assert tokenizer.end_of(tokenizer.chat.render(ASK)) == hf.unk_token_id
    finally:
        hf.chat_template = template
        tokenizer.__dict__.pop("chat", None)


def test_messages_in_the_wrong_place_are_named(model, shared):
    with pytest.raises(UserError, match="put the list of messages in"):
        qstar.generate(model, ASK, max_new_tokens=1)
    with pytest.raises(UserError, match="prefix stands in front of texts"):
        qstar.generate(model, [ASK], max_new_tokens=1, prefix="Once")
    bare = qstar.load(shared("weights/stories260k"))
    for call in (lambda: qstar.generate(bare, [ASK], max_new_tokens=1), lambda: qstar.logprobs(bare, [ASK], ["a"])):
        with pytest.raises(UserError, match="has no chat template"):
            call()


def test_rollouts_of_a_chat_are_replies_to_whole_conversations(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"{n} and {n}?", "answer": f"#### {2 * n}"}) + "\n" for n in (1, 2))
    )
    task = formatted(make_task("gsm8k", test=str(rows)), model.tokenizer)
    settings, problems = SampleSettings(max_new_tokens=6), task.problems("test")
    for few_shot in (True, False):
        found = sample_rollouts(
            model, task, problems, settings, folder=tmp_path, stage=f"greedy{few_shot}", few_shot=few_shot
        )
        for row, problem in zip(found, problems):
            ask = [{"role": "user", "content": f"{problem.question}\n\n{task.instruction}"}]
            reply = qstar.generate(model, [ask], max_new_tokens=6, temperature=0.0)[0][0]
            assert row.prompt == model.tokenizer.chat.render(ask) and row.completion == reply.text
            assert row.tokens[: len(reply.tokens)] == reply.tokens


def test_an_empty_completion_warns(model, monkeypatch):
    empty = [[Completion("", [2], [0.0], [0.0], True)]]
    monkeypatch.setattr(rollouts.batching, "generate", lambda *_, **__: empty)
    for prompt, remedy in (("What?", r"give the prompt as messages \(--chat\)"), (ASK, "try another prompt")):
        with pytest.warns(QstarWarning, match=f"a completion is empty.*{remedy}"):
            qstar.generate(model, [prompt], max_new_tokens=1)
    empty[0][0] = Completion("", [], [], [], True)
    with pytest.warns(QstarWarning, match="a completion is empty: it begins with a stop string"):
        qstar.generate(model, [ASK], max_new_tokens=1)
    empty[0][0] = Completion("a", [5, 2], [0.0] * 2, [0.0] * 2, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qstar.generate(model, [ASK], max_new_tokens=1)


def test_sample_chat_prints_the_reply(folder, shared, capsys):
    flags = ["sample", "--temperature=0", "--max-new-tokens=6"]
    assert main([*flags, f"--model={folder}", "--prompt=Tell a story.", "--chat"]) == 0
    reply = capsys.readouterr().out.strip()
    asked = [{"role": "user", "content": "Tell a story."}]
    found = qstar.generate(qstar.load(folder), [asked], temperature=0, max_new_tokens=6)[0][0]
    assert reply == found.text.strip() and "Tell" not in reply
    assert main([*flags, f"--model={folder}", "--prompt=a", "--system=b"]) == 2
    assert "--system is a message of a chat" in capsys.readouterr().err
    assert main([*flags, f"--model={shared('weights/stories260k')}", "--prompt=a", "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err
