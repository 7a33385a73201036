"""The forms in which instruction-tuned models write answers, and the right value of each, in both readings of each task."""

import json

import pytest

from qstar.tasks import make_task

GSM8K = [  # completion, lenient reading, strict reading
    ("48+24 = 72\n#### 72", "72", "72"),
    ("48+24 = 72\n#### **72**", "72", "**72**"),
    ("#### $\\boxed{72}$", "72", "$\\boxed{72}$"),
    ("#### \\boxed{72}", "72", "\\boxed{72}"),
    ("#### `72`", "72", "`72`"),
    ("#### ₹72", "72", "₹72"),
    ("#### Rs. 72", "72", "rs. 72"),
    ("#### US$ 72.50", "145/2", "us$ 72.50"),
    ("#### 72 (= 48 + 24)", "72", "72 (= 48 + 24)"),
    ("#### 48 + 24 = 72", "72", "48 + 24 = 72"),
    ("#### 72 clips, 24 of them in May", "72", "72 clips, 24 of them in may"),
    ("#### 72\n\n#### Explanation\nbecause 48 + 24 = 72", "72", "72"),
    ("#### 72\n\n### Explanation\n48 in April, 24 in May", "72", "72"),
    ("#### 72\n\nQuestion: Ann has 9?\nAnswer: 9\n#### 9", "72", "72"),
    ("#### 72\n\n**Problem 2:** Ann has 9.\n#### 9", "72", "72"),
    ("#### 72\n\nHere is another problem.\n\nAnn has 9.\n#### 9", "72", "72"),
    ("#### 72\n\nA bus has 9 seats. How many wheels has it?\nIt has 4.\n#### 4", "72", "72"),
    ("#### 72<|im_end|>\n<|im_start|>user\nAnn has 9.\n#### 9", "72", "72<|im_end|>"),
    ("<think>\n#### 5? No.\n</think>\n\nShe sold 48 + 24.\n#### 72", "72", "5? no."),
    ("#### 1. Clips in May\n48 / 2 = 24\n\n#### 2. In all\n48 + 24 = 72\n\n**Answer: 72**", "72", "1. clips in may"),
    ("#### Final Answer\n\n**72**", "72", "final answer"),
    ("#### Answer: 72 clips", "72", "answer: 72 clips"),
    ("Step 1: 48 / 2 = 24.\nStep 2: 48 + 24 = 72.\n\n**Answer:** 72", "72", None),
    ("### Final Answer:\n\\[\n\\boxed{72}\n\\]", "72", None),
    ("The final answer is: $\\boxed{72}$.", "72", None),
    ("So the answer is 48 + 24 = **72** clips.", "72", None),
    ("The answer to the question is that Natalia sold 72 clips.", "72", None),
    ("Therefore, Natalia sold altogether **72** clips.", "72", None),
    ("Natalia sold \\( \\boxed{72} \\) clips.", "72", None),
    ("<answer>72</answer>", "72", None),
    ("Final Answer: The final answer is $72$. I hope it is correct.", "72", None),
    ('```json\n{"answer": 72}\n```', "72", None),
    ("48 + 24 = 72\nA: 72", "72", None),
    ("72", "72", None),
    ("**Solution:** 48 + 24.\n\nAnswer = \u221272", "-72", None),
    ("48 / 2 = 24.\nTherefore, Natalia sold 72 clips.", "72", None),
    ("So, **Natalia sold 72 clips in total.**", "72", None),
    ("#### Total: 72", "72", "total: 72"),
    ("Final answer:\n\n- 72 clips", "72", None),
    ("#### 1 hour 12 minutes", None, "1 hour 12 minutes"),
    ("#### x = 5", None, "x = 5"),
    ("#### 5\nno, wait\n#### 72", "72", "5"),
    ("#### \\boxed{\\frac{1}{2}}", "1/2", "\\boxed{\\frac{1}{2}}"),
    ("#### 1\u202f000", "1000", "1\u202f000"),
    ("#### 1 000 000 \u20ac", "1000000", "1 000 000 \u20ac"),
    ("The answer is \\boxed{1{,}000}.", "1000", None),
    ("#### \\$1,080.00", "1080", "\\$1,080.00"),
    ("#### 35\\%", "35", "35\\%"),
    ("#### 5 or 6", None, "5 or 6"),
    ("#### 5:30", None, "5:30"),
    ("#### 72\n#### ", None, "72"),
    ("The answer is either 5 or 6.", None, None),
    ("To convert the answer to weeks: 28 days", None, None),
    ("I cannot say.\n\nQuestion: Ann has 9?\nAnswer: 9", None, None),
    (
        "Sure, let's solve it.\n\n**Problem:** Natalia sold 48 clips.\n\n**Solution:** 48 + 24 = 72.\n#### 72",
        "72",
        "72",
    ),
    ("<think>\nThe answer is 72.", None, None),
]


@pytest.fixture
def rows(tmp_path):
    def write(name, *records):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return {"train": str(path), "test": str(path)}

    return write


def check(make, table):
    """Reads every form in both ways; what is kept of a completion is read as the whole."""
    tasks = make(strict=False), make(strict=True)
    wrong = [
        (text, "strict" if strict else "lenient", found, right)
        for text, *rights in table
        for strict, right in enumerate(rights)
        if (found := tasks[strict].parse(text)) != right
    ]
    assert len(table) >= 25 and not wrong
    for text, lenient, _ in table:
        kept = tasks[0].cut(text)
        assert text.startswith(kept) and tasks[0].parse(kept) == lenient and tasks[0].cut(kept) == kept, (text, kept)


def test_gsm8k_forms(rows):
    files = rows("gsm8k", {"question": "How many?", "answer": "#### 72"})
    check(lambda **o: make_task("gsm8k", **files, **o), GSM8K)
