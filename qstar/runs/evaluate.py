"""Measuring a model on a task (greedy, pass@k, majority@k), and taking a model out of a run."""

from __future__ import annotations

import collections
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from qstar import tree
from qstar.errors import UserError, require, unknown
from qstar.runs import base_model
from qstar.methods import quiet_star
from qstar.runs.context import RunContext
from qstar.runs.checks import fit_prompts
from qstar.methods.quiet_data import QuietContext as QuietStudy
from qstar.runs.rollouts import SampleSettings, sample_rollouts
from qstar.runs.folder import cached_jsonl, end_run, open_run
from qstar.methods.select import Scorer, curves, difference, ks_for, quality
from qstar.methods.v_star_eval import Ballots, by_problem, candidates
from qstar.methods.v_star_setup import VStarContext
from qstar.methods.verifier import KINDS, Verifier, score
from qstar.models.heads import add_value_head
from qstar.models.hf import read_json, refuse_foreign
from qstar.models.model import Model, save
from qstar.sample.vote import voted_right_at_k
from qstar.tasks.base import Task
from qstar.text.tokenizer import Tokenizer
from qstar.train.checkpoint import Checkpoints
from qstar.train.stats import pass_at_k, summarise
from qstar.types import Rollout

ROUND = 512  # completions that are kept at once: what an interruption can lose


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
    made_with: dict[str, Any] | None = None,
    scorers: Mapping[str, Scorer | Verifier] | None = None,
    too_long: str = "error",
) -> dict[str, Any]:
    """Returns greedy accuracy and, from `samples` completions per problem, pass@k and majority@k for k = 1, 2, 4, ...

    Every metric comes with its 95% bootstrap interval over problems, and per group of problems. `answered` is the share of
    greedy completions in which an answer was found.

    Args:
      out: folder where answers are kept as JSONL; what is there already is not sampled again.
      made_with: what the answers depend on; kept in `out`, so that no answers of another model are counted.
      scorers: name -> what scores the samples (a `Verifier`, or a function of prompts and completions such as a judge), for
        best-of-k and votes by score.
      too_long: what happens to prompts beyond the model's context, see `checks.fit_prompts`; "too_long" counts them.

    Raises:
      UserError: no tokenizer, no problems, a prompt too long for the model, or `out` is of another evaluation.
    """
    if model.tokenizer is None:
        raise UserError("evaluation needs a tokenizer, and this model has none (no tokenizer files in its folder)")
    problems = task.problems(split)[: limit or None]
    if not problems:
        raise UserError(f"task {task.name} has no problems in split {split!r}")
    fit_examples(model, task, max_new_tokens)
    task, problems, long = fit_prompts(model, task, problems, max_new_tokens, too_long)
    if out is not None:
        open_run(out, made_with or {}, "--out")
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        settings = SampleSettings(max_new_tokens=max_new_tokens, temperature=0.0, round_size=ROUND)
        greedy = sample_rollouts(
            model, task, problems, settings, k=1, hinted=False, iteration=0, seed=seed, folder=folder, stage="greedy"
        )
        result: dict[str, Any] = {"problems": len(problems)} | ({"too_long": long} if too_long != "error" else {})
        result.update(summarise("accuracy", [float(r.correct) for r in greedy], [r.group for r in greedy]))
        result["answered"] = sum(r.answer is not None for r in greedy) / len(greedy)
        result["truncation_rate"] = sum(r.truncated for r in greedy) / len(greedy)
        if samples:
            settings = SampleSettings(max_new_tokens=max_new_tokens, temperature=temperature, round_size=ROUND)
            drawn = sample_rollouts(
                model,
                task,
                problems,
                settings,
                k=samples,
                hinted=False,
                iteration=0,
                seed=seed,
                folder=folder,
                stage="samples",
            )
            result.update(many(drawn, samples, task.ballots))
            result.update(by_scores(drawn, samples, scorers or {}, folder, task.ballots, model.tokenizer))
    if out is not None:
        end_run(out)
    return result


def fit_examples(model: Model, task: Task, max_new_tokens: int) -> None:
    """Leaves out built-in examples that would take more than half of the room that answers leave in a short context."""
    count, room = len(getattr(task, "examples", list)()), (model.config.max_positions - max_new_tokens) // 2
    while count and len(model.tokenizer.encode(task.prefix(), bos=True)) > room:
        count -= 1
        task.keep_examples(count)


def unanswered(result: Mapping[str, Any]) -> str:
    """A warning where most completions hold no answer that the task can read, so that accuracy says little; or ""."""
    share = result.get("answered", 1.0)
    return (
        ""
        if share >= 0.5
        else (
            f"warning: an answer was found in {share:.0%} of the completions only; accuracy says little. Look at "
            "the completions (--out), and give more --max-new-tokens or a prompt that shows the form of an answer"
        )
    )


def by_scores(
    rollouts: list[Rollout],
    samples: int,
    scorers: Mapping[str, Scorer | Verifier],
    folder: Path,
    ballots: Ballots = list,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Returns `best@k:NAME`, `weighted@k:NAME`, `top4@k:NAME` and `regret@k:NAME` with intervals, and `auc:NAME`,
    `auc_pooled:NAME`, `ece:NAME` and `brier:NAME` (after Platt scaling), for every scorer; and of every two scorers, paired
    over problems, `gain@k:B - A`, what best-of-k by B is right more often, at k = 16 (or all samples). All score the same
    samples: so verifiers of several runs are compared.

    "generator" is always one: the log-probability under the model that wrote the samples. Scores are kept in
    FOLDER/scores_NAME.jsonl, so that a second call does not score again. A `Verifier` with the `tokenizer` that the samples
    were written with scores the ids that were sampled; every other scorer gets texts.
    """
    groups = by_problem(rollouts)
    scores: dict[str, list[list[float]]] = {"generator": [[r.logprob for r in rows] for rows in groups]}
    for name, scorer in scorers.items():

        def make(scorer: Scorer = scorer) -> list[dict[str, Any]]:
            v = scorer if isinstance(scorer, Verifier) else None
            ids = v is not None and tokenizer is not None and v.reads(tokenizer)  # as they were sampled
            prompts = [rows[0].prompt for rows in groups]
            written = [[r.tokens if ids and r.tokens is not None else r.completion for r in rows] for rows in groups]
            found = score(v, prompts, written) if v is not None else scorer(prompts, written)
            return [{"problem_id": rows[0].problem_id, "scores": row.tolist()} for rows, row in zip(groups, found)]

        scores[name] = [row["scores"] for row in cached_jsonl(folder / f"scores_{name}.jsonl", make)]
    some = [candidates(rows, {name: scores[name][i] for name in scores}, ballots) for i, rows in enumerate(groups)]
    out: dict[str, Any] = {}
    values = curves(some, ks_for(samples))
    for rule, by_k in values.items():
        way, slash, name = rule.partition("/")
        for k, each in by_k.items() if slash else ():
            out.update(summarise(f"{way}@{k}:{name}", each, [c.group for c in some]))
    worth = quality(some, values)
    for name in scores:
        out |= {f"auc:{name}": worth["auc"][name], f"auc_pooled:{name}": worth["auc_pooled"][name]}
        out |= {f"{key}:{name}": value for key, value in worth["calibration"][name].items()}
        for k, (mean, low, high) in worth["regret"][name].items():
            out |= {f"regret@{k}:{name}": mean, f"regret@{k}:{name}_low": low, f"regret@{k}:{name}_high": high}
    k = max(k for k in ks_for(samples) if k <= 16)
    for a, b in itertools.combinations(scores, 2):
        mean, low, high = difference(values[f"best/{b}"][k], values[f"best/{a}"][k])
        key = f"gain@{k}:{b} - {a}"
        out |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return out


def result_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a table of what `evaluate_model` found: metric, value and its interval."""
    rows = []
    one_group = sum(key.startswith("accuracy/") for key in result) == 1  # its numbers are those of all
    for key, value in result.items():
        name, slash, group = key.partition("/")
        if not name.endswith(("_low", "_high")) and not (one_group and group):
            bounds = (result.get(f"{name}_{side}{slash}{group}") for side in ("low", "high"))
            rows.append(dict(zip(("metric", "value", "95% low", "95% high"), (key, value, *bounds))))
    return rows


def many(rollouts: list[Rollout], samples: int, ballots: Ballots = list) -> dict[str, Any]:
    """Returns pass@k and majority@k for k = 1, 2, 4, ... up to the number of samples per problem. `ballots`: the task's."""
    by_problem: dict[str, list[Rollout]] = collections.defaultdict(list)
    for r in rollouts:
        by_problem[r.problem_id].append(r)
    drawn = list(by_problem.values())
    answers = [
        ballots([None if r.truncated else r.answer for r in rows]) for rows in drawn
    ]  # what is cut off does not vote
    right = [[r.correct for r in rows] for rows in drawn]
    return votes(answers, right, [rows[0].group for rows in drawn], samples)


def votes(
    answers: Sequence[Sequence[str | None]], right: Sequence[Sequence[bool]], groups: Sequence[str], samples: int
) -> dict[str, Any]:
    """Returns pass@k and majority@k with intervals, k = 1, 2, 4, ... up to `samples`, of each problem's answers.

    Equal strings vote together (`Task.ballots`); None does not vote, but passes if it is right.
    """
    out: dict[str, Any] = {}
    k = 1
    while k <= samples:
        passed = [pass_at_k(len(some), sum(some), k) for some in right]
        voted = [voted_right_at_k(*pair, k) for pair in zip(answers, right)]
        out.update(summarise(f"pass@{k}", passed, groups))
        out.update(summarise(f"majority@{k}", voted, groups))
        k *= 2
    return out


def export_model(run: Path, arm: str | None, iteration: int | None, out: Path, verifier: str = "") -> Path:
    """Writes the model of a run's arm and iteration (default: the only arm, its last iteration; 0 is the base) to `out`.

    Args:
      verifier: "dpo", "orm" or "prm": that verifier of a V-STaR run, instead of its generator.

    Raises:
      UserError: no such run, arm or iteration; the line says which there are.
    """
    refuse_foreign(out.expanduser().resolve())
    model = trained_model(run, arm, iteration, verifier)
    save(model, out)
    return out


def trained_model(run: Path, arm: str | None = None, iteration: int | None = None, verifier: str = "") -> Model:
    """Returns the model of a run's arm and iteration; see `export_model`."""
    if not (run / "config.json").is_file():
        raise UserError(f"--run={run}: holds no config.json, so it is no run; give the --workdir of a `qstar train`")
    config = ConfigDict(read_json(run / "config.json"))
    if "method" not in config or not isinstance(config.get("arms"), ConfigDict):
        raise UserError(f"--run={run}: its config.json is not that of a run; give the --workdir of a `qstar train`")
    arms = sorted(config.arms.keys())
    if arm is None and len(arms) > 1 and iteration != 0:
        raise UserError(f"--run={run}: has the arms {', '.join(arms)}; name one with --arm")
    require((bool(arms), f"--run={run}: its config.json names no arms"))
    arm = arms[0] if arm is None else arm
    if arm not in arms:
        raise unknown(f"--run={run}: arm {arm!r}", arm, arms)
    require(
        (not verifier or config.method == "v_star", f"--run={run}: only V-STaR has verifiers; leave --verifier out")
    )
    if config.method == "v_star":
        return _v_star_model(run, config, arm, iteration, verifier)
    if config.method == "quiet_star":
        return _thinking_model(run, config, arm, iteration)
    done = sorted(int(p.parent.name[5:]) for p in (run / arm / "checkpoints").glob("iter_*/summary.json"))
    iteration = (done or [0])[-1] if iteration is None else iteration
    if iteration and iteration not in done:
        there = ", ".join(map(str, [0, *done]))
        raise UserError(f"--run={run}: arm {arm!r} has no finished iteration {iteration}; there are {there} (0: base)")
    config.mesh = "data=1,fsdp=-1"  # the machine that exports need not be the one that trained
    ctx = RunContext.make(config, run, Console(quiet=True))
    model = base_model.architecture(ctx)
    folder = run / arm / "checkpoints" / f"iter_{iteration:03d}" if iteration else run / "base"
    if not iteration and config.model.path:
        return model
    if not (folder / "summary.json").is_file():
        raise UserError(f"--run={run}: its base is not trained yet; let `qstar train` go on first")
    return restore(model, folder)


def _v_star_model(run: Path, config: ConfigDict, arm: str, iteration: int | None, verifier: str) -> Model:
    """The generator of an arm and iteration (0: G_SFT), or one of its verifiers."""
    if verifier and verifier not in KINDS:
        raise unknown(f"--verifier={verifier}", verifier, KINDS)
    home = run / arm / "verifiers" / verifier if verifier else run / arm / "checkpoints"
    done = sorted(int(p.parent.name[5:]) for p in home.glob("iter_*/summary.json"))
    done = done if verifier else [0, *done]
    what = f"--run={run}: arm {arm!r} has no finished {verifier + ' verifier' if verifier else 'generator'}"
    require((bool(done), f"{what}; let `qstar train` go on, or give its config.arms.{arm}.verifiers"))
    iteration = done[-1] if iteration is None else iteration
    require((iteration in done, f"{what} of iteration {iteration}; there are {', '.join(map(str, done))} (0: G_SFT)"))
    config.mesh = "data=1,fsdp=-1"
    model = base_model.architecture(VStarContext.make(config, run, Console(quiet=True)))
    folder = home / f"iter_{iteration:03d}" if iteration or verifier else run / "g_sft"
    require(
        ((folder / "summary.json").is_file(), f"--run={run}: G_SFT is not trained yet; let `qstar train` go on first")
    )
    model = add_value_head(model, verifier) if verifier in ("orm", "prm") else model
    return restore(model.replace(params=tree.cast(model.params, np.float32)), folder)


def _thinking_model(run: Path, config: ConfigDict, arm: str, iteration: int | None) -> Model:
    """The model of an arm of a Quiet-STaR run (iteration 0: its base), with start and end vectors and mixing head."""
    config.mesh = "data=1,fsdp=-1"
    ctx = QuietStudy.make(config, run, Console(quiet=True))
    model = base_model.loaded_or_random(ctx, ctx.corpus.tokenizer)
    if iteration not in (None, 0):
        raise UserError(f"--run={run}: Quiet-STaR has no iterations; leave --iteration out (0: base)")
    folder = run / "base" if iteration == 0 else run / arm
    if iteration == 0 and not ctx.base_steps:
        return model
    if not (folder / "summary.json").is_file():
        raise UserError(f"--run={run}: {folder.name} is not trained yet; let `qstar train` go on first")
    if iteration is None:
        model = quiet_star.thinking(ctx, ctx.recipe(quiet_star.QuietConfig, arm), model)
    return restore(model, folder)


def restore(model: Model, folder: Path) -> Model:
    """Returns the model with the parameters that `training.train_stage` left in `folder`."""
    if not (folder / "model").is_dir():
        raise UserError(f"{folder / 'model'}: the checkpoint is missing; delete {folder} to train it again")
    checkpoints = Checkpoints(folder / "model")
    params, _ = checkpoints.restore(model.params)
    checkpoints.close()
    return model.replace(params=params)
