"""V-STaR: train a verifier on correct and incorrect solutions (arXiv 2402.06457, algorithm 1).

    D_GEN <- D_SFT ; D_VER <- D_SFT ; G_SFT <- SFT(G_base, D_SFT)
    for n = 1 .. T:
        S     <- k samples for every query from G        G is G_SFT at first; labels by the final answer
        D_GEN += correct of S ;  D_VER += S
        G     <- SFT(G_base, D_GEN)                      from the base model, not from the previous G
    D_pref <- pairs of a correct and an incorrect solution of one problem, from D_VER
    V      <- DPO(init = reference = G_SFT, D_pref)
    test:     of k samples from G return the one with the largest log V(y|x)

The rows of the paper's table 1 are settings of this loop, see `PRESETS`.

Deviations from the paper:
1. `temperature` is 0.7: the paper does not give one.
2. D_pref is capped per problem, see `preference_data`.
3. `cap_per_problem`: of a problem's samples in D_GEN, G is trained on the most frequent alone (default: off).
4. Additions: verifiers in every iteration, ORM and PRM verifiers trained on the same D_VER, and generators trained on
   pairs by Iterative RPO (arXiv 2404.19733).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

from qstar.errors import Settings, bounded, require
from qstar.methods import preference_data as data
from qstar.methods import star
from qstar.methods.v_star_eval import SampledGate, SelectSettings, gate_metrics, measure
from qstar.methods.verifier import KINDS, VerifierSettings, train_dpo, train_head
from qstar.models.model import Model
from qstar.runs import base_model
from qstar.runs.context import Arm, RunContext
from qstar.runs.folder import stable_seed
from qstar.runs.rollouts import summary, to_example
from qstar.runs.settings import TaskSections, arms_from
from qstar.runs.stages import Stage, fine_tune, pack_rows
from qstar.text.packing import Example
from qstar.train.loop import Diverged
from qstar.types import Rollout


@dataclasses.dataclass(frozen=True)
class VStarConfig(star.VariantConfig):
    """The settings of the outer loop: STaR's with other defaults, and the verifier's."""

    n_iters: int = 3
    problems_per_iter: int | None = None  # D_query; None: all training problems
    fresh: bool = False  # the same queries in every iteration
    k: int = bounded(16, ge=1)
    temperature: float | None = 0.7
    rationalize: bool = False
    accumulate: bool = True
    include_sft_data: bool = True
    retrain: bool = True  # False: the generator stays G_SFT
    update: str = bounded("sft", choices=("sft", "rpo"))  # training of generators: on correct solutions, or on pairs
    verifiers: tuple = ()  # "dpo", "orm", "prm"
    verifier_every_iter: bool = False  # False: once, after the last iteration

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [v for v in self.verifiers if v not in KINDS]
        restart = f"restart={self.restart!r}: update='rpo' trains the previous generator; set restart='previous'"
        hints = "rationalize=True: V-STaR has no hints (hinted solutions would be labelled correct)"
        examples = "few_shot_in_train=True: pairs and verifiers are trained without examples; set it to False"
        require(
            (not unknown, f"verifiers: {unknown and unknown[0]!r} is not one of {', '.join(KINDS)}"),
            (self.update == "sft" or self.restart == "previous", restart),
            (not self.rationalize, hints),
            (not self.few_shot_in_train or (self.update == "sft" and not self.verifiers), examples),
            (not self.patience, f"patience={self.patience}: V-STaR runs all n_iters iterations; set it to 0"),
            (not self.retrain or not self.verifiers or self.accumulate, "accumulate=False: a verifier needs D_VER"),
        )


@dataclasses.dataclass(frozen=True)
class Supervision(Settings):
    """D_SFT, and the training of G_SFT on it. A config's `sft` section."""

    problems: int | None = bounded(None, ge=1)  # with human solutions; None: all of the training set
    steps: str = "epochs:2:0"  # of G_SFT (2 epochs on GSM8K, 3 on MBPP)

    def __post_init__(self) -> None:
        super().__post_init__()
        star.steps_for(self.steps, 1, 1, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VStarSections(TaskSections):
    """The sections of a V-STaR config."""

    gates: dict[str, SampledGate] = dataclasses.field(default_factory=dict)  # type: ignore[assignment]
    sft: Supervision = dataclasses.field(default_factory=Supervision)
    pairs: data.PairSettings = dataclasses.field(default_factory=data.PairSettings)
    rpo: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)  # of a generator
    dpo: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)
    orm: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)
    prm: VerifierSettings = dataclasses.field(default_factory=VerifierSettings)
    select: SelectSettings = dataclasses.field(default_factory=SelectSettings)


class VStarContext(RunContext):
    """One V-STaR run."""

    SECTIONS: ClassVar = VStarSections


_ONCE = {"n_iters": 1, "k": 48}  # as many samples as three iterations of 16
PRESETS: dict[str, dict[str, Any]] = {
    "sft": {"n_iters": 0},
    "verification": {**_ONCE, "retrain": False, "verifiers": ("dpo",)},
    "star": {"accumulate": False, "include_sft_data": False},
    "rft": dict(_ONCE),
    "star_dagger": {},
    "v_star_1iter": {**_ONCE, "verifiers": ("dpo",)},
    "v_star": {"verifiers": ("dpo",)},
    # Iterative RPO: every generator is trained on pairs of samples of the previous one
    "rpo": {"update": "rpo", "restart": "previous", "accumulate": False, "include_sft_data": False},
}


def run(config: Any, workdir: Path, console: Any) -> None:
    """Runs every arm of a V-STaR config in `workdir`, resuming an earlier run of the same config."""
    ctx = VStarContext.make(config, workdir, console)
    arms = arms_from(VStarConfig, vars(ctx.settings), "loop", PRESETS)
    for name, loop in arms.items():
        same = loop.few_shot_in_train == bool(ctx.settings.loop.get("few_shot_in_train"))
        fault = "all arms start from one G_SFT; set config.loop.few_shot_in_train"
        require((same, f"config.arms.{name}.few_shot_in_train: {fault}"))
    start = base_model.checked(ctx, arms.values())
    d_sft = supervised_data(ctx)
    ctx.start(start, arms=arms)
    base_model.show_parameters(ctx, start)
    # Not `base_model.prepare`: here the gates bound G_SFT, which all arms start from.
    base = start if config.model.path else base_model.train_on_seeds(ctx, start)
    sft = supervised(ctx, base, d_sft)
    base_model.check_gates(ctx, ctx.workdir / "g_sft", lambda: gate_metrics(ctx, sft))
    for name, loop in arms.items():
        outer_loop(Arm(ctx, name, loop.few_shot_at_sample), loop, base, sft, d_sft)
    ctx.close()


def outer_loop(arm: Arm, loop: VStarConfig, base: Model, sft: Model, d_sft: list[data.Solution]) -> None:
    """Algorithm 1, from G_SFT to G_T and V."""
    # ---- D_GEN <- D_SFT, D_VER <- D_SFT
    add_to_gen, add_to_ver = (functools.partial(data.add_to_buffer, arm.folder / name) for name in ("d_gen", "d_ver"))
    add_to_gen(0, d_sft)
    add_to_ver(0, d_sft)
    generator, n = sft, 0
    verifiers: dict[str, Model] = {}
    arm.report(0, arm.evaluate(sft, 0), {})
    for n in range(1, loop.n_iters + 1):
        arm.begin(n, loop.n_iters)
        # ---- S <- k samples for every query; D_GEN += correct of S, D_VER += S
        rollouts = labelled_rollouts(arm, loop, generator, n)
        # Duplicates are rejected for training on rationales, but here they raise the counts.
        correct = [r for r in rollouts if r.verdict != "rejected" or r.reason == "duplicate"]
        d_gen = add_to_gen(n, data.sampled_solutions(correct))
        d_ver = add_to_ver(n, data.sampled_solutions(rollouts))
        metrics = {f"d_gen_{k}": v for k, v in data.count_solutions(d_gen).items()}
        metrics |= {f"d_ver_{k}": v for k, v in data.count_solutions(d_ver).items()}
        try:
            # ---- G <- SFT(G_base, D_GEN)
            trained: dict[str, Any] = {}
            if loop.update == "rpo":
                generator, trained = train_on_pairs(arm, loop, generator, rollouts, n)
            elif loop.retrain:
                # Human solutions are exempt from the cap: with a count of 1 they would be the first to be dropped.
                human = [s for s in d_gen if s.source == "human"] if loop.include_sft_data else []
                # The model's own counts: a sample that equals a human solution is merged into that one in D_GEN.
                found = data.read_buffer(arm.folder / "d_gen", range(1 if loop.accumulate else n, n + 1))
                sampled = data.most_sampled(data.merge_duplicates(found), loop.cap_per_problem)
                known = {s.key for s in human}
                rows = [*human, *(s for s in sampled if s.key not in known)]
                generator, trained = retrain(arm, loop, base, generator, rows, n)
            metrics |= trained
            # ---- V <- DPO(G_SFT, D_pref)
            if loop.verifiers and (loop.verifier_every_iter or n == loop.n_iters):
                # From G_SFT, which is also DPO's reference, not from the last generator.
                verifiers, trained = train_verifiers(arm, loop, sft, d_ver, n)
                metrics |= trained
        except Diverged as e:
            arm.fail(n, e)
            return
        arm.report(n, arm.evaluate(generator, n), {**summary(rollouts), **metrics})
        # The last iteration is measured below, with or without verifiers.
        if verifiers and n < loop.n_iters:
            measure(arm, generator, sft, verifiers, n)
    if loop.n_iters and generator is sft and not verifiers:
        arm.stop(n, "neither a generator nor a verifier was trained", idle=True)
    # ---- test: select among k samples of G_T by V
    measure(arm, generator, sft, verifiers, n)
    arm.finish(sft)


def supervised_data(ctx: VStarContext) -> list[data.Solution]:
    """Returns D_SFT, the human solutions; raises UserError if the task has none."""
    found = data.human_solutions(ctx.task, ctx.task.pool(0, ctx.seed, ctx.settings.sft.problems))
    fault = f"config.task: {ctx.task.name} has no human solutions for D_SFT; give it data with solutions"
    require((bool(found), fault))
    return found


def supervised(ctx: VStarContext, base: Model, d_sft: list[data.Solution]) -> Model:
    """G_SFT <- SFT(G_base, D_SFT): one for all arms, in WORKDIR/g_sft."""
    rows = training_examples(ctx, d_sft, ctx.settings.loop.get("few_shot_in_train", False))
    settings = ctx.settings.train
    packed = len(pack_rows(rows, settings, base.config)["mask"])
    steps = star.steps_for(ctx.settings.sft.steps, 1, packed, settings.batch_size)
    ctx.say(f"\n[bold]G_SFT[/bold]: {len(rows)} solutions, {steps} steps")
    folder, seed = ctx.workdir / "g_sft", stable_seed(ctx.seed, "sft")
    with ctx.stage(folder, settings, steps=steps, seed=seed, bar="sft", arm="g_sft") as stage:
        return fine_tune(base, rows, stage)[0]


def training_examples(ctx: RunContext, solutions: list[data.Solution], few_shot: bool) -> list[Example]:
    """Returns solutions as training examples, with the few-shot text in front of their prompts if `few_shot`."""
    prefix = ctx.task.prefix() if few_shot else ""
    # Sampled token ids are trained on as they are; encoding the text anew may split it differently.
    rows = [to_example(ctx.tokenizer, ctx.task.behind(prefix, s.prompt), s.completion, s.tokens) for s in solutions]
    return ctx.fitting(rows)


def labelled_rollouts(arm: Arm, loop: VStarConfig, generator: Model, n: int) -> list[Rollout]:
    """Returns k labelled samples for every query: rationales/iter_NNN.jsonl."""
    ctx, shared = arm.ctx, {}
    if n == 1:
        # G_SFT is common to all arms: those that ask it for the same samples share them.
        problems = star.iteration_problems(ctx, loop, n)
        queries = stable_seed(loop.few_shot_at_sample, *(p.id for p in problems))
        name = f"k{loop.k}_t{loop.sampling(ctx.settings.sample).temperature:g}_{queries:08x}"
        shared = {"folder": ctx.workdir / "g_sft" / "stages" / name, "seed": stable_seed(ctx.seed, "sft")}
    # A cap per iteration would not bound D_GEN, which accumulates: `most_sampled` caps the union.
    return star.rationalised_rollouts(arm, dataclasses.replace(loop, cap_per_problem=None), generator, n, **shared)


def retrain(
    arm: Arm, loop: VStarConfig, base: Model, generator: Model, solutions: list[data.Solution], n: int
) -> tuple[Model, dict[str, Any]]:
    """G <- SFT(G_base, solutions); with too few rows the generator stays."""
    rows = training_examples(arm.ctx, solutions, loop.few_shot_in_train)
    if len(rows) < max(1, loop.min_kept):
        return generator, _too_few(arm, loop, f"{len(rows)} rows")
    return star.train(arm, loop, base if loop.restart == "base" else generator, rows, n)


def train_on_pairs(
    arm: Arm, loop: VStarConfig, generator: Model, rollouts: list[Rollout], n: int
) -> tuple[Model, dict[str, Any]]:
    """Iterative RPO: G <- DPO + alpha NLL of the winners, on pairs of this iteration; reference: the previous G."""
    stage = verifier_stage(arm, "rpo", n, arm.checkpoint(n))
    distinct = data.merge_duplicates(data.sampled_solutions(rollouts))
    pairs = data.build_pairs(distinct, arm.ctx.settings.pairs, stage.seed)
    if len(pairs) < max(1, loop.min_kept):
        return generator, _too_few(arm, loop, f"{len(pairs)} pairs")
    with arm.timed("train"):
        model, done = train_dpo(generator, pairs, stage, bar=arm.ctx.bar)
    metrics = {"trained_rows": done["pairs"], "train_steps": done["steps"], "train_loss": done["loss"]}
    keys = ("accuracy", "margin", "nll", "chosen_logratio", "rejected_logratio")
    return model, metrics | {f"rpo_{k}": done.get(k) for k in keys}


def _too_few(arm: Arm, loop: VStarConfig, what: str) -> dict[str, Any]:
    arm.ctx.say(f"[yellow]{what} to train on (loop.min_kept={loop.min_kept}): the previous generator stays")
    return {"trained_rows": 0}


def train_verifiers(
    arm: Arm, loop: VStarConfig, sft: Model, d_ver: list[data.Solution], n: int
) -> tuple[dict[str, Model], dict[str, Any]]:
    """V <- DPO(init = reference = G_SFT, D_pref), and the arm's other verifiers, from the same D_VER."""
    ctx, models = arm.ctx, {}
    metrics: dict[str, Any] = {}
    # D_VER holds solutions of all iterations, and human ones, whose problems need not be among the queries.
    queries = [p for m in range(1, n + 1) for p in star.iteration_problems(ctx, loop, m)]
    problems = {p.id: p for p in [*queries, *ctx.task.pool(0, ctx.seed, ctx.settings.sft.problems)]}
    for kind in loop.verifiers:
        stage = verifier_stage(arm, kind, n, arm.verifier(kind, n))
        with arm.timed(kind):
            if kind == "dpo":
                pairs = data.build_pairs(d_ver, ctx.settings.pairs, stage.seed)
                if not pairs:
                    ctx.say("[yellow]no problem has both a correct and an incorrect solution: no verifier is trained")
                    continue
                models[kind], done = train_dpo(sft, pairs, stage, bar=ctx.bar)
            else:
                labels = None
                if kind == "prm" and (rollouts := stage.settings.rollouts):
                    folder, sampling = stage.folder / "rollouts", loop.sampling(ctx.settings.sample)
                    labels = data.rollout_labels(
                        sft, ctx.task, problems, d_ver, sampling, n=rollouts, seed=stage.seed, folder=folder,
                        few_shot=loop.few_shot_at_sample,
                    )  # fmt: skip
                rows = data.repeat_by_count(d_ver, ctx.settings.pairs)
                models[kind], done = train_head(sft, kind, rows, ctx.task, problems, stage, labels, bar=ctx.bar)
        metrics |= {f"{kind}_{k}": v for k, v in done.items() if v is not None}
        ctx.say(f"  {kind}: {done['steps']} steps, loss {done['loss'] or 0:.4f}, accuracy {done['accuracy'] or 0:.3f}")
    return models, metrics


def verifier_stage(arm: Arm, kind: str, n: int, folder: Path) -> Stage:
    """Returns the training stage of the config section `kind` (dpo, orm, prm, rpo) in iteration n."""
    ctx, label = arm.ctx, {"arm": arm.name, "iteration": n}
    seed = stable_seed(ctx.seed, arm.name, n, kind)
    # How many steps there are depends on the rows: `verifier.train_dpo` and `train_head` set it.
    return Stage(folder, getattr(ctx.settings, kind), steps=0, seed=seed, writer=ctx.writer, label=label, name=kind)
