"""Measuring a model on a task (greedy, pass@k, majority@k), and taking a model out of a run."""

from __future__ import annotations

import collections
import json
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from qstar.errors import UserError
from qstar.methods import base_model
from qstar.methods.arms import Context
from qstar.methods.rollouts import SampleSettings, attempt
from qstar.models.model import Model, save
from qstar.sample.vote import majority_at_k
from qstar.tasks.base import Task
from qstar.train.checkpoint import Checkpoints
from qstar.train.evaluate import pass_at_k, summarise
from qstar.types import Rollout


def evaluate_model(
    model: Model,
    task: Task,
    *,
    split: str = "test",
    limit: int = 0,
    samples: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Returns greedy accuracy and, from `samples` completions per problem, pass@k and majority@k for k = 1, 2, 4, ...

    Every metric comes with its 95% bootstrap interval over problems, and per group of problems.

    Args:
      out: folder where answers are kept as JSONL; what is there already is not sampled again.
    """
    if model.tokenizer is None:
        raise UserError("evaluation needs a tokenizer, and this model has none")
    problems = task.problems(split)[: limit or None]
    if not problems:
        raise UserError(f"task {task.name} has no problems in split {split!r}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        settings = SampleSettings(max_new_tokens=max_new_tokens, temperature=0.0)
        greedy = attempt(
            model, task, problems, settings, k=1, hinted=False, iteration=0, seed=seed, folder=folder, stage="greedy"
        )
        result: dict[str, Any] = {"problems": len(problems)}
        result.update(summarise("accuracy", [float(r.correct) for r in greedy], [r.group for r in greedy]))
        result["truncation_rate"] = sum(r.truncated for r in greedy) / len(greedy)
        if samples:
            settings = SampleSettings(max_new_tokens=max_new_tokens, temperature=temperature)
            drawn = attempt(
                model, task, problems, settings, k=samples, hinted=False, iteration=0, seed=seed, folder=folder, stage="samples"
            )
            result.update(many(drawn, samples))
    return result


def many(rollouts: list[Rollout], samples: int) -> dict[str, Any]:
    """Returns pass@k and majority@k for k = 1, 2, 4, ... up to the number of samples per problem."""
    by_problem: dict[str, list[Rollout]] = collections.defaultdict(list)
    for r in rollouts:
        by_problem[r.problem_id].append(r)
    groups = [rows[0].group for rows in by_problem.values()]
    out: dict[str, Any] = {}
    k = 1
    while k <= samples:
        passed = [pass_at_k(len(rows), sum(r.correct for r in rows), k) for rows in by_problem.values()]
        voted = [_majority(rows, k) for rows in by_problem.values()]
        out.update(summarise(f"pass@{k}", passed, groups))
        out.update(summarise(f"majority@{k}", voted, groups))
        k *= 2
    return out


def _majority(rows: list[Rollout], k: int) -> float:
    """Majority over answers; right ones count as one answer however they are written, truncated ones do not vote."""
    answers = [None if r.truncated else "right" if r.correct else r.answer for r in rows]
    return majority_at_k(answers, "right", k)


def export_model(run: Path, arm: str | None, iteration: int | None, out: Path) -> Path:
    """Writes the model of a run's arm and iteration (default: first arm, last iteration; 0 is the base) to `out`.

    Raises:
      UserError: no such run, arm or iteration; the line says which there are.
    """
    model = trained_model(run, arm, iteration)
    save(model, out)
    return out


def trained_model(run: Path, arm: str | None = None, iteration: int | None = None) -> Model:
    """Returns the model of a run's arm and iteration; see `export_model`."""
    try:
        config = ConfigDict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{run}: no config.json in it, so it is no run folder of qstar") from None
    arms = sorted(config.arms.keys())
    arm = arm or arms[0]
    if arm not in arms:
        raise UserError(f"{run}: has no arm {arm!r}; there are {', '.join(arms)}")
    done = sorted(int(p.parent.name[5:]) for p in (run / arm / "checkpoints").glob("iter_*/summary.json"))
    iteration = (done or [0])[-1] if iteration is None else iteration
    if iteration and iteration not in done:
        raise UserError(f"{run}: arm {arm!r} has no finished iteration {iteration}; there are {done or 'none'}")
    ctx = Context.make(config, run, Console(quiet=True))
    model = base_model.architecture(ctx)
    folder = run / arm / "checkpoints" / f"iter_{iteration:03d}" if iteration else run / "base"
    if not iteration and config.model.path:
        return model
    return restore(model, folder)


def restore(model: Model, folder: Path) -> Model:
    """Returns the model with the parameters that `supervised.fine_tune` left in `folder`."""
    checkpoints = Checkpoints(folder / "model")
    params, _ = checkpoints.restore(model.params)
    checkpoints.close()
    return model.replace(params=params)
