from decimal import Decimal
from fractions import Fraction

import pytest

from qstar.data import write_jsonl
from qstar.errors import UserError
from qstar.tasks import make_task
from qstar.tasks.answer_parsing import number

QUESTION = "Natalia sold clips to 48 of her friends in April, and half as many in May. How many clips in all?"
ANSWER = "She sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.fixture
def make(tmp_path):
    """A GSM8K task on the rows given, all of which fall into train or val."""

    def build(rows=((QUESTION, ANSWER),), **options):
        path = tmp_path / "rows.jsonl"
        write_jsonl(path, [{"question": q, "answer": a} for q, a in rows])
        return make_task("gsm8k", train=str(path), test=str(path), **options)

    return build


@pytest.fixture
def task(make):
    return make()


@pytest.fixture
def natalia(task):
    return task.problems("test")[0]


@pytest.fixture(scope="module")
def real(shared):
    folder = shared("data/gsm8k")
    return make_task(
        "gsm8k",
        train=str(folder / "train.jsonl"),
        test=str(folder / "test.jsonl"),
        prompts=str(shared("data/prompts/star")),
    )


# ------------------------------------------------------------------ the answer parser, row by row


def test_the_last_mark_counts(task):
    assert task.parse("#### 5\nno, wait\n#### 72") == "72"
    assert task.parse("#### 72\n#### ") == "72"


def test_text_behind_a_stop_string_is_not_an_answer(task):
    assert task.parse("24\n#### 72\n\nQ: Another one?\nA: 9\n#### 9") == "72"


@pytest.mark.parametrize(
    "text",
    [
        "72",
        "$72",
        "72%",
        " 72 ",
        "72 clips",
        "72 clips.",
        "72.",
        "72.00",
        "$72.00",
        "€72",
        "+72",
        "72 (clips)",
    ],
)
def test_signs_units_and_full_stops_are_stripped(task, text):
    assert task.parse(f"#### {text}") == "72"


@pytest.mark.parametrize("text", [",", ".", "$", "-", "", "clips", "/", ",,", "%"])
def test_without_a_digit_there_is_no_number(task, text):
    assert task.parse(f"#### {text}") is None


@pytest.mark.parametrize(
    "text, value",
    [
        ("1,000", "1000"),
        ("109,200,000", "109200000"),
        ("1,000.50", "2001/2"),
        ("1,000,", "1000"),
        ("5,", "5"),
    ],
)
def test_commas_between_digits_are_dropped(task, text, value):
    assert task.parse(f"#### {text}") == value


@pytest.mark.parametrize("text", [",5", "..5", "1,,000", "1.5.3"])
def test_commas_and_points_stand_between_digits(task, text):
    assert task.parse(f"#### {text}") is None


def test_equal_numbers_are_equal_answers(task, make):
    answers = {task.parse(f"#### {text}") for text in ("29", "29.00", "$29.00", "29.", "58/2", "$29")}
    assert answers == {"29"}
    gold = make([("x", "#### 29")]).problems("test")[0]
    assert all(task.correct(gold, text) for text in ("29", "29.00", "$29.00"))
    assert not any(task.correct(gold, text) for text in ("29.01", "-29", "2 9", None))


def test_fractions(task):
    assert task.parse("#### 1/2") == task.parse("#### 0.5") == task.parse("#### 2 / 4 cups") == "1/2"
    assert task.parse("#### 1 1/2") == task.parse("#### 1½") == "3/2"
    assert task.parse("#### 1/0") is None
    assert task.parse("#### 1/2/3") is None


@pytest.mark.parametrize("text", ["-3", "\u22123", "\u20133", "-$3", "$-3", "\u2212 3"])
def test_minus_signs(task, text):
    assert task.parse(f"#### {text}") == "-3"


@pytest.mark.parametrize(
    "text",
    [
        "1e3",
        "1E3",
        "1.5e3",
        "10-20",
        "5 or 6",
        "5:30",
        "72 = 2 x 36",
        "x = 5",
    ],
)
def test_exponents_second_numbers_and_words_in_front_are_refused(task, text):
    assert task.parse(f"#### {text}") is None


def test_without_a_statement_of_an_answer_there_is_none_and_none_is_never_right(task, natalia):
    assert task.parse("She sold 72 clips to her friends.") is None
    assert not task.correct(natalia, None)


def test_digits_of_other_scripts_and_endless_numbers_are_refused(task):
    assert task.parse("#### \u0667\u0662") is None
    assert task.parse("#### " + "9" * 10_000) is None  # Python itself refuses to convert these


def test_gold_with_a_comma_is_normalised_the_same_way(make):
    task = make([("x", "Adds up.\n#### 1,080")])
    problem = task.problems("test")[0]
    assert problem.gold == "1080" and task.correct(problem, task.parse("#### 1080"))


@pytest.mark.parametrize(
    "text, value", [("₹72", 72), ("1 000", 1000), ("-.5", -0.5), ("3 1/2 cups", 3.5), ("1e6", None)]
)
def test_gold_numbers_are_written_as_answers_are(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["12", "-7", "3.25", "1,234,567.125"])
def test_numbers_agree_with_decimal(text):
    assert number(text) == Fraction(Decimal(text.replace(",", "")))


def test_strict_is_the_release(make):
    task = make([("x", "#### 1,080")], strict=True)
    problem = task.problems("test")[0]
    assert problem.gold == "1,080"
    for completion, right in [
        ("a\n#### 1,080\n#### 5", True),  # the FIRST line with the mark
        ("#### 5\n#### 1,080", False),
        ("#### 1080", False),
        ("#### $1,080", False),
        ("####1,080  ", True),
        ("no mark", False),
        ("####", False),
    ]:
        assert task.correct(problem, task.parse(completion)) is right


def test_strict_ignores_case(make):
    task = make([("x", "#### Yes")], strict=True)
    assert task.correct(task.problems("test")[0], task.parse("#### YES"))


# ------------------------------------------------------------------ prompts, hints, what is kept


def test_prompt_and_solution(task, natalia):
    assert task.prompt(natalia) == f"Q: {QUESTION}\nA:"
    assert task.solution(natalia) == " " + ANSWER


def test_hint_is_the_answer_or_the_solution(make, natalia):
    assert make().prompt(natalia, hint=True) == f"Q: {QUESTION} (72)\nA:"
    assert make(hint="solution").prompt(natalia, hint=True) == f"Q: {QUESTION} ({ANSWER})\nA:"
    with pytest.raises(UserError, match="hint='both'"):
        make(hint="both")


@pytest.mark.parametrize(
    "completion, kept",
    [
        (" a\n#### 72", " a\n#### 72"),
        (" a\n#### 72 clips, as I said\nmore", " a\n#### 72"),
        (" a\n#### $72.00.\n\nQ: next", " a\n#### $72.00"),
        (" a\n#### \u22121/2 cup", " a\n#### \u22121/2"),
        (" no answer\n\nQ: next", " no answer\n"),
        (" a\n#### none\nb", " a\n#### none"),
    ],
)
def test_nothing_behind_the_answer_is_kept(task, completion, kept):
    assert task.cut(completion) == kept
    assert task.parse(kept) == task.parse(completion)


# ------------------------------------------------------------------ leaks


@pytest.mark.parametrize(
    "completion, leaks",
    [
        (ANSWER, False),
        ("The answer is 72.\n#### 72", True),
        ("72 = 48 + 24\n#### 72", True),
        ("She sold 72 clips because 48 + 24 = 72.\n#### 72", True),
        ("She sold 48 + 24 = 72 clips.\n#### 72", False),
        ("She sold 48 clips, then 24, in all <<48+24=72>>72.\n#### 72", False),
        ("Let x be May: x + 48 is all, x is 24.\nSo 72.\n#### 72", False),
        ("The hint says so: 48 + 24 = 72\n#### 72", True),
        ("#### 72", False),  # no rationale at all is a matter of its length
    ],
)
def test_an_answer_before_any_computation_is_a_leak(task, natalia, completion, leaks):
    assert bool(task.leak(natalia, completion)) is leaks


def test_a_number_of_the_question_may_be_quoted(make):
    task = make([("Ann has 72 clips and gets none. How many has she?", "72 + 0 = 72\n#### 72")])
    assert task.leak(task.problems("test")[0], "Ann has 72 clips.\n#### 72") is None


def test_human_solutions_hardly_ever_look_like_leaks(real):
    problems = real.problems("train")
    assert sum(bool(real.leak(p, p.solution)) for p in problems) / len(problems) < 0.01


# ------------------------------------------------------------------ the real data


def test_every_real_solution_is_right_and_whole(real):
    for split in ("train", "val", "test"):
        for p in real.problems(split):
            assert real.correct(p, real.parse(p.solution)) and real.cut(p.solution) == p.solution


def test_splits_of_the_real_data(real):
    train, val, test = (real.problems(split) for split in ("train", "val", "test"))
    assert len(train) + len(val) == 7473 - 6  # the six few-shot questions are train rows
    assert len(test) == 1319
    assert 0.04 < len(val) / 7467 < 0.06
    assert not {p.question for p in train} & {p.question for p in val}
    assert len({p.id for p in train + val + test}) == 7467 + 1319
    shots = real.prefix()
    assert not any(f"Q: {p.question}\n" in shots for p in train + val + test)


def test_few_shot_text_is_the_file(real, shared):
    for hint, name in ((False, "gsm_prompts.txt"), (True, "gsm_prompts_answer_key.txt")):
        assert real.prefix(hint) == shared(f"data/prompts/star/{name}").read_text() + "\n\n"
    assert real.prefix().count("Q: ") == 6
    assert "altogether in April and May? (72)\nA:" in real.prefix(hint=True)


def test_bad_rows_are_named(make):
    for answer, culprit in (("no mark", "has no '####"), ("#### many", "'many', which is not a number")):
        with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{culprit}"):
            make([("x", "#### 1"), ("y", answer)]).problems("train")
