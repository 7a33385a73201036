"""STaR: bootstrapping reasoning with reasoning (arXiv 2203.14465, algorithm 1).

    M_0 = M
    for n = 1 .. N:
        (r_i, y_i)   = M_{n-1}(x_i)                     sample a rationale and an answer for every problem
        (r'_i, y'_i) = M_{n-1}(add_hint(x_i, gold_i))   rationalise, where y_i was wrong
        D_n          = {(x_i, r_i)  : y_i  = gold_i}    keep what reached the right answer ...
        D_n^rat      = {(x_i, r'_i) : y_i != gold_i, y'_i = gold_i}     ... the hint taken out of the prompt again
        M_n          = train(M, D_n + D_n^rat)          from the base model M, not from M_{n-1}

STaR without rationalisation, STaR-dagger, RFT and ReST-EM are settings of this one loop: see `PRESETS`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from qstar.errors import Settings, UserError, bounded
from qstar.models.model import Model
from qstar.runs import base_model
from qstar.runs.context import Arm, RunContext
from qstar.runs.folder import cached_jsonl, open_run, stable_seed
from qstar.runs.rollouts import Selection, sample_rollouts, select, show_hint, summary, to_example
from qstar.runs.supervised import fine_tune, pack_rows
from qstar.tasks.base import Problem
from qstar.text.packing import Example
from qstar.train.loop import Diverged
from qstar.types import Rollout


@dataclasses.dataclass(frozen=True)
class VariantConfig(Settings):
    """The switches of the outer loop. A config's `loop` section, a preset and an arm's own settings, in this order."""

    n_iters: int = bounded(16, ge=0)
    problems_per_iter: int | None = bounded(10_000, ge=1)
    fresh: bool = True  # problems are drawn anew in every loop; False: the same ones
    k: int = bounded(1, ge=1)  # samples per problem
    temperature: float | None = bounded(None, ge=0)  # None: as `sample` says
    rationalize: bool = True
    p_rationalize: float = bounded(1.0, ge=0, le=1)  # share of the failures that are tried again with a hint
    # Share of rationalised rows trained on with the hint in the prompt (an ablation)
    p_keep_hint: float = bounded(0.0, ge=0, le=1)
    few_shot_at_sample: bool = True
    few_shot_in_train: bool = False
    restart: str = bounded("base", choices=("base", "previous"))  # "base" (the paper) or "previous"
    accumulate: bool = False  # train on the kept rows of all loops so far
    include_sft_data: bool = False  # gold solutions of this loop's problems (not of earlier ones) in the mix
    steps: str = "exp:40:1.2"  # "exp:40:1.2", "lin:300:20" or "epochs:1:0.2"
    # Over the kept rows (as packed): S_n steps on a handful would only overfit
    max_epochs: float | None = bounded(10.0, gt=0, le=math.inf)
    # Stop the arm when there are fewer rows to train on (gold ones, if in the mix, count)
    min_kept: int = bounded(1, ge=0)
    # Share of hinted gold seed rows in every batch (from-scratch models only)
    seed_share: float = bounded(0.0, ge=0, le=1)
    dedupe: bool = True
    cap_per_problem: int | None = bounded(None, ge=1)
    min_rationale_tokens: int = 0
    exact_filter: bool = False
    patience: int = bounded(0, ge=0)  # stop after so many loops without a better validation accuracy (0: never)

    def __post_init__(self) -> None:
        super().__post_init__()
        steps_for(self.steps, 1, 1, 1)

    @property
    def selection(self) -> Selection:
        return Selection(self.dedupe, self.cap_per_problem, self.min_rationale_tokens, self.exact_filter)


PRESETS: dict[str, dict[str, Any]] = {
    "star": {},
    "star_norat": {"rationalize": False},
    # V-STaR's name for the loop that keeps gold data and accumulates (arXiv 2402.06457, table 1)
    "star_dagger": {"rationalize": False, "k": 16, "temperature": 0.7, "accumulate": True, "include_sft_data": True},
    # 2308.01825: one round of many samples, distinct ones kept beside the gold data
    "rft": {
        "rationalize": False,
        "k": 100,
        "temperature": 0.7,
        "n_iters": 1,
        "include_sft_data": True,
        "steps": "epochs:3:0",
    },
    # 2312.06585: at most 10 kept per problem, from this round only, always fine-tuning the base
    "rest_em": {"rationalize": False, "k": 32, "temperature": 0.7, "cap_per_problem": 10, "n_iters": 3},
}


def steps_for(spec: str, n: int, rows: int, batch_size: int) -> int:
    """Returns S_n, the updates of loop n (from 1): int(40 * 1.2^(n-1)), 300 + 20 (n-1), or epochs growing by a share.

    Raises:
      UserError: the spec is none of these forms.
    """
    kind, *numbers = spec.split(":")
    try:
        first, growth = (float(x) for x in numbers)
    except ValueError:
        first, growth = math.nan, math.nan
    if not (0 < first < math.inf and 0 <= growth < math.inf):
        kind = ""
    if kind == "exp":
        return int(first * growth ** (n - 1))
    if kind == "lin":
        return int(first + growth * (n - 1))
    if kind == "epochs":
        return max(1, int(rows * first * (1 + growth * (n - 1)) // batch_size))
    raise UserError(f"steps={spec!r} is not of the form exp:40:1.2, lin:300:20 or epochs:1:0.2")


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs every arm of a STaR config in `workdir`, going on where an earlier run of the same config stopped."""
    ctx = RunContext.make(config, Path(workdir), console)
    arms = {name: ctx.arm_settings(VariantConfig, PRESETS, name) for name in config.arms}
    start = base_model.checked(ctx, config, arms.values())
    open_run(ctx.workdir, config.to_dict(), resolved={"model": start.config, **ctx.settings(), "arms": arms})
    ctx.start()
    base = base_model.prepare(ctx, start)
    for name, loop in arms.items():
        outer_loop(Arm(ctx, name, loop.few_shot_at_sample), loop, base)
    ctx.close()


def outer_loop(arm: Arm, loop: VariantConfig, base: Model) -> Model:
    """Algorithm 1, from M to M_N. Returns the last model."""
    model = base
    arm.report(0, arm.evaluate(base, 0), {})
    for n in range(1, loop.n_iters + 1):
        arm.begin(n, loop.n_iters)
        rollouts = rationalised_rollouts(arm, loop, model, n)
        examples = training_examples(arm, loop, [r for r in rollouts if r.verdict != "rejected"], n)
        if len(examples) < max(1, loop.min_kept):
            arm.stop(
                n,
                f"{len(examples)} rows kept of {len(rollouts)} attempts (loop.min_kept={loop.min_kept}); "
                "the model of the loop before stays",
            )
            break
        start = base if loop.restart == "base" else model
        try:
            model, trained = train(arm, loop, start, examples, n)
        except Diverged as e:
            arm.fail(n, e)
            break
        metrics = arm.evaluate(model, n)
        arm.report(n, metrics, {**summary(rollouts), **trained})
        if loop.patience and arm.stale(loop.patience):
            arm.stop(n, f"no better validation accuracy for {loop.patience} loops")
            break
    arm.finish(base)
    return model


def rationalised_rollouts(arm: Arm, loop: VariantConfig, model: Model, n: int) -> list[Rollout]:
    """Samples, rationalises the failures, and decides what is kept: rationales/iter_NNN.jsonl."""
    ctx = arm.ctx
    problems = iteration_problems(ctx, loop, n)
    by_id = {p.id: p for p in problems}

    def make() -> list[dict[str, Any]]:
        rollouts = sample(arm, loop, model, problems, n, hinted=False)
        if loop.rationalize:
            solved = {r.problem_id for r in rollouts if r.correct}
            failed = [p for p in problems if p.id not in solved and should_rationalize(p, n, loop.p_rationalize)]
            rollouts += sample(arm, loop, model, failed, n, hinted=True)
        seen = [(r.problem_id, " ".join(r.completion.split())) for r in arm.kept_before(n)] if loop.accumulate else ()
        return [r.to_json() for r in select(rollouts, by_id, ctx.task, loop.selection, seen)]

    rows = [Rollout(**row) for row in cached_jsonl(arm.rationales(n), make)]
    arm.show_examples(rows)
    return rows


def iteration_problems(ctx: RunContext, loop: VariantConfig, n: int) -> list[Problem]:
    """The problems of loop n."""
    return ctx.task.pool(n if loop.fresh else 1, ctx.seed, loop.problems_per_iter)


def sample(
    arm: Arm, loop: VariantConfig, model: Model, problems: list[Problem], n: int, *, hinted: bool
) -> list[Rollout]:
    """One greedy (or k sampled) rationale per problem from M_{n-1}; with hints, the answer stands in the prompt."""
    settings = arm.ctx.sample_settings
    if loop.temperature is not None:
        settings = dataclasses.replace(settings, temperature=loop.temperature)
    stage = "rationalise" if hinted else "sample"
    with arm.timed(stage), arm.ctx.bar(stage, len(problems) * loop.k) as progress:
        return sample_rollouts(
            model,
            arm.ctx.task,
            problems,
            settings,
            k=loop.k,
            hinted=hinted,
            iteration=n,
            seed=stable_seed(arm.ctx.seed, arm.name),
            folder=arm.folder / "stages" / f"iter_{n:03d}",
            stage=stage,
            few_shot=loop.few_shot_at_sample,
            progress=progress,
        )


def train(arm: Arm, loop: VariantConfig, start: Model, examples: list[Example], n: int) -> tuple[Model, dict[str, Any]]:
    """Fine-tunes `start` on the kept rationales for S_n steps, with fresh optimiser moments."""
    ctx = arm.ctx
    settings = ctx.train_settings
    rows = len(pack_rows(examples, settings, start.config)["mask"])  # several examples share a packed row
    steps = steps_for(loop.steps, n, rows, settings.batch_size)
    if loop.max_epochs is not None:
        cap = max(1, int(loop.max_epochs * rows / settings.batch_size))
        if cap < steps:
            ctx.say(
                f"[yellow]only {len(examples)} examples in {rows} rows: {cap} steps instead of {steps} "
                f"(loop.max_epochs={loop.max_epochs})"
            )
        steps = min(steps, cap)
    hinted_seeds = [ctx.seed_example(p, hinted) for p, hinted in ctx.task.seeds() if hinted] if loop.seed_share else []
    with arm.timed("train"), ctx.bar("train", steps) as progress:
        model, done = fine_tune(
            start,
            examples,
            settings,
            steps=steps,
            seed=stable_seed(ctx.seed, arm.name, n, "train"),
            folder=arm.checkpoint(n),
            writer=ctx.writer,
            label={"arm": arm.name, "iteration": n},
            mix=(hinted_seeds, loop.seed_share) if hinted_seeds else None,
            progress=progress,
        )
    tokens = round((done["tokens"] or 0) * done["steps"])
    return model, {
        "trained_rows": len(examples),
        "train_steps": done["steps"],
        "train_tokens": tokens,
        "train_loss": done["loss"],
    }


def training_examples(arm: Arm, loop: VariantConfig, kept: list[Rollout], n: int) -> list[Example]:
    """The kept rows (of all loops so far, if they accumulate) as they are trained on: without hints."""
    ctx = arm.ctx
    if loop.accumulate:
        kept = arm.kept_before(n) + kept
    rows = []
    problems = {p.id: p for m in {r.iteration for r in kept} for p in iteration_problems(ctx, loop, m)}
    prefix = ctx.task.prefix() if loop.few_shot_in_train else ""
    for r in kept:
        prompt = ctx.task.prompt(problems[r.problem_id], hint=show_hint(r, loop.p_keep_hint))
        rows.append(to_example(ctx.tokenizer, prefix + prompt, r.completion, r.tokens))
    if loop.include_sft_data:
        gold = [(p, ctx.task.solution(p)) for p in iteration_problems(ctx, loop, n)]
        rows += [to_example(ctx.tokenizer, prefix + ctx.task.prompt(p), s) for p, s in gold if s is not None]
    return ctx.fitting(rows)


def should_rationalize(problem: Problem, n: int, share: float) -> bool:
    """Whether a failed problem is rationalised in loop n (all are, at share 1)."""
    return stable_seed(problem.id, n, "rationalise") < share * 2**31
