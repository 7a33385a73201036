"""What a run reports is what its files hold, and what it trains on is not what it is tested on."""

import collections

import pytest

from qstar.data.sources import read_jsonl
from qstar.tasks import make_task
from qstar.train import metrics
from tests.methods import runs

CASES = [("arithmetic", arm, n) for arm in ("no_rationalisation", "rationalisation") for n in (1, 2)] + [
    ("gsm8k", "star", 1)
]
EVERY = pytest.mark.parametrize(("job", "arm", "n"), CASES)


def of(job, arm, n):
    """(folder, the metrics row of loop n, its attempts as plain rows)."""
    folder = getattr(runs, job)()
    (row,) = [r for r in metrics.read(folder) if (r["stage"], r["arm"], r["iteration"]) == ("iteration", arm, n)]
    return folder, row, read_jsonl(folder / arm / "rationales" / f"iter_{n:03d}.jsonl")


@EVERY
def test_counts_add_up(job, arm, n):
    folder, row, attempts = of(job, arm, n)
    stages = [read_jsonl(f) for f in sorted((folder / arm / "stages" / f"iter_{n:03d}").glob("*.jsonl"))]
    assert len(attempts) == sum(map(len, stages)) == row["attempted"] + row["hinted_attempted"]
    rejected = sum(v for k, v in row.items() if k.startswith("rejected_"))
    assert row["kept"] + row["rationalised"] + rejected == len(attempts)
    assert (
        row["trained_rows"] >= row["kept"] + row["rationalised"] - 5
        if job == "gsm8k"
        else (row["trained_rows"] == row["kept"] + row["rationalised"])
    )
    plain = [a for a in attempts if not a["hinted"]]
    assert (
        len({a["problem_id"] for a in plain}) == len(plain) == row["attempted"] == {"arithmetic": 64, "gsm8k": 24}[job]
    )
    solved = {a["problem_id"] for a in plain if a["correct"]}
    hinted = {a["problem_id"] for a in attempts if a["hinted"]}
    assert hinted == (set() if arm == "no_rationalisation" else {a["problem_id"] for a in plain} - solved)


@EVERY
def test_rates_match_a_recount(job, arm, n):
    _, row, attempts = of(job, arm, n)
    plain, hinted = ([a for a in attempts if a["hinted"] is h] for h in (False, True))

    def rate(rows, field):
        return sum(bool(r[field]) for r in rows) / len(rows) if rows else None

    assert row["solved"] == sum(a["correct"] for a in plain) and row["solve_rate"] == rate(plain, "correct")
    assert row["hinted_solved"] == sum(a["correct"] for a in hinted) and row["hinted_solve_rate"] == rate(
        hinted, "correct"
    )
    assert row["truncation_rate"] == rate(attempts, "truncated")
    assert row["parse_failure_rate"] == pytest.approx(sum(a["answer"] is None for a in attempts) / len(attempts))
    assert row["mean_tokens"] == pytest.approx(sum(a["n_tokens"] for a in attempts) / len(attempts))
    verdicts = collections.Counter(a["verdict"] for a in attempts)
    assert (row["kept"], row["rationalised"]) == (verdicts["kept"], verdicts["rationalised"])
    groups = collections.Counter((a["verdict"], a["group"]) for a in attempts)
    for name in {a["group"] for a in attempts}:
        assert (row[f"kept/{name}"], row[f"rationalised/{name}"]) == (
            groups["kept", name],
            groups["rationalised", name],
        )
    for kind, verdict in (("valid_kept", "kept"), ("valid_rationalised", "rationalised")):
        told = [a for a in attempts if a["verdict"] == verdict and a["valid"] is not None]
        assert row[kind] == rate(told, "valid")
    reasons = collections.Counter(
        a["reason"].split(":")[0].replace(" ", "_") for a in attempts if a["verdict"] == "rejected"
    )
    assert {k.removeprefix("rejected_"): v for k, v in row.items() if k.startswith("rejected_")} == reasons


@EVERY
def test_accuracies_are_those_of_the_evaluation_files(job, arm, n):
    folder, row, _ = of(job, arm, n)
    for name, file in (("accuracy", f"iter_{n:03d}"), ("hinted_accuracy", f"iter_{n:03d}_hinted")):
        path = folder / arm / "evaluation" / f"{file}.jsonl"
        assert path.exists() == (name == "accuracy" or job == "arithmetic")
        if not path.exists():
            continue
        rows = read_jsonl(path)
        assert all(r["verdict"] == "" and r["hinted"] == ("hinted" in file) for r in rows)
        for group in ["", *{r["group"] for r in rows}]:
            mine = [r["correct"] for r in rows if group in ("", r["group"])]
            tail = f"/{group}" if group else ""
            assert row[name + tail] == pytest.approx(sum(mine) / len(mine))
            assert 0 <= row[f"{name}_low{tail}"] <= row[name + tail] <= row[f"{name}_high{tail}"] <= 1


def test_the_smoke_run_keeps_and_rationalises_something():
    """Or most of what stands above would be about nothing."""
    rows = [of("arithmetic", "rationalisation", n)[1] for n in (1, 2)]
    assert all(
        r["kept"] >= 1 and r["rationalised"] >= 10 and r["train_steps"] >= 20 and r["train_tokens"] > 0 for r in rows
    )
    assert all({"seconds_sample", "seconds_train", "seconds_evaluate", "seconds_rationalise"} <= r.keys() for r in rows)


def test_an_attempt_is_scored_as_the_task_does():
    task = make_task("arithmetic", pool={1: 40, 2: 24}, seeds={1: (30, 60), 2: (0, 30)}, eval_per_length=20)
    for arm in ("no_rationalisation", "rationalisation"):
        for r in runs.rollouts(runs.arithmetic(), arm, 1):
            problem = task.problem(*map(int, r.problem_id.split("+")))
            assert r.gold == problem.gold and r.prompt == task.prompt(problem, hint=r.hinted)
            assert r.answer == task.parse(r.completion) and r.valid == task.audit(problem, r.completion)
            assert r.correct == (not r.truncated and r.answer == str(eval(r.problem_id)))
            assert r.verdict == "rejected" or r.correct
            assert (r.verdict == "rationalised") == (r.hinted and r.verdict != "rejected")


def test_problems_of_pools_and_seeds_are_never_tested():
    """Up to the order of the operands."""
    folder = runs.arithmetic()

    def pairs(pattern):
        files = list(folder.glob(pattern))
        assert files
        return {tuple(sorted(map(int, r["problem_id"].split("+")))) for f in files for r in read_jsonl(f)}

    task = make_task("arithmetic", pool={1: 40, 2: 24}, seeds={1: (30, 60), 2: (0, 30)}, eval_per_length=20)
    seeds = {tuple(sorted(map(int, p.id.split("+")))) for p, _ in task.seeds()}
    trained, tested = (
        pairs("*/rationales/*.jsonl") | pairs("*/stages/iter_*/*.jsonl") | seeds,
        pairs("*/evaluation/*.jsonl"),
    )
    assert len(tested) >= 20 and len(trained) > 60 and not trained & tested


def test_both_arms_draw_the_same_problems_and_start_from_the_same_answers():
    plain, rationalised = (
        [r for r in runs.rollouts(runs.arithmetic(), arm, 1) if not r.hinted]
        for arm in ("no_rationalisation", "rationalisation")
    )
    assert [(r.problem_id, r.completion) for r in plain] == [(r.problem_id, r.completion) for r in rationalised]
    second = {r.problem_id for r in runs.rollouts(runs.arithmetic(), "rationalisation", 2)}
    assert {r.problem_id for r in plain} != second  # every loop draws anew
