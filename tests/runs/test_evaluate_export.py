"""Measuring a model by its own answers' files, and taking a model out of a run."""

import itertools
import json

import jax
import pytest

import qstar
from qstar.data.sources import read_jsonl
from qstar.errors import UserError
from qstar.methods.export import export_model, trained_model
from qstar.runs import context, rollouts
from qstar.runs.evaluate import evaluate_model, many
from qstar.tasks import make_task
from tests.methods import runs, stub

K = 6
TASK = make_task("arithmetic", pool={1: 30, 2: 6}, seeds={1: (30, 60)}, eval_per_length=12)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The last model of the arm with rationalisation, as a folder."""
    out = tmp_path_factory.mktemp("export") / "model"
    assert export_model(runs.arithmetic(), "rationalisation", None, out) == out
    return out


@pytest.fixture(scope="module")
def evaluation(exported, tmp_path_factory):
    """(result, folder of the answers). Most problems of this split were trained on: some are solved."""
    out = tmp_path_factory.mktemp("answers") / "out"
    model = qstar.load(exported)
    return evaluate_model(
        model, TASK, split="train", samples=K, max_new_tokens=34, temperature=1.0, seed=3, out=out
    ), out


def expected_pass(rows, k):
    subsets = list(itertools.combinations(rows, k))
    return sum(any(r["correct"] for r in s) for s in subsets) / len(subsets)


def expected_majority(rows, k):
    """Over all subsets of k: which share of the most frequent answers is right. Unread, cut off: no vote."""
    subsets, total = list(itertools.combinations(rows, k)), 0.0
    for subset in subsets:
        votes = [
            r["gold"] if r["correct"] else r["answer"] for r in subset if not r["truncated"] and r["answer"] is not None
        ]
        top = max(map(votes.count, votes), default=0)
        winners = {v for v in votes if votes.count(v) == top}
        total += (subset[0]["gold"] in winners) / len(winners) if winners else 0.0
    return total / len(subsets)


def by_problem(rows):
    out = {}
    for r in rows:
        out.setdefault(r["problem_id"], []).append(r)
    return out


def check_estimates(result, rows, samples):
    problems = by_problem(rows)
    assert all(len(mine) == samples for mine in problems.values())
    ks = [k for k in (1, 2, 4, 8) if k <= samples]
    assert {k.split("@")[1] for k in result if k.startswith("pass@") and "_" not in k and "/" not in k} == set(
        map(str, ks)
    )
    for k in ks:
        for name, expected in (("pass", expected_pass), ("majority", expected_majority)):
            for group in ["", *{r["group"] for r in rows}]:
                values = [expected(mine, k) for mine in problems.values() if group in ("", mine[0]["group"])]
                key = f"{name}@{k}" + (f"/{group}" if group else "")
                assert result[key] == pytest.approx(sum(values) / len(values), abs=1e-12)
        assert result[f"pass@{k}_low"] <= result[f"pass@{k}"] <= result[f"pass@{k}_high"]


def test_greedy_accuracy_is_that_of_the_file(evaluation):
    result, out = evaluation
    rows = read_jsonl(out / "greedy_000.jsonl")
    assert [r["problem_id"] for r in rows] == [p.id for p in TASK.problems("train")] and result["problems"] == 36
    assert result["accuracy"] == pytest.approx(sum(r["correct"] for r in rows) / 36)
    assert result["truncation_rate"] == pytest.approx(sum(r["truncated"] for r in rows) / 36)


def test_pass_and_majority_are_those_of_the_file(evaluation):
    result, out = evaluation
    rows = read_jsonl(out / "samples_000.jsonl")
    mixed = [mine for mine in by_problem(rows).values() if 0 < sum(r["correct"] for r in mine) < K]
    assert len(mixed) >= 2  # or the estimators would have nothing to do
    assert [r["sample"] for r in rows] == list(range(K)) * 36
    check_estimates(result, rows, K)


def test_estimates_with_ties_cut_off_and_unread_answers():
    task = make_task("arithmetic")
    problem, other = task.problem(5, 6), task.problem(12, 34)
    drawn = [("#11", False), ("#12", False), ("#12", False), ("", False), ("#11", True), ("#13", False)]
    rows = [stub.rollout(task, problem, text, sample=i, truncated=cut) for i, (text, cut) in enumerate(drawn)]
    rows += [stub.rollout(task, other, "#46" if i % 2 else "#64", sample=i) for i in range(6)]
    check_estimates(many(rows, 6), [vars(r) for r in rows], 6)


def test_answers_that_are_there_are_not_sampled_again(evaluation, exported, monkeypatch):
    result, out = evaluation

    def stream(*_, **__):
        raise AssertionError("sampled")
        yield

    monkeypatch.setattr(rollouts, "stream", stream)
    model = qstar.load(exported)
    again = evaluate_model(model, TASK, split="train", samples=K, max_new_tokens=34, temperature=1.0, seed=3, out=out)
    assert again == result
    with pytest.raises(AssertionError, match="sampled"):
        evaluate_model(model, TASK, split="train", max_new_tokens=34)


def test_answers_of_other_weights_are_not_counted(evaluation, exported):
    model = qstar.load(exported)
    other = model.replace(params=jax.tree.map(lambda x: 1.00001 * x, model.params))
    with pytest.raises(UserError, match="was made with config.parameters="):
        evaluate_model(
            other, TASK, split="train", samples=K, max_new_tokens=34, temperature=1.0, seed=3, out=evaluation[1]
        )


def test_answers_of_another_question_are_not_counted(tmp_path, exported):
    """`qstar evaluate --out`: another split or length in the same folder is a mistake, not a result."""
    from qstar.__main__ import main

    options = json.dumps({"pool": {"1": 3}, "seeds": {}, "eval_per_length": 3})
    call = [
        "evaluate",
        f"--model={exported}",
        "--task=arithmetic",
        f"--task-options={options}",
        f"--out={tmp_path}/o",
        "--json",
    ]
    assert main([*call, "--max-new-tokens=34"]) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for other in (
        ["--max-new-tokens=30"],
        ["--max-new-tokens=34", "--split=val"],
        ["--max-new-tokens=34", "--limit=2"],
    ):
        assert main([*call, *other]) == 2
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# ----------------------------------------------------------------------------------------------------- export


def answered(arm, n, hinted=False):
    return read_jsonl(runs.arithmetic() / arm / "evaluation" / f"iter_{n:03d}{'_hinted' if hinted else ''}.jsonl")


def replies(model, rows):
    """Greedy continuations of the prompts of some rows."""
    found = qstar.generate(model, [r["prompt"] for r in rows], max_new_tokens=34, temperature=0.0)
    return [completion.text for (completion,) in found]


@pytest.mark.parametrize(("arm", "n"), [("rationalisation", 2), ("no_rationalisation", 1), ("rationalisation", 0)])
def test_an_exported_model_answers_as_it_did_in_the_run(arm, n, tmp_path):
    rows = answered(arm, n) + answered(arm, n, hinted=True)
    out = export_model(runs.arithmetic(), arm, n, tmp_path / "m")
    assert replies(qstar.load(out), rows) == [r["completion"] for r in rows]
    others = {(a, m) for a in ("rationalisation", "no_rationalisation") for m in (1, 2)} | {("rationalisation", 0)}
    different = [
        (a, m)
        for a, m in others - {(arm, n)}
        if [r["completion"] for r in answered(a, m) + answered(a, m, hinted=True)] != [r["completion"] for r in rows]
    ]
    assert len(different) == 4  # so it is this model, and no other of the run


def test_the_last_iteration_is_the_default(exported):
    rows = answered("rationalisation", 2)
    assert replies(trained_model(runs.arithmetic(), "rationalisation"), rows) == [r["completion"] for r in rows]
    assert replies(qstar.load(exported), rows) == [r["completion"] for r in rows]


def test_an_export_needs_no_task(monkeypatch):
    """The file of a task of one's own may be gone."""
    monkeypatch.setattr(context, "make_prompted", lambda *a: pytest.fail("the task was made"))
    assert trained_model(runs.arithmetic(), "rationalisation", None).params


def test_the_base_of_a_pretrained_run_is_the_pretrained_model(tmp_path):
    import numpy as np
    from conftest import shared

    out = export_model(runs.gsm8k(), None, 0, tmp_path / "m")
    first, second = qstar.load(shared("weights/stories260k")), qstar.load(out)
    tokens = first.tokenizer.encode("Once upon a time", bos=True)
    np.testing.assert_array_equal(qstar.logits(first, [tokens]), qstar.logits(second, [tokens]))
    trained = trained_model(runs.gsm8k())
    assert not np.array_equal(qstar.logits(first, [tokens]), qstar.logits(trained, [tokens]))


@pytest.mark.parametrize(
    ("arm", "n", "named"),
    [
        ("rationalization", None, "rationalization.*rationalisation"),
        ("rationalisation", 3, "no finished iteration 3.*0, 1, 2"),
        ("rationalisation", -1, "no finished iteration -1"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(arm, n, named, tmp_path):
    with pytest.raises(UserError, match=named):
        export_model(runs.arithmetic(), arm, n, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_no_run_and_a_base_that_is_not_trained_are_named(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        export_model(tmp_path, None, None, tmp_path / "m")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text((runs.arithmetic() / "config.json").read_text())
    with pytest.raises(UserError, match="not trained yet"):
        export_model(tmp_path / "run", "rationalisation", None, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and [p.name for p in (tmp_path / "run").iterdir()] == [
        "config.json"
    ]
