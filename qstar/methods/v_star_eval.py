"""Evaluation of V-STaR: accuracy of every selection rule as a function of k, from N samples per held-out problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qstar.errors import Settings, bounded
from qstar.methods import select
from qstar.methods.select import Candidates
from qstar.methods.verifier import KINDS, Verifier, score
from qstar.models.model import Model
from qstar.runs.context import Arm, RunContext
from qstar.runs.evaluate import by_problem
from qstar.runs.folder import cached_jsonl, once_json
from qstar.runs.rollouts import sample_rollouts
from qstar.runs.settings import Gate
from qstar.tasks.base import Problem, Task, stable_rng
from qstar.train.stats import bootstrap_ci
from qstar.types import Rollout


@dataclasses.dataclass(frozen=True)
class SelectSettings(Settings):
    """Samples of the last generator, for the evaluation of selection. A config's `select` section."""

    samples: int = bounded(128, ge=0)  # N per problem; 0: no evaluation
    temperature: float = bounded(0.7, ge=0)
    limit: int = bounded(0, ge=0)  # first so many problems (0: all)
    m: int = bounded(4, ge=1)  # of the top-m vote


@dataclasses.dataclass(frozen=True)
class SampledGate(Gate):
    """A bound on samples of G_SFT on validation problems."""

    NAMES: ClassVar = ("pass@1", "pass@16", "majority@16")


Ballots = Callable[[Sequence[str | None]], Sequence[str | None]]


def gate_metrics(ctx: RunContext, sft: Model) -> dict[str, float]:
    """Returns pass@1, pass@16 and majority@16 of G_SFT, for the gates."""
    # Gates decide whether a run goes on, so they must not read the test problems.
    few_shot = ctx.settings.loop.get("few_shot_at_sample", True)
    folder, problems = ctx.workdir / "g_sft" / "gates", ctx.task.problems("val")
    rows = _sample(ctx, sft, problems, k=16, iteration=0, folder=folder, stage="val", few_shot=few_shot)
    found = select.curves([candidates(some, {}, ctx.task.ballots) for some in by_problem(rows)], [1, 16])
    return {f"{rule}@{k}": float(np.mean(found[rule][k])) for rule, k in (("pass", 1), ("pass", 16), ("majority", 16))}


def measure(arm: Arm, generator: Model, sft: Model, verifiers: dict[str, Model], n: int) -> dict[str, Any]:
    """Returns the curves of all rules and scorers (selection/iter_NNN.json), prints them and writes metrics rows."""
    ctx, folder, N = arm.ctx, arm.folder / "selection", arm.ctx.settings.select.samples
    if not N:
        return {}
    problems = ctx.task.problems(ctx.settings.evaluate.split)[: ctx.settings.select.limit or None]
    with arm.timed("select"):
        with ctx.bar("test samples", len(problems) * N) as progress:
            how = {"few_shot": arm.few_shot, "progress": progress}
            rows = _sample(ctx, generator, problems, k=N, iteration=n, folder=folder, stage=f"samples_{n:03d}", **how)
        # Samples, scores and curves are files of their own: a kill repeats only the stage in which it came.
        scores = cached_jsonl(folder / f"scores_{n:03d}.jsonl", lambda: score_rows(ctx.task, rows, sft, verifiers))
        found = once_json(
            folder / f"iter_{n:03d}.json",
            lambda: result(rows, scores, N, ctx.settings.select.m, faults(ctx.task, problems, rows), ctx.task.ballots),
        )
    label: dict[str, Any] = {"arm": arm.name, "iteration": n}
    for name, auc in found["auc"].items():
        row = {"auc": auc, "auc_pooled": found["auc_pooled"][name], **found["calibration"][name]}
        row |= {f"regret@{k}": mean for k, (mean, _, _) in found["regret"][name].items()}
        ctx.writer.write(stage=f"scorer/{name}", step=n, **label, **row)
    for k in found["curves"]["pass"]:
        row = {}
        for rule, by_k in found["curves"].items():
            row |= dict(zip((rule, f"{rule}_low", f"{rule}_high"), by_k[k]))
        ctx.writer.write(stage="selection", step=int(k), **label, **row)
    ctx.table(f"{arm.name}: accuracy of the solution selected from k samples", table_rows(found))
    return found


def _sample(
    ctx: RunContext, model: Model, problems: Sequence[Problem], *, iteration: int, folder: Path, **how: Any
) -> list[Rollout]:
    # A temperature of its own: at that of greedy `sample` settings, all N samples would be equal. Seed 0 for every config:
    # the recorded figures of all seeds (configs/RESULTS.md) are of these draws.
    settings = dataclasses.replace(ctx.settings.sample, temperature=ctx.settings.select.temperature)
    return sample_rollouts(
        model, ctx.task, problems, settings, hinted=False, iteration=iteration, seed=0, folder=folder, **how
    )


def score_rows(task: Task, rollouts: list[Rollout], sft: Model, verifiers: dict[str, Model]) -> list[dict[str, Any]]:
    """Returns one row per sample with its scores, computed on the sampled token ids (truncated ones with an EOS)."""
    # The sampler's own log-probabilities cost no forward pass. They include the tokens behind the kept text.
    prompts = [r.prompt for r in rollouts]
    written = [r.completion if r.tokens is None else r.tokens for r in rollouts]
    columns: dict[str, Any] = {"generator": np.asarray([r.logprob for r in rollouts])}
    reference = score(Verifier(sft, "logp"), prompts, written)
    for kind, model in verifiers.items():
        for rule in KINDS[kind]:
            name = kind if rule in ("logp", "orm") else f"{kind}_{rule.removeprefix('prm_')}"
            if rule == "logratio":
                # `logp` precedes it in KINDS, so that the verifier's forward pass is not repeated.
                columns[name] = columns[kind] - reference
            else:
                columns[name] = score(Verifier(model, rule, steps=task.steps), prompts, written)
    columns["sft"] = reference
    if "dpo" in columns:
        # Not in the paper: the sum asks for solutions that both the generator and the verifier find likely.
        columns["generator+dpo"] = columns["generator"] + columns["dpo"]
    return [
        {"problem_id": r.problem_id, "sample": r.sample, **{name: float(values[i]) for name, values in columns.items()}}
        for i, r in enumerate(rollouts)
    ]


def candidates(rows: Sequence[Rollout], scores: dict[str, list[float]], ballots: Ballots = list) -> Candidates:
    """Returns one problem's samples. `ballots`: see `Task.ballots`."""
    # Truncated samples do not vote: their answer may be the first digits of a longer one.
    answers = ballots([None if r.truncated else r.answer for r in rows])
    return Candidates(answers, [r.correct for r in rows], scores, rows[0].group)


def faults(task: Task, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> list[str | None]:
    """Returns the kind of every sample's first mistake; None for correct samples and tasks without a step audit."""
    by_id = {p.id: p for p in problems}
    return [None if r.correct else task.fault(by_id[r.problem_id], r.completion) for r in rollouts]


def result(
    rollouts: list[Rollout],
    scored: list[dict[str, Any]],
    samples: int,
    m: int,
    faulty: Sequence[str | None] | None = None,
    ballots: Ballots = list,
) -> dict[str, Any]:
    """Returns the curves with intervals, the quality of each scorer, and the verifiers' gains at k = 16.

    `scored`: see `score_rows`; `samples`: N per problem; `m`: of the top-m vote; `faulty`: see `faults`.
    """
    scorers = [name for name in scored[0] if name not in ("problem_id", "sample")]
    values = {(row["problem_id"], row["sample"]): row for row in scored}
    kinds = dict(zip(((r.problem_id, r.sample) for r in rollouts), faulty or ()))
    problems, kinds_by_problem = [], []
    for rows in by_problem(rollouts):
        keys = [(r.problem_id, r.sample) for r in rows]
        scores = {s: [values[key][s] for key in keys] for s in scorers}
        rng = stable_rng("random scores", rows[0].problem_id)
        # A baseline without information; seeded by the problem, so that resumed runs draw the same scores.
        scores["random"] = [rng.random() for _ in rows]
        problems.append(candidates(rows, scores, ballots))
        kinds_by_problem.append([kinds.get(key) for key in keys])
    ks = select.ks_for(samples)
    curves = select.curves(problems, ks, m=m)
    # Gains are reported at one k, that of the tables in configs/RESULTS.md.
    at = min(16, ks[-1])
    baselines = ("majority", "best/generator", "best/random")
    return {
        "problems": len(problems),
        "samples": samples,
        "curves": {
            rule: {str(k): [float(np.mean(v)), *bootstrap_ci(v)] for k, v in by_k.items()}
            for rule, by_k in curves.items()
        },
        **select.quality(problems, curves),
        f"gain@{at}": {
            f"{rule} - {other}": select.gain(curves[rule][at], curves[other][at])
            for rule in curves
            if rule.startswith("best/") and rule not in baselines
            for other in baselines
        },
        "auc_by_fault": select.auc_by_fault(problems, kinds_by_problem),
    }


def table_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the printed table: per rule its accuracy for some k and its scorer's AUC."""
    ks = list(found["curves"]["pass"])
    shown = [k for k in ks if k in ("1", "4", "16", "64")] or ks
    return [
        {"rule": rule, **{f"k={k}": by_k[k][0] for k in shown}, "AUC": found["auc"].get(rule.partition("/")[2])}
        for rule, by_k in found["curves"].items()
        if rule.startswith(("pass", "majority", "best/"))
    ]
