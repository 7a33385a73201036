"""A PRM's labels by trying: every step is as right as the share of its continuations that reach the answer."""

import dataclasses

from qstar.methods import preference_data
from qstar.methods.preference_data import ContinuationTask, Solution, rollout_labels
from qstar.runs.rollouts import SampleSettings
from qstar.tasks.arithmetic import Arithmetic
from tests.methods.stub import rollout

TASK = Arithmetic(pool={2: 5}, seeds={})
PROBLEM = TASK.problem(17, 25)
WRONG = "17+25,C0|1+2,3C1|,43C0|043|#43"


def solution(text, right):
    return Solution(PROBLEM.id, TASK.prompt(PROBLEM), text, right, True, False, "model", 1)


def test_every_beginning_is_continued_once_and_labelled_by_what_comes_of_it(monkeypatch, tmp_path):
    gold = PROBLEM.solution  # 17+25,C0|1+2,2C1|,42C0|042|#42
    asked = {}

    def attempt(model, task, problems, settings, *, k, folder, **_):
        rows = []
        for p in problems:
            prompt = task.prompt(p)
            asked[prompt] = asked.get(prompt, 0) + 1
            begun = prompt.removeprefix(TASK.prompt(PROBLEM))
            texts = [gold[len(begun) :] if j % 2 == 0 or begun.count("|") == 3 else "#7" for j in range(k)]
            made = [rollout(TASK, PROBLEM, t, sample=j) for j, t in enumerate(texts)]
            right = task.judged([p] * k, [task.parse(task.cut(t)) for t in texts])
            rows += [dataclasses.replace(r, problem_id=p.id, correct=z) for r, z in zip(made, right)]
        return rows

    monkeypatch.setattr(preference_data, "sample_rollouts", attempt)
    solutions = [solution(gold, True), solution(WRONG, False)]
    made = rollout_labels(None, TASK, {PROBLEM.id: PROBLEM}, solutions, SampleSettings(), n=4, seed=0, folder=tmp_path)
    # The first line is common. Of the wrong one's later lines none can be put right by the gold text's rest.
    ends = [TASK.steps(s.completion)[:-1] for s in solutions]
    assert set(asked) == {s.prompt + s.completion[:e] for s, some in zip(solutions, ends) for e in some}
    assert set(asked.values()) == {1} and len(asked) == 7
    assert made[0] == [0.5, 0.5, 1.0, 0.5, 1.0] and made[1][0] == 0.5 and made[1][-1] == 0.0
    assert [len(labels) for labels in made] == [5, 5]


def test_a_continuation_is_judged_with_what_it_continues():
    task = ContinuationTask(TASK)
    begun = dataclasses.replace(PROBLEM, id="x", meta={"of": PROBLEM, "prefix": "17+25,C0|1+2,2C1|,42C0|042|#4"})
    assert task.prompt(begun) == "17+25=17+25,C0|1+2,2C1|,42C0|042|#4"
    assert task.judged([begun] * 3, ["2", "3", None]) == [True, False, False]
