"""Updates and samplers with abstract arguments: what the programs of all methods are made of."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qstar import tree
from qstar.errors import require
from qstar.files import local_path
from qstar.mesh import SAMPLING, batch_sharding, count_shards, replicated
from qstar.models import scoring
from qstar.models.config import SIZES, ModelConfig, preset
from qstar.models.decoder import PARAM_AXES
from qstar.models.hf import read_config
from qstar.models.hf_config import from_hf
from qstar.models.hf_names import abstract_params
from qstar.models.hub import resolve
from qstar.models.model import Model
from qstar.models.presets import is_published, published
from qstar.plan.program import Program, local_bytes
from qstar.runs.rollouts import SampleSettings
from qstar.runs.settings import arms_from, check_keys, settings_from
from qstar.runs.stages import UpdateSettings, fresh_adapters
from qstar.sample import sampler as S
from qstar.sample import seq2seq
from qstar.sample.batching import FILL_SHARE, default_slots, padded_length, state_shardings
from qstar.sample.logits import SamplingParams
from qstar.train import flops
from qstar.train.state import abstract, abstract_state
from qstar.types import Batch

NO_ADAPTERS = ("quiet_star", "guided_cot")  # methods that are not advised to take train.lora_rank


@dataclasses.dataclass(frozen=True)
class Assumed:
    """Lengths that depend on the data, in tokens."""

    prompt: int = 256
    prefix: int = 0  # few-shot text that all prompts share
    problems: int = 7473  # of the training split (GSM8K's), or rows of one's own
    row: int = 512  # the longest row of `sft` and `dpo`, where the config has no row_length


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on a slice."""

    config: Any
    mesh: Mesh
    assumed: Assumed

    def spec(self, shape: tuple[int, ...], dtype: Any, *, split: bool = False) -> Any:
        """Returns an abstract array: a copy on every chip, or rows split as `mesh.put_global_batch` does."""
        # Rows that do not divide are replicated there, too: the plan must compile the same program as the run.
        split = split and shape[0] % count_shards(self.mesh) == 0
        where = batch_sharding(self.mesh) if split else replicated(self.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def specs(self, values: Any) -> Any:
        """Returns abstract values with a copy on every chip."""
        return jax.tree.map(lambda x: self.spec(x.shape, x.dtype), values)

    def batch(self, rows: int, length: int) -> Batch:
        ids = self.spec((rows, length), jnp.int32, split=True)
        return Batch(ids, self.spec((rows, length), jnp.float32, split=True), ids, ids)

    def responses(self, rows: int, prompt: int, response: int) -> tuple[Any, Any, Any]:
        """Returns abstract prompts, their masks, and responses."""
        ids, answers = (self.spec((rows, n), jnp.int32, split=True) for n in (prompt, response))
        return ids, ids, answers

    def like(self, f: Callable[..., Any], *args: Any) -> Any:
        """Returns shapes and shardings of the parameters that f makes of abstract arguments."""
        return abstract(jax.eval_shape(f, *args), self.mesh, PARAM_AXES)

    @property
    def problems(self) -> int:
        """The problems of the training split; no more than the config's own pool, where it draws them from one."""
        pool = self.section("task").get("pool")
        drawn = sum(n for n in pool.values() if isinstance(n, int)) if isinstance(pool, dict) else 0
        return min(self.assumed.problems, drawn or self.assumed.problems)

    def section(self, name: str) -> dict[str, Any]:
        """Returns a section of the config, {} if it is missing."""
        found = self.config.get(name)
        return found.to_dict() if found else {}

    def settings(self, cls: Any, name: str, **more: Any) -> Any:
        """Returns a section of the config as settings of a class."""
        return settings_from(cls, {**self.section(name), **more}, name)

    def arms(self, cls: Any, section: str = "", presets: Mapping[str, Mapping[str, Any]] = {}) -> dict[str, Any]:
        """Returns the arms' settings, see `arms_from`."""
        return arms_from(cls, self.config.to_dict(), section, presets)


# ---------------------------------------------------------------------------------------------------------- models


def abstract_model(case: Case, options: dict[str, Any], where: str = "model") -> Model:
    """Returns the model of a config's section without weights or tokenizer."""
    options = dict(options)
    path, name, revision = (options.pop(key, "") for key in ("path", "preset", "revision"))
    require((bool(path or name), f"config.{where}: neither path (a model folder) nor preset is set; set one of them"))
    check_keys(ModelConfig, {k: v for k, v in options.items() if k != "dtype"}, where)
    # The shapes of known models are in a table: a plan of them needs no network.
    known = not path or is_published(path) and not local_path(path).is_dir()
    folder = None if known else resolve(path, revision, weights=False)
    if folder is not None and folder.is_dir():
        raw = read_config(folder)
        config, stored = from_hf(raw, where=str(path)), raw.get("dtype", raw.get("torch_dtype")) or "float32"
    elif path:
        config, stored = published(path)
    else:
        config, stored = preset(name, **{k: options.pop(k) for k in list(options) if k in SIZES}), "float32"
    # As `model.load`: bfloat16 for float16 weights, too, which overflow in the residual stream of many models.
    compute = options.pop("dtype", None) or ("bfloat16" if stored in ("bfloat16", "float16") else "float32")
    config = config.replace(dtype=compute, **options)
    params = jax.eval_shape(functools.partial(tree.cast, dtype=jnp.dtype(stored)), abstract_params(config))
    return Model(config, abstract(params, case.mesh, PARAM_AXES), None, case.mesh)


def decoder_model(case: Case) -> Model:
    """Returns the model of the section `model`, which may not be an encoder-decoder."""
    model = abstract_model(case, case.section("model"))
    line = f"config.model.path={case.section('model').get('path')}: plans of this method are for decoders, not for a T5"
    require((isinstance(model.config, ModelConfig), f"{line}; name a decoder"))
    return model


def _float32(case: Case, params: Any) -> Any:
    return case.like(functools.partial(tree.cast, dtype=jnp.float32), params)


def trained(case: Case, model: Model, settings: UpdateSettings) -> Model:
    """Returns the model after a stage of training: float32, or adapters merged in the stored dtype."""
    # Full training keeps float32 master weights: in bfloat16, Adam's updates of 1e-6 round to nothing.
    return model if settings.lora_rank else model.replace(params=_float32(case, model.params))


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
    frozen: dict[str, Any] | None = None,
) -> Program:
    """Returns an update as `train_stage` runs it.

    Args: made: (optimiser, jitted step). roles: what trains beside the policy. resident: what is kept beside the update.
      frozen: what the update reads and does not train.
    """
    tx, step = made
    # The model that the run started from stays: every iteration trains it anew (STaR, section 3.1).
    before = {"the base model": model.params}
    frozen = frozen or {}
    if settings.lora_rank:
        fresh = lambda p: fresh_adapters(model.replace(params=p), settings.lora, 0)  # noqa: E731
        # The step reads the base in place: it is an argument, and no copy of it is part of the state.
        policy, frozen, before = case.like(fresh, model.params), {**frozen, "base": model.params}, {}
    else:
        policy = _float32(case, model.params)
    state = abstract_state({"policy": policy, **(roles or {})}, tx, mesh=case.mesh, table=PARAM_AXES)
    rate = case.spec((), jnp.float32)
    parts: dict[str, Any] = {"parameters": {**state.params, **frozen}, "optimiser": state.opt_state}
    return Program(
        name,
        lambda: step.lower(state, batch, rate, frozen),
        parts | {"batch": (batch, state.step, state.rng)},
        {**before, **(resident or {})},
        *needed,
        tokens=max(math.prod(x.shape) for x in jax.tree.leaves(batch) if x.ndim == 2),
        least=_kept_activations(case, model.config, settings, batch) + local_bytes(policy),
    )


def _kept_activations(case: Case, c: Any, settings: UpdateSettings, batch: Any) -> int:
    # A lower bound in bytes per chip, so that a search may discard a layout by it. Per layer and token: with `remat`
    # the layer's input, else also the inputs of its matrix products. Scores of attention and of the vocabulary are
    # not counted.
    if not isinstance(c, ModelConfig):
        return 0
    rows, length = max((x.shape for x in jax.tree.leaves(batch) if x.ndim == 2), key=math.prod)
    heads_ = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    mlp = (3 if c.gated_mlp else 2) * c.intermediate_size
    inner = 0 if c.remat == "block" else c.hidden_size + (heads_ + mlp) // case.mesh.shape["tensor"]
    # Rows or, where they do not divide, tokens are split.
    tokens = -(-rows // settings.accumulate * length // count_shards(case.mesh))
    return tokens * c.num_layers * (c.hidden_size + inner) * jnp.dtype(c.dtype).itemsize


def sampling(
    case: Case, model: Model, settings: SampleSettings, k: int, requests: int, prefix: int
) -> Iterator[Program]:
    """Yields prefill of a quarter of the slots, and decoding, as `batching.stream` runs them."""
    c, P, new = model.config, padded_length(case.assumed.prompt), settings.max_new_tokens
    slots = settings.slots or default_slots(requests)
    group = min(k, max(1, slots // FILL_SHARE))
    N, L = max(1, slots // FILL_SHARE // group), padded_length(prefix) if prefix else 0
    sampler = S.Sampler(c, (c.eos_id or 0,), slots, P, new, c.vocab_size)
    params = abstract(jax.eval_shape(lambda p: S.prepare(p, c), model.params), case.mesh, PARAM_AXES, SAMPLING)
    state = jax.eval_shape(lambda: S.empty_state(sampler))
    where = state_shardings(state, case.mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)

    # The prefix's keys and values are shared by all rows: not split over them, but by head like the cache.
    def by_head(x: Any) -> jax.ShapeDtypeStruct:
        spec = SAMPLING.spec(("heads", None, None)[: x.ndim], x.shape, case.mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(case.mesh, spec))

    shared = jax.eval_shape(
        lambda p, i, n: S.prefill_prefix(p, c, i, n), params, case.spec((L,), jnp.int32), jnp.int32(0)
    )
    shared = jax.tree.map(by_head, shared)
    sampling_params, seed = case.specs(jax.eval_shape(lambda: (SamplingParams.make(), jax.random.key(0))))
    shapes = ((N, P), (N,), (N * group,), (N * group,), (N * group, 2))
    fill = S.PrefillBatch(*(case.spec(s, jnp.int32) for s in shapes))
    parts, resident = {"parameters": params, "cache": (state, shared)}, {"the model as trained": model.params}
    yield Program(
        f"sampling: prefill of {N} prompts of {P} tokens" + (f" after a prefix of {L}" if L else ""),
        lambda: S.insert_requests.lower(params, sampler, shared, state, fill, seed, sampling_params),
        parts,
        resident,
        *flops.forward(c, N, P, context=L, predicted=N),
        rollouts=N * group,
    )
    count, flag = case.spec((), jnp.int32), case.spec((slots,), jnp.bool_)
    yield Program(
        f"sampling: {new} tokens of {slots} rows",
        lambda: S.decode.lower(params, sampler, shared, state, sampling_params, flag, count, count),
        parts,
        resident,
        # On average half of the new tokens are in the cache.
        *flops.forward(c, slots * new, 1, context=L + P + new // 2, predicted=slots * new),
        steps=new,
        tokens=slots * new,
        rollouts=slots,
    )


def seq2seq_sampling(
    case: Case, model: Model, what: str, slots: int, prompt: int, new: int, resident: dict[str, Any]
) -> Program:
    """Returns the sampling of an encoder-decoder."""
    c = model.config
    sampler = S.Sampler(c, (c.eos_id or 0,), slots, prompt, new, scoring.text_limit(c))
    ready = jax.eval_shape(lambda p: seq2seq.prepare(p, c), model.params)
    params = {k: abstract({k: v}, case.mesh, PARAM_AXES, seq2seq.rules_of(k))[k] for k, v in ready.items()}
    tokens, lengths, asked = (case.spec(s, jnp.int32, split=True) for s in ((slots, prompt), (slots,), (slots, 1, 2)))
    sampling_params, seed = case.specs(jax.eval_shape(lambda: (SamplingParams.make(), jax.random.key(0))))
    return Program(
        f"sampling: {what}, {slots} rows of {prompt} and {new} tokens",
        lambda: seq2seq.sample_rows.lower(params, sampler, tokens, lengths, asked, seed, sampling_params),
        {"parameters": params, "batch": tokens},
        {"the model as it is": model.params, **resident},
        *flops.respond(c, slots, prompt, new),
        steps=new,
        tokens=slots * new,
        rollouts=slots,
    )
