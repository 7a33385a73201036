"""A V-STaR run folder as `qstar train` writes it, made up: sums, four samples each, scores that know more or less."""

import dataclasses
import json
from random import Random

from qstar.data.sources import write_jsonl
from qstar.methods.v_star_eval import faults, result
from qstar.tasks.arithmetic import Arithmetic
from tests.methods.stub import rollout

WRONG = ("carry", "sum", "answer", "form")


def write_v_star_run(folder, arms=("v_star", "verification"), problems=30, samples=4):
    """Writes the run and returns its folder. "dpo" knows what is right but for every fifth problem; "generator" knows half."""
    folder.mkdir(parents=True)
    task = Arithmetic(pool={2: 5}, seeds={}, eval_per_length=problems)
    config = {"format_version": 2, "method": "v_star", "name": "v_star_test", "seed": 0, "task": {"name": "arithmetic"}}
    config |= {"arms": {arm: {} for arm in arms}, "train": {}, "loop": {}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "g_sft").mkdir()
    gate = {"metric": "pass@1", "value": 0.652, "limit": "at most 0.6", "ok": False, "why": "little to choose"}
    (folder / "g_sft" / "gates.json").write_text(json.dumps({"headroom": gate}))
    rows = []
    for arm in arms:
        for n in (1, 2) if arm == "v_star" else (1,):
            drawn = [_sample(task, p, j, n) for p in task.problems("test") for j in range(samples)]
            home = folder / arm / "selection"
            write_jsonl(home / f"samples_{n:03d}_000.jsonl", [vars(r) for r in drawn])
            scores = [_scores(i // samples, r, n) for i, r in enumerate(drawn)]
            write_jsonl(home / f"scores_{n:03d}.jsonl", scores)
            found = result(drawn, scores, samples, 2, faults(task, task.problems("test"), drawn))
            (home / f"iter_{n:03d}.json").write_text(json.dumps(found))
            rows.append({"arm": arm, "iteration": n, "stage": "iteration", "step": n, "accuracy": 0.5})
        (folder / arm / "status.json").write_text(json.dumps({"status": "finished", "reason": ""}))
    write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def _sample(task, problem, j, n):
    """The gold scratchpad, or one that goes wrong in some way."""
    kind = Random(f"{problem.id}/{j}/{n}").choice((*WRONG, "right", "right", "right"))
    line, last, padded, answer = problem.solution.split("|")[1:] if kind != "right" else [""] * 4
    texts = {
        "right": problem.solution,
        "carry": "|".join([problem.question + ",C0", line[:-1] + "7", last, "9" + padded[1:], "#9" + padded[1:]]),
        "sum": "|".join([problem.question + ",C0", line, last, "9" + padded[1:], "#9" + padded[1:]]),
        "answer": "|".join([problem.question + ",C0", line, last, padded, "#1"]),
        "form": problem.question + ",C0|</script><script>document.title='owned'</script>",
    }
    made = rollout(task, problem, texts[kind], iteration=n, sample=j, truncated=kind == "form")
    return dataclasses.replace(made, logprob=Random(f"{problem.id}/{j}").uniform(-9, -1))


def _scores(problem, row, n):
    knows = 1.0 if problem % 5 else -1.0
    noise = Random(row.completion).uniform(0, 2.5 - n)
    own = row.logprob + 4 * (row.correct and problem % 2)
    dpo = knows * (3.0 if row.correct else 0.0) + noise - 5
    return {
        "problem_id": row.problem_id,
        "sample": row.sample,
        "generator": own,
        "dpo": dpo,
        "orm": 1 / (1 + 2.7**-dpo),
    }
