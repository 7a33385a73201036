"""V-STaR: training verifiers for self-taught reasoners (arXiv 2402.06457, algorithm 1).

    D_GEN <- D_SFT ; D_VER <- D_SFT (as right) ; G_SFT <- SFT(G_base, D_SFT)
    repeat T times:
        S     <- k samples for every query from G        G is G_SFT at first; each labelled z by its final answer
        D_GEN += {z = 1} ;  D_VER += all
        G     <- SFT(G_base, D_GEN)                      from the base model, not from the G before
    D_pref <- pairs of a right and a wrong solution of one problem, from D_VER
    V      <- DPO(init = reference = G_SFT, D_pref)      once, at the end
    test:     sample from G, take the best of k by log V(y|x)

The rows of its table 1 are settings of this loop: see `PRESETS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qstar.errors import require
from qstar.methods import star
from qstar.methods.buffers import Buffer, Solution, counts, human, merged, most_sampled, sampled
from qstar.methods.preference_data import build_pairs, repeated
from qstar.methods.step_rollouts import rollout_labels
from qstar.methods.v_star_eval import measure, sampled_accuracy
from qstar.methods.v_star_setup import VStarContext
from qstar.methods.verifier import KINDS, Job, train_dpo, train_head
from qstar.models.model import Model
from qstar.runs import base_model
from qstar.runs.context import Arm
from qstar.runs.folder import cached_jsonl, open_run, stable_seed
from qstar.runs.gates import check_gates
from qstar.runs.rollouts import Selection, sample_rollouts, select, summary, to_example
from qstar.runs.supervised import fine_tune, pack_rows
from qstar.tasks.base import Problem
from qstar.train.loop import Diverged
from qstar.types import Rollout


@dataclasses.dataclass(frozen=True)
class VStarConfig(star.VariantConfig):
    """The switches of the outer loop: STaR's, with other defaults, and the verifier's."""

    n_iters: int = 3
    problems_per_iter: int | None = None  # D_query: all training problems
    fresh: bool = False  # the same queries in every iteration
    k: int = 16
    temperature: float | None = 0.7  # the paper does not say
    rationalize: bool = False
    accumulate: bool = True
    include_sft_data: bool = True
    retrain: bool = True  # False: the generator stays G_SFT
    update: str = "sft"  # how a generator learns: "sft" (from right solutions) or "rpo" (from pairs, see `improve`)
    verifiers: tuple = ()  # "dpo", "orm", "prm"
    verifier_every_iter: bool = False  # else once, at the end
    # STaR's cap_per_problem here means all iterations together, and takes the solutions that were sampled most often

    def __post_init__(self):
        super().__post_init__()
        unknown = [v for v in self.verifiers if v not in KINDS]
        require(
            (not unknown, f"verifiers: {unknown and unknown[0]!r} is not one of {', '.join(KINDS)}"),
            (self.update in ("sft", "rpo"), f"update={self.update!r} is not one of sft, rpo"),
            (
                self.update == "sft" or self.restart == "previous",
                f"restart={self.restart!r}: update='rpo' goes on from the generator before; set restart='previous'",
            ),
            (not self.rationalize, "rationalize=True: V-STaR has no hints (solutions to wrong answers would be right)"),
            (not self.retrain or not self.verifiers or self.accumulate, "accumulate=False: a verifier needs D_VER"),
        )

    @property
    def selection(self) -> Selection:
        """What counts as right; the cap is applied to D_GEN as a whole."""
        return dataclasses.replace(super().selection, cap_per_problem=None)


_ONCE = {"n_iters": 1, "k": 48}  # as many samples as three iterations of 16
PRESETS: dict[str, dict[str, Any]] = {
    "sft": {"n_iters": 0},
    "verification": {**_ONCE, "retrain": False, "verifiers": ("dpo",)},
    "star": {"accumulate": False, "include_sft_data": False},
    "rft": dict(_ONCE),
    "star_dagger": {},
    "v_star_1iter": {**_ONCE, "verifiers": ("dpo",)},
    "v_star": {"verifiers": ("dpo",)},
    # Iterative RPO (arXiv 2404.19733): every generator learns from the pairs that the one before has sampled
    "rpo": {"update": "rpo", "restart": "previous", "accumulate": False, "include_sft_data": False},
}


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs every arm of a V-STaR config in `workdir`, going on where an earlier run of the same config stopped."""
    ctx = VStarContext.make(config, Path(workdir), console)
    arms = {name: ctx.arm_settings(VStarConfig, PRESETS, name) for name in config.arms}
    start = base_model.checked(ctx, config, arms.values())
    solutions = d_sft(ctx)
    open_run(ctx.workdir, config.to_dict(), resolved={"model": start.config, **ctx.settings(), "arms": arms})
    ctx.start()
    base_model.show_parameters(ctx, start)
    base = start if config.model.path else base_model.train_base(ctx, start)
    sft = supervised(ctx, base, solutions)
    check_gates(ctx.console, ctx.workdir / "g_sft", ctx.gates, lambda: sampled_accuracy(ctx, sft))
    for name, loop in arms.items():
        outer_loop(Arm(ctx, name, loop.few_shot_at_sample), loop, base, sft, solutions)
    ctx.close()


def outer_loop(arm: Arm, loop: VStarConfig, base: Model, sft: Model, solutions: list[Solution]) -> None:
    """Algorithm 1, from G_SFT to G_T and V."""
    d_gen, d_ver = Buffer(arm.folder / "d_gen"), Buffer(arm.folder / "d_ver")
    d_gen.add(0, solutions)
    d_ver.add(0, solutions)
    generator, verifiers, n = sft, {}, 0
    arm.report(0, arm.evaluate(sft, 0), {})
    for n in range(1, loop.n_iters + 1):
        arm.begin(n, loop.n_iters)
        rollouts = labelled_rollouts(arm, loop, generator, n)
        kept = [r for r in rollouts if r.verdict != "rejected" or r.reason == "duplicate"]  # those count
        known = {"d_gen": d_gen.add(n, sampled(kept)), "d_ver": d_ver.add(n, sampled(rollouts))}
        metrics = {f"{name}_{k}": v for name, some in known.items() for k, v in counts(some).items()}
        try:
            if loop.update == "rpo":
                generator, trained = improve(arm, loop, generator, rollouts, n)
                metrics |= trained
            elif loop.retrain:
                generator, trained = retrain(arm, loop, base, generator, known["d_gen"], kept, n)
                metrics |= trained
            if loop.verifiers and (loop.verifier_every_iter or n == loop.n_iters):
                verifiers, train_metrics = train_verifiers(arm, loop, sft, known["d_ver"], n)
                metrics |= train_metrics
        except Diverged as e:
            arm.fail(n, e)
            return
        arm.report(n, arm.evaluate(generator, n), {**summary(rollouts), **metrics})
        if verifiers and n < loop.n_iters:
            measure(arm, generator, sft, verifiers, n)
    measure(arm, generator, sft, verifiers, n)
    arm.finish(sft)


def d_sft(ctx: VStarContext) -> list[Solution]:
    """Returns the human solutions that all begins with.

    Raises:
      UserError: the task has none.
    """
    found = human(ctx.task, ctx.task.pool(0, ctx.seed, ctx.sft.problems))
    require(
        (
            bool(found),
            f"config.task: {ctx.task.name} has no solutions to begin with (D_SFT); give it data with solutions",
        )
    )
    return found


def supervised(ctx: VStarContext, base: Model, solutions: list[Solution]) -> Model:
    """G_SFT <- SFT(G_base, D_SFT): one for all arms, in WORKDIR/g_sft."""
    rows = ctx.fitting([to_example(ctx.tokenizer, ctx.few_shot + s.prompt, s.completion) for s in solutions])
    s = ctx.train_settings
    steps = star.steps_for(ctx.sft.steps, 1, len(pack_rows(rows, s, base.config)["mask"]), s.batch_size)
    ctx.say(f"\n[bold]G_SFT[/bold]: {len(rows)} solutions, {steps} steps")
    with ctx.bar("sft", steps) as progress:
        seed = stable_seed(ctx.seed, "sft")
        model, _ = fine_tune(
            base, rows, s, steps=steps, seed=seed, folder=ctx.workdir / "g_sft", writer=ctx.writer, label={"arm": "g_sft"},
            progress=progress,
        )  # fmt: skip
    return model


def labelled_rollouts(arm: Arm, loop: VStarConfig, generator: Model, n: int) -> list[Rollout]:
    """k samples for every query, labelled: rationales/iter_NNN.jsonl. Arms that ask G_SFT the same share its samples."""
    ctx = arm.ctx
    problems = star.iteration_problems(ctx, loop, n)
    settings = ctx.sample_settings
    if loop.temperature is not None:
        settings = dataclasses.replace(settings, temperature=loop.temperature)
    first = n == 1
    owner = ctx.workdir / "g_sft" if first else arm.folder
    asked = stable_seed(loop.few_shot_at_sample, *(p.id for p in problems))
    tag = f"k{loop.k}_t{settings.temperature:g}_{asked:08x}" if first else f"iter_{n:03d}"

    def make() -> list[dict[str, Any]]:
        with arm.timed("sample"), ctx.bar("sample", len(problems) * loop.k) as progress:
            rollouts = sample_rollouts(
                generator,
                ctx.task,
                problems,
                settings,
                k=loop.k,
                hinted=False,
                iteration=n,
                seed=stable_seed(ctx.seed, "sft" if first else arm.name),
                folder=owner / "stages" / tag,
                stage="sample",
                few_shot=loop.few_shot_at_sample,
                progress=progress,
            )
        seen = [(r.problem_id, " ".join(r.completion.split())) for r in arm.kept_before(n)] if loop.accumulate else ()
        return [r.to_json() for r in select(rollouts, {p.id: p for p in problems}, ctx.task, loop.selection, seen)]

    rows = [Rollout(**row) for row in cached_jsonl(arm.rationales(n), make)]
    arm.show_examples(rows)
    return rows


def retrain(
    arm: Arm, loop: VStarConfig, base: Model, generator: Model, d_gen: list[Solution], kept: list[Rollout], n: int
) -> tuple[Model, dict[str, Any]]:
    """G <- SFT(G_base, D_GEN); without accumulation on this iteration's samples alone. Too few rows: G stays.

    Of a problem's right solutions at most `cap_per_problem` are trained on, those that were sampled most often.
    """
    ctx = arm.ctx
    models = [s for s in (d_gen if loop.accumulate else merged(sampled(kept))) if s.source == "model"]
    models = most_sampled(models, loop.cap_per_problem)
    people = [s for s in d_gen if s.source == "human"] if loop.include_sft_data else []
    some = [to_example(ctx.tokenizer, ctx.few_shot + s.prompt, s.completion, s.tokens) for s in [*people, *models]]
    rows = ctx.fitting(some)
    if len(rows) < max(1, loop.min_kept):
        ctx.say(f"[yellow]{len(rows)} rows to train on (loop.min_kept={loop.min_kept}): the generator before stays")
        return generator, {"trained_rows": 0}
    return star.train(arm, loop, base if loop.restart == "base" else generator, rows, n)


def improve(
    arm: Arm, loop: VStarConfig, generator: Model, rollouts: list[Rollout], n: int
) -> tuple[Model, dict[str, Any]]:
    """Iterative RPO: G <- DPO + alpha NLL of the winners, on pairs of this iteration's samples; reference: the G before."""
    ctx, seed = arm.ctx, stable_seed(arm.ctx.seed, arm.name, n, "rpo")
    pairs = build_pairs(merged(sampled(rollouts)), ctx.pairs, seed)
    if len(pairs) < max(1, loop.min_kept):
        ctx.say(f"[yellow]{len(pairs)} pairs to train on (loop.min_kept={loop.min_kept}): the generator before stays")
        return generator, {"trained_rows": 0}
    label = {"arm": arm.name, "iteration": n}
    with arm.timed("train"):
        job = Job(arm.checkpoint(n), ctx.rpo, seed, ctx.writer, label, functools.partial(ctx.bar, "rpo"))
        model, done = train_dpo(generator, pairs, job)
    train_metrics = {f"rpo_{k}": done.get(k) for k in ("accuracy", "margin", "nll", "chosen_drift", "rejected_drift")}
    return model, {
        "trained_rows": done["pairs"],
        "train_steps": done["steps"],
        "train_loss": done["loss"],
        **train_metrics,
    }


def train_verifiers(
    arm: Arm, loop: VStarConfig, sft: Model, d_ver: list[Solution], n: int
) -> tuple[dict[str, Model], dict[str, Any]]:
    """V <- DPO(init = reference = G_SFT, D_pref), and whatever other verifiers the arm has, from the same D_VER."""
    ctx, models, train_metrics = arm.ctx, {}, {}
    for kind in loop.verifiers:
        settings, seed = getattr(ctx, kind), stable_seed(ctx.seed, arm.name, n, kind)
        with arm.timed(kind):
            label = {"arm": arm.name, "iteration": n}
            job = Job(arm.verifier(kind, n), settings, seed, ctx.writer, label, functools.partial(ctx.bar, kind))
            if kind == "dpo":
                pairs = build_pairs(d_ver, ctx.pairs, seed)
                if not pairs:
                    ctx.say("[yellow]no problem has both a right and a wrong solution: there is no verifier")
                    continue
                models[kind], done = train_dpo(sft, pairs, job)
            else:
                problems = {
                    p.id: p
                    for p in [*star.iteration_problems(ctx, loop, n), *ctx.task.pool(0, ctx.seed, ctx.sft.problems)]
                }
                labels = step_labels(arm, loop, sft, d_ver, problems, job) if kind == "prm" else None
                models[kind], done = train_head(sft, kind, repeated(d_ver, ctx.pairs), ctx.task, problems, job, labels)
        train_metrics |= {f"{kind}_{k}": v for k, v in done.items() if v is not None}
        ctx.say(f"  {kind}: {done['steps']} steps, loss {done['loss'] or 0:.4f}, accuracy {done['accuracy'] or 0:.3f}")
    return models, train_metrics


def step_labels(
    arm: Arm, loop: VStarConfig, sft: Model, d_ver: list[Solution], problems: dict[str, Problem], job: Job
) -> Callable[[Solution], list[float]] | None:
    """How right a solution's steps are, by continuations of G_SFT; None where the task is to be asked."""
    ctx, n = arm.ctx, job.settings.rollouts
    if not n:
        return None
    settings = ctx.sample_settings
    if loop.temperature is not None:
        settings = dataclasses.replace(settings, temperature=loop.temperature)
    found = rollout_labels(
        sft, ctx.task, problems, d_ver, settings, n=n, seed=job.seed, folder=job.folder / "rollouts",
        few_shot=loop.few_shot_at_sample,
    )  # fmt: skip
    by_key = {s.key: labels for s, labels in zip(d_ver, found)}
    return lambda s: by_key[s.key]
