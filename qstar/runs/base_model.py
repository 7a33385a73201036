"""The model M that STaR starts from: pretrained weights, or a small model trained from scratch on seed rows.

A model from scratch has no few-shot ability, so seed rows stand in for pretraining and prompts: gold scratchpads,
mostly short ones, plain and with the answer as a hint. Hinted rows are what makes rationalisation possible at all.
Gates check that the base is in the window where the experiment means something, before any loop is paid for.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import jax

from qstar import distributed
from qstar.errors import TrainingFailed, UserError, require
from qstar.mesh import parameter_table, shardings
from qstar.runs.context import RunContext
from qstar.runs.checks import check_fits, check_model, check_problems, check_room
from qstar.runs.gates import check_gates
from qstar.runs.rollouts import Rollout, sample_rollouts
from qstar.runs.folder import check_run, stable_seed
from qstar.runs.settings import check_keys
from qstar.runs.supervised import fine_tune
from qstar.models import decoder
from qstar.models.config import ModelConfig, preset
from qstar.models.encdec import EncDecConfig
from qstar.models.hf import read_config
from qstar.models.hf_config import from_hf
from qstar.models.model import Model, load
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.packing import Example
from qstar.text.tokenizer import Tokenizer, char_tokenizer
from qstar.train.loop import Diverged
from qstar.train.state import init_params

RUN_OPTIONS = {"dtype", "attention", "remat", "scan_unroll"}  # of a pretrained model: how it is run, not what it is


def checked(ctx: RunContext, config: Any, loops: Collection[Any]) -> Model:
    """Looks for whatever is wrong with a run before anything of it is written; returns the `architecture`.

    Args:
      config: the whole config, which the run folder must hold if it holds one. loops: the arms' `Loop` settings.

    Raises:
      UserError: see `check_run`, `model_options`, `check_problems`, `architecture`, `check_model` and `check_room`.
    """
    check_run(ctx.workdir, config.to_dict())
    model_options(ctx)
    check_problems(ctx, loops)
    start = architecture(ctx)
    check_model(ctx, start, loops)
    check_room(ctx, start, loops)
    return start


def prepare(ctx: RunContext, model: Model) -> Model:
    """Returns M: the pretrained model as it is; or the preset trained on the task's seed rows, its gates checked.

    Args:
      model: from `architecture`.

    Raises:
      UserError: a gate that does not hold.
    """
    show_parameters(ctx, model)
    if not ctx.config.model.path:
        model = train_base(ctx, model)
        check_gates(ctx.console, ctx.workdir / "base", ctx.gates, lambda: measure_gates(ctx, model))
    return model


def model_options(ctx: Any) -> tuple[str, str, dict[str, Any]]:
    """Returns path, preset and the other entries of `config.model`; nothing large is read.

    Raises:
      UserError: an entry that makes no sense there, or no such model folder.
    """
    options = ctx.config.model.to_dict()
    path, name = options.pop("path", ""), options.pop("preset", "")
    check_keys(ModelConfig, {k: v for k, v in options.items() if not (k == "dtype" and path)}, "model")
    if path:
        fixed = next(iter(sorted(options.keys() - RUN_OPTIONS)), "")
        free = ", ".join(sorted(RUN_OPTIONS))
        require((not fixed, f"config.model.{fixed} is fixed by the weights of {path}; there you can set {free}"))
        encoder_decoder = is_encoder_decoder(path)  # names a folder that is not there, before any data is read
        why = "config.model.attention: a T5 has relative biases, which only XLA's attention knows; leave it out"
        require((not ("attention" in options and encoder_decoder), why))
    require((bool(path or name), "config.model: neither path (a model folder) nor preset is set; set one of them"))
    return path, name, options


def is_encoder_decoder(path: str) -> bool:
    """Whether a model folder holds a T5; only its config.json is read."""
    return isinstance(from_hf(read_config(path), where=f"{path}/config.json"), EncDecConfig)


def architecture(ctx: RunContext) -> Model:
    """Returns the pretrained model, or the preset with random weights; sets the run's tokenizer. Writes nothing.

    Raises:
      UserError: see `model_options`; no weights, no tokenizer, no seed rows.
    """
    model = loaded_or_random(ctx, char_tokenizer(ALPHABET, pad=PAD, eos=EOS))
    path = ctx.config.model.get("path")
    if path and model.tokenizer is None:
        raise UserError(f"config.model.path={path}: STaR needs a tokenizer, and this folder has no tokenizer files")
    ctx.tokenizer = model.tokenizer
    if not path:
        seed_examples(ctx)
    return model


def loaded_or_random(ctx: Any, tokenizer: Tokenizer) -> Model:
    """Returns the model of `config.model`: its weights, or a preset with random ones for the text of `tokenizer`.

    Args:
      ctx: of any method: it has `config`, `mesh` and `seed`.
    """
    path, name, options = model_options(ctx)
    if path:
        model = load(path, mesh=ctx.mesh, dtype=options.pop("dtype", None) or None)
        return model.replace(config=model.config.replace(**options))
    options.setdefault("vocab_size", tokenizer.vocab_size)
    size, least = options["vocab_size"], tokenizer.vocab_size
    require(
        (size >= least, f"config.model.vocab_size={size} is less than the {least} tokens of the text; leave it out")
    )
    config = preset(name, eos_id=tokenizer.eos_id, **options)
    params = init_params(
        lambda key: decoder.init(config, key),
        seed=stable_seed(ctx.seed, "init"),
        mesh=ctx.mesh,
        table=decoder.PARAM_AXES,
    )
    return Model(config, params, tokenizer, ctx.mesh)


def seed_examples(ctx: RunContext) -> list[Example]:
    """Returns the rows that the base is trained on.

    Raises:
      UserError: there are none, or one is longer than a row.
    """
    examples = [ctx.seed_example(p, hinted) for p, hinted in ctx.task.seeds()]
    if not examples:
        raise UserError(
            f"config.model: task {ctx.task.name} has no seed rows to train from scratch on; set config.model.path"
        )
    check_fits(examples, ctx.base_settings.row_length, "base")
    return examples


def train_base(ctx: RunContext, model: Model) -> Model:
    """Trains on all seed rows, plain and hinted, uniformly.

    Raises:
      UserError: training diverged.
    """
    steps, settings, examples = ctx.base_steps, ctx.base_settings, seed_examples(ctx)
    ctx.say(f"\n[bold]base[/bold]: {len(examples)} seed rows, {steps} steps")
    began = time.perf_counter()
    try:
        with ctx.bar("base", steps) as progress:
            model, done = fine_tune(
                model,
                examples,
                settings,
                steps=steps,
                seed=stable_seed(ctx.seed, "base"),
                folder=ctx.workdir / "base",
                writer=ctx.writer,
                label={"arm": "base"},
                progress=progress,
            )
    except Diverged as e:
        raise TrainingFailed(f"config.base.lr={settings.lr}: {e}") from None
    ctx.say(f"  loss {done['loss'] or 0:.4f}, {time.perf_counter() - began:.0f} s")
    return model


def measure_gates(ctx: RunContext, model: Model) -> dict[str, float]:
    """Returns the metrics that the gates name, on pool problems (held-out ones stay unseen)."""
    problems = ctx.task.problems("val")
    rows: dict[bool, list[Rollout]] = {}
    for hinted in (False, True):
        rows[hinted] = sample_rollouts(
            model,
            ctx.task,
            problems,
            ctx.sample_settings,
            k=1,
            hinted=hinted,
            iteration=0,
            seed=0,
            folder=ctx.workdir / "base" / "gates",
            stage="hinted" if hinted else "plain",
        )
    return {gate.metric: _gate_value(rows, gate.metric) for gate in ctx.gates.values()}


def _gate_value(rows: dict[bool, list[Rollout]], metric: str) -> float:
    name, _, group = metric.partition("/")
    mine = [r for r in rows[name.startswith("hinted")] if r.group == group or not group]
    if name == "hinted_valid":
        mine = [r for r in mine if r.correct]
        return sum(bool(r.valid) for r in mine) / max(1, len(mine))
    return sum(r.correct for r in mine) / max(1, len(mine))


def show_parameters(ctx: RunContext, model: Model) -> None:
    """Prints the parameter table: path, shape, sharding, bytes per device."""
    if not distributed.is_first():
        return
    where = shardings(model.params, decoder.PARAM_AXES, ctx.mesh) if ctx.mesh is not None else None
    if where is None:
        where = jax.tree.map(lambda x: x.sharding, model.params)
    ctx.console.print(parameter_table(model.params, where), markup=False, highlight=False, soft_wrap=True)
