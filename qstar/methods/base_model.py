"""The model M that STaR starts from: pretrained weights, or a small model trained from scratch on seed rows.

A model from scratch has no few-shot ability, so seed rows stand in for pretraining and prompts: gold scratchpads,
mostly short ones, plain and with the answer as a hint. Hinted rows are what makes rationalisation possible at all.
Gates check that the base is in the window where the experiment means something, before any loop is paid for.
"""

from __future__ import annotations

import time
from typing import Any

import jax

from qstar.errors import UserError
from qstar.mesh import parameter_table, shardings
from qstar.methods.arms import Context, settings_from
from qstar.methods.rollouts import Rollout, attempt
from qstar.methods.run_folder import once_json, stable_seed
from qstar.methods.supervised import TrainSettings, fine_tune
from qstar.models import decoder
from qstar.models.config import preset
from qstar.models.model import Model, load
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.tokenizer import char_tokenizer
from qstar.train.metrics import show_table
from qstar.train.state import init_params


def prepare(ctx: Context) -> Model:
    """Returns M: loads `config.model.path`, or trains the preset from scratch on the task's seed rows and checks the gates.

    Raises:
      UserError: no weights, no tokenizer, no seed rows, or a gate that does not hold.
    """
    model = architecture(ctx)
    show_parameters(ctx, model)
    if not ctx.config.model.path:
        model = train_base(ctx, model)
        check_gates(ctx, model)
    return model


def architecture(ctx: Context) -> Model:
    """Returns the pretrained model, or the preset with random weights; sets the run's tokenizer."""
    options = ctx.config.model.to_dict()
    path, name = options.pop("path"), options.pop("preset")
    if path:
        model = load(path, mesh=ctx.mesh, dtype=options.pop("dtype", None) or None)
        model = model.replace(config=model.config.replace(**options))
        if model.tokenizer is None:
            raise UserError(f"config.model.path={path}: STaR needs a tokenizer, and this folder has no tokenizer files")
    else:
        model = from_scratch(ctx, name, options)
    ctx.tokenizer = model.tokenizer
    return model


def from_scratch(ctx: Context, name: str, options: dict[str, Any]) -> Model:
    """Returns a randomly initialised preset with a character tokenizer."""
    tokenizer = char_tokenizer(ALPHABET, pad=PAD, eos=EOS)
    options.setdefault("vocab_size", tokenizer.vocab_size)
    config = preset(name, eos_id=tokenizer.eos_id, **options)
    params = init_params(
        lambda key: decoder.init(config, key), seed=stable_seed(ctx.seed, "init"), mesh=ctx.mesh, table=decoder.PARAM_AXES
    )
    return Model(config, params, tokenizer, ctx.mesh)


def train_base(ctx: Context, model: Model) -> Model:
    """Trains on all seed rows, plain and hinted, uniformly."""
    options = ctx.config.base.to_dict()
    steps = options.pop("steps")
    settings = settings_from(TrainSettings, options, "base")
    examples = [ctx.seed_example(p, hinted) for p, hinted in ctx.task.seeds()]
    if not examples:
        raise UserError(f"config.model: task {ctx.task.name} has no seed rows to train from scratch on; set config.model.path")
    ctx.say(f"\n[bold]base[/bold]: {len(examples)} seed rows, {steps} steps")
    began = time.perf_counter()
    with ctx.bar("base", steps) as progress:
        model, done = fine_tune(
            model, examples, settings, steps=steps, seed=stable_seed(ctx.seed, "base"), folder=ctx.workdir / "base",
            writer=ctx.writer, label={"arm": "base"}, progress=progress,
        )
    ctx.say(f"  loss {done['loss'] or 0:.4f}, {time.perf_counter() - began:.0f} s")
    return model


def check_gates(ctx: Context, model: Model) -> None:
    """Measures the base on pool problems (held-out ones stay unseen) against `config.gates`, writes base/gates.json.

    A gate reads e.g. {"metric": "hinted_accuracy/3", "min": 0.6, "why": ..., "stop": True}.

    Raises:
      UserError: a gate with stop=True does not hold.
    """
    gates = ctx.config.gates.to_dict()
    if not gates:
        return
    found = once_json(ctx.workdir / "base" / "gates.json", lambda: measure_gates(ctx, model, gates))
    rows = [{"gate": k, "value": g["value"], "limit": g["limit"], "holds": "yes" if g["ok"] else "NO"} for k, g in found.items()]
    show_table(ctx.console, "gates of the base", rows)
    failed = [(k, g) for k, g in found.items() if not g["ok"] and gates[k].get("stop", True)]
    if failed:
        name, g = failed[0]
        raise UserError(f"gate {name}: {g['metric']} is {g['value']:.3f}, wanted {g['limit']}: {g['why']}")


def measure_gates(ctx: Context, model: Model, gates: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns {gate: {metric, value, limit, ok, why}}."""
    problems = ctx.task.problems("val")
    rows: dict[bool, list[Rollout]] = {}
    for hinted in (False, True):
        rows[hinted] = attempt(
            model, ctx.task, problems, ctx.sample_settings, k=1, hinted=hinted, iteration=0, seed=0,
            folder=ctx.workdir / "base" / "gates", stage="hinted" if hinted else "plain",
        )
    out = {}
    for name, gate in gates.items():
        value = _gate_value(rows, gate["metric"])
        low, high = gate.get("min", 0.0), gate.get("max", 1.0)
        limit = f"at least {low}" if "min" in gate else f"at most {high}"
        out[name] = {"metric": gate["metric"], "value": value, "limit": limit, "ok": low <= value <= high, "why": gate["why"]}
    return out


def _gate_value(rows: dict[bool, list[Rollout]], metric: str) -> float:
    name, _, group = metric.partition("/")
    mine = [r for r in rows[name.startswith("hinted")] if r.group == group or not group]
    if name == "hinted_valid":
        mine = [r for r in mine if r.correct]
        return sum(bool(r.valid) for r in mine) / max(1, len(mine))
    return sum(r.correct for r in mine) / max(1, len(mine))


def show_parameters(ctx: Context, model: Model) -> None:
    """Prints the parameter table: path, shape, sharding, bytes per device."""
    if jax.process_index() != 0:
        return
    where = shardings(model.params, decoder.PARAM_AXES, ctx.mesh) if ctx.mesh is not None else None
    if where is None:
        where = jax.tree.map(lambda x: x.sharding, model.params)
    ctx.console.print(parameter_table(model.params, where), markup=False, highlight=False)
