import json
import re

import pytest

from qstar.data import write_jsonl
from qstar.errors import UserError
from qstar.tasks import make_task

TEXTS = ["shirt pocket", "calligrapher's hand", "inkwell", "desk drawer", "blotter"]
STEM = "What do people use to absorb extra ink from a fountain pen?"
ORIGINAL = {
    "id": "x1",
    "answerKey": "E",
    "question": {
        "stem": STEM,
        "choices": [{"label": label, "text": text} for label, text in zip("ABCDE", TEXTS, strict=True)],
    },
}
HUB = {"id": "x1", "answerKey": "E", "question": STEM, "choices": {"label": list("ABCDE"), "text": TEXTS}}
PROMPT = f"""Q: {STEM}
Answer Choices:
(a) shirt pocket
(b) calligrapher's hand
(c) inkwell
(d) desk drawer
(e) blotter
A:"""


@pytest.fixture
def make(tmp_path):
    def build(*rows, **options):
        path = tmp_path / "rows.jsonl"
        write_jsonl(path, rows or [ORIGINAL])
        return make_task("commonsense_qa", train=str(path), test=str(path), **options)

    return build


@pytest.fixture
def problem(make):
    return make().problems("test")[0]


@pytest.fixture(scope="module")
def real(shared):
    folder = shared("data/commonsenseqa")
    return make_task(
        "commonsense_qa",
        train=str(folder / "train_rand_split.jsonl"),
        test=str(folder / "dev_rand_split.jsonl"),
        prompts=str(shared("data/prompts/star")),
    )


def test_both_published_shapes_are_one_problem(make):
    (original,), (hub,) = make(ORIGINAL).problems("test"), make(HUB).problems("test")
    assert original == hub and original.meta == hub.meta
    assert (original.id, original.gold, original.question) == ("x1", "e", STEM)


def test_prompt_is_that_of_the_release(make, problem):
    assert make().prompt(problem) == PROMPT


def test_hint_stands_on_the_right_line_only(make, problem):
    hinted = make().prompt(problem, hint=True)
    assert hinted == PROMPT.replace("(e) blotter", "(e) blotter (CORRECT)")


@pytest.mark.parametrize(
    "completion, answer",
    [
        (" Blotters absorb liquids. Therefore, the answer is blotter (e).", "e"),
        (" Not (a), but (B)", "b"),
        (" (c)\n\nQ: next one\nA: (d).", "c"),
        (" (e) is right. I am sure of it", "e"),  # the release read the third character from the end
        (" (f)", None),
        (" e).", None),
        (" (CORRECT)", None),
        (" (ab)", None),
        ("", None),
    ],
)
def test_answer_is_the_last_letter_in_brackets(make, completion, answer):
    assert make().parse(completion) == answer


def test_nothing_behind_the_answer_is_kept(make):
    task = make()
    assert task.cut(" the answer is blotter (e). Because I say so.") == " the answer is blotter (e)."
    assert task.cut(" (a) or (e)\n\nQ: next (b)") == " (a) or (e)"
    assert task.cut(" no answer") == " no answer"


def test_no_answer_is_wrong(make, problem):
    task = make()
    assert task.correct(problem, "e") and not task.correct(problem, "a") and not task.correct(problem, None)


def test_rationales_that_show_the_hint_leak(make, problem):
    task = make()
    assert task.leak(problem, " It is marked (CORRECT). The answer is blotter (e).")
    assert task.leak(problem, " Blotters absorb ink. Therefore, the answer is blotter (e).") is None


def test_direct_has_no_rationale(make, problem, shared):
    task = make(direct=True, prompts=str(shared("data/prompts/star")))
    assert task.solution(make(direct=True).problems("test")[0]) == " (e)."
    assert make().solution(problem) is None
    assert task.prefix().count("\nA: (") == 7 and "Therefore" not in task.prefix()
    assert task.prefix(hint=True).count("(CORRECT)") == 7


def test_splits_of_the_real_data(real):
    train, val, test = (real.problems(split) for split in ("train", "val", "test"))
    assert len(train) + len(val) == 9741 - 7  # the seven few-shot questions are train rows
    assert len(test) == 1221
    assert 0.04 < len(val) / 9734 < 0.06
    assert not {p.question for p in train} & {p.question for p in val}
    assert len({p.id for p in train + val + test}) == 9734 + 1221


def test_few_shot_text_is_written_as_the_prompts_are(real, shared):
    assert real.prefix() == shared("data/prompts/star/commonsenseqa_prompts.txt").read_text() + "\n\n"
    assert real.prefix().startswith(PROMPT + " The answer must be")
    assert real.prefix(hint=True).startswith(PROMPT.replace("blotter", "blotter (CORRECT)"))


def test_few_shot_questions_are_in_no_split(real, shared):
    lines = shared("data/commonsenseqa/train_rand_split.jsonl").read_text(encoding="utf-8").splitlines()
    stems = {json.loads(line)["question"]["stem"] for line in lines}
    left = {p.question for split in ("train", "val", "test") for p in real.problems(split)}
    missing = {" ".join(stem.split()) for stem in stems - left}  # the data has double spaces
    assert len(missing) == 7 and all(f"Q: {stem}\n" in real.prefix() for stem in missing)


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"answerKey": "F"}, "field 'answerKey' is 'F', none of the choices A shirt pocket, B"),
        ({"answerKey": ""}, "may have no answers"),
        ({"answerKey": None}, "field 'answerKey' is missing"),
        ({"question": {"stem": "x"}}, "choices"),
        ({"question": "x"}, "field 'question.choices|choices' is missing; the record has id, answerKey"),
        ({"question": "x", "choices": {"label": ["A", "A"], "text": ["s", "t"]}}, "each label once"),
        ({"question": "x", "choices": {"label": ["1"], "text": ["s"]}}, "is 'E', none of the choices 1 s"),
    ],
)
def test_bad_rows_are_named(make, change, culprit):
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{re.escape(culprit)}"):
        make(ORIGINAL, {**ORIGINAL, **change}).problems("train")
