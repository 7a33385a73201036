"""A run folder as `qstar train` writes it, made up, whose numbers follow from the arguments alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random

from qstar.data.sources import write_jsonl
from qstar.tasks.arithmetic import Arithmetic

PROBLEMS = {"1": 40, "2": 80, "3": 160}  # per loop
CURVES = {  # arm -> group -> accuracy after loop 0, 1, ...
    "rat": {
        "1": [0.9, 1.0, 1.0, 1.0, 1.0],
        "2": [0.54, 0.88, 0.97, 0.99, 1.0],
        "3": [0.004, 0.49, 0.81, 0.93, 0.97],
    },
    "norat": {
        "1": [0.9, 0.9, 1.0, 1.0, 1.0],
        "2": [0.54, 0.6, 0.69, 0.72, 0.76],
        "3": [0.004, 0.0, 0.004, 0.0, 0.004],
    },
}
SCRIPT = "<script>document.title='owned'</script><!--"


@dataclasses.dataclass
class Shape:
    """What kind of run to write."""

    arms: tuple[str, ...] = ("rat", "norat")
    loops: int = 4
    groups: bool = True
    audit: bool = True
    status: str | None = "finished"
    reason: str = ""
    task: str = "arithmetic"
    scale: int = 1  # times PROBLEMS


def write_run(folder: Path, shape: Shape | None = None) -> Path:
    """Writes the run and returns its folder."""
    shape = shape or Shape()
    folder.mkdir(parents=True, exist_ok=True)
    train = {"steps": 400, "optim": {"lr": 0.0015, "b2": 0.98}}
    config = {
        "format_version": 2,
        "method": "star",
        "name": "star_test",
        "seed": 0,
        "task": {"name": shape.task},
        "train": train,
        "arms": {arm: {} for arm in shape.arms},
        "loop": {"restart": "previous", "seed_share": 0.15},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"jax": "0.10.2", "device": "cpu", "devices": 1}))
    (folder / "base").mkdir(exist_ok=True)
    gates = {
        "hint works": {"metric": "hinted_accuracy/3", "value": 0.788, "limit": "at least 0.6", "ok": True},
        "valid": {"value": 0.71, "limit": "at least 0.8", "ok": False, "why": "a warning only"},
    }
    (folder / "base" / "gates.json").write_text(json.dumps(gates))
    rows = [_train_row("base", 0, step, 3.0 * 0.5 ** (step / 300)) for step in range(50, 1501, 50)]
    for arm in shape.arms:
        for loop in range(shape.loops + 1):
            rows += _loop(folder, shape, arm, loop)
        if shape.status:
            status = {"status": shape.status, "reason": shape.reason, "iterations": shape.loops}
            (folder / arm / "status.json").write_text(json.dumps(status))
    write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def _loop(folder: Path, shape: Shape, arm: str, loop: int) -> list[dict]:
    """Writes the files of one loop and returns its rows of metrics."""
    row = {"arm": arm, "iteration": loop, "stage": "iteration", "step": loop}
    for group, values in CURVES[arm].items():
        if shape.groups:
            row.update(_accuracy("accuracy", f"/{group}", values[loop]))
            row[f"hinted_accuracy/{group}"] = min(1.0, 0.78 + 0.05 * loop)
    row.update(_accuracy("accuracy", "", sum(v[loop] for v in CURVES[arm].values()) / len(CURVES[arm])))
    write_jsonl(folder / arm / "evaluation" / f"iter_{loop:03d}.jsonl", _evaluation(shape, arm, loop))
    if loop == 0:
        return [row]
    attempts = _attempts(shape, arm, loop)
    write_jsonl(folder / arm / "rationales" / f"iter_{loop:03d}.jsonl", attempts)
    verdicts = [r["verdict"] for r in attempts]
    kept, rationalised = verdicts.count("kept"), verdicts.count("rationalised")
    steps = 400 + 20 * (loop - 1)
    plain = [r for r in attempts if not r["hinted"]]
    row |= {
        "attempted": len(plain),
        "solved": sum(r["correct"] for r in plain),
        "kept": kept,
        "hinted_attempted": len(attempts) - len(plain),
        "rationalised": rationalised,
        "trained_rows": kept + rationalised,
        "truncation_rate": 0.01,
        "mean_tokens": 41.25,
        "train_steps": steps,
        "seconds_sample": 2.0,
        "seconds_rationalise": 1.5 if arm == "rat" else 0.0,
        "seconds_train": 31.5,
        "seconds_evaluate": 0.7,
        "valid_kept": 0.4 + 0.1 * loop if shape.audit else None,
        "valid_rationalised": (0.8 + 0.03 * loop if arm == "rat" else None) if shape.audit else None,
    }
    return [*(_train_row(arm, loop, s, 0.5 / loop * 0.5 ** (s / 200)) for s in range(50, steps + 1, 50)), row]


def _accuracy(name: str, suffix: str, value: float) -> dict:
    half = (value * (1 - value) / 250) ** 0.5 * 1.96
    bounds = {f"{name}_low{suffix}": max(0.0, value - half), f"{name}_high{suffix}": min(1.0, value + half)}
    return {f"{name}{suffix}": value, **bounds}


def _train_row(arm: str, loop: int, step: int, loss: float) -> dict:
    return {"arm": arm, "iteration": loop, "stage": "train", "step": step, "loss": loss, "accuracy": 0.9}


def _attempts(shape: Shape, arm: str, loop: int) -> list[dict]:
    """Greedy attempts: right with the accuracy of the loop before; in arm rat the others with the hint."""
    task = Arithmetic(pool={int(n): count * shape.scale for n, count in PROBLEMS.items()})
    rng = Random(f"{arm}/{loop}")
    rows = []
    for problem in task.pool(loop, 0):
        right = rng.random() < CURVES[arm][problem.group][loop - 1]
        rows.append(_attempt(task, problem, loop, shape, rng, right, False))
        if not right and arm == "rat":
            rows.append(_attempt(task, problem, loop, shape, rng, rng.random() < 0.8, True))
    rows[0] |= {
        "verdict": "rejected",
        "reason": "duplicate",
        "completion": SCRIPT,
        "correct": False,
    }  # once per loop
    return rows


def _attempt(task, problem, loop, shape, rng, right: bool, hinted: bool) -> dict:
    answer = problem.gold if right else str(int(problem.gold) + 10)
    text = problem.solution if right else problem.solution.replace(problem.question, _wrong(problem.question), 1)
    text = text if right else text.rsplit("#", 1)[0] + "#" + answer
    lucky = right and rng.random() < 0.1
    verdict = ("rationalised" if hinted else "kept") if right else "rejected"
    return {
        "problem_id": problem.id,
        "iteration": loop,
        "sample": 0,
        "hinted": hinted,
        "group": problem.group if shape.groups else "",
        "prompt": task.prompt(problem, hinted),
        "completion": text.replace("C0", "C1", 1) if lucky else text,
        "answer": answer,
        "gold": problem.gold,
        "correct": right,
        "verdict": verdict,
        "reason": "right answer" if right else "wrong answer",
        "truncated": False,
        "valid": (right and not lucky) if shape.audit else None,
        "logprob": -1.5,
        "n_tokens": len(text) + 1,
    }


def _evaluation(shape: Shape, arm: str, loop: int) -> list[dict]:
    task = Arithmetic(pool={1: 1, 2: 1, 3: 1}, eval_per_length=50)
    rng = Random(f"{arm}/{loop}/evaluation")
    rows = []
    for problem in task.problems("val"):
        right = rng.random() < CURVES[arm][problem.group][loop]
        rows.append(_attempt(task, problem, loop, shape, rng, right, False) | {"verdict": "", "reason": ""})
    return rows


def _wrong(question: str) -> str:
    """The sum with its first operand one off, as in the commonest mistake; every other time as it is."""
    a, b = question.split("+")
    return f"{int(a) ^ 1}+{b}" if int(b) % 2 else question
