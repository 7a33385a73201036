"""A completion that runs into the token limit behind a whole answer has answered; one that is cut off before has not."""

import json

import pytest

from qstar.runs.rollouts import read_answer
from qstar.tasks import make_task
from qstar.types import Completion

PROGRAM = "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\n"
FORMS = {
    # task, text, stopped, answered, part that is kept
    "answer, then a new problem": ("gsm8k", "3 + 4 = 7\n#### 7\n\nQ: Tom has 9 ap", False, True, "3 + 4 = 7\n#### 7"),
    "no answer yet": ("gsm8k", "3 + 4 = 7, and then 7 +", False, False, None),
    "a number that may go on": ("gsm8k", "3 + 4 = 7\n#### 7", False, False, None),
    "the same, ended": ("gsm8k", "3 + 4 = 7\n#### 7", True, True, None),
    "program, then an explanation": ("mbpp", PROGRAM + "This function doubles its", False, True, PROGRAM.rstrip()),
    "a program that is cut off": ("mbpp", "```python\ndef double(x):\n    return 2 *", False, False, None),
    "examples without a definition": ("mbpp", "```python\ndouble(2)\n```\nNow the func", False, False, None),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    gsm8k = {"question": "Tom has 3 apples and gets 4. How many?", "answer": "3 + 4 = 7\n#### 7"}
    mbpp = {"task_id": 11, "text": "Double.", "code": "def double(x):\n    return 2 * x",
            "test_list": ["assert double(2) == 4"], "test_setup_code": "", "challenge_test_list": []}  # fmt: skip
    for name, row in (("gsm8k", gsm8k), ("mbpp", mbpp)):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return {
        "gsm8k": make_task("gsm8k", test=str(folder / "gsm8k.jsonl")),
        "mbpp": make_task("mbpp", data=str(folder / "mbpp.jsonl")),
    }


@pytest.mark.parametrize("name", FORMS)
def test_what_is_cut_off_behind_its_answer_has_answered(name, tasks):
    task, text, stopped, answered, part = FORMS[name]
    kept, _, ended = read_answer(tasks[task], Completion(text, [1], [-1.0], [-1.0], stopped))
    assert ended == answered
    assert kept == (text if part is None else part)


def test_the_answer_behind_which_a_model_went_on_is_right(tasks):
    task = tasks["gsm8k"]
    (problem,) = task.problems("test")
    _, answer, ended = read_answer(task, Completion(FORMS["answer, then a new problem"][1], [1], [-1.0], [-1.0], False))
    assert ended and task.correct(problem, answer)
