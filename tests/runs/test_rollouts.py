"""What is kept for training, and what a training prompt shows (specification of STaR, edge cases)."""

import dataclasses
import json

import pytest

from qstar.methods import star
from qstar.runs import rollouts
from qstar.runs.rollouts import Selection, read_answer, select, summary
from qstar.tasks import make_task
from qstar.tasks.base import Problem, Task
from qstar.tasks.prompts import PromptFormat, formatted
from qstar.types import Completion
from tests.methods import stub
from tests.text.test_chat import ZEPHYR, with_template


class Words(Task):
    """The answer is the last word; a completion that says "hint" betrays it."""

    name = "words"

    def prompt(self, problem, hint=False):
        return f"{problem.question} ({problem.gold})" if hint else problem.question

    def parse(self, completion):
        return completion.split()[-1] if completion.split() else None


TASK = Words()
PROBLEMS = {name: Problem(id=name, question=f"{name}?", gold=gold) for name, gold in (("p", "7"), ("q", "8"))}


def row(completion, problem="p", **changes):
    made = stub.rollout(TASK, PROBLEMS[problem], completion, hinted=changes.pop("hinted", False))
    return dataclasses.replace(made, **changes)


def verdicts(rows, rules=Selection(), seen=()):
    out = select(rows, PROBLEMS, TASK, rules, seen)
    assert [dataclasses.replace(r, verdict="", reason="") for r in out] == list(rows)  # nothing else changes
    return [(r.verdict, r.reason) for r in out]


def test_right_answers_are_kept_and_hinted_ones_are_called_rationalised():
    found = verdicts([row("so 7"), row("so 8", "q", hinted=True)])
    assert [v for v, _ in found] == ["kept", "rationalised"]


@pytest.mark.parametrize("hinted", [False, True])
@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (row("so 7", truncated=True, correct=False), "truncated"),
        (row("so 7", truncated=True), "truncated"),  # even where somebody calls it right
        (row(""), "no answer"),
        (row("so 9"), "wrong answer"),
    ],
)
def test_rejected_by_itself(attempt, reason, hinted):
    assert verdicts([dataclasses.replace(attempt, hinted=hinted)]) == [("rejected", reason)]


def test_an_answer_that_is_none_is_not_right_where_the_gold_is_none():
    assert not TASK.correct(Problem(id="x", question="", gold=None), None)


def test_a_leak_of_the_hint_is_rejected_with_its_words_but_only_in_hinted_rows():
    found = verdicts([row("as stated 7", hinted=True), row("as stated 7")])
    assert found[0] == ("rejected", "hint leak: hint marker 'as stated'")
    assert found[1][0] == "kept"


def test_a_leak_in_a_sum_is_found_by_the_task():
    task = make_task("arithmetic", pool={1: 4}, seeds={})
    problem = task.problem(3, 4)
    rows = [
        stub.rollout(task, problem, text, hinted=True) for text in ("07|#7", "3+4(07),C0|,7C0|07|#7", problem.solution)
    ]
    found = select(rows, {problem.id: problem}, task, Selection())
    assert [r.verdict for r in found] == ["rejected", "rejected", "rationalised"]
    assert all(r.correct for r in found) and all(r.reason.startswith("hint leak: ") for r in found[:2])


def test_duplicates_are_those_of_one_problem_up_to_white_space():
    rows = [
        row("so  it is\n7"),
        row("so it is 7 "),
        row("it is 7"),
        row("so it is 8", "q"),
        row("so it is 8", "q", hinted=True),
    ]
    assert [v for v, _ in verdicts(rows)] == ["kept", "rejected", "kept", "kept", "rejected"]
    assert verdicts(rows)[1] == ("rejected", "duplicate")
    assert [v for v, _ in verdicts(rows, Selection(dedupe=False))] == [
        "kept",
        "kept",
        "kept",
        "kept",
        "rationalised",
    ]


def test_what_was_kept_in_earlier_loops_is_a_duplicate():
    rows = [row("so   7"), row("so 7", "q"), row("then 7")]
    found = verdicts(rows, seen=[("p", "so 7")])
    assert found == [("rejected", "duplicate"), ("rejected", "wrong answer"), ("kept", "right answer")]


def test_a_rejected_row_makes_no_duplicate_and_fills_no_cap():
    rows = [row("so 7", truncated=True), row("so 7"), row("then 7")]
    assert [v for v, _ in verdicts(rows, Selection(cap_per_problem=2))] == ["rejected", "kept", "kept"]


def test_cap_per_problem():
    rows = [row("a 7"), row("b 7"), row("c 7"), row("a 8", "q"), row("b 8", "q", hinted=True)]
    found = verdicts(rows, Selection(cap_per_problem=1))
    assert [v for v, _ in found] == ["kept", "rejected", "rejected", "kept", "rejected"]
    assert found[1][1] == "over the cap per problem"


def test_exact_filter_asks_the_audit_and_none_passes():
    rows = [row("a 7", valid=False), row("b 7", valid=True), row("c 7", valid=None)]
    assert [v for v, _ in verdicts(rows)] == ["kept"] * 3
    assert verdicts(rows, Selection(exact_filter=True))[0] == ("rejected", "wrong step")
    assert [v for v, _ in verdicts(rows, Selection(exact_filter=True))[1:]] == ["kept", "kept"]


def test_counts_of_a_loop_add_up_whatever_the_reasons():
    rows = [
        row("a 7"),
        row("a 7"),
        row("9"),
        row(""),
        row("so 7", truncated=True, correct=False),
        row("given answer 7", hinted=True),
        row("hence 8", "q", hinted=True),
    ]
    found = summary(select(rows, PROBLEMS, TASK, Selection()))
    rejected = {k: v for k, v in found.items() if k.startswith("rejected_")}
    assert rejected == {
        "rejected_duplicate": 1,
        "rejected_wrong_answer": 1,
        "rejected_no_answer": 1,
        "rejected_truncated": 1,
        "rejected_hint_leak": 1,
    }
    assert (
        found["kept"] + found["rationalised"] + sum(rejected.values())
        == found["attempted"] + found["hinted_attempted"]
        == 7
    )
    assert (found["kept"], found["rationalised"], found["share_rationalised"]) == (1, 1, 0.5)
    assert found["solve_rate"] == 2 / 5 and found["hinted_solve_rate"] == 1.0 and found["problems_solved"] == 1


# ---------------------------------------------------------------------------------------- who is rationalised


def right(task):
    return lambda problem: task.solution(problem)


def test_only_problems_without_any_right_sample_are_rationalised(tmp_path, monkeypatch):
    ctx = stub.context(tmp_path, loop={"k": 2, "n_iters": 1})
    arm, loop = stub.arm_of(ctx)
    pool = ctx.task.pool(1, ctx.seed, loop.problems_per_iter)
    solved = {p.id for p in pool[::3]}
    calls = iter(range(10_000))

    def write(problem, hinted, n):  # one of the two samples is right
        return ctx.task.solution(problem) if hinted or problem.id in solved and next(calls) % 2 else "#0"

    asked = stub.script(monkeypatch, write)
    rows = star.rationalised_rollouts(arm, loop, None, 1)
    assert [stage for stage, *_ in asked] == ["sample", "rationalise"]
    assert asked[0][3] == [p.id for p in pool]
    hit = {r.problem_id for r in rows if r.correct and not r.hinted}
    assert hit and hit <= solved and asked[1][3] == [p.id for p in pool if p.id not in hit]
    assert {r.problem_id for r in rows if r.verdict == "rationalised"} == {p.id for p in pool} - hit


@pytest.mark.parametrize("own", [{"preset": "star_norat"}, {"p_rationalize": 0.0}])
def test_without_rationalisation_no_hint_is_shown(tmp_path, monkeypatch, own):
    ctx = stub.context(tmp_path, arms={"star": own})
    arm, loop = stub.arm_of(ctx)
    asked = stub.script(monkeypatch, lambda *_: None)
    assert not any(r.hinted for r in star.rationalised_rollouts(arm, loop, None, 1))
    assert not any(hinted and ids for _, hinted, _, ids in asked)


def test_a_share_of_the_failures_is_rationalised_and_the_same_ones_again():
    pool = make_task("arithmetic").pool(1, 0)
    picked = [p for p in pool if star.should_rationalize(p, 1, 0.3)]
    assert 0.25 < len(picked) / len(pool) < 0.35
    assert (
        picked
        == [p for p in pool if star.should_rationalize(p, 1, 0.3)]
        != [p for p in pool if star.should_rationalize(p, 2, 0.3)]
    )
    assert all(star.should_rationalize(p, 1, 1.0) for p in pool) and not any(
        star.should_rationalize(p, 1, 0.0) for p in pool
    )


# ------------------------------------------------------------------------------------------- training prompts


def kept_rows(ctx, loop, n=1):
    """Every problem of the pool of loop n, every other one rationalised."""
    pool = ctx.task.pool(n, ctx.seed, loop.problems_per_iter)
    rows = [
        stub.rollout(ctx.task, p, ctx.task.solution(p), hinted=bool(i % 2), iteration=n) for i, p in enumerate(pool)
    ]
    return select(rows, {p.id: p for p in pool}, ctx.task, Selection())


def texts(ctx, examples):
    return [(ctx.tokenizer.decode(e.prompt), ctx.tokenizer.decode(e.completion)) for e in examples]


def test_no_training_prompt_holds_the_hint(tmp_path):
    ctx = stub.context(tmp_path)
    arm, loop = stub.arm_of(ctx)
    rows = kept_rows(ctx, loop)
    assert any("(" in r.prompt for r in rows)  # as it was shown to the model
    examples = star.training_examples(arm, loop, rows, 1)
    assert len(examples) == len(rows)
    for r, example, (prompt, completion) in zip(rows, examples, texts(ctx, examples), strict=True):
        assert prompt == f"{r.problem_id}=" and completion == r.completion  # `decode` skips the EOS
        assert example.completion[-1] == ctx.tokenizer.eos_id


def test_the_hint_stays_in_rationalised_rows_where_the_ablation_asks_for_it(tmp_path):
    ctx = stub.context(tmp_path, loop={"p_keep_hint": 1.0})
    arm, loop = stub.arm_of(ctx)
    rows = kept_rows(ctx, loop)
    prompts = [prompt for prompt, _ in texts(ctx, star.training_examples(arm, loop, rows, 1))]
    assert prompts == [r.prompt for r in rows] and sum("(" in p for p in prompts) == sum(r.hinted for r in rows)


def test_a_share_of_the_hints_stays():
    rows = [row("so 7", hinted=True, problem_id=str(i)) for i in range(2000)]
    assert 0.25 < sum(rollouts.show_hint(r, 0.3) for r in rows) / 2000 < 0.35
    assert not any(rollouts.show_hint(dataclasses.replace(r, hinted=False), 1.0) for r in rows)


@pytest.mark.parametrize("accumulate", [False, True])
def test_data_are_of_this_loop_alone_or_of_all(tmp_path, accumulate):
    ctx = stub.context(tmp_path, loop={"accumulate": accumulate})
    arm, loop = stub.arm_of(ctx)
    first, second = kept_rows(ctx, loop, 1), kept_rows(ctx, loop, 2)
    stub_file(arm, 1, [*first, dataclasses.replace(first[0], verdict="rejected", completion="no")])
    got = texts(ctx, star.training_examples(arm, loop, second, 2))
    wanted = [*first, *second] if accumulate else second
    assert got == [(f"{r.problem_id}=", r.completion) for r in wanted]


def stub_file(arm, n, rows):
    from qstar.data.sources import write_jsonl

    write_jsonl(arm.rationales(n), [vars(r) for r in rows])


def test_accumulated_loops_hold_no_row_twice(tmp_path, monkeypatch):
    """One digit has few sums: a greedy model writes the same text for the same one in every loop."""
    ctx = stub.context(tmp_path, loop={"accumulate": True, "rationalize": False}, task={"pool": {"1": 45}, "seeds": {}})
    arm, loop = stub.arm_of(ctx)
    stub.script(monkeypatch, lambda p, hinted, n: ctx.task.solution(p) + "")
    kept = []
    for n in (1, 2):
        kept = [r for r in star.rationalised_rollouts(arm, loop, None, n) if r.verdict != "rejected"]
    got = texts(ctx, star.training_examples(arm, loop, kept, 2))
    drawn = {f"{p.id}=" for n in (1, 2) for p in ctx.task.pool(n, ctx.seed)}
    assert len(got) == len(set(got)) and {prompt for prompt, _ in got} == drawn and len(kept) < 45
    loop = dataclasses.replace(loop, accumulate=False)
    arm = stub.Arm(ctx, "other")
    rows = [star.rationalised_rollouts(arm, loop, None, n) for n in (1, 2)]
    assert all(r.verdict == "kept" for loop_rows in rows for r in loop_rows)  # every loop by itself


def test_gold_solutions_are_in_the_mix_where_asked_for(tmp_path):
    ctx = stub.context(tmp_path, loop={"include_sft_data": True})
    arm, loop = stub.arm_of(ctx)
    rows = kept_rows(ctx, loop)[:2]
    got = texts(ctx, star.training_examples(arm, loop, rows, 1))
    pool = ctx.task.pool(1, ctx.seed, loop.problems_per_iter)
    assert got[2:] == [(f"{p.id}=", p.solution) for p in pool]


def test_rows_that_do_not_fit_are_dropped_and_counted_aloud(tmp_path):
    ctx = stub.context(tmp_path, train={"row_length": 26})
    arm, loop = stub.arm_of(ctx)
    rows = kept_rows(ctx, loop)
    got = star.training_examples(arm, loop, rows, 1)
    assert 0 < len(got) < len(rows) and all(len(e) <= 26 for e in got)
    assert any(f"{len(rows) - len(got)} of {len(rows)} rows are longer" in line for line in ctx.console.lines)


def few_shot_tasks(shared):
    data, prompts = shared("data"), str(shared("data/prompts/star"))
    gsm = {"train": f"{data}/gsm8k/train.jsonl", "test": f"{data}/gsm8k/test.jsonl"}
    cqa = {k: f"{data}/commonsenseqa/{n}_rand_split.jsonl" for k, n in (("train", "train"), ("test", "dev"))}
    return [make_task("gsm8k", prompts=prompts, **gsm), make_task("commonsense_qa", prompts=prompts, **cqa)]


def test_few_shot_items_are_in_no_pool_and_no_evaluation(shared):
    for task in few_shot_tasks(shared):
        shown = {" ".join(line[3:].split()) for line in task.prefix().splitlines() if line.startswith("Q: ")}
        assert len(shown) >= 5
        for problems in (task.pool(1, 0), task.problems("val"), task.problems("test")):
            assert len(problems) > 100 and not shown & {" ".join(p.question.split()) for p in problems}


def test_few_shot_text_in_training_prompts_is_the_one_without_hints(shared, tmp_path):
    task = few_shot_tasks(shared)[1]
    ctx = stub.context(tmp_path, loop={"few_shot_in_train": True, "problems_per_iter": 3}, train={"row_length": 4096})
    ctx.task = task
    ctx.tokenizer = CharTokenizer()
    arm, loop = stub.arm_of(ctx)
    pool = task.pool(1, ctx.seed, 3)
    rows = [stub.rollout(task, p, f" So ({p.gold}).", hinted=True) for p in pool]
    rows = select(rows, {p.id: p for p in pool}, task, Selection())
    assert all("(CORRECT)" in r.prompt and r.verdict == "rationalised" for r in rows)
    got = [ctx.tokenizer.decode(e.prompt) for e in star.training_examples(arm, loop, rows, 1)]
    assert got == [task.prefix() + task.prompt(p) for p in pool] and not any("CORRECT" in text for text in got)


@pytest.mark.parametrize("in_train", [False, True])
def test_training_rows_of_a_chat_hold_its_shots_only_if_asked_and_never_the_hint(tmp_path, in_train):
    tokenizer = with_template("mistral", ZEPHYR)
    rows = [{"question": f"{n} and {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(2, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    raw = make_task("gsm8k", train=str(tmp_path / "rows.jsonl"))
    task = formatted(raw, tokenizer, PromptFormat("chat", 1))
    ctx = stub.context(
        tmp_path, loop={"few_shot_in_train": in_train, "problems_per_iter": 2}, train={"row_length": 4096}
    )
    ctx.task, ctx.tokenizer = task, tokenizer
    arm, loop = stub.arm_of(ctx)
    pool = task.pool(1, ctx.seed, 2)
    kept = [stub.rollout(task, p, f"So {p.gold}.\n#### {p.gold}", hinted=True) for p in pool]
    shot = raw.examples()[0]
    for example, p in zip(star.training_examples(arm, loop, kept, 1), pool, strict=True):
        talk = [("user", shot), ("assistant", shot), ("user", p)][0 if in_train else 2 :]
        text = {"user": lambda x: f"{x.question}\n\n{raw.instruction}", "assistant": lambda x: raw.solution(x).strip()}
        messages = [{"role": role, "content": text[role](x)} for role, x in talk]
        assert example.prompt == tokenizer.encode(tokenizer.chat.render(messages))
        assert example.completion[-1] == tokenizer.chat.turn.end_id


class CharTokenizer:
    """Characters as ids, for text that the alphabet of sums does not hold."""

    def ended(self, ids, prompt):
        return [*ids, 0]

    def encode_pair(self, prompt, completion):
        return list(map(ord, prompt)), list(map(ord, completion))

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)


@pytest.mark.parametrize(
    ("written", "opened", "text", "answer"),
    [
        ("<think>#### 3</think>So\n#### 4", False, "<think>#### 3</think>So\n#### 4", "4"),
        ("<think>Q: 1\n\nQ: 2\n#### 3", False, "<think>Q: 1\n\nQ: 2\n#### 3", None),  # not closed: no answer
        ("2 + 2\n</think>\n\n#### 4", True, "2 + 2\n</think>\n\n#### 4", "4"),  # the prompt ends in <think>
        ("2 + 2\n#### 4", True, "2 + 2\n#### 4", None),
        ("<think>a</think>#### 4\nQ: more", False, "<think>a</think>#### 4", "4"),
    ],
)
def test_think_blocks_stay_in_the_text_and_hold_no_answer(written, opened, text, answer):
    for strict in (False, True):
        task = make_task("gsm8k", strict=strict)
        task.opens_thinking = opened
        done = Completion(written, [], [], [], True)
        assert read_answer(task, done) == (text, answer, True)
