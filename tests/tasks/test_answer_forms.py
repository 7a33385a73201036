"""Answers in unusual characters and wrappers, and before problems that a model invents; what is uncertain is None."""

import pytest

from qstar.tasks.answer_parsing import final_letter, final_number, final_yes_no, number
from qstar.tasks.generic import Exact

NUMBERS = {  # behind the mark
    "72": ["₱72", "₦72", "₺72", "₴72", "￥72", "¢72", "＄72", "A$72", "C$72", "S$72", "HK$72", "NZ$72", "US$ 72", "R 72",
           "CAD 72", "AUD 72", "CHF 72", "JPY72", "\u200b72", "\ufeff72", "7\u20602", "７２", "72。", "72元", "72，共3个", "72 m²"],
    "-72": ["‑72", "‐72", "－72", "-₱72", "A$-72"],
    "1000": ["1_000", "1，000", "1٬000", "1’000"],
    "1/3": ["1⁄3", "1∕3", "⅓"],
    "16/5": ["3⅕", "3 ⅕"],
    "1/6": ["⅙"],
    None: ["1_00", "5，6", "1，2，3", "1、2", "1٫5", "5'10", "3·5", "3 ⋅ 5", "2³", "5¹⁄₃", "72元5角", "NOT 72", "A$5 or A$6", "US$5 + US$6",
           "A$5-A$10", "A$5, A$6", "CAD 5 or CAD 6"],
}  # fmt: skip
ENDS = [  # an answer of 72, and what does not belong to it
    "#### 72\n---\nTom has 5 apples and buys 4. How many?\n9\n#### 9",
    "#### $72 clips\n\n---\n\nTom has 5 apples and buys 4.\n#### 9",
    "#### **72**\n\n***\n#### 9",
    "#### 72\n* * *\n#### 9",
    "#### 72\n======\n#### 9",
    "#### 72assistant\n\nHere is another:\n#### 5",
    "#### 72 clips.user\n\nAnn has 5.\n#### 5",
    "#### 72<｜User｜>Ann has 5.\n#### 5",
    "#### 72\n\n问题：5\n#### 5",
    # No rule ends a solution behind a heading or a step.
    "#### 1. Add up\n---\n24 + 48\n\n**Answer: 72**",
    "#### Step 1: 24\n\n---\n\n#### Step 2\n\n**Answer: 72**",
    "#### 12 + 12 = 24\n---\n#### 24 + 48 = 72",
    "### Step 1\n**24**\n\n---\n\n### Step 2\n**48**\n\n***\n\n### Final Answer\n\n---\n\n72",
    "Therefore, she sold 72 clips.\n\n---",
    "**Answer: 72**\n\n---\n\n5 apples",
    "Answer：72",
    "所以，答案：72",
    "最终答案是72。",
    "Ans. 72",
]
LETTERS = {
    "a": ["Answer：A，sand"],
    "b": ["#### B", "#### B) sand", "It is dry.\n#### B", "（B）", "Answer：B", "答案：B", "Ans. B", "Answer - B", "Answer – B",
          "The answer is sand: B", "The answer is sand: (B).", "#### Option A: no\n#### Option B: yes\n\nSo the answer is B."],
    None: ["#### A closer look", "#### A) sand\nIt is dry.\n#### B) water\nIt is wet.\n#### C) air", "Answer - A big dog", "Answer. A big dog",
           "Ink is wet.\n\n#### B\n\n#### Explanation"],
}  # fmt: skip
VERDICTS = {
    "yes": ["#### yes", "Yeah", "Answer: Y", "**Answer:** y.", "Absolutely yes.", "Certainly, yes.", "Without a doubt, yes.", "Answer (yes/no): yes",
            "The answer isn\u2019t no.", "The answer is absolutely yes"],
    "no": ["#### No", "Nope", "Nope, dogs bark.", 'The answer is likely "No"', "The answer isn't yes.", "That isn't true.", "Answer - no", "Answer：No"],
    None: ["yes/no", "no/yes", "Answer: yes/no", "Answer: yes / no", "Answer: N/A", "Answer: Y-axis", "Certainly no one knows.", "So, y.",
           "Clearly, no proof exists.", "#### No proof", "The answer isn't clear."],
}  # fmt: skip
PHRASES = {
    "paris": ["The final answer is: $\\boxed{Paris}$", "#### Paris", "It is in France.\n#### Paris", "- Paris", "[Paris]", "(Paris)", "#### (the Paris!)",
              "Paris\n\n#### Explanation: it is in France", "#### Answer: Paris", "Answer：Paris", "---\nParis"],
    "c#": ["C#", "The answer is C#."], "- 5": ["- 5"], "$5": ["$5"], "(1, 2]": ["(1, 2]"], "(1, 2)": ["(1, 2)"], "[1, 2]": ["[1, 2]"], "#1": ["#1"],
    "(a) and (b)": ["(a) and (b)"], "[]": ["[]"], None: ["#### Final Answer"],
}  # fmt: skip


def table(rows):
    return pytest.mark.parametrize("right, text", [(right, text) for right, texts in rows.items() for text in texts])


def read_number(text):
    found = final_number(text)
    # What is kept of the text ends with the answer.
    assert found is None or final_number(text[: found.end]) == found
    return found and str(found.value)


@table(NUMBERS)
def test_numbers(right, text):
    assert read_number(f"#### {text}") == right


@pytest.mark.parametrize("text", ENDS)
def test_ends_of_solutions(text):
    assert read_number(text) == "72"


@table({"72": ["A$72", "CAD 72", "₴72"], "1000": ["1_000"], "16/5": ["3⅕"], "-5": ["‑5"], None: ["5，6", "1_00", "2³"]})
def test_gold_numbers(right, text):
    value = number(text)
    assert (None if value is None else str(value)) == right


@table(LETTERS)
def test_letters(right, text):
    found = final_letter(text)
    assert (found and found[0]) == right and (found is None or final_letter(text[: found[1]])[0] == right)


@table(VERDICTS)
def test_verdicts(right, text):
    assert final_yes_no(text) == right


@table(PHRASES)
def test_phrases(right, text):
    assert Exact().parse(text) == right
