"""Real solutions of four models to all of GSM8K's test questions, with the labels their authors published.

The file writes the answer as a last line "A: 18" where the task has "#### 18"; nothing else is changed. Agreement of
our parser and comparison with the labels, in 1,319 solutions each:

    model               label right   agreement   disagreements
    6b_finetuning               286      100.0%               0
    6b_verification             515      100.0%               0
    175b_finetuning             458      100.0%               0
    175b_verification           742      100.0%               0

Eleven solutions have no answer line (they ran out of tokens); all are labelled wrong, as we judge them.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from qstar.tasks import make_task
from qstar.train.stats import best_of_k, bootstrap_ci, majority_at_k, mean_auc, pass_at_k

LABELLED_RIGHT = {"6b_finetuning": 286, "6b_verification": 515, "175b_finetuning": 458, "175b_verification": 742}
# (model, row): why our judgement may differ from the published label. None does.
EXPLAINED: dict[tuple[str, int], str] = {}


def in_our_format(solution: str) -> str:
    return re.sub(r"(?m)^A:(?=[^\n]*\Z)", "####", solution)


@pytest.fixture(scope="module")
def task(shared):
    return make_task("gsm8k", train=str(shared("data/gsm8k/train.jsonl")), test=str(shared("data/gsm8k/test.jsonl")))


@pytest.fixture(scope="module")
def rows(task, shared):
    """Per question: the problem, and for each model its parsed answer, our judgement and the published label."""
    problems = {p.question: p for p in task.problems("test")}
    out = []
    with open(shared("data/gsm8k/example_model_solutions.jsonl"), encoding="utf-8") as file:
        for record in map(json.loads, file):
            problem = problems[record["question"]]
            assert task.parse(in_our_format(record["ground_truth"])) == problem.gold
            answers = {m: task.parse(in_our_format(record[m]["solution"])) for m in LABELLED_RIGHT}
            right = {m: task.correct(problem, a) for m, a in answers.items()}
            out.append((problem, answers, right, {m: record[m]["is_correct"] for m in LABELLED_RIGHT}))
    assert len(out) == 1319
    return out


@pytest.mark.parametrize("model", LABELLED_RIGHT)
def test_the_parser_reproduces_the_published_labels(rows, model):
    assert sum(label[model] for *_, label in rows) == LABELLED_RIGHT[model]
    disagree = {(model, i) for i, (_, _, right, label) in enumerate(rows) if right[model] != label[model]}
    assert disagree == {key for key in EXPLAINED if key[0] == model}


def test_only_solutions_without_an_answer_line_have_no_answer(rows):
    """Eleven have none; one of them is nothing but a number, which is read as its answer (and is wrong)."""
    none = [(i, m) for i, (_, answers, _, _) in enumerate(rows) for m, a in answers.items() if a is None]
    assert len(none) == 10 and not any(rows[i][3][m] for i, m in none)


def test_comparing_letters_as_the_star_release_does_would_not(rows, shared):
    """What the exact fractions are for: "3.0" is 3, and "5,000" is 5000."""
    strict = make_task("gsm8k", test=str(shared("data/gsm8k/test.jsonl")), strict=True)
    gold = {p.question: p.gold for p in strict.problems("test")}
    missed = 0
    with open(shared("data/gsm8k/example_model_solutions.jsonl"), encoding="utf-8") as file:
        for i, record in enumerate(map(json.loads, file)):
            for model in LABELLED_RIGHT:
                same = strict.parse(in_our_format(record[model]["solution"])) == gold[record["question"]]
                assert not same or rows[i][3][model]
                missed += rows[i][3][model] and not same
    assert missed == 10


def test_metrics_on_four_real_samples_per_problem(rows):
    """Each model one sample; a judge who only knows which model wrote it; the models' own order is by accuracy."""
    right = np.array([[r[m] for m in LABELLED_RIGHT] for _, _, r, _ in rows])
    answers = [list(a.values()) for _, a, _, _ in rows]
    golds = [p.gold for p, *_ in rows]
    shares = right.mean(axis=0)
    by_model = np.broadcast_to(shares, right.shape)
    average = right.mean()

    def vote(k):
        return np.mean([majority_at_k(a, g, k) for a, g in zip(answers, golds)])

    passed = {k: np.mean([pass_at_k(4, int(c), k) for c in right.sum(axis=1)]) for k in (1, 2, 3, 4)}
    best = {k: np.mean(best_of_k(by_model, right, k)) for k in (1, 2, 3, 4)}
    assert average == pytest.approx(sum(LABELLED_RIGHT.values()) / (4 * 1319))
    assert passed[1] == pytest.approx(average) == best[1] == pytest.approx(best[1])
    assert best[4] == pytest.approx(742 / 1319)  # always the strongest model
    assert passed[4] == pytest.approx(right.any(axis=1).mean())
    assert best[1] < best[2] < best[3] < best[4] < passed[4]
    assert np.mean(best_of_k(right, right, 3)) == pytest.approx(passed[3])  # an oracle
    assert vote(2) <= passed[2] and average < vote(3) < passed[3] and average < vote(4) < best[4]
    assert 0.5 < mean_auc(by_model, right) < 1
    low, high = bootstrap_ci(right[:, 3].astype(float))
    assert high - low == pytest.approx(2 * 0.027, abs=0.004)  # 2.7 points for 1,319 problems at about 50%
