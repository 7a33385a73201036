"""Multi-hop questions: the official metrics restated, on all rows of the shared files; records, prompts, contexts."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter

import pytest
from conftest import shared

from qstar.errors import UserError
from qstar.tasks import make_task
from qstar.tasks import multihop as M
from qstar.tasks import qa_metrics as Q

FILES = {"hotpotqa": ("data/hotpotqa/train_100.json", "data/hotpotqa/dev_sample_500.jsonl"),
         "2wikimultihopqa": ("data/2wikimultihopqa/dev_sample_500.jsonl",) * 2}  # fmt: skip


def rows(path):
    text = shared(path).read_text(encoding="utf-8")
    return json.loads(text) if path.endswith(".json") else [json.loads(x) for x in text.split("\n") if x.strip()]


# ---------------------------------------------- the official rules, restated step by step as the papers' scripts word them


def reference_normal(s):
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    s = re.sub(r"\b(a|an|the)\b", " ", s)
    return " ".join(s.split())


def reference_f1(prediction, gold):
    a, b = reference_normal(prediction), reference_normal(gold)
    for x in ("yes", "no", "noanswer"):
        if (a == x or b == x) and a != b:
            return 0
    common = 0
    left = Counter(b.split())
    for word in a.split():
        if left[word] > 0:
            left[word] -= 1
            common += 1
    if common == 0:
        return 0
    p, r = common / len(a.split()), common / len(b.split())
    return 2 * p * r / (p + r)


def perturbed(answer, rng):
    words = answer.split()
    return rng.choice([
        answer, answer.upper(), f"The {answer}.", f"{answer}, an {answer}", "yes", "no", "noanswer", "", "the",
        " ".join(rng.sample(words, len(words))), " ".join(words[:-1]), f"north {answer} is it", answer.replace(" ", "-"),
        f"{answer} Ünïcödé – x",
    ])  # fmt: skip


@pytest.mark.parametrize("path", sorted({p for pair in FILES.values() for p in pair}))
def test_metrics_equal_the_official_rules_on_every_row_for_perturbed_predictions(path):
    rng, sums = random.Random(path), Counter()
    for record in rows(path):
        said, gold = perturbed(record["answer"], rng), record["answer"]
        expected = (float(reference_normal(said) == reference_normal(gold)), reference_f1(said, gold))
        score = Q.answer_score(said, gold)
        assert score == pytest.approx(expected, abs=1e-12)
        sums.update(score._asdict())
    assert all(0 < total < len(rows(path)) for total in sums.values())  # perturbed enough to mean something


@pytest.mark.parametrize("said, gold, em, f1", [
    ("The U.S.", "us", 1, 1), ("co-op", "coop", 1, 1), ("yes", "yes it is", 0, 0), ("no", "no", 1, 1), ("", "the", 1, 0),
    ("north", "no", 0, 0), ("Paris France", "Paris", 0, 2 / 3), ("x–y", "x y", 0, 0), ("été", "ete", 0, 0),
])  # fmt: skip
def test_single_answers(said, gold, em, f1):
    score = Q.answer_score(said, gold)
    assert (score.em, score.f1) == (em, pytest.approx(f1))


def test_inclusion_is_of_words_and_not_of_letters():
    assert Q.includes("It lies in the north, no doubt", "No") and not Q.includes("It lies in the north", "no")
    assert Q.includes("in New York City", "new york") and not Q.includes("anything", "")


# ------------------------------------------------------------------------------------------------- records and prompts


@pytest.mark.parametrize("name", FILES)
def test_all_rows_are_read_and_the_hubs_columns_give_the_same(name, tmp_path):
    train, test = FILES[name]
    task = make_task(name, train=str(shared(train)), test=str(shared(test)))
    problems = task.problems("test")
    assert len(problems) == 500
    hub = []
    for r in rows(test)[:20]:
        c, s = zip(*r["context"]), zip(*r["supporting_facts"])
        (ct, cs), (st, si) = map(list, c), map(list, s)
        row = {**r, "id": r["_id"], "context": {"title": ct, "sentences": cs}}
        row["supporting_facts"] = {"title": st, "sent_id": si}
        row.pop("_id")
        if name.startswith("2"):
            row["context"] = json.dumps(row["context"])  # as one mirror has it
        hub.append(row)
    (tmp_path / "hub.jsonl").write_text("\n".join(map(json.dumps, hub)))
    again = make_task(name, train=str(shared(train)), test=str(tmp_path / "hub.jsonl")).problems("test")
    for a, b in zip(again, problems):
        assert a == b and a.meta == b.meta and M.paragraphs(a, "gold") == M.paragraphs(b, "gold")
    assert {p.group for p in problems} <= {"bridge", "comparison", "inference", "compositional", "bridge_comparison"}


def test_contexts_hold_what_they_say_and_the_answer_is_judged_as_the_metric_does():
    train, test = FILES["hotpotqa"]
    made = {c: make_task("hotpotqa", train=str(shared(train)), test=str(shared(test)), context=c) for c in M.CONTEXTS}
    lengths = {c: [len(t.prompt(p).split()) for p in t.problems("train")] for c, t in made.items()}
    middle = {c: sorted(x)[len(x) // 2] for c, x in lengths.items()}
    assert middle["distractor"] > 500 > 200 > middle["gold"] > middle["supporting_only"] > 30
    task = made["distractor"]
    for p in task.problems("test")[:50]:
        assert task.correct(p, task.parse(f" The {p.meta['answer']}.")) and not task.correct(p, task.parse(" zzz"))
        assert task.parse("") is None
        facts = " ".join(t for t, _ in p.meta["supporting_facts"])
        assert M.coverage(p, facts) == 1.0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("said", ["{}", "Answer: {}", "The answer is {}."])
def test_every_gold_answer_is_read_as_it_is_written(name, said):
    for style, text in (("standard", said), ("cot", f"So it is. {said}")):
        task = make_task(name, test=str(shared(FILES[name][1])), style=style)
        # Of the band's name "!!!" the metric leaves nothing.
        problems = [p for p in task.problems("test") if said != "{}" or style == "standard"]
        assert all(p.gold for p in problems)
        assert not [
            p.meta["answer"] for p in problems if not task.correct(p, task.parse(text.format(p.meta["answer"])))
        ]


def test_an_answer_that_the_metric_deletes_is_compared_as_it_is_written(tmp_path):
    row = {"question": "q", "answer": "The The", "context": [["T", ["s"]]], "supporting_facts": [["T", 0]]}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({**row, "answer": a}) + "\n" for a in ("The The", "!!!", "a")))
    said = ("the The.", " !!!", "A", "?", "Bob", "!!! is Bob", "")
    for strict, right in ((False, (["the the"], ["!!!"], ["a"])), (True, 3 * (["the the", "!!!", "a", "?"],))):
        task = make_task("hotpotqa", test=str(tmp_path / "x.jsonl"), strict=strict)
        for problem, wanted in zip(task.problems("test"), right):
            found = [text.lower().strip(" .") for text in said if task.correct(problem, task.parse(text))]
            assert found == wanted


def problem(n=4):
    parts = tuple(M.Paragraph(f"T{i}", (f"first {i}.", f" second {i}."), i in (1, 3)) for i in range(n))
    return M.Problem("x", "who is it ?", "a", meta={"paragraphs": parts, "supporting_facts": [("T1", 0), ("T3", 1)]})


def words(text):
    return len(text.split())


def test_truncation_drops_paragraphs_and_never_cuts_question_or_rationale():
    p = problem()
    frame = M.frame_for("guided", p.question, "T1 is b. b is a.")
    whole, cut = M.fit(M.paragraphs(p, "distractor"), frame, 0, words)
    assert not cut and all(f"T{i}:" in whole for i in range(4))
    for keep_gold, left in ((False, ["T0", "T1"]), (True, ["T1", "T3"])):
        text, cut = M.fit(M.paragraphs(p, "distractor"), frame, words(whole) - 6, words, keep_gold=keep_gold)
        assert cut and [t for t in ("T0", "T1", "T2", "T3") if f"{t}:" in text] == left
        assert text.endswith("Question: who is it ? Reasoning: T1 is b. b is a. Answer:")
    with pytest.raises(UserError, match="limit of 5"):
        M.fit(M.paragraphs(p, "gold"), frame, 5, words)


@pytest.mark.parametrize("context, text", [
    ([["T", ["It is.", "He was."]]], "T: It is. He was."),  # as 2WikiMultiHopQA
    ([["T", ['It is "Go', '" and', " so on."]]], 'T: It is "Go" and so on.'),  # as HotpotQA
    ([["T", "The Elbe"]], "T: The Elbe"),
    ([{"title": "T", "sentences": ["x", "y"]}], "T: x y"),
    ({"title": ["T"], "sentences": ["The Elbe"]}, "T: The Elbe"),
])  # fmt: skip
def test_paragraphs_are_the_sentences_with_one_space_between_them(context, text, tmp_path):
    row = {"question": "q", "answer": "a", "context": context, "supporting_facts": [["T", 0]]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (problem,) = make_task("2wikimultihopqa", test=str(tmp_path / "x.jsonl")).problems("test")
    assert [p.text() for p in M.paragraphs(problem, "gold")] == [text]


def test_supporting_only_keeps_the_sentences_that_are_named():
    assert [x.text() for x in M.paragraphs(problem(), "supporting_only")] == ["T1: first 1.", "T3: second 3."]


@pytest.mark.parametrize("text, rationale, answer", [
    ("A is B. So the answer is Cork.", "A is B.", "Cork"), ("A. Answer: no\nmore", "A.", "no"), ("A is B", "A is B", None),
    ("answer: x. So the answer is: y", "answer: x.", "y"), ("so the answer is", "", None), ("", "", None),
])  # fmt: skip
def test_a_chain_of_thought_is_cut_at_its_last_marker(text, rationale, answer):
    assert M.split_reasoning(text) == (rationale, answer)


def test_a_rationale_cannot_open_a_second_answer_slot():
    prompt = M.frame_for("guided", "q?", "x is y.\nAnswer: z Question: other?")("c")
    assert (
        prompt.count("Answer:") == prompt.count("Question:") == 1 and "\n" not in prompt and prompt.endswith("Answer:")
    )


def test_strategy_qa_reads_its_rows_and_answers():
    folder = shared("data/strategyqa")
    task = make_task("strategy_qa", train=f"{folder}/train.jsonl", test=f"{folder}/dev.jsonl")
    problems = task.problems("test")
    assert len(problems) == 500 and {p.gold for p in problems} == {"yes", "no"}
    assert all(task.parse(p.solution) == p.gold for p in problems)
    said = ("Yes.", "hm", "No one knows. So the answer is yes.", "True")
    assert [task.parse(x) for x in said] == ["yes", None, "yes", "yes"]


BROKEN = [({"context": "[1]"}, "context"), ({"supporting_facts": [["a"]]}, "supporting_facts"), ({"answer": 3}, "text")]


@pytest.mark.parametrize("broken, word", BROKEN)
def test_broken_records_are_named_with_their_line(broken, word, tmp_path):
    good = {"question": "q", "answer": "a", "context": [["T", ["s"]]], "supporting_facts": [["T", 0]]}
    (tmp_path / "x.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({**good, **broken}))
    with pytest.raises(UserError, match=f"x.jsonl:2.*{word}"):
        make_task("hotpotqa", test=str(tmp_path / "x.jsonl")).problems("test")
