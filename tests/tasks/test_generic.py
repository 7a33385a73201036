"""Tasks by options alone: fields, patterns, splits, choices, answers; the ready-made ones in the fields of their columns."""

from __future__ import annotations

import csv
import json

import datasets
import pytest

from qstar.data import write_jsonl
from qstar.errors import QstarWarning, UserError
from qstar.tasks import make_task, task_names
from qstar.tasks.ready_made import READY_MADE

SVAMP = {"ID": "c1", "Body": "Ann has 3 apples.", "Question": "How many are 2 more?", "Answer": 5.0, "Type": "Addition"}


@pytest.fixture
def make(tmp_path):
    def build(name, *rows, file="rows.jsonl", **options):
        path = tmp_path / file
        if path.suffix == ".csv":
            with path.open("w", newline="") as f:
                writer = csv.DictWriter(f, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            write_jsonl(path, rows)
        return make_task(name, test=str(path), **options)

    return build


def only(task):
    (problem,) = task.problems("test")
    return problem


# ---------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    "spec, question",
    [
        ("Body Question", "Ann has 3 apples. How many are 2 more?"),
        ("{Body} {Question} Answer with a number.", "Ann has 3 apples. How many are 2 more? Answer with a number."),
        ("asked|Question", "How many are 2 more?"),
        ("in.1.text", "nested"),
        ("{in.1.n}: {Question}", "7: How many are 2 more?"),
        ("no.2", "dotted"),
        ("two words", "a head with a space"),
    ],
)
def test_questions_are_fields_templates_and_nested_fields(make, spec, question):
    row = SVAMP | {"in": [{}, {"text": "nested", "n": 7}], "no.2": "dotted", "two words": "a head with a space"}
    problem = only(make("numeric", row, question=spec, answer="Answer"))
    assert (problem.question, problem.gold) == (question, "5")


@pytest.mark.parametrize(
    "answer, options, gold, solution",
    [
        (51.0, {}, "51", None),
        (2.5, {}, "5/2", None),
        (1e16, {}, "10000000000000000", None),
        ("1,080 apples", {}, "1080", None),
        ("So 3.\n#### 72", {"answer_pattern": "#### (.*)", "rationale": "answer"}, "72", " So 3.\n#### 72"),
        ("So 3.\n#### 72\r\n", {"answer_pattern": "#### (.*)", "rationale": "answer"}, "72", " So 3.\n#### 72"),
        ("9 (apples)", {"rationale": "why"}, "9", " Since 4 + 5 = 9.\n#### 9 (apples)"),
    ],
)
def test_numbers_and_rationales(make, answer, options, gold, solution):
    task = make("numeric", {"question": "q", "answer": answer, "why": "Since 4 + 5 = 9."}, **options)
    problem = only(task)
    assert (problem.gold, problem.solution) == (gold, solution)
    assert solution is None or task.correct(problem, task.parse(task.cut(solution)))


def test_tolerance_counts_near_answers_as_right(make):
    row = {"question": "q", "answer": 1473.33333}
    for tolerance, right in ((1e-2, True), (0.0, False)):
        task = make("numeric", row, tolerance=tolerance)
        assert task.correct(only(task), task.parse("#### 1473.33")) is right


def test_a_csv_file_and_parts_of_one_file(make, tmp_path):
    rows = [{"q": f"How many are {i}?", "a": i} for i in range(50)]
    path = str(tmp_path / "rows.csv")
    task = make(
        "numeric",
        *rows,
        file="rows.csv",
        question="q",
        answer="a",
        train=path,
        train_split="train[:80%]",
        test_split="[40:]",
    )
    test, train = task.problems("test"), task.problems("train") + task.problems("val")
    assert [p.gold for p in test] == [str(i) for i in range(40, 50)] and len(train) == 40
    with pytest.raises(UserError, match=r"split 'a\[3\]' is not of the form train\[10:20\] or train\[:80%\]"):
        make_task("numeric", test=path, test_split="a[3]").problems("test")


@pytest.mark.parametrize("train, test, count", [
    ("[:70]", "test", 70), ("[:80]", "[70:]", 10), ("[:80%]", "[70%:]", 10), ("train", "test", 100), ("[:70]", "[70:]", 0),
])  # fmt: skip
def test_test_problems_among_the_train_problems_are_counted(make, tmp_path, monkeypatch, recwarn, train, test, count):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"q{i}", "answer": i} for i in range(100)]
    task = make("numeric", *rows, train="./rows.jsonl", train_split=train, test_split=test)
    found = [len(task.problems(split)) for split in ("train", "test")][1]
    (line,) = [str(w.message) for w in recwarn if issubclass(w.category, QstarWarning)] or [""]
    assert line.startswith(f"task numeric: {count} of its {found} test problems are among its train" if count else "")
    assert bool(line) == bool(count)


def test_a_question_with_other_choices_is_another_problem(make, tmp_path, recwarn):
    rows = [{"question": "Which is true?", "choices": [f"a{i}", "b"], "answer": 0} for i in range(10)]
    task = make("multiple_choice", *rows, train=str(tmp_path / "rows.jsonl"), train_split="[:5]", test_split="[5:]")
    assert len(task.problems("train") + task.problems("val") + task.problems("test")) == 10
    assert not [w for w in recwarn if issubclass(w.category, QstarWarning)]


def test_a_missing_field_lists_those_of_the_record_and_a_missing_source_its_option(make):
    with pytest.raises(UserError) as e:
        make("numeric", SVAMP, SVAMP, question="Body Questoin").problems("test")
    assert "rows.jsonl:1: field 'answer' is missing; the record has ID, Body, Question, Answer, Type (and none" in str(
        e.value
    )
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="task numeric has no source of train records; set its option 'train'"):
        make("numeric", SVAMP).problems("train")
    with pytest.raises(UserError, match=r"exact: answer_pattern='\(' is no regular expression"):
        make("exact", SVAMP, answer_pattern="(")


# ---------------------------------------------------------------------------------------------------------- choices

TEXTS = ["sun", "moon", "4"]
SHAPES = {
    "texts": {"choices": TEXTS},
    "texts with labels": {"choices": ["A) sun", "B) moon", "C) 4"]},
    "objects": {"choices": [{"label": label, "text": text} for label, text in zip("123", TEXTS)]},
    "columns of labels and texts": {"choices": {"label": list("ABC"), "text": TEXTS}},
    "a column for each label": {"choices": dict(zip("ABC", TEXTS))},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("answer", ["B", "b", "2", "moon", 1])
def test_published_shapes_of_choices_and_answers(make, shape, answer):
    if answer == "2" and shape != "objects" or shape == "objects" and answer in ("B", "b"):
        pytest.skip("not a label of this shape")
    task = make("multiple_choice", {"question": "At night?", "answer": answer, **SHAPES[shape]})
    problem = only(task)
    assert problem.gold == "b" and problem.meta["choices"] == dict(zip("abc", TEXTS))
    assert task.prompt(problem) == "Q: At night?\nAnswer Choices:\n(a) sun\n(b) moon\n(c) 4\nA:"


def test_what_an_answer_is_can_be_named(make):
    row = {"question": "q", "answer": "1", "choices": ["2", "1", "0"]}
    golds = {way: only(make("multiple_choice", row, answer_as=way)).gold for way in ("auto", "text", "index")}
    assert golds == {"auto": "b", "text": "b", "index": "b"}
    row["answer"] = "2"
    assert {w: only(make("multiple_choice", row, answer_as=w)).gold for w in ("text", "index")} == {
        "text": "a",
        "index": "c",
    }
    with pytest.raises(UserError, match="field 'answer' is '2', none of the choices A 2, B 1, C 0"):
        make("multiple_choice", row, answer_as="label").problems("test")


def test_separate_columns_are_shuffled_alike_in_every_run(make):
    rows = [{"q": f"q{i}", "right": f"r{i}", "w1": f"w{i}", "w2": f"v{i}"} for i in range(40)]
    options = dict(question="q", choices="right w1 w2", answer="right", shuffle=True)
    first, again = (make("multiple_choice", *rows, **options).problems("test") for _ in range(2))
    assert first == again and {p.gold for p in first} == set("abc")
    assert all(p.meta["choices"][p.gold] == p.question.replace("q", "r") for p in first)


def test_more_choices_than_letters_are_refused(make):
    row = {"question": "q", "answer": "g", "choices": list("abcdefg")}
    with pytest.raises(UserError, match="field 'choices' has 7 choices, above max_choices=5"):
        make("multiple_choice", row).problems("test")
    task = make("multiple_choice", row, max_choices=7)
    assert only(task).gold == "g" == task.parse(" The answer is (g).")


def test_choices_that_are_a_text_need_a_pattern(make):
    row = {"question": "q", "answer": "B", "choices": "AB"}
    with pytest.raises(UserError, match="field 'choices' is text; give choices_pattern"):
        make("multiple_choice", row).problems("test")
    assert only(make("multiple_choice", row, choices_pattern="[AB]")).gold == "b"


def test_a_rationale_that_states_no_letter_gets_the_statement(make):
    row = {"question": "q", "answer": "B", "choices": TEXTS, "rationale": "It is dark."}
    task = make("multiple_choice", row, rationale="rationale")
    assert only(task).solution == " It is dark. Therefore, the answer is moon (b)."
    assert task.parse(only(task).solution) == "b"


# ---------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize(
    "said, read",
    [
        (" So the answer is The Eiffel Tower.", "eiffel tower"),
        (" eiffel  tower", "eiffel tower"),
        (" It is tall.\n**Answer:** `Eiffel Tower`", "eiffel tower"),
        (" C++", "c++"),
        (" -5", "-5"),
        ("", None),
    ],
)
def test_exact_answers_are_normalised(make, said, read):
    assert make("exact", {"question": "q", "answer": "a"}).parse(said) == read


@pytest.mark.parametrize(
    "name, option", [("gsm8k", "test"), ("gsm8k", "train"), ("mbpp", "data"), ("humaneval", "data")]
)
def test_an_empty_source_is_refused(name, option):
    with pytest.raises(UserError, match="'' is neither a file nor a hub name"):
        make_task(name, **{option: ""}).problems("train" if option == "train" else "test")


def test_each_of_several_answers_is_right(make):
    task = make("exact", {"question": "q", "answer": {"aliases": [None, "New York", "NYC"]}}, answer="answer.aliases")
    assert [task.correct(only(task), task.parse(f" {a}.")) for a in ("nyc", "The New York", "York")] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("gold", ["__init__", "{a, b}", "~5", "<html>", "\\frac{1}{2}", "*args", "{}"])
def test_an_answer_of_markup_can_be_right(make, gold):
    task = make("exact", {"question": "q", "answer": gold})
    for said in (f" {gold}", f" So the answer is {gold}."):
        assert task.correct(only(task), task.parse(said)), said
    assert task.parse("\\boxed{}") is None and task.parse("<|im_end|>") is None


@pytest.mark.parametrize("answer, gold", [(True, "yes"), ("no", "no"), ("False", "no")])
def test_yes_no(make, answer, gold):
    problem = only(make("exact", {"question": "q", "answer": answer}, yes_no=True))
    assert (problem.gold, problem.group) == (gold, gold)
    with pytest.raises(UserError, match="field 'answer' is 'maybe', neither yes nor no"):
        make("exact", {"question": "q", "answer": "maybe"}, yes_no=True).problems("test")


# ------------------------------------------------------------------------------------------------------- ready made

ARC = {
    "id": "M1",
    "question": "What shines?",
    "choices": {"text": ["sun", "mud"], "label": ["A", "B"]},
    "answerKey": "A",
}
AQUA = {"question": "2+3?", "options": ["A)4", "B)5", "C)6", "D)7", "E)8"], "rationale": "Answer - B", "correct": "B"}
# A row in the columns of the hub's data set (written for this test): its question, gold answer, group.
HUB = {
    "svamp": (SVAMP, "Ann has 3 apples. How many are 2 more?", "5", "Addition"),
    "multiarith": ({"question": "1+1?", "final_ans": "2"}, "1+1?", "2", "multiarith"),
    "gsm_hard": ({"input": "9e3/7?", "code": "", "target": 1285.7142857}, "9e3/7?", "12857142857/10000000", "gsm_hard"),
    "asdiv": (
        {"body": "Tom has 4.", "question": "And 5 more?", "answer": "9 (apples)", "solution_type": "Addition", "formula": ""},
        "Tom has 4. And 5 more?", "9", "Addition",
    ),
    "gsm8k": ({"question": "1+1?", "answer": "It is 2.\n#### 2"}, "1+1?", "2", "gsm8k"),
    "arc_easy": (ARC, "What shines?", "a", "arc_easy"),
    "arc_challenge": ({**ARC, "choices": {"text": ["mud", "sun"], "label": ["1", "2"]}, "answerKey": "2"}, "What shines?", "b", "arc_challenge"),
    "openbookqa": ({**ARC, "question_stem": ARC["question"], "question": None}, "What shines?", "a", "openbookqa"),
    "commonsense_qa": (ARC, "What shines?", "a", "commonsense_qa"),
    "aqua": (AQUA, "2+3?", "b", "aqua"),
    "boolq": ({"question": "is it wet", "passage": "Water is wet.", "answer": True}, "is it wet", "yes", "yes"),
    "strategy_qa": ({"qid": "x", "question": "Wet?", "answer": False, "facts": ["Sand is dry."]}, "Wet?", "no", "no"),
}  # fmt: skip


@pytest.mark.parametrize("name", READY_MADE)
def test_ready_made_tasks_read_the_columns_of_the_hub_and_their_own_solutions(name, monkeypatch):
    row, question, gold, group = HUB[name]
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k["split"])) or [row])
    task = make_task(name)
    problem = only(task)
    assert (problem.question, problem.gold, problem.group) == (question, gold, group)
    assert task.name == name and problem.id
    ((path, config), split) = calls[0]
    assert "/" in path and split in ("test", "validation", "train")
    if problem.solution:
        assert task.correct(problem, task.parse(task.cut(problem.solution)))
    hinted = task.prompt(problem, hint=True)
    assert hinted != task.prompt(problem) and hinted.endswith("A:")


def test_the_error_for_an_unknown_name_lists_them_all():
    with pytest.raises(UserError) as e:
        make_task("swamp")
    assert "did you mean svamp?" in str(e.value) and all(name in str(e.value) for name in task_names())


def test_local_copies_are_read_by_options(shared):
    svamp = str(shared("data/svamp/SVAMP.json"))
    task = make_task("svamp", train=svamp, train_split="[:700]", test=svamp, test_split="[700:]")
    assert len(task.problems("test")) == 300 and len({p.group for p in task.problems("test")}) >= 4
    assert len(make_task("aqua", test=str(shared("data/aqua/test.jsonl"))).problems("test")) == 254
    arc = json.loads("""{
        "question": "instruction", "question_pattern": "question: ([\\\\s\\\\S]*?)\\n\\nAnswer1:",
        "choices": "instruction", "choices_pattern": "Answer(\\\\d): ([\\\\s\\\\S]*?)(?= Answer\\\\d: |\\n\\nAnswer format)",
        "answer_pattern": "answer(\\\\d)"}""", strict=False)  # fmt: skip
    problems = make_task("multiple_choice", test=str(shared("data/arc/ARC-Easy.test.json")), **arc).problems("test")
    assert len(problems) == 2376 and {len(p.meta["choices"]) for p in problems} == {3, 4, 5}
    assert problems[0].meta["choices"]["a"] == "Sunlight is the source of energy for nearly all ecosystems."
