"""The built-in worked examples: in the form that the task reads, in no split, and the default of `qstar evaluate`."""

import json
import pathlib

import pytest
from conftest import real_model, shared

import qstar.tasks
from qstar.__main__ import main
from qstar.tasks import make_task

FILES = sorted((pathlib.Path(qstar.tasks.__file__).parent / "examples").glob("*.jsonl"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_built_in_examples_are_read_as_right_in_both_readings(file):
    for strict in (False, True):
        task = make_task(file.stem, train=str(file), test=str(file), prompts="built-in", strict=strict)
        examples = task.examples()
        assert len(examples) >= 3
        for e in examples:
            assert task.correct(e, task.parse(task.cut(task.solution(e)))), e.question
            assert task.prefix().count(task.prompt(e) + task.solution(e) + "\n\n") == 1
            assert task.prompt(e, hint=True) in task.prefix(hint=True)
        assert task.problems("test") == []  # an example is never a problem
        task.keep_examples(1)
        assert task.prefix() == task.prompt(examples[0]) + task.solution(examples[0]) + "\n\n"
    assert make_task(file.stem, train=str(file), test=str(file)).prefix() == ""


def test_evaluate_shows_examples_by_default_prints_the_parse_rate_and_warns(tmp_path, capfd):
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"question": "Tom has 2 apples.", "answer": "1 + 1 = 2\n#### 2"}) + "\n")
    model = shared("weights/stories260k")  # its context of 512 tokens has no room for all examples
    flags = ["evaluate", f"--model={model}", "--task=gsm8k", "--max-new-tokens=4"]
    for prompts, seen in (({}, "built-in"), ({"prompts": None}, None)):
        out = tmp_path / f"out-{seen}"
        options = json.dumps({"test": str(data), **prompts})
        assert main([*flags, f"--task-options={options}", f"--out={out}"]) == 0
        printed = capfd.readouterr().out
        assert "answered" in printed and "warning: an answer was found in only 0% of the completions" in printed
        assert f'"prompts": {json.dumps(seen)}' in "".join(f.read_text() for f in out.glob("*.json"))


def test_a_real_model_answers_in_the_form_that_is_read(tmp_path, capfd):
    """40 problems and 256 tokens: SmolLM2-135M-Instruct .975, Qwen2.5-Coder-0.5B-Instruct .875; here a few of them."""
    model, data = real_model("smollm2-135m-instruct"), shared("data/gsm8k/test.jsonl")
    options = json.dumps({"test": str(data)})
    assert (
        main(["evaluate", f"--model={model}", "--task=gsm8k", f"--task-options={options}", "--limit=8", "--json"]) == 0
    )
    assert json.loads(capfd.readouterr().out)["answered"] > 0.8
