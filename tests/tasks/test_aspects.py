"""Aspects of rationales: each tells a worse rationale from a good one, and none needs the answer."""

import pytest

from qstar.tasks.aspects import ASPECTS, View, bare_answer

CONTEXT = ("Ada Lovelace: Ada Lovelace was born in London. She wrote notes. Lord Byron: Lord Byron died in "
           "Missolonghi in 1824.")  # fmt: skip
QUESTION = "Where did the father of Ada Lovelace die?"
GOOD = ("Ada Lovelace was born in London and she was the daughter of Lord Byron. Lord Byron was the father of Ada "
        "Lovelace. Lord Byron died in Missolonghi in 1824.")  # fmt: skip


def measure(rationale, **more):
    return {n: a(View(QUESTION, CONTEXT, rationale, **more)) for n, a in ASPECTS.items()}


def test_there_are_eight_aspects_in_range():
    assert len(ASPECTS) == 8
    for text in (
        GOOD,
        "",
        " ",
        "x",
        "." * 50,
        "Missolonghi",
        QUESTION,
        "the the the " * 200,
        "Ünï – «x»\n\n",
        GOOD * 20,
    ):
        for name, x in measure(text).items():
            assert 0.0 <= x <= 1.0, (name, text)
            assert text.strip(" .\n") or x == 0.0, name


@pytest.mark.parametrize("aspect, worse", [
    ("factuality", "Ada Lovelace died in Missolonghi with London notes. Byron wrote 1824 London."),
    ("relevance", "Someone was somewhere at some time and then something happened to somebody else."),
    ("logicality", "Bananas are yellow. London calls. Paris sleeps."),
    ("consistency", "Lord Byron died in Missolonghi. Lord Byron not died in Missolonghi."),
    ("coherence", "Bananas are yellow. London calls. Paris sleeps."),
    ("fluency", "Ada Lovelace was born in London and"),
    ("naturalness", "Missolonghi"),
    ("readability", "Missolonghi 1824."),
])  # fmt: skip
def test_every_aspect_tells_a_worse_rationale_from_a_good_one(aspect, worse):
    assert measure(GOOD)[aspect] > measure(worse)[aspect] + 0.1


def test_naturalness_falls_with_repetition_and_an_echo_of_the_question_has_none():
    assert measure(QUESTION)["naturalness"] == 0 and measure(GOOD * 10)["naturalness"] < 0.2


@pytest.mark.parametrize("rationale, answer, bare", [
    ("Missolonghi", "Missolonghi", True), ("The answer: Missolonghi.", "Missolonghi", True), (GOOD, "Missolonghi", False),
    ("", "", False), ("London", "Missolonghi", False), ("yes", "yes", True),
])  # fmt: skip
def test_bare_answers_are_told_from_rationales(rationale, answer, bare):
    assert bare_answer(rationale, answer) == bare
