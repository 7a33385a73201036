"""The programs of a run, from its config: the same steps and samplers that `methods` calls, with abstract arguments.

Nothing is read but the config and, where the model is a folder, its config.json. Lengths that only data know are assumed:
a prompt's and that of a few-shot prefix (`Assumed`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qstar import tree
from qstar.errors import require, unknown
from qstar.mesh import SAMPLING, batch_sharding, make_mesh, replicated
from qstar.methods import star
from qstar.methods.quiet_star import QuietConfig, update
from qstar.methods.v_star import PRESETS, VStarConfig
from qstar.methods.verifier import VerifierSettings, dpo_step, value_step
from qstar.models import heads
from qstar.models.config import SIZES, ModelConfig, preset
from qstar.models.decoder import PARAM_AXES
from qstar.models.hf import read_config
from qstar.models.hf_config import from_hf
from qstar.models.hf_names import abstract_params
from qstar.models.model import Model
from qstar.models.presets import published
from qstar.models.scoring import CHUNK_TOKENS, next_logprobs
from qstar.models.thought_config import ThoughtConfig
from qstar.plan import flops
from qstar.plan.program import Program, local_bytes
from qstar.runs.rollouts import SampleSettings
from qstar.runs.settings import check_keys, settings_from
from qstar.runs.stages import TrainSettings, UpdateSettings, fresh_adapters, sft_step
from qstar.sample import sampler as S
from qstar.sample.batching import FILL_SHARE, default_slots, padded_length, state_shardings
from qstar.sample.logits import SamplingParams
from qstar.thoughts import measure
from qstar.train.state import abstract, abstract_state, optimizer_for
from qstar.types import Batch, Graded, Preference


@dataclasses.dataclass(frozen=True)
class Assumed:
    """Lengths that only the data know, in tokens."""

    prompt: int = 256
    prefix: int = 0  # few-shot text that all prompts share


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on a slice."""

    config: Any
    mesh: Mesh
    assumed: Assumed

    def spec(self, shape: tuple[int, ...], dtype: Any, *, split: bool = False) -> jax.ShapeDtypeStruct:
        """An abstract array: one copy on every chip, or rows split as `put_whole_batch` would."""
        num_shards = self.row_ways
        where = batch_sharding(self.mesh) if split and shape[0] % num_shards == 0 else replicated(self.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    @property
    def row_ways(self) -> int:
        """Into how many parts rows are split."""
        return self.mesh.size // self.mesh.shape["tensor"]

    def batch(self, rows: int, length: int) -> Batch:
        """Abstract training rows."""
        ids = self.spec((rows, length), jnp.int32, split=True)
        return Batch(ids, self.spec((rows, length), jnp.float32, split=True), ids, ids)

    def like(self, f: Callable[..., Any], *args: Any) -> Any:
        """Shapes and shardings of what f makes of abstract parameters."""
        return abstract(jax.eval_shape(f, *args), self.mesh, PARAM_AXES)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config."""
        found = self.config.get(name)
        return found.to_dict() if found else {}

    def notes(self, rows: int, accumulate: int = 1) -> tuple[str, ...]:
        """What is wasted: rows that do not divide over the chips are computed by all of them."""
        each, split = rows // accumulate, self.row_ways
        if each % split == 0:
            return ()
        what = f"{each} rows" + (f" of a micro-batch (accumulate={accumulate})" if accumulate > 1 else "")
        return (f"{what} do not divide over data x fsdp = {split}: every chip computes all of them",)


def programs(config: Any, devices: Any, assumed: Assumed) -> list[Program]:
    """Returns the programs of a config on devices, those of training first.

    Raises:
      UserError: a config that is wrong, or whose method cannot be planned.
    """
    from qstar.plan import guided

    case = Case(config, make_mesh(config.mesh, list(devices)), assumed)
    known = {
        "star": _star,
        "v_star": _v_star,
        "quiet_star": _quiet_star,
        "guided_cot": guided.programs,
        "rl": guided.rl,
    }
    method = config.get("method")
    if method not in known:
        raise unknown(f"config.method={method!r}", str(method), known)
    return list(known[method](case))


def named(found: list[Program], only: str) -> list[Program]:
    """Returns the programs whose names hold `only`.

    Raises:
      UserError: none does.
    """
    names = "; ".join(p.name for p in found)
    out = [p for p in found if only in p.name]
    require((bool(out), f"--only={only}: in the name of no program of this config; they are: {names}"))
    return out


# ---------------------------------------------------------------------------------------------------------- models


def abstract_model(case: Case, options: dict[str, Any], where: str = "model") -> Model:
    """Returns the model of a config's section, as `base_model.loaded_or_random` would, without weights or tokenizer."""
    options = dict(options)
    path, name = options.pop("path", ""), options.pop("preset", "")
    require((bool(path or name), f"config.{where}: neither path (a model folder) nor preset is set; set one of them"))
    check_keys(ModelConfig, {k: v for k, v in options.items() if k != "dtype"}, where)
    if path and Path(path).expanduser().is_dir():
        raw = read_config(path)
        config, stored = from_hf(raw, where=str(path)), raw.get("dtype", raw.get("torch_dtype")) or "float32"
    elif path:
        config, stored = published(path)
    else:
        sizes = {k: options.pop(k) for k in list(options) if k in SIZES}
        config, stored = preset(name, **sizes), "float32"
    compute = options.pop("dtype", None) or ("bfloat16" if stored in ("bfloat16", "float16") else "float32")
    config = config.replace(dtype=compute, **options)
    params = tree_cast(abstract_params(config), stored)
    return Model(config, abstract(params, case.mesh, PARAM_AXES), None, case.mesh)


def decoder_model(case: Case) -> Model:
    """`abstract_model` of the config's `model`, which may not be an encoder-decoder: fine-tuning one is not planned."""
    model = abstract_model(case, case.section("model"))
    line = f"config.model.path={case.section('model').get('path')}: plans of this method are for decoders, not for a T5"
    require((isinstance(model.config, ModelConfig), f"{line}; name a decoder"))
    return model


def tree_cast(params: Any, dtype: Any) -> Any:
    """`tree.cast` of abstract arrays."""
    return jax.eval_shape(functools.partial(tree.cast, dtype=jnp.dtype(dtype)), params)


# -------------------------------------------------------------------------------------------------------- programs


def train_program(
    case: Case,
    name: str,
    model: Model,
    settings: UpdateSettings,
    made: tuple[Any, Any],
    batch: Any,
    needed: tuple[float, str],
    roles: dict[str, Any] | None = None,
    resident: dict[str, Any] | None = None,
) -> Program:
    """Returns an update: what `train_stage` would run, on the state that it would make.

    Args:
      made: (optimiser, jitted step). held: what the method keeps beside it, besides the parameters that it starts from.
    """
    tx, step = made
    start = case.like(functools.partial(tree.cast, dtype=jnp.float32), model.params)
    if settings.lora_rank:
        fresh = lambda p: fresh_adapters(model.replace(params=p), settings.lora, 0)  # noqa: E731
        policy, roles = case.like(fresh, model.params), {**(roles or {}), "base": model.params}
        start = {}
    else:
        policy = start
    state = abstract_state({"policy": policy, **(roles or {})}, tx, mesh=case.mesh, table=PARAM_AXES)
    rate = case.spec((), jnp.float32)
    before = {"the base model": model.params}
    if not settings.lora_rank and jax.tree.leaves(start)[0].dtype != jax.tree.leaves(model.params)[0].dtype:
        before["a float32 copy of it"] = start
    return Program(
        name,
        lambda: step.lower(state, batch, rate),
        {"parameters": state.params, "optimiser": state.opt_state, "batch": (batch, state.step, state.rng)},
        {**before, **(resident or {})},
        *needed,
        notes=case.notes(settings.batch_size, settings.accumulate),
        least=kept(case, model.config, settings, batch) + local_bytes(policy),
    )


def kept(case: Case, config: Any, settings: UpdateSettings, batch: Any) -> int:
    """Bytes per chip that a micro-batch of plain rows keeps from the forward pass for the backward one, at least.

    In each layer, of each token: with `remat` its input alone, else what enters a matrix product, too. Attention's scores
    and the vocabulary's are not counted.
    """
    c, rows = config, settings.batch_size // settings.accumulate
    if not isinstance(c, ModelConfig):
        return 0
    length = max(x.shape[-1] for x in jax.tree.leaves(batch) if x.ndim == 2)
    tensor = case.mesh.shape["tensor"]
    heads, mlp = (
        (c.num_heads + 2 * c.num_kv_heads + c.num_heads) * c.head_dim,
        (3 if c.gated_mlp else 2) * c.intermediate_size,
    )
    each = c.hidden_size if c.remat == "block" else 2 * c.hidden_size + (heads + mlp) // tensor
    split = case.row_ways if rows % case.row_ways == 0 else 1
    return rows // split * length * c.num_layers * each * jnp.dtype(c.dtype).itemsize


def sampling(
    case: Case, model: Model, settings: SampleSettings, k: int, requests: int, prefix: int
) -> Iterator[Program]:
    """Yields refill (prefill of a quarter of the slots) and decode, as `batching.stream` runs them."""
    c, P = model.config, padded_length(case.assumed.prompt)
    slots = settings.slots or default_slots(requests)
    group = min(k, max(1, slots // FILL_SHARE))
    N = max(1, slots // FILL_SHARE // group)
    sampler = S.Sampler(c, (c.eos_id or 0,), slots, P, settings.max_new_tokens, c.vocab_size)
    params = abstract(jax.eval_shape(lambda p: S.prepare(p, c), model.params), case.mesh, PARAM_AXES, SAMPLING)
    state = jax.eval_shape(lambda: S.empty_state(sampler))
    where = state_shardings(state, case.mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
    L = padded_length(prefix) if prefix else 0
    replicated_spec = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(case.mesh))  # noqa: E731

    def heads(x: Any) -> jax.ShapeDtypeStruct:
        spec = SAMPLING.spec(("heads", None, None)[: x.ndim], x.shape, case.mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(case.mesh, spec))

    ids = case.spec((L,), jnp.int32)
    shared = jax.tree.map(
        heads, jax.eval_shape(lambda p, i, n: S.prefill_prefix(p, c, i, n), params, ids, jnp.int32(0))
    )
    sampling_params = jax.tree.map(replicated_spec, jax.eval_shape(SamplingParams.make))
    fill = S.PrefillBatch(
        *(case.spec(s, jnp.int32) for s in ((N, P), (N,), (N * group,), (N * group,), (N * group,), (N * group, 2)))
    )
    seed = replicated_spec(jax.eval_shape(lambda: jax.random.key(0)))
    parts = {"parameters": params, "cache": (state, shared)}
    resident = {"the model as trained": model.params}
    yield Program(
        f"sampling: prefill of {N} prompts of {P} tokens" + (f" after a prefix of {L}" if L else ""),
        lambda: S.insert_requests.lower(params, sampler, shared, state, fill, seed, sampling_params),
        parts,
        resident,
        *flops.forward(c, N, P, context=L, predicted=N),
    )
    number, flag = case.spec((), jnp.int32), case.spec((slots,), jnp.bool_)
    context = L + P + settings.max_new_tokens // 2
    yield Program(
        f"sampling: {settings.max_new_tokens} tokens of {slots} rows",
        lambda: S.decode.lower(params, sampler, shared, state, sampling_params, flag, number, number),
        parts,
        resident,
        *flops.forward(
            c, slots * settings.max_new_tokens, 1, context=context, predicted=slots * settings.max_new_tokens
        ),
        steps=settings.max_new_tokens,
    )


def scoring(case: Case, model: Model, length: int) -> Program:
    """Log-probabilities of completions, as `model.logprobs` computes them: reference values of DPO, selection."""
    rows = max(1, CHUNK_TOKENS // length)
    ids = case.spec((rows, length), jnp.int32, split=True)
    return Program(
        f"scoring: {rows} rows of {length} tokens",
        lambda: next_logprobs.lower(model.params, model.config, ids, ids),
        {"parameters": model.params},
        {},
        *flops.forward(model.config, rows, length, predicted=rows * length),
    )


# --------------------------------------------------------------------------------------------------------- methods


def _star(case: Case) -> Iterator[Program]:
    model = decoder_model(case)
    settings = settings_from(TrainSettings, case.section("train"), "train")
    sample = settings_from(SampleSettings, case.section("sample"), "sample")
    batch = case.batch(settings.batch_size, settings.row_length)
    needed = flops.update(model.config, settings.batch_size, settings.row_length, lora=settings.lora_rank > 0)
    yield train_program(case, "fine-tuning", model, settings, sft_step(model.config, settings), batch, needed)
    loops = [_loop(case, star.VariantConfig, star.PRESETS, name) for name in case.config.arms]
    prefix = case.assumed.prefix if any(loop.few_shot_at_sample for loop in loops) else 0
    k = max(loop.k for loop in loops)
    yield from sampling(case, trained(case, model, settings), sample, k, sample.round_size, prefix)


def _loop(case: Case, cls: type, presets: dict[str, Any], name: str) -> Any:
    own = case.config.arms[name].to_dict()
    return settings_from(cls, {**case.section("loop"), **presets[own.pop("preset", "star")], **own}, f"arms.{name}")


def trained(case: Case, model: Model, settings: UpdateSettings) -> Model:
    """Returns the model as a stage of training leaves it: float32, or adapters merged in the dtype as stored."""
    if settings.lora_rank:
        return model
    return model.replace(params=case.like(functools.partial(tree.cast, dtype=jnp.float32), model.params))


def _v_star(case: Case) -> Iterator[Program]:
    model = decoder_model(case)
    settings = settings_from(TrainSettings, case.section("train"), "train")
    sample = settings_from(SampleSettings, case.section("sample"), "sample")
    batch = case.batch(settings.batch_size, settings.row_length)
    needed = flops.update(model.config, settings.batch_size, settings.row_length, lora=settings.lora_rank > 0)
    yield train_program(case, "fine-tuning", model, settings, sft_step(model.config, settings), batch, needed)
    loops = [_loop(case, VStarConfig, PRESETS, name) for name in case.config.arms]
    done = trained(case, model, settings)
    base = {"the model before fine-tuning": model.params}
    for kind in sorted({v for loop in loops for v in loop.verifiers}):
        s = settings_from(VerifierSettings, case.section(kind), kind)
        yield _verifier(case, kind, done, s, base)
    k = max(loop.k for loop in loops)
    yield from sampling(case, done, sample, k, sample.round_size, 0)
    yield scoring(case, done, padded_length(case.assumed.prompt + sample.max_new_tokens))


def _verifier(case: Case, kind: str, model: Model, s: VerifierSettings, resident: dict[str, Any]) -> Program:
    rows, length = s.batch_size, s.row_length
    batch = case.batch(rows, length)
    needed = flops.update(model.config, rows, length, lora=s.lora_rank > 0)
    if kind == "dpo":
        pairs = max(1, length // (2 * case.assumed.prompt))
        two = case.spec((rows, pairs, 2), jnp.float32, split=True)
        preference = Preference(batch, two, case.spec((rows, pairs), jnp.float32, split=True))
        return train_program(case, "DPO", model, s, dpo_step(model.config, s), preference, needed, resident=resident)
    head = lambda p: {**p, "value": {"kernel": jnp.zeros((model.config.hidden_size, 1)), "bias": jnp.zeros((1,))}}  # noqa: E731
    judge = Model(model.config.replace(value_head=kind), case.like(head, model.params), None, case.mesh)
    each = case.spec((rows, length), jnp.float32, split=True)
    graded = Graded(batch, each, each)
    return train_program(case, kind.upper(), judge, s, value_step(judge.config, s), graded, needed, resident=resident)


def _quiet_star(case: Case) -> Iterator[Program]:
    options = case.section("thoughts")
    options.pop("start_text", None)
    options.setdefault("forbidden_ids", ())
    make = ThoughtConfig.parity if options.pop("parity", False) else ThoughtConfig
    thoughts = make(**options)
    model = decoder_model(case)
    length = case.section("data").get("length", 256)
    seen = set()
    for name in case.config.arms:
        recipe = settings_from(QuietConfig, case.config.arms[name].to_dict(), f"arms.{name}")
        own = thoughts.replace(**recipe.thoughts)
        settings = settings_from(UpdateSettings, {**case.section("train"), **recipe.train}, f"arms.{name}.train")
        key = (recipe.thinker, own, settings.batch_size, settings.accumulate, recipe.trains, recipe.teacher)
        if key in seen:
            continue
        seen.add(key)
        yield from _thinking(case, name, model, recipe, own, settings, length)


def _thinking(case, name, model, recipe, thoughts, settings, length) -> Iterator[Program]:
    config = model.config.replace(thoughts=thoughts)
    thinks = recipe.thinker != "none"
    attach = lambda p, k: heads.attach_thoughts(p, config, k, 0)  # noqa: E731
    params = case.like(attach, model.params, jax.random.key(0)) if thinks else model.params
    start = model.replace(config=config, params=params)
    tx = optimizer_for(settings.optimiser(), f"^policy/.*({recipe.trains})")
    teacher = config.replace(thoughts=thoughts) if recipe.teacher else None
    step = update(config, recipe.thinker, thoughts.thought_tokens, tx, settings, teacher, recipe.teacher_weight)
    roles = (
        {"teacher": case.like(attach, trained(case, model, settings).params, jax.random.key(0))} if teacher else None
    )
    needed = (
        flops.quiet_star(config, settings.batch_size, length)
        if thinks
        else flops.update(config, settings.batch_size, length)
    )
    batch = case.batch(settings.batch_size, length)
    yield train_program(case, f"{name}: update", start, settings, (tx, step), batch, needed, roles)
    if not thinks:
        return
    rows = case.section("evaluate").get("batch_size", 8)
    done, text = trained(case, start, settings), case.batch(rows, length)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated(case.mesh))
    yield Program(
        f"{name}: thoughts on held-out text, {rows} rows",
        lambda: measure.score.lower(done.params, config, text, key),
        {"parameters": done.params, "batch": text},
        {"the base model": model.params},
        *flops.thoughts(config, rows, length),
        notes=case.notes(rows),
    )
