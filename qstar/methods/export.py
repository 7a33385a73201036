"""Models of finished runs: parameters of an arm and iteration, restored and written in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from qstar import tree
from qstar.errors import UserError, require, unknown
from qstar.methods import pairs, quiet_star
from qstar.methods.quiet_data import QuietContext
from qstar.methods.rl import RLContext
from qstar.methods.v_star import VStarContext
from qstar.methods.verifier import KINDS
from qstar.models.heads import add_value_head
from qstar.models.hf import read_json, refuse_foreign
from qstar.models.model import Model, save
from qstar.runs import base_model
from qstar.runs.access import read_run_config
from qstar.runs.context import RunContext
from qstar.runs.stages import restore

CONTEXTS: dict[str, type[RunContext]] = {"star": RunContext, "rl": RLContext, "v_star": VStarContext}
CONTEXTS |= {"quiet_star": QuietContext, **pairs.CONTEXTS}


def export_model(run: Path, arm: str | None, iteration: int | None, out: Path, verifier: str = "") -> Path:
    """Writes the model of a run's arm and iteration to `out`; see `trained_model`."""
    # Checked first: restoring a large model takes long, and then a refused folder would waste it.
    refuse_foreign(out.resolve())
    save(trained_model(run, arm, iteration, verifier), out)
    return out


def trained_model(run: Path, arm: str | None = None, iteration: int | None = None, verifier: str = "") -> Model:
    """Returns the model of an arm and iteration (default: the only arm, its last iteration; 0 is the base or G_SFT).

    `verifier` ("dpo", "orm", "prm") names one of a V-STaR run, instead of its generator. Raises UserError if there is
    no such run, arm or iteration; the message names those that there are.
    """
    config = _config_of(run)
    arms = sorted(config.arms.keys())
    require(
        (config.method in CONTEXTS, f"--run={run}: runs of method {config.method!r} have no models to export"),
        (bool(arms), f"--run={run}: its config.json names no arms"),
        (not verifier or config.method == "v_star", f"--run={run}: only V-STaR has verifiers; leave --verifier out"),
    )
    if arm is None and len(arms) > 1 and iteration != 0:
        raise UserError(f"--run={run}: has the arms {', '.join(arms)}; name one with --arm")
    arm = arms[0] if arm is None else arm
    if arm not in arms:
        raise unknown(f"--run={run}: arm {arm!r}", arm, arms)
    # The exporting machine may have other devices than the one that trained.
    config.mesh = "data=1,fsdp=-1"
    ctx = CONTEXTS[config.method].make(config, run, Console(quiet=True))
    if isinstance(ctx, QuietContext):
        return _thinking_model(ctx, arm, iteration)
    return _iteration_model(ctx, arm, iteration, verifier)


def _config_of(run: Path) -> ConfigDict:
    if not (run / "config.json").is_file():
        raise UserError(f"--run={run}: holds no config.json, so it is no run; give the --workdir of a `qstar train`")
    raw = read_json(run / "config.json")
    if "method" not in raw or not isinstance(raw.get("arms"), dict):
        raise UserError(f"--run={run}: its config.json is not that of a run; give the --workdir of a `qstar train`")
    return ConfigDict(read_run_config(run, "--run"))


def _iteration_model(ctx: RunContext, arm: str, iteration: int | None, verifier: str) -> Model:
    if verifier and verifier not in KINDS:
        raise unknown(f"--verifier={verifier}", verifier, KINDS)
    zero, base = ("G_SFT", "g_sft") if isinstance(ctx, VStarContext) else ("base", "base")
    home = ctx.workdir / arm / "verifiers" / verifier if verifier else ctx.workdir / arm / "checkpoints"
    # summary.json is the done-marker of a stage: a checkpoint without it may be of a run that still trains.
    done = sorted(int(p.parent.name[5:]) for p in home.glob("iter_*/summary.json"))
    done = done if verifier else [0, *done]
    what = f"{verifier} verifier" if verifier else "generator" if isinstance(ctx, VStarContext) else ""
    line = f"--run={ctx.workdir}: arm {arm!r} has no finished {what}"
    require((bool(done), f"{line}; let `qstar train` go on, or give its config.arms.{arm}.verifiers"))
    iteration = done[-1] if iteration is None else iteration
    line += f"{' of ' if what else ''}iteration {iteration}"
    require((iteration in done, f"{line}; there are {', '.join(map(str, done))} (0: {zero})"))
    model = ctx.load() if isinstance(ctx, pairs.PairContext) else base_model.architecture(ctx)
    if isinstance(ctx, VStarContext):
        model = model.replace(params=tree.cast(model.params, np.float32))
    if verifier in ("orm", "prm"):
        model = add_value_head(model, verifier)
    if iteration or verifier:
        return restore(model, home / f"iter_{iteration:03d}")
    # A pretrained base is never written to the run folder; G_SFT and a base from scratch are.
    if base == "base" and (ctx.config.model.path or isinstance(ctx, pairs.PairContext)):
        return model
    return _first(model, ctx.workdir, base, zero)


def _thinking_model(ctx: QuietContext, arm: str, iteration: int | None) -> Model:
    model = base_model.loaded_or_random(ctx, ctx.corpus.tokenizer)
    line = f"--run={ctx.workdir}: Quiet-STaR has no iterations; leave --iteration out (0: base)"
    require((iteration in (None, 0), line))
    if iteration is None:
        # The template of the restore needs thought vectors and mixing head, which the base does not have.
        model = quiet_star.with_thoughts(ctx, ctx.arm_config(quiet_star.QuietConfig, arm), model)
        return _first(model, ctx.workdir, arm, arm)
    return _first(model, ctx.workdir, "base", "base") if ctx.settings.base.steps else model


def _first(model: Model, run: Path, folder: str, what: str) -> Model:
    trained = (run / folder / "summary.json").is_file()
    require((trained, f"--run={run}: {what} is not trained yet; let `qstar train` go on first"))
    return restore(model, run / folder)
