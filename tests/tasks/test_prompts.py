"""Prompt formats: what a task's view in the chat format writes, and which format is taken."""

import copy
import json
import pickle

import pytest

from qstar.errors import UserError
from qstar.tasks import make_task
from qstar.tasks.prompts import ChatTask, PromptFormat, formatted, make_prompted
from qstar.types import Completion
from tests.text.kinds import tokenizer
from tests.text.test_chat import INST, PLAIN, REAL, ZEPHYR, with_template

RECORD = {"question": "Tom has 2 apples and eats 1.\nHow many are left?", "answer": "2 - 1 = 1\n#### 1"}
CASES = [*((name, None) for name in REAL), ("stories260k", INST), ("mistral", ZEPHYR)]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(RECORD) + "\n")
    return {"train": str(file), "test": str(file)}


@pytest.mark.parametrize(("kind", "template"), CASES)
@pytest.mark.parametrize("shots", [0, 2])
def test_prefix_and_prompt_are_the_conversation_that_transformers_renders(data, kind, template, shots):
    tok = with_template(kind, template)
    raw = make_task("gsm8k", **data)
    task = formatted(raw, tok, PromptFormat("chat", shots))
    problem = task.problems("test")[0]
    talk = []
    for example in raw.examples()[:shots]:
        talk += [("user", f"{example.question}\n\n{raw.instruction}"), ("assistant", raw.solution(example).strip())]
    talk.append(("user", f"{RECORD['question']}\n\n{raw.instruction}"))
    messages = [{"role": role, "content": text} for role, text in talk]
    # What every prompt begins with is apart, so that it is computed once.
    assert task.behind(task.prefix(), task.prompt(problem)) == tok.chat.render(messages)
    assert task.prompt(problem).startswith(task.opening) and task.stop == ()
    assert task.prompt(problem) == tok.chat.render(messages[-1:])


def test_training_rows_are_the_conversation_with_its_end_of_turn(data):
    from qstar.runs.rollouts import to_example

    tok = with_template("stories260k", INST)
    task = formatted(make_task("gsm8k", **data), tok)
    problem = task.problems("test")[0]
    row = to_example(tok, task.prompt(problem), task.solution(problem))
    question = {"role": "user", "content": f"{task.message(problem)}\n\n{task.instruction}"}
    ids, mask = tok.chat.encode([question, {"role": "assistant", "content": RECORD["answer"]}])
    assert row.prompt + row.completion == ids and row.completion[-1] == tok.chat.turn.end_id
    # The space in front of the reply is the template's; here it is learnt, too.
    assert [0] * len(row.prompt) + [1] * len(row.completion) == mask
    assert to_example(tok, task.prompt(problem), f"{task.solution(problem)}{tok.hf.eos_token}") == row


@pytest.mark.parametrize("name, reply, answer", [
    ("commonsense_qa", "Ink is for writing.\n\nTherefore, the answer is w (b).", "b"),
    ("commonsense_qa", "<think>\nhm\n</think>\n\nTherefore, the answer is w (b).", "b"),
    ("strategy_qa", "Water is a liquid.\n\nSo the answer is yes.", "yes"),
    ("exact", "It flows.\n\nSo the answer is Elbe.\nQ: And Rhine?\nA: It is Rhine.", "elbe"),
    ("hotpotqa", "<think>\nhm\n</think>\n\nElbe", "elbe"),
    ("2wikimultihopqa", "\n\nThe answer is Elbe.\n\nIt is a river.", "elbe"),
])  # fmt: skip
def test_replies_have_paragraphs(name, reply, answer):
    from qstar.runs.rollouts import read_answer

    raw = make_task(name)
    task = formatted(raw, with_template("mistral", ZEPHYR))
    text, found, _ = read_answer(task, Completion(reply, [], [], [], True))
    assert found == answer and "Rhine" not in text and "\n\n" in raw.stop


def test_hints_stand_in_the_message_and_leave_the_prompt_for_training(data):
    task = formatted(make_task("gsm8k", **data), with_template("mistral", ZEPHYR))
    problem = task.problems("test")[0]
    hinted, plain = task.prompt(problem, hint=True), task.prompt(problem)
    assert "How many are left? (1)\n" in hinted and "given in brackets" in hinted and "(1)" not in plain
    assert hinted.startswith(task.opening)


def test_the_format_follows_from_tokenizer_task_and_options(data, tmp_path):
    bare, chat = tokenizer("mistral"), with_template("mistral", ZEPHYR)
    shown = {"plain": "", "few_shot": make_task("gsm8k", prompts="built-in").prefix()}
    for tok, options, wanted in (
        (bare, {}, "few_shot"),
        (bare, {"format": "plain"}, "plain"),
        (bare, {"prompts": None}, "plain"),
        (chat, {"prompts": "built-in"}, "few_shot"),
        (chat, {"format": "few_shot"}, "few_shot"),
        (chat, {"format": "plain"}, "plain"),
    ):
        task, settings = make_prompted("gsm8k", {**data, **options})
        found = formatted(task, tok, settings)
        assert found.prefix() == shown[wanted] and found.prompt(found.problems("test")[0]).startswith("Q: "), options
    view = formatted(*_swapped(make_prompted("gsm8k", data), chat))
    assert isinstance(view, ChatTask) and formatted(view, chat) is view
    assert pickle.loads(pickle.dumps(view)).prefix() == copy.copy(view).prefix() == ""
    for options, tok, fault in (
        ({"format": "chat"}, bare, "no chat template"),
        ({"format": "chat", "prompts": "built-in"}, chat, "leave one of them out"),
        ({"format": "few_shot", "shots": 2}, chat, "shots=2 are turns of a chat"),
        ({"shots": 9}, chat, "has 4 worked examples"),
        ({"format": "chatt"}, chat, "is not one of auto, chat, few_shot, plain"),
        ({"shots": "2"}, chat, "option shots='2' must be of type int"),
    ):
        with pytest.raises(UserError, match=fault):
            formatted(*_swapped(make_prompted("gsm8k", {**data, **options}), tok))


def _swapped(made, tok):
    return made[0], tok, made[1]


def test_options_of_a_task_that_are_called_alike_stay_its_own():
    assert make_prompted("arithmetic", {"format": "release", "shots": 3})[0].shots == 3
    assert make_prompted("arithmetic", {"format": "chat", "shots": 3})[1] == PromptFormat("chat")
    task, settings = make_prompted("mbpp", {"shots": 2})
    assert (task.shots, settings.shots) == ((2, 3, 4), 2)
    assert make_prompted("mbpp", {"shots": ()})[0].shots == ()
    assert make_prompted("math", {"format": "gsm8k"})[0].format == "gsm8k"
    assert make_prompted("math", {"format": "chat"})[1].format == "chat"


def test_a_template_that_changes_messages_is_refused():
    tok = with_template("mistral", "{{ messages[0].content | upper }}")
    with pytest.raises(UserError, match="does not write a user's message as it is"):
        formatted(make_task("gsm8k"), tok, PromptFormat("chat"))
    # Without an end token a reply ends with EOS.
    assert formatted(make_task("gsm8k"), with_template("mistral", PLAIN)).opening == "user: "
