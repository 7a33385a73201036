"""Prompts of an evaluation that the model's context has no room for."""

import json

import pytest

import qstar
from qstar.__main__ import main
from qstar.errors import QstarWarning, UserError
from qstar.runs.evaluate import evaluate_model, fit_examples, fit_prompts
from qstar.runs.rollouts import check_lengths
from qstar.tasks import make_task
from qstar.tasks.prompts import PromptFormat, formatted
from tests.text.test_chat import ZEPHYR, with_template

SHORT = "Tom has 2 apples."
LONG = "Tom has one apple and one pear. " * 80 + "How many?"

PLAIN = PromptFormat("plain")


@pytest.fixture
def task(tmp_path):
    rows = [{"question": q, "answer": "#### 2"} for q in (SHORT, LONG, SHORT + " Why?")]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return make_task("gsm8k", train=str(path), test=str(path))


@pytest.fixture(scope="module")
def model(shared):
    return qstar.load(shared("weights/stories260k"))


def test_an_error_names_the_first(task, model):
    with pytest.raises(UserError, match="problem gsm8k-test-00001: .* exceed the model's context of 512 tokens"):
        evaluate_model(model, task, prompt_format=PLAIN, max_new_tokens=4)


def test_skip_leaves_them_out_and_counts_them(task, model, tmp_path):
    with pytest.warns(QstarWarning, match="1 of 3 prompts exceed .* left out: gsm8k-test-00001"):
        found = evaluate_model(
            model, task, prompt_format=PLAIN, max_new_tokens=4, too_long="skip", out=tmp_path / "out"
        )
    assert (found["problems"], found["too_long"]) == (2, 1)
    rows = [json.loads(line) for line in (tmp_path / "out/greedy_000.jsonl").read_text().splitlines()]
    assert [r["problem_id"] for r in rows] == ["gsm8k-test-00000", "gsm8k-test-00002"]


def test_truncate_keeps_the_end_and_the_room(task, model, tmp_path):
    with pytest.warns(QstarWarning, match="lost their first tokens: gsm8k-test-00001"):
        found = evaluate_model(
            model, task, prompt_format=PLAIN, max_new_tokens=4, too_long="truncate", out=tmp_path / "out"
        )
    assert (found["problems"], found["too_long"]) == (3, 1)
    rows = [json.loads(line) for line in (tmp_path / "out/greedy_000.jsonl").read_text().splitlines()]
    prompt, whole = rows[1]["prompt"], task.prompt(task.problems("test")[1])
    assert whole.endswith(prompt) and prompt.endswith("How many?\nA:")
    assert 512 - 4 - 3 <= len(model.tokenizer.encode(prompt, bos=True)) <= 512 - 4
    assert rows[0]["prompt"] == task.prompt(task.problems("test")[0])


def test_a_chat_keeps_the_end_of_its_message(task, model):
    chat = with_template("stories260k", ZEPHYR)
    long, problems = formatted(task, chat), task.problems("test")
    with pytest.warns(QstarWarning, match="lost their first tokens"):
        short, *_ = fit_prompts(model.replace(tokenizer=chat), long, problems, 4, "truncate")
    (_, prompt, _), (_, whole, _) = (list(map(t.prompt, problems)) for t in (short, long))
    assert prompt.startswith(long.opening) and prompt.endswith(whole[-60:]) and len(prompt) < len(whole)
    assert whole[-60:].count("</s>") == 1


def test_examples_that_do_not_fit_are_left_out_of_a_copy(model):
    task = make_task("gsm8k", prompts="built-in")
    examples = len(task.examples())
    with pytest.warns(QstarWarning, match=f"{examples} worked examples are left out"):
        assert fit_examples(model, task, 500).prefix() == ""
    assert len(task.examples()) == examples


def test_a_prompt_of_few_characters_may_be_the_longest(model, tmp_path):
    rows = [{"question": q, "answer": "#### 2"} for q in ["a" * 200] * 16 + ["\U0001f600" * 150]]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = make_task("gsm8k", test=str(path))
    with pytest.raises(UserError, match="problem gsm8k-test-00016: "):
        check_lengths(model, task, task.problems("test"), 4)


def test_nothing_left_is_refused(task, model):
    with pytest.raises(UserError, match="3 of 3 prompts exceed"):
        evaluate_model(model, task, prompt_format=PLAIN, max_new_tokens=511, too_long="skip")
    with pytest.raises(UserError, match="lower max_new_tokens"):
        evaluate_model(model, task, prompt_format=PLAIN, max_new_tokens=511, too_long="truncate")
    with pytest.raises(UserError, match="max_new_tokens=600 leaves no room for a prompt in the context of 512"):
        fit_prompts(model, task, task.problems("test"), 600, "truncate")


def test_the_command_line_knows_it(task, capfd, shared):
    data = json.dumps({"test": task.test})
    flags = [
        "evaluate",
        f"--model={shared('weights/stories260k')}",
        "--task=gsm8k",
        "--task-options",
        data,
        "--max-new-tokens=2",
    ]
    assert main(flags) == 2
    assert "--too-long=skip" in capfd.readouterr().err
    assert main([*flags, "--too-long=skip", "--json"]) == 0
    out = capfd.readouterr()
    assert json.loads(out.out)["too_long"] == 1
    examples, long = out.err.splitlines()
    assert "3 worked examples are left out" in examples and long.startswith("qstar: warning: 1 of 3 prompts")
    assert main([*flags, "--too-long=skip", "--metric=expected"]) == 2
    assert "--too-long" in capfd.readouterr().err
