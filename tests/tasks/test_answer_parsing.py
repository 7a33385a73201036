"""The forms in which instruction-tuned models write answers, and the right value of each, in both readings of each task."""

import json
import time

import pytest

from qstar.tasks import make_task
from qstar.tasks.answer_parsing import final_letter, final_number, final_phrases, final_yes_no

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
    ("#### 72\n\nA: A bat costs $9.\n#### 9", "72", "72"),
    ("#### \u20ac3,50", "7/2", "\u20ac3,50"),
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
    ('{"final_answer": 72}', "72", None),
    ("48 + 24 = 72\nA: 72", "72", None),
    ("72", "72", None),
    ("**Solution:** 48 + 24.\n\nAnswer = \u221272", "-72", None),
    ("48 / 2 = 24.\nTherefore, Natalia sold 72 clips.", "72", None),
    ("So, **Natalia sold 72 clips in total.**", "72", None),
    ("#### Total: 72", "72", "total: 72"),
    ("Final answer:\n\n- 72 clips", "72", None),
    ("#### 1 hour 12 minutes", None, "1 hour 12 minutes"),
    ("#### 3 hours and 30 minutes", None, "3 hours and 30 minutes"),
    ("#### 5 apples and 6 pears", None, "5 apples and 6 pears"),
    ("\\boxed{5, 6}", None, None),
    ("#### 5, 6 and 7", None, "5, 6 and 7"),
    ("#### 72, 24 of them in May", "72", "72, 24 of them in may"),
    ("#### 50% or 1/2", None, "50% or 1/2"),
    ("#### 10%-20%", None, "10%-20%"),
    ("#### 1/3 of 12 = 4", "4", "1/3 of 12 = 4"),
    ("So the answer is 72 because 24 is half of 48.", "72", None),
    ("So the answer is 72 as 24 is half of 48.", "72", None),
    ("The answer is 2 million dollars.", "2", None),
    ("The answer is $2k per month.", "2", None),
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
    ("#### 72\n#### ", "72", "72"),
    ("#### 72\n\n#### (checked)", "72", "72"),
    ("#### 72\n#### 5 or 6", None, "72"),
    ("#### $24 x 3 = $72", "72", "$24 x 3 = $72"),
    ("#### 24 \\times 3 = 72", "72", "24 \\times 3 = 72"),
    ("#### $.50", "1/2", "$.50"),
    ("The answer is -.5.", "-1/2", None),
    ("The answer is ...5", None, None),
    ("The answer is 1\\frac{1}{2}.", "3/2", None),
    ("\\boxed{137 \\cfrac{1}{2}}", "275/2", None),
    ("#### -1½ cups", "-3/2", "-1½ cups"),
    ("Ann has 3 and a half apples, so the answer is 3 and a half.", "7/2", None),
    ("#### 1 3/2", None, "1 3/2"),
    ("#### 1 1/2 or 2 1/2", None, "1 1/2 or 2 1/2"),
    ("\\boxed{2\\sqrt{3}}", None, None),
    ("\\boxed{\\frac{\\sqrt{3}}{3}}", None, None),
    ("\\boxed{\\sqrt{3} - 1}", None, None),
    ("\\boxed{\\frac{1}{\\sqrt{3}}}", None, None),
    ("\\boxed{12\\pi}", None, None),
    ("\\boxed{12\\text{cm}}", "12", None),
    ("\\boxed{(5,6)}", None, None),
    ("\\boxed{(-5, 6)}", None, None),
    ("\\boxed{(1,000)}", "1000", None),
    ("The answer is negative 5.", "-5", None),
    ("The temperature at the end is the answer: it is minus 5 degrees.", "-5", None),
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

COMMONSENSE_QA = [  # completion, lenient reading, strict reading
    (" Blotters absorb ink. Therefore, the answer is blotter (e).", "e", "e"),
    (" (E) blotter, not (b) hat.", "e", "b"),
    (" The answer is E.", "e", None),
    (" **E**", "e", None),
    (" E) blotter", "e", None),
    (" Answer: E", "e", None),
    ("E", "e", None),
    ("E.", "e", None),
    ("E. blotter", "e", None),
    ("**E. blotter**\n\nA blotter absorbs ink, unlike (a).", "e", None),
    ("**Answer: (E) blotter**\n\n**Explanation:** (a) and (b) hold no ink.", "e", "e"),
    ("### Answer\n\n**(e) blotter**", "e", None),
    ("The correct answer is **(E) blotter**.", "e", "e"),
    ("The correct answer is option E: blotter.", "e", None),
    ("The best choice is E because blotters absorb ink.", "e", None),
    ("Let's look at each.\n\n(a) no.\n(b) no.\n\nSo the answer is (e).\n\nNote that (c) is close.", "e", None),
    ("Option E is the correct answer.", "e", None),
    ("E is correct.", "e", None),
    ("\\boxed{E}", "e", None),
    ("$\\boxed{\\text{(E) blotter}}$", "e", "e"),
    ("<answer>E</answer>", "e", None),
    ("<think>It is (a)?</think>The answer is `E`.", "e", "a"),
    ('The answer is "E".', "e", None),
    ("The answer is not (a) but (e).", "e", "e"),
    ("Final answer: E\n\nQuestion: Where are hats?\nAnswer: B", "e", None),
    ("The answer is E.\nQ: Where are hats?\nA: (b).", "e", None),
    ("(e)\n\n**Question 2**: Where are hats?\n(b)", "e", "e"),
    ("The answer is (E)<|im_end|>\n<|im_start|>user\nWhy not (b)?", "e", "b"),
    ('{"answer": "E"}', "e", None),
    ('{"final_answer": "E"}', "e", None),
    ("The final answer is $E$. I hope it is correct.", "e", None),
    ("The final answer is $e$. I hope it is correct.", "e", None),
    ("The final answer is $A$. I hope it is correct.", "a", None),
    ("A $5 blotter absorbs ink.", None, None),
    ("$E = 2b$", None, None),
    ("$a$ is wet.", None, None),
    ("$E$", "e", None),
    ("The answer is e because ink is wet.", "e", None),
    ("The answer is a because ink is wet.", "a", None),
    ("The answer is e, blotter", "e", None),
    ("The answer is e - blotter", "e", None),
    ("The answer is a pocket, blotter or hat", None, None),
    ("The answer is (a) and (b).", None, "b"),
    ("The answer is A and B.", None, None),
    ("The answer is (a) or (b).", None, "b"),
    ("The answer is (e) and (a) is wrong.", "e", "a"),
    ("Answer: e) blotter", "e", None),
    ("The answer is [E].", "e", None),
    ("(A) is wrong. (B) is wrong. (E) is right.", "e", "e"),
    ("Pockets are wrong. So it must be E.", "e", None),
    ("Therefore, E.", "e", None),
    ("Pockets hold no ink.\nI choose **E**", "e", None),
    ("The answer is a blotter.", None, None),
    ("A blotter absorbs ink.", None, None),
    ("Answer: A", "a", None),
    ("A) shirt pocket", "a", None),
    ("A - pocket", "a", None),
    ("Answer: A — pocket", "a", None),
    ("The answer is A (pocket).", "a", None),
    ("A (big) pocket holds no ink.", None, None),
    ("Ink is absorbed by blotters.", None, None),
    ("<think>The answer is E", None, None),
]
STRATEGY_QA = [
    (" Water is wet. So the answer is yes.", "yes", "yes"),
    (" So the answer is not yes.", "no", "yes"),
    (" The answer is unclear; there is no proof. Yes.", "yes", "no"),
    (" **Yes**, it is.", "yes", None),
    (" Answer: No", "no", None),
    (' "Yes"', "yes", None),
    (" So the answer is yes.\nSo the question's answer is likely known.", "yes", None),
    ("Yes.", "yes", "yes"),
    ("No, since dogs bark.", "no", "no"),
    ("No one knows.", None, "no"),
    ("No — dogs bark.", "no", "no"),
    ("No—dogs bark.", "no", "no"),
    ("The answer is **No** (dogs bark).", "no", "no"),
    ("**No.** Dogs bark.", "no", None),
    ("True", "yes", "yes"),
    ("The statement is false.", "no", None),
    ("The answer is **no**.", "no", "no"),
    ("The answer is: **No**\n\n**Explanation:** yes, some people think so.", "no", "no"),
    ("### Answer\n\nNo", "no", None),
    ("### Conclusion\n\nNo, dogs bark.", "no", None),
    ("Final Answer: \\boxed{No}", "no", None),
    ("\\boxed{\\text{Yes}}", "yes", None),
    ("<answer>no</answer>", "no", None),
    ("<think>The answer is yes?</think>\nThe answer is no.", "no", "no"),
    ("Dogs bark. Therefore, no.", "no", None),
    ("Dogs bark, and cats do not. So yes, they differ.", "yes", None),
    ("The answer is most likely yes.", "yes", "yes"),
    ("The answer is a definite no.", "no", "no"),
    ("The answer to the question is no, as dogs bark.", "no", None),
    ("The correct answer would be `yes`.", "yes", None),
    ("The answer is no.\n\nQuestion: Do cats bark?\nAnswer: yes", "no", "no"),
    ("The answer is no.\nQ: Do cats meow?\nA: So the answer is yes.", "no", "no"),
    ("The answer is not clear.", None, None),
    ("The answer is yes and no.", None, "yes"),
    ("It depends. There is no way to know.", None, None),
    ("Nobody knows.", None, None),
    ("It is not true that dogs meow. The answer is not no.", "yes", "no"),
    ("Let us think.\n\nDogs bark.\n\nThe answer is yes.", "yes", None),
    ('{"answer": "yes"}', "yes", None),
    ('{"final_answer": "yes"}', "yes", None),
    ("No I don't think so", "no", "no"),
    ("It's true.", "yes", None),
    ("That\u2019s false.", "no", None),
    ("I would say no.", "no", None),
    ("I'd say yes, it is.", "yes", None),
    ("In short, yes.", "yes", None),
    ("The answer is a resounding yes", "yes", "yes"),
    ("Answer: False.", "no", None),
]

MATH = [
    ("So $x = 5$. The answer is $\\boxed{5}$.", "5", "5"),
    ("**Answer:** $\\boxed{5}$", "5", "5"),
    ("### Final Answer\n\n$$\\boxed{\\frac{1}{2}}$$", "\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\[\n\\boxed{\\dfrac{1}{2}}\n\\]", "\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\boxed{$5$}", "5", "5"),
    ("\\boxed{5}\n\n**Explanation:** because $2 + 3 = 5$.", "5", "5"),
    ("\\boxed{5}\n\nProblem 2: What is $3 + 4$?\n\\boxed{7}", "5", "7"),
    ("\\boxed{5}\n\n### Question\nAdd.\n\\boxed{7}", "5", "7"),
    ("\\boxed{5}\n\nHere is another problem.\n\\boxed{7}", "5", "7"),
    ("\\boxed{5}<|im_end|>\n<|im_start|>user\n\\boxed{7}", "5", "7"),
    ("\\boxed{5}\nProblem:\nAdd.\nSolution: \\boxed{7}", "5", "5"),
    ("<think>\\boxed{7}?</think>\\boxed{5}", "5", "5"),
    ("\\boxed{7}, so I thought.</think>\nIt is $\\boxed{5}$.", "5", "5"),
    ("<think>\\boxed{7}", None, "7"),
    ("First \\boxed{2}, then \\boxed{3}.", "3", "3"),
    ("Final Answer: The final answer is $5$. I hope it is correct.", "5", None),
    ("The answer is $\\frac{1}{2}$.", "\\frac{1}{2}", None),
    ("**Answer:** \\(2\\sqrt{3}\\)", "2\\sqrt{3}", None),
    ("**Final Answer**\n\n\\[ x^2 + 1 \\]", "x^2+1", None),
    ("Answer: 3.5", "3.5", None),
    ("The answer is **12**.", "12", None),
    ("Therefore the answer is 5 apples.", "5", None),
    ("The correct answer is `(1,2)`.", "(1,2)", None),
    ("<answer>5</answer>", "5", None),
    ("It is five.\n#### 5", "5", None),
    ("#### 5\n\n#### Explanation\nAdd.", "5", None),
    ("$2 + 3 = 5$", None, None),
    ("\\boxed{", None, None),
    ("The answer is $1,000$.", "1000", None),
    ("\\boxed{1{,}000}", "1000", "1000"),
    ("\\boxed{3{,}5}", "3,5", "3,5"),
    ("\\boxed{90^{\\circ }}", "90", "90"),
    ("\\boxed{\\frac{90^\\circ}{2}}", "\\frac{90}{2}", "\\frac{90}{2}"),
    ("\\fbox{5}", "5", "5"),
]
HOTPOTQA = [  # after "Answer:"
    (" Cork", "cork", "cork"),
    ("Cork.", "cork", "cork"),
    ("**Cork**", "cork", "cork"),
    ("`Cork`", "cork", "cork"),
    ('"Cork"', "cork", "cork"),
    ("\\boxed{Cork}", "cork", "boxedcork"),
    ("$\\boxed{\\text{Cork}}$", "cork", "boxedtextcork"),
    ("The answer is Cork.", "cork", "answer is cork"),
    ("The answer is **Cork**, because it is in Ireland.", "cork", "answer is cork because it is in ireland"),
    ("Answer: Cork", "cork", "answer cork"),
    ("**Answer:** Cork", "cork", "answer cork"),
    ("Final Answer: Cork", "cork", "final answer cork"),
    ("### Answer\nCork", "cork", "answer"),
    ("<answer>Cork</answer>", "cork", "answercorkanswer"),
    ("<think>Dublin?</think>\nCork", "cork", "thinkdublinthink"),
    ("Cork\nExplanation: the answer is based on the context.", "cork", "cork"),
    ("Cork\n\nQuestion: Who?\nAnswer: Ann", "cork", "cork"),
    ("Cork Question: Who? Answer: Ann", "cork", "cork question who answer ann"),
    ("Cork<|im_end|>", "cork", "corkimend"),
    ("Cork. It is a city in Ireland.", "cork", "cork it is city in ireland"),
    ("St. Louis", "st louis", "st louis"),
    ("J. K. Rowling", "j k rowling", "j k rowling"),
    ("J.K. Rowling", "jk rowling", "jk rowling"),
    ("The answer is George R.R. Martin.", "george rr martin", "answer is george rr martin"),
    ("U.S. Route 66. It is a road.", "us route 66", "us route 66 it is road"),
    ("Warner Bros. Records", "warner bros records", "warner bros records"),
    ("Mamma Mia! Here We Go Again", "mamma mia here we go again", "mamma mia here we go again"),
    ("Cork! The city is in Ireland.", "cork", "cork city is in ireland"),
    ("No. 9 Squadron", "no 9 squadron", "no 9 squadron"),
    ("No — Ann is not.", "no", "no — ann is not"),
    ("the Cold War (1947–91)", "cold war 1947–91", "cold war 1947–91"),
    ("yes", "yes", "yes"),
    ("Yes, both are cities.", "yes", "yes both are cities"),
    ("No. Ann is not.", "no", "no ann is not"),
    ("Yes, Minister", "yes minister", "yes minister"),
    ("The correct answer is the Beatles.", "beatles", "correct answer is beatles"),
    ("To answer this, we need the city where Ann was born first.\nThe answer is Cork.", "cork",
     "to answer this we need city where ann was born first"),
    ("", None, None),
    ("\n", None, None),
]  # fmt: skip
HOTPOTQA_COT = [  # after "Reasoning:"
    ("Ann was born in Cork. So the answer is Cork.", "cork", "cork"),
    ("Ann was born in Cork. So the answer is: **Cork**", "cork", "cork"),
    ("Ann was born in Cork.\n\n**Answer:** Cork", "cork", None),
    ("Ann was born in Cork. The final answer is \\boxed{Cork}.", "cork", None),
    ("Ann was born in Cork.", None, None),
]


@pytest.fixture
def rows(tmp_path):
    def write(name, *records):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return {"train": str(path), "test": str(path)}

    return write


def check(make, table, least=25):
    """Reads every form in both ways; what is kept of a completion is read as the whole."""
    tasks = make(strict=False), make(strict=True)
    wrong = [
        (text, "strict" if strict else "lenient", found, right)
        for text, *rights in table
        for strict, right in enumerate(rights)
        if (found := tasks[strict].parse(text)) != right
    ]
    assert len(table) >= least and not wrong
    for text, lenient, _ in table:
        kept = tasks[0].cut(text)
        assert text.startswith(kept) and tasks[0].parse(kept) == lenient and tasks[0].cut(kept) == kept, (text, kept)


def test_gsm8k_forms(rows):
    files = rows("gsm8k", {"question": "How many?", "answer": "#### 72"})
    check(lambda **o: make_task("gsm8k", **files, **o), GSM8K)


def test_commonsense_qa_forms(rows):
    choices = {"label": list("ABCDE"), "text": ["pocket", "hand", "inkwell", "drawer", "blotter"]}
    files = rows("csqa", {"question": "What absorbs ink?", "answerKey": "E", "choices": choices})
    check(lambda **o: make_task("commonsense_qa", prompts="built-in", **files, **o), COMMONSENSE_QA)


def test_strategy_qa_forms(rows):
    files = rows("strategy_qa", {"question": "Is water wet?", "answer": True})
    check(lambda **o: make_task("strategy_qa", prompts="built-in", **files, **o), STRATEGY_QA)


def test_math_forms(rows):
    files = rows("math", {"problem": "Add.", "solution": "$\\boxed{5}$", "level": "Level 1", "type": "Algebra"})
    check(lambda **o: make_task("math", **files, **o), MATH)


def test_multi_hop_forms(rows):
    row = {
        "question": "Where?",
        "answer": "Cork",
        "context": [["Ann", ["Ann is of Cork."]]],
        "supporting_facts": [["Ann", 0]],
    }
    files = rows("hotpotqa", row)
    check(lambda **o: make_task("hotpotqa", **files, **o), HOTPOTQA)
    check(lambda **o: make_task("hotpotqa", style="cot", **files, **o), HOTPOTQA_COT, least=5)


def test_answers_to_math_problems_that_are_equal_vote_together(rows):
    files = rows("math", {"problem": "Halve.", "solution": "$\\boxed{1}$", "level": "Level 1", "type": "Algebra"})
    task = make_task("math", **files)
    said = ["0.5", None, "\\frac{1}{2}", "2\\sqrt{3}", "\\sqrt{12}", "0.50", "7"]
    assert task.ballots(said) == ["0.5", None, "0.5", "2\\sqrt{3}", "2\\sqrt{3}", "0.5", "7"]


PIECES = "\n| |1,|1 1/|\\frac{1}|(|J. |A - |no — |#### |5 x 3 |5% and |5, |(a) and |$ |- |---\n|#### 5\n\n|A$|答案是: |the answer is "


@pytest.mark.parametrize("piece", PIECES.split("|"))
def test_the_time_of_parsing_grows_linearly(piece):
    def seconds(length):
        text, start = "x\n" + piece * (length // len(piece)), time.process_time()
        for read in (final_number, final_letter, final_yes_no, lambda part: final_phrases(part, reasoning=False)):
            read(text)
        return time.process_time() - start

    short, long = (min(seconds(length) for _ in range(n)) for length, n in ((5_000, 5), (80_000, 1)))
    assert long < 48 * short  # 16 times as long; quadratic: 256
