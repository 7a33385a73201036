"""STaR: bootstrapping reasoning with reasoning (arXiv 2203.14465, algorithm 1).

    M_0 = M
    for n = 1 .. N:
        (r_i, y_i)   = M_{n-1}(x_i)                     1 rationale generation for every problem
        (r'_i, y'_i) = M_{n-1}(add_hint(x_i, gold_i))   2 rationalisation, where y_i is wrong
        D_n          = {(x_i, r_i)  : y_i  = gold_i}    3 filter rationales by their answers
        D_n^rat      = {(x_i, r'_i) : y_i != gold_i, y'_i = gold_i}     4 rationalisations likewise, without the hint
        M_n          = train(M, D_n + D_n^rat)          5 fine-tuning of the base model M, not of M_{n-1}

Deviations from the paper:

1. Only failures are rationalised, all of them; the algorithm rationalises every problem and uses the failures.
2. Rationalisations that copy the hint, duplicates and truncated texts are rejected (`runs.rollouts.select`).
3. S_n, the number of updates, is at most `max_epochs` passes over the kept rows.
4. A base model from scratch is trained on seed rows (`runs.base_model`), and `seed_share` can keep them in every batch.
5. Unlike in the released code (not the paper), the loss is on the completion alone, without the prompt.

STaR without rationalisation, SFT on gold solutions, STaR-dagger, RFT and ReST-EM are settings of this loop: see `PRESETS`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

from qstar.errors import UserError, bounded, require
from qstar.models.model import Model
from qstar.runs import base_model
from qstar.runs.context import Arm, RunContext
from qstar.runs.folder import cached_jsonl, stable_seed
from qstar.runs.rollouts import (
    SampleSettings,
    Selection,
    sample_rollouts,
    select,
    show_hint,
    summary,
    text_key,
    to_example,
)
from qstar.runs.settings import arms_from
from qstar.runs.stages import fine_tune, pack_rows
from qstar.tasks.base import Problem
from qstar.text.packing import Example
from qstar.train.loop import Diverged
from qstar.types import Rollout


@dataclasses.dataclass(frozen=True)
class VariantConfig(Selection):
    """The options of the outer loop and of its filter: a config's `loop` section, a preset, an arm's own keys."""

    n_iters: int = bounded(16, ge=0)
    problems_per_iter: int | None = bounded(10_000, ge=1)
    fresh: bool = True  # redrawn in every loop; False: the same problems
    k: int = bounded(1, ge=0)  # samples per problem; 0: gold solutions alone (`include_sft_data`)
    temperature: float | None = bounded(None, ge=0)  # None: as `sample` says
    rationalize: bool = True
    p_rationalize: float = bounded(1.0, ge=0, le=1)  # share of the failures that are rationalised
    # An ablation: share of rationalised rows that are trained on with the hint in the prompt.
    p_keep_hint: float = bounded(0.0, ge=0, le=1)
    few_shot_at_sample: bool = True
    few_shot_in_train: bool = False
    restart: str = bounded("base", choices=("base", "previous"))  # the model that is fine-tuned; "base" in the paper
    accumulate: bool = False  # train on the kept rows of all loops so far
    include_sft_data: bool = False  # also train on gold solutions of this loop's problems (not of earlier ones)
    steps: str = "exp:40:1.2"  # or lin:300:20, epochs:1:0.2; see `steps_for`
    # Passes over the kept rows (as packed). The paper's S_n updates on a handful of rows would only overfit.
    max_epochs: float | None = bounded(10.0, gt=0, le=math.inf)
    min_kept: int = bounded(1, ge=0)  # fewer rows to train on (gold ones included) stop the arm
    seed_share: float = bounded(0.0, ge=0, le=1)  # of hinted gold seed rows in every batch (models from scratch only)
    patience: int = bounded(0, ge=0)  # stop after so many loops without a better validation accuracy (0: never)

    def __post_init__(self) -> None:
        super().__post_init__()
        steps_for(self.steps, 1, 1, 1)
        nothing = "k=0 samples nothing: set include_sft_data=True and rationalize=False, or k to 1 or more"
        require((self.k > 0 or self.include_sft_data and not self.rationalize, nothing))

    def sampling(self, settings: SampleSettings) -> SampleSettings:
        """Returns the run's sampling settings with this loop's temperature."""
        return settings if self.temperature is None else dataclasses.replace(settings, temperature=self.temperature)


_MANY = {"rationalize": False, "temperature": 0.7}
PRESETS: dict[str, dict[str, Any]] = {
    "star": {},
    "star_norat": {"rationalize": False},
    "sft": {"rationalize": False, "k": 0, "n_iters": 1, "include_sft_data": True, "steps": "epochs:3:0"},
    # V-STaR's name for the loop that keeps gold data and accumulates (arXiv 2402.06457, table 1)
    "star_dagger": {**_MANY, "k": 16, "accumulate": True, "include_sft_data": True},
    # arXiv 2308.01825: one round of many samples; distinct solutions are kept beside the gold data
    "rft": {**_MANY, "k": 100, "n_iters": 1, "include_sft_data": True, "steps": "epochs:3:0"},
    # arXiv 2312.06585: at most 10 kept per problem, from this round only, always fine-tuning the base
    "rest_em": {**_MANY, "k": 32, "cap_per_problem": 10, "n_iters": 3},
}


def steps_for(spec: str, n: int, rows: int, batch_size: int) -> int:
    """Returns S_n, the updates of loop n (from 1).

    Args:
      spec: "exp:40:1.2" is int(40 * 1.2^(n-1)) (the paper's), "lin:300:20" is 300 + 20 (n-1), "epochs:1:0.2" is 1 pass
        over the rows, and 0.2 passes more in every further loop. Any other form raises UserError.
    """
    kind, *numbers = spec.split(":")
    try:
        first, growth = (float(x) for x in numbers)
    except ValueError:
        first, growth = math.nan, math.nan
    if 0 < first < math.inf and 0 <= growth < math.inf:
        if kind == "exp":
            return int(first * growth ** (n - 1))
        if kind == "lin":
            return int(first + growth * (n - 1))
        if kind == "epochs":
            return max(1, int(rows * first * (1 + growth * (n - 1)) // batch_size))
    raise UserError(f"steps={spec!r} is not of the form exp:40:1.2, lin:300:20 or epochs:1:0.2")


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs every arm of a STaR config in `workdir`, continuing an earlier run of the same config."""
    ctx = RunContext.make(config, workdir, console)
    arms = arms_from(VariantConfig, vars(ctx.settings), "loop", PRESETS)
    for name, loop in arms.items():
        valid = not loop.patience or ctx.settings.evaluate.split != "test"
        fault = f"config.arms.{name}: patience={loop.patience} would choose a loop by test problems"
        require((valid, f"{fault}; set config.evaluate.split='val'"))
    start = base_model.checked(ctx, arms.values())
    ctx.start(start, arms=arms)
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

        # ---- 1, 2: M_{n-1} writes rationales, and rationalisations of its failures. 3, 4: those with the right answer.
        rollouts = rationalised_rollouts(arm, loop, model, n)
        examples = training_examples(arm, loop, [r for r in rollouts if r.verdict != "rejected"], n)
        # min_kept=0 still needs one row: an empty set is never trained on, and M_{n-1} stays.
        if len(examples) < max(1, loop.min_kept):
            few = f"{len(examples)} rows kept of {len(rollouts)} attempts (loop.min_kept={loop.min_kept})"
            arm.stop(n, f"{few}; the previous model stays")
            break

        # ---- 5: the base model is fine-tuned on them.
        try:
            # From M, not M_{n-1}: training one model on and on would overfit (section 3.1).
            model, trained = train(arm, loop, base if loop.restart == "base" else model, examples, n)
        except Diverged as e:
            arm.fail(n, e)
            break

        # ---- M_n is evaluated on held-out problems.
        arm.report(n, arm.evaluate(model, n), {**summary(rollouts), **trained})
        if loop.patience and arm.stale(loop.patience):
            arm.stop(n, f"no better validation accuracy for {loop.patience} loops")
            break
    arm.finish(base)
    return model


# ------------------------------------------------------------------------------- 1 to 4: generation and rationalisation


def rationalised_rollouts(arm: Arm, loop: VariantConfig, model: Model, n: int, **shared: Any) -> list[Rollout]:
    """Samples, rationalises the failures, and marks what is kept: rationales/iter_NNN.jsonl. `shared`: see `sample`."""
    ctx = arm.ctx
    problems = iteration_problems(ctx, loop, n)

    def make() -> list[dict[str, Any]]:
        rollouts = sample(arm, loop, model, problems, n, hinted=False, **shared) if loop.k else []
        if loop.rationalize:
            solved = {r.problem_id for r in rollouts if r.correct}
            # With k > 1 a problem has failed only if none of its samples is correct.
            failed = [p for p in problems if p.id not in solved and should_rationalize(p, n, loop.p_rationalize)]
            rollouts += sample(arm, loop, model, failed, n, hinted=True)
        # With accumulation the rows of earlier loops are trained on again, so that a repeated one would count twice.
        seen = [text_key(r) for r in arm.kept_before(n)] if loop.accumulate else ()
        by_id = {p.id: p for p in problems}
        return [vars(r) for r in select(rollouts, by_id, ctx.task, loop, seen)]

    rows = [Rollout(**row) for row in cached_jsonl(arm.rationales(n), make)]
    arm.show_examples(rows)
    return rows


def iteration_problems(ctx: RunContext, loop: VariantConfig, n: int) -> list[Problem]:
    """Returns the problems of loop n."""
    return ctx.task.pool(n if loop.fresh else 1, ctx.seed, loop.problems_per_iter)


def sample(
    arm: Arm, loop: VariantConfig, model: Model, problems: list[Problem], n: int, *, hinted: bool, **shared: Any
) -> list[Rollout]:
    """Samples k rationales per problem from M_{n-1}. `shared`: the `folder` and `seed` of samples that arms share."""
    settings = loop.sampling(arm.ctx.settings.sample)
    stage, few_shot = "rationalise" if hinted else "sample", loop.few_shot_at_sample
    own = {"folder": arm.folder / "stages" / f"iter_{n:03d}", "seed": stable_seed(arm.ctx.seed, arm.name)}
    generate = functools.partial(sample_rollouts, model, arm.ctx.task, problems, settings, few_shot=few_shot)
    with arm.timed(stage), arm.ctx.bar(stage, len(problems) * loop.k) as progress:
        return generate(stage=stage, k=loop.k, hinted=hinted, iteration=n, progress=progress, **{**own, **shared})


def should_rationalize(problem: Problem, n: int, share: float) -> bool:
    """Returns whether a failed problem is rationalised in loop n."""
    # Chosen by a hash, so that a resumed run rationalises the same problems; 2^31 is the range of `stable_seed`.
    return stable_seed(problem.id, n, "rationalise") < share * 2**31


# -------------------------------------------------------------------------------------------------- 5: fine-tuning


def training_examples(arm: Arm, loop: VariantConfig, kept: list[Rollout], n: int) -> list[Example]:
    """Returns the kept rows (of all loops so far, if they accumulate) as training examples, without hints."""
    ctx = arm.ctx
    kept = arm.kept_before(n) + kept if loop.accumulate else kept
    # Rows of earlier loops belong to problems of those loops, which a fresh pool of loop n may not contain.
    problems = {p.id: p for m in {r.iteration for r in kept} for p in iteration_problems(ctx, loop, m)}
    prefix = ctx.task.prefix() if loop.few_shot_in_train else ""
    rows = []
    for r in kept:
        prompt = ctx.task.prompt(problems[r.problem_id], hint=show_hint(r, loop.p_keep_hint))
        rows.append(to_example(ctx.tokenizer, ctx.task.behind(prefix, prompt), r.completion, r.tokens))
    if loop.include_sft_data:
        gold = [(p, ctx.task.solution(p)) for p in iteration_problems(ctx, loop, n)]
        texts = [(ctx.task.behind(prefix, ctx.task.prompt(p)), s) for p, s in gold if s is not None]
        rows += [to_example(ctx.tokenizer, *pair) for pair in texts]
    return ctx.fitting(rows)


def train(arm: Arm, loop: VariantConfig, start: Model, examples: list[Example], n: int) -> tuple[Model, dict[str, Any]]:
    """Fine-tunes `start` for S_n updates, with fresh optimiser moments; returns the new model and its metrics."""
    ctx, settings = arm.ctx, arm.ctx.settings.train
    rows = len(pack_rows(examples, settings, start.config)["mask"])  # several examples share a packed row
    steps = steps_for(loop.steps, n, rows, settings.batch_size)
    most = math.inf if loop.max_epochs is None else max(1, loop.max_epochs * rows / settings.batch_size)
    if int(min(most, steps)) < steps:
        cap, why = int(most), f"(loop.max_epochs={loop.max_epochs})"
        ctx.say(f"[yellow]only {len(examples)} examples in {rows} rows: {cap} steps instead of {steps} {why}")
        steps = cap
    # A model from scratch has no few-shot hints: without hinted rows in its batches it forgets how to rationalise.
    seeds = ctx.hinted_seeds() if loop.seed_share else []
    seed = stable_seed(ctx.seed, arm.name, n, "train")
    label: dict[str, Any] = {"arm": arm.name, "iteration": n}
    with arm.timed("train"), ctx.stage(arm.checkpoint(n), settings, steps=steps, seed=seed, **label) as stage:
        model, done = fine_tune(start, examples, stage, mix=(seeds, loop.seed_share) if seeds else None)
    return model, {
        "trained_rows": len(examples),
        "train_steps": done["steps"],
        "train_tokens": round((done["tokens"] or 0) * done["steps"]),
        "train_loss": done["loss"],
    }
