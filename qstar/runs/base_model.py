"""The base model of a run: checks before the run, loading or training from scratch, and gates.

A model from scratch has no few-shot ability, so seed rows stand in for pretraining and prompts: gold scratchpads,
mostly short ones, plain and with the answer as a hint. Without hinted rows the model could not rationalise. Gates
check, before any loop runs, that the base model is in the range where the experiment is informative.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qstar import distributed
from qstar.errors import UserError, require, within
from qstar.mesh import parameter_table, shardings
from qstar.models import decoder
from qstar.models.config import ModelConfig, preset
from qstar.models.encdec import EncDecConfig
from qstar.models.hf import read_config
from qstar.models.hf_config import from_hf
from qstar.models.hub import resolve
from qstar.models.model import Model, load
from qstar.runs.context import RunContext
from qstar.runs.folder import check_run, once_json, stable_seed
from qstar.runs.rollouts import check_lengths, sample_rollouts
from qstar.runs.settings import Gate, check_keys, narrowed
from qstar.runs.stages import Stage, TrainSettings, check_trainable, fine_tune
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.tasks.prompts import formatted
from qstar.text.packing import Example
from qstar.text.tokenizer import Tokenizer, char_tokenizer
from qstar.train.loop import Diverged
from qstar.train.state import sharded_jit
from qstar.types import Rollout

# How a pretrained model is run may be chosen; what it is follows from its weights.
RUN_OPTIONS = {"dtype", "attention", "remat", "scan_unroll", "piece_tokens"}


# ---------------------------------------------------------------------------------------------- checks before a run


def checked(ctx: RunContext, loops: Collection[Any]) -> Model:
    """Looks for mistakes in a run before it writes anything; returns the `architecture`. `loops`: the arms' settings.

    Raises UserError if the folder holds another run, data are faulty or missing, the model cannot be used, or rows or
    prompts are too long.
    """
    # In the order of their cost: reading the problems and the model's weights takes longest.
    check_run(ctx.workdir, ctx.config.to_dict())
    model_options(ctx)
    _check_problems(ctx, loops)
    start = architecture(ctx)
    if ctx.config.model.get("path"):
        ctx.task = formatted(ctx.task, ctx.tokenizer, ctx.prompt_format)
    else:
        # A model from scratch reads neither instructions nor examples: its prompts are those of its seed rows.
        given = ctx.prompt_format.format
        require((given in ("auto", "plain"), f"config.task.format={given} is for pretrained models; leave it out"))
        seed_examples(ctx)
    _check_trainable(ctx, start, loops)
    _check_room(ctx, start, loops)
    return start


def _check_problems(ctx: RunContext, loops: Collection[Any]) -> None:
    evaluation = ctx.settings.evaluate
    found = {"train": [p for loop in loops for p in ctx.task.pool(1, ctx.seed, loop.problems_per_iter)]}
    # A run that compares its loops on validation ends with a test of the best one (`Arm.finish`).
    for split in ("val", "test") if evaluation.split == "val" else (evaluation.split,):
        found[split] = ctx.task.problems(split)
    for split, problems in found.items():
        fault = f"config.task: {ctx.task.name} has no problems in its split {split!r}; give it more data"
        require((bool(problems), fault))


def _check_trainable(ctx: RunContext, start: Model, loops: Collection[Any]) -> None:
    with within("config.train."):
        check_trainable(start.config, ctx.settings.train)
    if isinstance(start.config, EncDecConfig):
        updates = [update for x in loops for update in (*getattr(x, "verifiers", ()), getattr(x, "update", "sft"))]
        update = next((update for update in updates if update != "sft"), "")
        line = f"config.model.path={ctx.config.model.path}: an encoder-decoder (T5) cannot be trained by {update!r}"
        require((not update, f"{line} (only by fine-tuning); leave that arm out, or take a decoder"))


def _check_room(ctx: RunContext, start: Model, loops: Collection[Any]) -> None:
    if any(getattr(loop, "seed_share", 0) for loop in loops):
        check_fits(ctx.hinted_seeds(), ctx.settings.train.row_length, "train")
    length, evaluation = ctx.settings.sample.max_new_tokens, ctx.settings.evaluate
    # Checked before the run: an evaluation would find a prompt that is too long only after the training.
    problems = ctx.task.problems(evaluation.split)[: evaluation.limit or None]
    few_shot = any(loop.few_shot_at_sample for loop in loops)
    for hinted in {False, evaluation.hinted}:
        check_lengths(start, ctx.task, problems, length, hinted=hinted, few_shot=few_shot)
    for loop in loops:
        problems = ctx.task.pool(1, ctx.seed, loop.problems_per_iter)
        for hinted in {False, getattr(loop, "rationalize", False)}:
            check_lengths(start, ctx.task, problems, length, hinted=hinted, few_shot=loop.few_shot_at_sample)


def check_fits(examples: Sequence[Example], row_length: int, section: str) -> None:
    """Raises UserError unless all examples fit into the rows of a config section."""
    longest = max(map(len, examples), default=0)
    fault = f"config.{section}.row_length={row_length} is too short: the longest seed row has {longest} tokens"
    require((longest <= row_length, fault))


# --------------------------------------------------------------------------------------------- architecture, weights


def model_options(ctx: RunContext) -> tuple[str, str, dict[str, Any]]:
    """Returns local folder, preset and the other entries of `config.model`; reads nothing large, but may download.

    Raises UserError for an entry that this kind of model does not have, or no such model folder.
    """
    options = dict(ctx.settings.model)
    path, name, _ = model_folder(options), options.pop("preset", ""), options.pop("revision", "")
    options.pop("path", None)
    check_keys(ModelConfig, {k: v for k, v in options.items() if not (k == "dtype" and path)}, "model")
    if path:
        fixed = next(iter(sorted(options.keys() - RUN_OPTIONS)), "")
        free = ", ".join(sorted(RUN_OPTIONS))
        require((not fixed, f"config.model.{fixed} is fixed by the weights of {path}; there you can set {free}"))
        # Outside the condition below: it raises for a folder that does not exist, before any data is read.
        encoder_decoder = is_encoder_decoder(path)
        why = "config.model.attention: a T5 has relative biases, which only XLA's attention supports; leave it out"
        require((not ("attention" in options and encoder_decoder), why))
        why = "config.model.piece_tokens: pieces are of thoughts, which a T5 does not have; leave it out"
        require((not ("piece_tokens" in options and encoder_decoder), why))
    ends = "config.model.eos_id: a model from scratch ends its texts as its tokenizer does; leave it out"
    require(
        (bool(path or name), "config.model: neither path (a model folder) nor preset is set; set one of them"),
        (bool(path) or "eos_id" not in options, ends),
    )
    return path, name, options


def model_folder(section: Mapping[str, Any]) -> str:
    """Returns the local folder of `path` and `revision` of a config's `model` section, fetched if it is a hub name; or ""."""
    path, revision = section.get("path", ""), section.get("revision", "")
    require((path or not revision, "config.model.revision belongs to a hub name in config.model.path; set that, too"))
    return str(resolve(path, revision)) if path else ""


def is_encoder_decoder(path: str) -> bool:
    """Whether a model folder holds a T5; only its config.json is read."""
    return isinstance(from_hf(read_config(path), where=f"{path}/config.json"), EncDecConfig)


def architecture(ctx: RunContext) -> Model:
    """Returns the pretrained model, or the preset with random weights; sets the run's tokenizer. Writes nothing.

    Raises UserError: see `model_options`; no weights, no tokenizer.
    """
    model = loaded_or_random(ctx, char_tokenizer(ALPHABET, pad=PAD, eos=EOS))
    if model.tokenizer is None:  # of a folder: a preset has the one above
        path = ctx.config.model.path
        raise UserError(f"config.model.path={path}: runs need a tokenizer, and this folder has none of its files")
    ctx.tokenizer = model.tokenizer
    return model


def loaded_or_random(ctx: RunContext, tokenizer: Tokenizer | None = None) -> Model:
    """Returns the model of `config.model`: its weights, or a preset with random ones for the text of `tokenizer`."""
    path, name, options = model_options(ctx)
    if path:
        model = load(path, mesh=ctx.mesh, dtype=options.pop("dtype", None) or None)
        section = ctx.settings.model
        source = section["path"] + (f"@{section['revision']}" if section.get("revision") else "")
        return model.replace(config=model.config.replace(**options), source=source)
    assert tokenizer is not None
    size, least = options.setdefault("vocab_size", tokenizer.vocab_size), tokenizer.vocab_size
    line = f"config.model.vocab_size={size} is less than the {least} tokens of the text; leave it out"
    require((size >= least, line))
    config = preset(name, eos_id=tokenizer.eos_id, **options)
    # Under jit, sharded by the table: on a mesh, no device ever holds the whole model.
    init = sharded_jit(functools.partial(decoder.init, config), ctx.mesh, decoder.PARAM_AXES)
    params = init(jax.random.key(stable_seed(ctx.seed, "init")))
    return Model(config, params, tokenizer, ctx.mesh)


def show_parameters(ctx: RunContext, model: Model) -> None:
    """Prints the parameter table: path, shape, sharding, bytes per device."""
    if not distributed.is_first():
        return
    if ctx.mesh is not None:
        where = shardings(model.params, decoder.PARAM_AXES, ctx.mesh)
    else:
        where = jax.tree.map(lambda x: x.sharding, model.params)
    ctx.console.print(parameter_table(model.params, where), markup=False, highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------- training from scratch


def prepare(ctx: RunContext, model: Model) -> Model:
    """Returns M: the pretrained `architecture` as it is, or the preset trained on seed rows, its gates checked.

    Raises UserError for a gate that does not hold, TrainingFailed if training diverged.
    """
    show_parameters(ctx, model)
    if not ctx.config.model.path:
        model = train_on_seeds(ctx, model)
        # Gates bound what the seed rows have taught; a pretrained model is taken as it is.
        check_gates(ctx, ctx.workdir / "base", lambda: measure_gates(ctx, model))
    return model


def seed_examples(ctx: RunContext) -> list[Example]:
    """Returns the rows that the base is trained on; raises UserError for none, or one that is longer than a row."""
    examples = [ctx.seed_example(p, hinted) for p, hinted in ctx.task.seeds()]
    why = f"config.model: task {ctx.task.name} has no seed rows to train from scratch on; set config.model.path"
    require((bool(examples), why))
    check_fits(examples, ctx.settings.base.row_length, "base")
    return examples


def train_on_seeds(ctx: RunContext, model: Model) -> Model:
    """Trains on all seed rows, plain and hinted, uniformly."""
    examples = seed_examples(ctx)
    train = functools.partial(fine_tune, model, examples)
    return train_base(ctx, train, TrainSettings, f"{len(examples)} seed rows, ")


def train_base(
    ctx: RunContext, train: Callable[[Stage], tuple[Model, dict[str, Any]]], settings: type, data: str = ""
) -> Model:
    """Runs the stage WORKDIR/base with `config.base`, read as `settings`; `data` describes what it is trained on.

    Raises TrainingFailed if training diverged.
    """
    base = ctx.settings.base
    ctx.say(f"\n[bold]base[/bold]: {data}{base.steps} steps")
    began, seed = time.perf_counter(), stable_seed(ctx.seed, "base")
    folder, update = ctx.workdir / "base", narrowed(settings, base)
    opened = ctx.stage(folder, update, steps=base.steps, seed=seed, bar="base", arm="base")
    with within(f"config.base.lr={base.lr}: ", Diverged), opened as stage:
        model, done = train(stage)
    ctx.say(f"  loss {done['loss'] or 0:.4f}, {time.perf_counter() - began:.0f} s")
    return model


# ------------------------------------------------------------------------------------------------------------ gates


def check_gates(ctx: RunContext, folder: Path, measure: Callable[[], dict[str, float]]) -> None:
    """Compares the result of `measure` ({metric: value}) with the config's gates, once (FOLDER/gates.json).

    A gate reads e.g. {"metric": "hinted_accuracy/3", "min": 0.6, "why": ..., "stop": True}. Raises UserError if one
    with stop=True does not hold.
    """
    gates = ctx.settings.gates
    if not gates:
        return
    # Kept in a file: a resumed run does not sample again, and decides the same.
    found = once_json(folder / "gates.json", lambda: _compare(gates, measure()))
    rows = [
        {"gate": k, "value": g["value"], "limit": g["limit"], "holds": "yes" if g["ok"] else "NO"}
        for k, g in found.items()
    ]
    ctx.table("gates of the base", rows)
    for name, g in found.items():
        line = f"gate {name}: {g['metric']} is {g['value']:.3f}, wanted {g['limit']}: {g['why']}"
        require((g["ok"] or not gates[name].stop, line))


def _compare(gates: dict[str, Gate], values: dict[str, float]) -> dict[str, Any]:
    out = {}
    for name, gate in gates.items():
        known = f"there are {', '.join(sorted(values)) or 'none'}"
        require((gate.metric in values, f"config.gates.{name}.metric={gate.metric!r} was not measured; {known}"))
        value = values[gate.metric]
        bounds = {"at least": gate.min, "at most": gate.max}
        limit = ", ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        ok = (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
        out[name] = {"metric": gate.metric, "value": value, "limit": limit, "ok": bool(ok), "why": gate.why}
    return out


def measure_gates(ctx: RunContext, model: Model) -> dict[str, float]:
    """Returns the metrics that the gates name."""
    # On validation problems: the test problems must not decide whether a run goes on.
    problems, folder = ctx.task.problems("val"), ctx.workdir / "base" / "gates"
    sample = functools.partial(sample_rollouts, model, ctx.task, problems, ctx.settings.sample, folder=folder)
    rows = {hinted: sample(hinted=hinted, stage="hinted" if hinted else "plain") for hinted in (False, True)}
    return {gate.metric: _gate_value(rows, gate.metric) for gate in ctx.settings.gates.values()}


def _gate_value(rows: dict[bool, list[Rollout]], metric: str) -> float:
    name, _, group = metric.partition("/")
    mine = [r for r in rows[name.startswith("hinted")] if r.group == group or not group]
    if name == "hinted_valid":
        mine = [r for r in mine if r.correct]
        return sum(bool(r.valid) for r in mine) / max(1, len(mine))
    return sum(r.correct for r in mine) / max(1, len(mine))
