"""D_GEN, D_VER, the pairs drawn from them, and labels of steps (from a task, or from rollouts)."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from qstar.errors import UserError
from qstar.methods import preference_data
from qstar.methods.preference_data import (
    ContinuationTask,
    Pair,
    PairSettings,
    Solution,
    add_to_buffer,
    build_pairs,
    count_solutions,
    graded_arrays,
    human_solutions,
    merge_duplicates,
    most_sampled,
    repeat_by_count,
    rollout_labels,
    sampled_solutions,
    step_ends,
    step_targets,
)
from qstar.runs.rollouts import SampleSettings, to_example
from qstar.tasks.arithmetic import Arithmetic
from qstar.tasks.base import Task
from tests.methods import stub


def solution(problem, text, correct, **changes):
    fields = dict(prompt=f"{problem}=", parsed=True, truncated=False, source="model", iteration=1, group="1")
    return Solution(problem_id=problem, completion=text, correct=correct, **{**fields, **changes})


def many(problem, right, wrong):
    return [solution(problem, f"r{i}", True) for i in range(right)] + [
        solution(problem, f"w{i}", False) for i in range(wrong)
    ]


@pytest.mark.parametrize("right, wrong, cap", [(1, 1, 8), (3, 5, 8), (3, 5, 100), (5, 2, 7), (1, 20, 8), (20, 1, 8)])
def test_pairs_are_drawn_from_the_product_without_replacement(right, wrong, cap):
    pairs = build_pairs(many("a", right, wrong), PairSettings(per_problem=cap), seed=0)
    assert len(set(pairs)) == len(pairs) == min(cap, right * wrong)
    product = {Pair("a", "a=", f"r{i}", f"w{j}") for i, j in itertools.product(range(right), range(wrong))}
    assert set(pairs) <= product


@pytest.mark.parametrize("right, wrong, cap", [(3, 5, 7), (2, 9, 12), (4, 3, 12)])
def test_every_wrong_solution_occurs_before_one_occurs_again(right, wrong, cap):
    pairs = build_pairs(many("a", right, wrong), PairSettings(per_problem=cap, winners="distinct"), seed=3)
    seen = [p.rejected for p in pairs]
    for n in range(1, len(pairs) + 1):
        times = [seen[:n].count(f"w{i}") for i in range(wrong)]
        assert max(times) - min(times) <= 1
    used = [sum(p.chosen == f"r{i}" for p in pairs) for i in range(right)]
    assert max(used) - min(used) <= -(-wrong // right)


def test_right_solutions_are_drawn_as_often_as_they_were_sampled():
    """One valid solution found 9 times beside three that reached the answer by luck, once each."""
    drawn = []
    for i in range(300):
        rows = [solution(f"p{i}", "valid", True, count=9), *many(f"p{i}", 3, 4)]
        drawn += [p.chosen for p in build_pairs(rows, PairSettings(per_problem=4), 0)]
    assert drawn.count("valid") / len(drawn) == pytest.approx(9 / 12, abs=0.05)
    rows = [solution("a", "valid", True, count=9), *many("a", 3, 4)]
    turns = [p.chosen for p in build_pairs(rows, PairSettings(per_problem=4, winners="distinct"), 0)]
    assert len(set(turns)) == 4


def test_a_head_sees_a_solution_as_often_as_it_was_sampled_up_to_a_cap():
    rows = [solution("a", "x", True, count=5), solution("a", "y", False, count=2), solution("a", "z", False)]
    assert [s.completion for s in repeat_by_count(rows, PairSettings(repeats=3))] == list("xxxyyz")
    assert repeat_by_count(rows, PairSettings()) == rows


def test_problems_that_lack_either_side_give_nothing_and_others_keep_their_order():
    rows = [*many("b", 2, 1), *many("only right", 3, 0), *many("only wrong", 0, 3), *many("a", 1, 2)]
    assert [p.problem_id for p in build_pairs(rows, PairSettings(), 0)] == ["b", "b", "a", "a"]


def test_the_draw_depends_on_the_seed_and_the_problem_alone():
    rows = many("a", 5, 9)
    first = build_pairs(rows, PairSettings(per_problem=4), 0)
    assert build_pairs([*many("z", 1, 1), *rows], PairSettings(per_problem=4), 0)[1:] == first
    assert build_pairs(rows, PairSettings(per_problem=4), 1) != first


def test_cut_off_and_unreadable_solutions_are_rejected_only_if_asked_for():
    rows = [
        solution("a", "r", True),
        solution("a", "cut", False, truncated=True),
        solution("a", "unreadable", False, parsed=False),
        solution("a", "w", False),
    ]
    assert [p.rejected for p in build_pairs(rows, PairSettings(), 0)] == ["w"]
    assert {p.rejected for p in build_pairs(rows, PairSettings(negatives="any"), 0)} == {"cut", "unreadable", "w"}


@pytest.mark.parametrize("changes", [{"per_problem": 0}, {"negatives": "parse"}, {"winners": "all"}, {"repeats": 0}])
def test_settings_that_make_no_sense_are_named(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        PairSettings(**changes)


# ------------------------------------------------------------------------------------------------------- buffers


def test_a_buffer_is_a_set_that_remembers_who_found_a_solution_first(tmp_path):
    add = functools.partial(add_to_buffer, tmp_path / "d_gen")
    add(0, [solution("a", "x y", True, source="human", iteration=0)])
    one = add(1, [solution("a", "x  y", True), solution("a", "z", True), solution("a", "z ", True)])
    two = add(2, [solution("b", "z", True, iteration=2), solution("a", "z", True, iteration=2)])
    assert [(s.problem_id, s.completion, s.source, s.iteration, s.count) for s in two] == [
        ("a", "x y", "human", 0, 2),
        ("a", "z", "model", 1, 3),
        ("b", "z", "model", 2, 1),
    ]
    assert one == add(1, []) and add(2, []) == two and [s.count for s in one] == [2, 2]


def test_texts_that_differ_in_white_space_and_label_are_two_solutions():
    both = [solution("a", "if x:\n    return 1", True), solution("a", "if x:\n  return 1", False)]
    found = merge_duplicates([*both, *both])
    assert [(s.correct, s.count) for s in found] == [(True, 2), (False, 2)]
    assert len(build_pairs(found, PairSettings(), seed=0)) == 1


def test_of_a_problem_the_most_sampled_solutions_are_kept_in_order():
    rows = merge_duplicates(
        [*many("a", 3, 0), solution("a", "r2", True), solution("b", "x", True), solution("a", "r1 ", True)]
    )
    assert [(s.completion, s.count) for s in rows] == [("r0", 1), ("r1", 2), ("r2", 2), ("x", 1)]
    assert [s.completion for s in most_sampled(rows, 1)] == ["r1", "x"]
    assert [s.completion for s in most_sampled(rows, 2)] == ["r1", "r2", "x"] and most_sampled(rows, None) == rows


def test_a_file_that_is_there_is_read_and_not_made_again(tmp_path):
    add_to_buffer(tmp_path, 1, [solution("a", "x", True)])
    assert [s.completion for s in add_to_buffer(tmp_path, 1, [solution("a", "other", True)])] == ["x"]


def test_human_solutions_are_right_and_hinted_attempts_are_no_solutions():
    task = Arithmetic(pool={1: 5}, seeds={})
    problems = task.problems("test")[:2]
    gold = human_solutions(task, problems)
    assert [(s.completion, s.correct, s.source) for s in gold] == [(p.solution, True, "human") for p in problems]
    p = problems[0]
    tries = [stub.rollout(task, p, p.solution), stub.rollout(task, p, "#99"), stub.rollout(task, p, "no")]
    tries += [stub.rollout(task, p, p.solution, hinted=True), stub.rollout(task, p, "#1", truncated=True)]
    found = sampled_solutions(tries)
    assert [(s.correct, s.parsed, s.truncated) for s in found] == [
        (True, True, False),
        (False, True, False),
        (False, False, False),
        (False, True, True),
    ]
    assert count_solutions(found) == {"solutions": 4, "correct": 1, "incorrect": 3, "human": 0, "mixed_problems": 1}


def merging_newlines():
    """A character tokenizer with one token for two line ends, as GPT-2's, Llama 3's and Qwen's have."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    from qstar.text.tokenizer import Tokenizer

    vocabulary = {token: i for i, token in enumerate([*"abcQ:$.\n ", "\n\n", ".\n\n"])}
    backend = Backend(models.BPE(vocabulary, [("\n", "\n"), (".", "\n\n")]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="$"))


@pytest.mark.parametrize(
    "text, right, expected",
    [
        ("a\n\nb\n\nc", [1, 0, 0], {1: 1, 3: 0, 5: 0}),
        ("a.\n\n\n\nb\nc", [1, 1, 0], {1: 1, 4: 1, 6: 0}),  # ".\n\n" is one token
        ("\n\na\n \nb", [1, 0], {2: 1, 6: 0}),  # white space alone is no step
        ("a\nb\n", [1, 0], {1: 1, 4: 0}),
    ],
)
def test_step_labels_stay_with_their_steps_where_line_ends_share_a_token(text, right, expected):
    tokenizer, task = merging_newlines(), Task()
    assert len(task.steps(text)) == len(right)
    ends = step_ends(task.steps, tokenizer, to_example(tokenizer, "Q:", text), text)
    found, labels = step_targets(ends, right)
    assert dict(zip(found, labels)) == expected
    arrays = graded_arrays([solution("Q:", text, False, prompt="Q:")], tokenizer, 16, False, [(found, labels)])
    asked = arrays["weight"][0] > 0
    assert dict(zip(np.flatnonzero(asked) - 2, arrays["labels"][0][asked])) == expected


def test_steps_that_end_in_one_token_have_the_label_of_the_last():
    assert step_targets([1, 1, 3], [1, 0, 0]) == ([1, 3], [0, 0])
    with pytest.raises(ValueError):  # a label too few is not aligned from either side
        step_targets([1, 3], [1])


# ------------------------------------------------------------------------------------------- labels of steps by rollouts

SUMS = Arithmetic(pool={2: 5}, seeds={})
PROBLEM = SUMS.problem(17, 25)
WRONG = "17+25,C0|1+2,3C1|,43C0|043|#43"


def sum_solution(text, right):
    return Solution(PROBLEM.id, SUMS.prompt(PROBLEM), text, right, True, False, "model", 1)


def test_every_beginning_is_continued_once_and_labelled_by_what_comes_of_it(monkeypatch, tmp_path):
    gold = PROBLEM.solution  # 17+25,C0|1+2,2C1|,42C0|042|#42
    asked = {}

    def attempt(model, task, problems, settings, *, k, folder, **_):
        rows = []
        for p in problems:
            prompt = task.prompt(p)
            asked[prompt] = asked.get(prompt, 0) + 1
            begun = prompt.removeprefix(SUMS.prompt(PROBLEM))
            texts = [gold[len(begun) :] if j % 2 == 0 or begun.count("|") == 3 else "#7" for j in range(k)]
            made = [stub.rollout(SUMS, PROBLEM, t, sample=j) for j, t in enumerate(texts)]
            right = task.judged([p] * k, [task.parse(task.cut(t)) for t in texts])
            rows += [dataclasses.replace(r, problem_id=p.id, correct=z) for r, z in zip(made, right)]
        return rows

    monkeypatch.setattr(preference_data, "sample_rollouts", attempt)
    solutions = [sum_solution(gold, True), sum_solution(WRONG, False)]
    found = rollout_labels(None, SUMS, {PROBLEM.id: PROBLEM}, solutions, SampleSettings(), n=4, seed=0, folder=tmp_path)
    made = [found[s.key] for s in solutions]
    # The first line is common. Of the wrong one's later lines none can be put right by the gold text's rest.
    ends = [SUMS.steps(s.completion)[:-1] for s in solutions]
    assert set(asked) == {s.prompt + s.completion[:e] for s, some in zip(solutions, ends) for e in some}
    assert set(asked.values()) == {1} and len(asked) == 7
    assert made[0] == [0.5, 0.5, 1.0, 0.5, 1.0] and made[1][0] == 0.5 and made[1][-1] == 0.0
    assert [len(labels) for labels in made] == [5, 5]


def test_a_continuation_is_judged_with_what_it_continues():
    task = ContinuationTask(SUMS)
    begun = dataclasses.replace(PROBLEM, id="x", meta={"of": PROBLEM, "prefix": "17+25,C0|1+2,2C1|,42C0|042|#4"})
    assert task.prompt(begun) == "17+25=17+25,C0|1+2,2C1|,42C0|042|#4"
    assert task.judged([begun] * 3, ["2", "3", None]) == [True, False, False]


def test_a_continuation_that_ran_to_the_limit_ends_where_the_task_says():
    class Boxed(Task):
        name, opens_thinking = "boxed", True

        def answered_part(self, completion):
            return completion[: completion.index("]") + 1] if "]" in completion else None

    task = ContinuationTask(Boxed())
    assert task.answered_part("so [4] and so on and") == "so [4]" and task.answered_part("so") is None
    assert task.opens_thinking
