"""Measuring selection: N samples per problem from the last generator, once, and every way to choose from k of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qstar import distributed
from qstar.methods import select as choosing
from qstar.methods.select import Candidates
from qstar.methods.verifier import KINDS, Verifier, score
from qstar.models.model import Model
from qstar.runs.context import Arm
from qstar.runs.folder import cached_jsonl, once_json
from qstar.runs.rollouts import sample_rollouts
from qstar.sample.vote import voted_right_at_k
from qstar.tasks.base import Problem, Task
from qstar.train.metrics import show_table
from qstar.train.stats import pass_at_k
from qstar.types import Rollout

Ballots = Callable[[Sequence[str | None]], Sequence[str | None]]


def sampled_accuracy(ctx: Any, model: Model) -> dict[str, float]:
    """Returns pass@1, pass@16 and majority@16 on validation problems, for the gates of G_SFT."""
    settings = dataclasses.replace(ctx.sample_settings, temperature=ctx.select.temperature)
    folder = ctx.workdir / "g_sft" / "gates"
    problems = ctx.task.problems("val")
    few_shot = ctx.config.loop.get("few_shot_at_sample", True)
    rows = sample_rollouts(
        model, ctx.task, problems, settings, k=16, hinted=False, iteration=0, seed=0, folder=folder, stage="val",
        few_shot=few_shot,
    )  # fmt: skip
    some = [candidates(problem, {}, ctx.task.ballots) for problem in by_problem(rows)]
    mean = lambda f: float(np.mean([f(c) for c in some]))  # noqa: E731
    return {
        "pass@1": mean(lambda c: np.mean(c.correct)),
        "pass@16": mean(lambda c: pass_at_k(16, sum(c.correct), 16)),
        "majority@16": mean(lambda c: voted_right_at_k(c.answers, c.correct, 16)),
    }


def measure(arm: Arm, generator: Model, sft: Model, verifiers: dict[str, Model], n: int) -> dict[str, Any]:
    """Returns and keeps (selection/iter_NNN.json) the curves of all rules and scorers; prints them; writes metrics rows."""
    ctx = arm.ctx
    if not ctx.select.samples:
        return {}
    problems = ctx.task.problems(ctx.evaluation.split)[: ctx.select.limit or None]
    folder = arm.folder / "selection"
    with arm.timed("select"):
        rollouts = test_samples(arm, generator, problems, n)
        scored = cached_jsonl(folder / f"scores_{n:03d}.jsonl", lambda: _score_rows(ctx, rollouts, sft, verifiers))
        found = once_json(
            folder / f"iter_{n:03d}.json",
            lambda: result(
                rollouts,
                scored,
                ctx.select.samples,
                ctx.select.m,
                faults(ctx.task, problems, rollouts),
                ctx.task.ballots,
            ),
        )
    label = {"arm": arm.name, "iteration": n}
    for name, row in scorer_rows(found).items():
        ctx.writer.write(stage=f"scorer/{name}", step=n, **label, **row)
    for k, row in table(found).items():
        ctx.writer.write(stage="selection", step=int(k), **label, **row)
    if distributed.is_first():
        show_table(ctx.console, f"{arm.name}: chance to be right with k samples", printed(found))
    return found


def test_samples(arm: Arm, generator: Model, problems: Sequence[Problem], n: int) -> list[Rollout]:
    """N samples per held-out problem: selection/samples_NNN_RRR.jsonl."""
    ctx = arm.ctx
    settings = dataclasses.replace(ctx.sample_settings, temperature=ctx.select.temperature)
    with ctx.bar("test samples", len(problems) * ctx.select.samples) as progress:
        return sample_rollouts(
            generator,
            ctx.task,
            problems,
            settings,
            k=ctx.select.samples,
            hinted=False,
            iteration=n,
            seed=0,
            folder=arm.folder / "selection",
            stage=f"samples_{n:03d}",
            few_shot=arm.few_shot,
            progress=progress,
        )


def _score_rows(ctx: Any, rollouts: list[Rollout], sft: Model, verifiers: dict[str, Model]) -> list[dict[str, Any]]:
    """One row per sample: its scores, of the ids that were sampled. What was cut off is scored as if it had ended there."""
    prompts = [r.prompt for r in rollouts]
    written = [r.completion if r.tokens is None else r.tokens for r in rollouts]
    columns: dict[str, Any] = {"generator": [r.logprob for r in rollouts]}
    reference = score(Verifier(sft, "logp"), prompts, written)
    for kind, model in verifiers.items():
        for rule in KINDS[kind]:
            name = kind if rule in ("logp", "orm") else f"{kind}_{rule.removeprefix('prm_')}"
            if rule == "logratio":
                columns[name] = columns[kind] - reference  # not scored twice
                continue
            columns[name] = score(Verifier(model, rule, steps=ctx.task.steps), prompts, written)
    columns["sft"] = reference
    if "dpo" in columns:  # ours, not the paper's: the writer and the verifier must both find it likely
        columns["generator+dpo"] = np.asarray(columns["generator"]) + columns["dpo"]
    rows = [{"problem_id": r.problem_id, "sample": r.sample} for r in rollouts]
    for name, values in columns.items():
        for row, value in zip(rows, values):
            row[name] = float(value)
    return rows


def by_problem(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Returns the samples of each problem."""
    groups: dict[str, list[Rollout]] = collections.defaultdict(list)
    for r in rollouts:
        groups[r.problem_id].append(r)
    return list(groups.values())


def candidates(rows: Sequence[Rollout], scores: dict[str, list[float]], ballots: Ballots = list) -> Candidates:
    """Returns one problem's samples. What is cut off does not vote. `ballots`: the task's."""
    answers = ballots([None if r.truncated else r.answer for r in rows])
    return Candidates(answers, [r.correct for r in rows], scores, rows[0].group)


def faults(task: Task, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> list[str | None]:
    """Returns the kind of the first mistake of every sample, None of right ones and where the task cannot tell."""
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
    """Returns the curves with their intervals, what each scorer is worth, and what a verifier gains over the others at
    k = 16.

    Args:
      faulty: the kind of mistake of each rollout, see `faults`.
      ballots: what the answers of one problem vote for, see `Task.ballots`.
    """
    scorers = [name for name in scored[0] if name not in ("problem_id", "sample")]
    values = {(row["problem_id"], row["sample"]): row for row in scored}
    some = []
    for rows in by_problem(rollouts):
        scores = {s: [values[r.problem_id, r.sample][s] for r in rows] for s in scorers}
        scores["random"] = choosing.random_scores(rows[0].problem_id, len(rows))
        some.append(candidates(rows, scores, ballots))
    ks = choosing.ks_for(samples)
    curves = choosing.curves(some, ks, m=m)
    at = 16 if samples >= 16 else ks[-1]
    against = {rule: curves[rule][at] for rule in ("majority", "best/generator", "best/random")}
    kinds = dict(zip(((r.problem_id, r.sample) for r in rollouts), faulty or ()))
    by_kind = [[kinds.get((r.problem_id, r.sample)) for r in rows] for rows in by_problem(rollouts)]
    return {
        "problems": len(some),
        "samples": samples,
        "curves": choosing.summary(curves),
        **choosing.quality(some, curves),
        f"gain@{at}": {
            f"{rule} - {other}": choosing.difference(curves[rule][at], there)
            for rule in curves
            if rule.startswith("best/") and rule not in against
            for other, there in against.items()
        },
        "auc_by_fault": choosing.auc_by_fault(some, by_kind),
    }


def scorer_rows(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Returns scorer -> its metrics row: AUC within problems and pooled, calibration, regret by k."""
    return {
        name: {"auc": area, "auc_pooled": found["auc_pooled"][name], **found["calibration"][name]}
        | {f"regret@{k}": mean for k, (mean, _, _) in found["regret"][name].items()}
        for name, area in found["auc"].items()
    }


def table(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns k -> {rule: mean, rule_low, rule_high}: the metrics rows of a selection."""
    out: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for rule, by_k in found["curves"].items():
        for k, (mean, low, high) in by_k.items():
            out[k] |= {rule: mean, f"{rule}_low": low, f"{rule}_high": high}
    return dict(out)


def printed(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a table: a rule each, its values for some k, and its scorer's AUC."""
    ks = list(found["curves"]["pass"])
    shown = [k for k in ks if k in ("1", "4", "16", "64")] or ks
    rows = []
    for rule, by_k in found["curves"].items():
        if rule.startswith(("pass", "majority", "best/")):
            auc = found["auc"].get(rule.partition("/")[2])
            rows.append({"rule": rule, **{f"k={k}": by_k[k][0] for k in shown}, "AUC": auc})
    return rows
