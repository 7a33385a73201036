"""Records that cannot be used: left out up to a share, with a warning that names file, line and field."""

import json

import pytest

from qstar.data import read_records
from qstar.data.corpus import TextCorpus
from qstar.errors import QstarWarning, UserError
from qstar.tasks import make_task
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.tokenizer import char_tokenizer

PARAGRAPHS = [["A", ["The Elbe. "]]]
MATH = {"problem": "1+1", "solution": "\\boxed{2}", "level": "Level 1", "type": "Algebra"}
QUIZ = {
    "id": "q",
    "question": {"stem": "Where?", "choices": [{"label": c, "text": c} for c in "ABCDE"]},
    "answerKey": "A",
}
TEST = "def check(f):\n    assert f() == 1\n"
CODE = {
    "task_id": "H/0",
    "prompt": 'def f():\n    """One."""\n',
    "canonical_solution": "    return 1\n",
    "test": TEST,
    "entry_point": "f",
}
HOP = {"question": "Which?", "answer": "Elbe", "context": PARAGRAPHS, "supporting_facts": [["A", 0]]}
# task: (a good record, a bad one, what is said of the bad one)
KINDS = {
    "no paragraphs": ("hotpotqa", HOP, {**HOP, "context": []}, "field 'context' has no paragraph"),
    "facts that are no list": ("2wikimultihopqa", HOP, {**HOP, "supporting_facts": 5}, "field 'supporting_facts'"),
    "half a surrogate pair": ("gsm8k", {"question": "q", "answer": "#### 2"}, {"question": "a \ud83d", "answer": "#### 2"},
                              "field 'question' has half a surrogate pair ('\\ud83d', character 2"),
    "half a pair inside a list": ("hotpotqa", HOP, {**HOP, "context": [["A", ["\udc00"]]]}, "field 'context' has half a surrogate"),
    "a number for a text": ("gsm8k", {"question": "q", "answer": "#### 2"}, {"question": 5, "answer": "#### 2"}, "field 'question'"),
    "a list for a text": ("strategy_qa", {"question": "q", "answer": True}, {"question": ["q"], "answer": True}, "question"),
    "null for a text": ("gsm8k", {"question": "q", "answer": "#### 2"}, {"question": "q", "answer": None},
                        "field 'answer' is missing: it is null"),
    "a blank question": ("numeric", {"question": "q", "answer": 2}, {"question": " ", "answer": 2}, "field 'question' is blank"),
    "a blank problem": ("math", MATH, {**MATH, "problem": "\n"}, "field 'problem'"),
    "a blank answer": ("hotpotqa", HOP, {**HOP, "answer": ""}, "'question' or 'answer' is blank"),
    "nothing but null": ("exact", {"question": "q", "answer": "a"}, {"question": "q", "answer": [None]}, "no text"),
    "a choice that is null": ("multiple_choice", {"question": "q", "answer": "x", "choices": ["x", "y"]},
                              {"question": "q", "answer": "A", "choices": {"label": ["A", "B"], "text": ["x", None]}}, "null"),
    "paragraphs of other keys": ("hotpotqa", HOP, {**HOP, "context": [{"title": "A", "text": ["x"]}]}, "field 'context'"),
    "a paragraph that is null": ("hotpotqa", HOP, {**HOP, "context": [["A", [None, "x"]]]}, "field 'context' is neither"),
    "a title that is null": ("hotpotqa", HOP, {**HOP, "context": [[None, ["x"]]]}, "null is not text"),
    "a fact without a title": ("hotpotqa", HOP, {**HOP, "supporting_facts": [[None, 0]]}, "field 'supporting_facts' is neither"),
    "a context in prose": ("hotpotqa", HOP, {**HOP, "context": "The Elbe."}, "field 'context' is neither"),
    "facts in prose": ("hotpotqa", HOP, {**HOP, "supporting_facts": "A, 0"}, "field 'supporting_facts' is neither"),
    "a problem without its subject": ("math", MATH, {**MATH, "type": None}, "field 'type' or 'subject' is missing"),
    "no boxed answer": ("math", MATH, {**MATH, "solution": "2"}, "no \\boxed answer"),
    "choices that are no list": ("commonsense_qa", QUIZ, {**QUIZ, "question": {"stem": "Where?", "choices": 3}}, "choices"),
    "a prompt that is no Python": ("humaneval", CODE, {**CODE, "prompt": "def f(:"}, "field 'prompt' is not Python"),
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def make(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return str(path)

    return make


def options(name, path):
    return {"data": path} if name == "humaneval" else {"train": path, "test": path}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_row_is_left_out_and_named(kind, write):
    name, good, bad, said = KINDS[kind]
    path = write([{**good, "id": str(n)} for n in range(150)] + [{**bad, "id": "x"}])
    with pytest.warns(QstarWarning) as caught:
        assert len(make_task(name, **options(name, path)).problems("test")) == 150
    assert "1 of 151 records are left out" in str(caught[0].message)
    assert f"{path}:151: " in str(caught[0].message) and said in str(caught[0].message)


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_share_the_run_stops(kind, write):
    name, good, bad, said = KINDS[kind]
    path = write([good, bad])
    with pytest.raises(UserError) as caught:
        make_task(name, **options(name, path)).problems("test")
    assert f"{path}:2: " in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.warns(QstarWarning, match="1 of 2"):
        assert len(make_task(name, **options(name, path), bad_rows=0.5).problems("test")) == 1


def test_lines_that_are_no_json_count_as_bad_rows(write):
    path = write([*[{"x": n} for n in range(300)], '{"x": 1', "[1]", "5"])
    with pytest.warns(QstarWarning, match=r"3 of 303 records are left out: .*:301: not JSON.*:302: a record must be"):
        assert len(read_records(path, ["x"], bad_rows=0.01)) == 300
    with pytest.raises(UserError, match=":301: not JSON"):
        read_records(path, ["x"])
    with pytest.raises(UserError, match=r":301: not JSON.* 3 of 303 records cannot be used, above bad_rows=0.005"):
        read_records(path, ["x"], bad_rows=0.005)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(write, share):
    with pytest.raises(UserError, match="bad_rows"):
        make_task("gsm8k", train=write([]), test=write([]), bad_rows=share)


def test_documents_that_are_no_text_are_left_out_of_a_corpus(write):
    tokenizer = char_tokenizer(ALPHABET, pad=PAD, eos=EOS)
    bad = [{"text": "1 \ud83d"}, {"text": 5}]
    path = write([{"text": f"{n}+1"} for n in range(250)] + bad)
    with pytest.warns(QstarWarning, match="2 of 252"):
        corpus = TextCorpus(path, tokenizer, length=8)
    assert corpus.rows(0, 4, 0).tokens.shape == (4, 8)
    for n, row in enumerate(bad):
        with pytest.raises(UserError, match=rf"rows{n}.jsonl:2: field 'text'"):
            TextCorpus(write([{"text": "1"}, row], f"rows{n}.jsonl"), tokenizer, length=8)
