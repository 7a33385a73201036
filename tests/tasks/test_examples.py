"""The built-in worked examples: in the form that the task reads, in no split, and the default of `qstar evaluate`."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import real_model, shared

import qstar.tasks
from qstar.__main__ import main
from qstar.tasks import make_task, task_names

FILES = sorted((pathlib.Path(qstar.tasks.__file__).parent / "examples").glob("*.jsonl"))


def tasks_of(file):
    """The task of an examples file in its readings, with the examples themselves as data."""
    if file.stem in ("mbpp", "humaneval"):
        return [make_task(file.stem, data=str(file))]
    data = {"train": str(file), "test": str(file)}
    if file.stem in ("hotpotqa", "2wikimultihopqa"):
        return [make_task(file.stem, **data, style=s, strict=r) for s in ("standard", "cot") for r in (False, True)]
    names = {f.name for f in dataclasses.fields(make_task(file.stem))}
    fields = {"question": "question", "answer": "answer", "answer_pattern": "", "rationale": "rationale", "choices": "choices",
              "context": "context|", "id": ""}  # fmt: skip
    data |= {name: value for name, value in fields.items() if name in names}
    return [make_task(file.stem, **data, strict=strict) for strict in (False, True)]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_worked_examples_are_read_as_right_in_all_readings(file):
    for plain in tasks_of(file):
        task = plain.in_format("few_shot")
        examples = task.examples()
        assert 4 <= len(examples) <= 8 and plain.in_format("plain").prefix() == ""
        answers = [task.parse(task.cut(task.solution(e))) for e in examples]
        assert all(task.judged(examples, answers)), [e.question for e, a in zip(examples, answers) if a is None]
        # In a chat the solution is a message of its own, read as a whole.
        assert answers == [task.parse(task.solution(e).strip()) for e in examples]
        if file.stem != "mbpp":  # shows its own few-shot tasks, which are part of the data
            assert all(task.prefix().count(task.prompt(e) + task.solution(e)) == 1 for e in examples)
            assert task.stop[0] not in "".join(task.solution(e) for e in examples)
        else:  # and those are an option: none is left out for want of room
            assert not task.drop_example() and task.examples() == examples
        if file.stem not in ("mbpp", "humaneval"):
            assert all(task.prompt(e, hint=True) in task.prefix(hint=True) for e in examples)
            assert task.problems("test") == []  # an example is never a problem
            while len(task.examples()) > 1:
                assert task.drop_example()
            first = task.prompt(examples[0]) + task.solution(examples[0]) + "\n\n"
            assert task.prefix() == first and not (task.drop_example() and task.drop_example())


def test_every_task_has_worked_examples_or_makes_its_own():
    made = make_task("arithmetic", format="release")
    assert all(made.correct(e, made.parse(made.solution(e))) for e in made.examples()) and made.examples()
    for name in set(task_names()) - {"arithmetic"}:
        assert make_task(name).examples(), name
    # Fields of the data are not those of the examples.
    task = make_task("numeric", test="x.json", question="Body Question", answer="Answer")
    assert [e.gold for e in task.examples()] == [e.gold for e in make_task("gsm8k").examples()]


def test_evaluate_shows_examples_by_default_prints_the_parse_rate_and_warns(tmp_path, capfd):
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"question": "Tom has 2 apples.", "answer": "1 + 1 = 2\n#### 2"}) + "\n")
    model = shared("weights/stories260k")  # its context of 512 tokens has no room for all examples
    flags = ["evaluate", f"--model={model}", "--task=gsm8k", "--max-new-tokens=4"]
    for prompts, seen in (({}, "Q: A bakery"), ({"prompts": None}, "Q: Tom")):
        out = tmp_path / f"out-{len(prompts)}"
        options = json.dumps({"test": str(data), **prompts})
        assert main([*flags, f"--task-options={options}", f"--out={out}"]) == 0
        printed = capfd.readouterr().out
        assert "answered" in printed and "warning: an answer was found in only 0% of the completions" in printed
        assert seen


def test_a_real_model_answers_in_the_form_that_is_read():
    """40 problems and 256 tokens: SmolLM2-135M-Instruct .975, Qwen2.5-Coder-0.5B-Instruct .875; here a few of them."""
    model, data = real_model("smollm2-135m-instruct"), shared("data/gsm8k/test.jsonl")
    options = json.dumps({"test": str(data)})
    command = ["-m", "qstar", "evaluate", f"--model={model}", "--task=gsm8k", f"--task-options={options}"]
    # In a process of its own, whose programs are optimised (conftest.py turns it off) and use all cores.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).resolve().parents[2])
    command += ["--limit=8", "--json", "--format=few_shot"]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answered"] > 0.8
