"""LoRA (arXiv 2106.09685) as a transform of the parameter tree: x W + (alpha / r) (x A) B with frozen kernels W.

    layers/q/kernel [L, in, out]   ->   layers/q/lora_a [L, in, r]   layers/q/lora_b [L, r, out]

`attach` puts adapters beside their kernels, where `layers.Linear` adds their product; a training step never computes a
changed kernel or its gradient. `merge` returns plain parameters, for sampling and export. `save_adapters` and
`load_adapters` write and read PEFT's files, whose A is [r, in] and whose B is [out, r], per module. Options of PEFT
beyond this formula are refused. Ranks and scales of single modules are read.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from qstar import files, tree
from qstar.errors import UserError, require
from qstar.models import fields
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.hf import write_json
from qstar.models.hf_names import Row, abstract_params, name_map
from qstar.models.hub import split_revision
from qstar.models.layers import with_adapters
from qstar.models.weight_files import DTYPES, FORMATS, WRAPPERS, read_json
from qstar.types import Params

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """The kernels with adapters, and their rank."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = KERNELS  # of which the model need not have all

    def __post_init__(self):
        strange = [t for t in self.targets if t not in KERNELS]
        require(
            (self.rank >= 1, f"rank={self.rank} must be at least 1"),
            (0 < self.alpha < math.inf, f"alpha={self.alpha} must be above 0"),
            (bool(self.targets), "targets is empty; name kernels, e.g. ('q', 'v')"),
            (not strange, f"targets: {strange and strange[0]!r} is not one of {', '.join(KERNELS)}"),
        )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init(config: ModelConfig, lora: Lora, key: jax.Array) -> Params:
    """Returns fresh adapters, float32. (A value head is trained whole, beside them.)"""
    check_targets(config, lora)
    layers = abstract_params(config)["layers"]
    out: Params = {"layers": {}}
    for i, name in enumerate(n for n in KERNELS if n in lora.targets and n in layers):
        L, rows, columns = layers[name]["kernel"].shape
        # A as in PEFT (Kaiming uniform, a = sqrt 5); B is zero, so that the model is unchanged at first.
        bound = 1 / math.sqrt(rows)
        a = jax.random.uniform(jax.random.fold_in(key, i), (L, rows, lora.rank), minval=-bound, maxval=bound)
        out["layers"][name] = {"lora_a": a, "lora_b": jnp.zeros((L, lora.rank, columns))}
    return out


def check_targets(config: Any, lora: Lora) -> None:
    """Raises UserError for targets that the model does not have, unless they are the default ones."""
    if isinstance(config, EncDecConfig):
        raise UserError(f"rank={lora.rank} is for decoders, and this model is an encoder-decoder (T5); set it to 0")
    there = [n for n in KERNELS if n in abstract_params(config)["layers"]]
    strange = [] if set(lora.targets) == set(KERNELS) else [t for t in lora.targets if t not in there]
    fault = f"targets: {strange and strange[0]!r} is no kernel of this {config.family}; it has {', '.join(there)}"
    require((not strange, fault))


def attach(params: Params, adapters: Params, scale: float) -> Params:
    """Returns the parameters with adapters beside their kernels (B times `scale`); other trees replace theirs."""
    layers = dict(params["layers"])
    for name, pair in adapters["layers"].items():
        layers[name] = {**layers[name], "lora_a": pair["lora_a"], "lora_b": scale * pair["lora_b"]}
    rest = {k: v for k, v in adapters.items() if k != "layers"}
    return {**params, **rest, "layers": layers}


def merge(params: Params, adapters: Params, scale: float) -> Params:
    """Returns plain parameters, each in its own dtype: W + scale A B, added in float32."""
    return plain(attach(params, adapters, scale))


def plain(attached: Params) -> Params:
    """Returns the result of `attach` as plain parameters; plain ones as they are."""
    return {**attached, "layers": with_adapters(attached["layers"])}


def through(loss: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """Returns the loss as a function of {"policy": adapters, "base": frozen parameters, other roles}."""

    def adapted(params: dict[str, Params], batch: Any, rng: jax.Array) -> Any:
        rest = {role: found for role, found in params.items() if role != "base"}
        base = jax.lax.stop_gradient(params["base"])
        return loss({**rest, "policy": attach(base, params["policy"], scale)}, batch, rng)

    return adapted


# ---------------------------------------------------------------------------------------------------- PEFT's files

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_MERGE = "merge it into its base model with PEFT (`merge_and_unload`) and load that"
_PREFIX = "base_model.model."
_RANK, _ALPHA = fields.WIDTH, fields.number(1e-6, 1e6)
_MODULES = fields.Field(
    lambda v: all(isinstance(x, str) for x in (v if isinstance(v, list) else [v])), "text, or a list"
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base weights
# Options of PEFT with which a module computes something else, or another module changes.
_OTHER = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "alora_invocation_tokens"),
    *(f"{name}_config" for name in ("arrow", "velora", "monteclora", "kasa")),
)


def module(config: ModelConfig, name: str) -> Row:
    """Returns the row of a kernel, its name that of the module that PEFT adapts ({i} for the layer)."""
    row = next(r for r, _ in name_map(config) if r.path == f"layers/{name}/kernel")
    return row._replace(name=row.name.removesuffix(".weight"))


def _suffix(config: ModelConfig, name: str) -> str:
    # The shortest unambiguous end of a module's name: both of GPT-2's output projections are c_proj.
    ends = {r.name.rsplit(".", 1)[0] for r, _ in name_map(config) if r.path.endswith("/kernel")}
    last = name.rpartition(".")[2]
    return last if sum(e.endswith(f".{last}") for e in ends) == 1 else ".".join(name.split(".")[-2:])


def save_adapters(
    config: ModelConfig, adapters: Params, lora: Lora, folder: str | os.PathLike, base: str = ""
) -> pathlib.Path:
    """Writes what `peft.PeftModel.from_pretrained` loads.

    Args:
      adapters: a trained value head among them goes into the file as `score`.
      base: folder of the base model, or its name on the hub (`owner/name[@revision]`), for the config.
    """
    folder = files.as_path(folder)
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, list[tuple[Row, str]]] = {}  # a fused module has up to three parts
    for name in adapters["layers"]:
        row = module(config, name)
        modules.setdefault(row.name, []).append((row, name))
    # Kernels that the files keep fused (q, k, v of GPT-2 and Phi-3) become one module whose rank is the sum of theirs.
    # Its alpha grows with the rank, so that alpha / r stays the same.
    ranks = {_suffix(config, stem): len(parts) for stem, parts in modules.items() if len(parts) > 1}
    for stem, parts in modules.items():
        for i in range(config.num_layers):
            leaves = [adapters["layers"][name] for _, name in parts]
            a = np.concatenate([np.asarray(x["lora_a"][i], np.float32) for x in leaves], axis=1)
            # The parts' B are the blocks of a matrix whose other entries are 0: rows by rank, columns by part.
            b = np.zeros((lora.rank * len(parts), parts[0][0].fused_width), np.float32)
            for at, ((row, _), x) in enumerate(zip(parts, leaves)):
                columns = slice(row.start, row.start + x["lora_b"].shape[-1])
                b[at * lora.rank : (at + 1) * lora.rank, columns] = x["lora_b"][i]
            for letter, x in (("A", a), ("B", b)):
                tensors[f"{_PREFIX}{stem.format(i=i)}.lora_{letter}.weight"] = np.ascontiguousarray(x.T)
    for path, leaf in tree.named_leaves(adapters.get("value", {})):
        part = {"kernel": "weight", "bias": "bias"}[path]
        tensors[f"{_PREFIX}score.{part}"] = np.ascontiguousarray(np.asarray(leaf, np.float32).T)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    name, revision = split_revision(str(base))
    written = {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS" if config.value_head else "CAUSAL_LM",
        "base_model_name_or_path": name or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": {name: n * lora.rank for name, n in ranks.items()},
        "alpha_pattern": {name: n * lora.alpha for name, n in ranks.items()},
        "lora_dropout": 0.0,
        "target_modules": sorted(_suffix(config, stem) for stem in modules),
        "modules_to_save": ["score"] if "value" in adapters else None,
        "bias": "none",
        # PEFT's flag for kernels kept as [in, out], as in GPT-2's Conv1D.
        "fan_in_fan_out": config.family == "gpt2",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, {**written, **({"revision": revision} if revision else {})})
    return folder


def _check_settings(raw: dict[str, Any], where: str) -> None:
    """Raises UserError where PEFT would compute anything but x W + scale (x A) B, or a value is of a wrong type."""
    kind = raw.get("peft_type")
    require((kind == "LORA", f"{where}: peft_type {kind!r} is not LORA, which alone is read; {_MERGE}"))
    for key in _OTHER:
        require((not raw.get(key), f"{where}: {key}={str(raw.get(key))[:60]} is more than plain LoRA; {_MERGE}"))
    start = raw.get("init_lora_weights", True)
    require(
        (start in _PLAIN_STARTS, f"{where}: init_lora_weights={start!r} changes the base weights, too; {_MERGE}"),
        (raw.get("bias", "none") == "none", f"{where}: bias={raw.get('bias')!r} trains biases, too; {_MERGE}"),
    )
    fields.check(
        raw, where, {"r": _RANK, "lora_alpha": _ALPHA}, {"use_rslora": fields.FLAG, "target_modules": _MODULES}
    )
    for key, field in (("rank_pattern", _RANK), ("alpha_pattern", _ALPHA)):
        pattern = raw.get(key) or {}
        require((isinstance(pattern, dict), f"{where}: {key} must be an object"))
        fields.check(pattern, f"{where}: {key}", dict.fromkeys(pattern, field), {})
        for text in pattern:
            try:
                re.compile(text)
            except re.error as e:
                raise UserError(f"{where}: {key}: {text!r} is no regular expression ({e})") from None


def _rank_and_scale(raw: dict[str, Any], name: str) -> tuple[int, float]:
    def own(key: str, default: Any) -> Any:
        # As in PEFT, the first key of a pattern that matches the end of the module's name decides.
        patterns = {WRAPPERS.sub("", k): v for k, v in (raw.get(key) or {}).items()}
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)

    rank, alpha = own("rank_pattern", raw["r"]), own("alpha_pattern", raw["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def _read_tensors(where: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of an adapter's file (on a disk or in a bucket) in float32, under PEFT's names on disk."""
    pickled = not where.exists() and (where.parent / PICKLE).exists()
    require((not pickled, f"{where.parent / PICKLE}: {FORMATS['.bin']}; load it in PEFT and save it again"))
    try:
        views = deserialize(where.read_bytes())
    except (OSError, SafetensorError) as e:
        raise UserError(f"{where}: cannot be read ({e}); copy it again") from None
    tensors: dict[str, np.ndarray] = {}
    for name, view in views:
        kind, place = view["dtype"], f"{where}: tensor {name!r}"
        require((kind in DTYPES, f"{place} has dtype {kind}; only {', '.join(DTYPES)} are supported"))
        x = np.frombuffer(view["data"], DTYPES[kind]).reshape(view["shape"]).astype(np.float32)
        require((bool(np.isfinite(x).all()), f"{place} holds NaN or infinity; copy the file again"))
        # PEFT puts the adapter's name between lora_A and weight in memory, and some programs save it so.
        tensors[re.sub(r"(lora_[AB])\.[^.]+\.weight$", r"\1.weight", WRAPPERS.sub("", name))] = x
    return tensors


def load_adapters(config: ModelConfig, folder: str | os.PathLike) -> tuple[Params, Lora]:
    """Reads adapters that `save_adapters` or PEFT wrote.

    Raises:
      UserError: names a missing or broken file, an option beyond plain LoRA, or a tensor that does not fit the model.
    """
    folder = files.as_path(folder)
    raw = read_json(folder / CONFIG)
    where = folder / WEIGHTS
    _check_settings(raw, str(folder / CONFIG))
    require((not isinstance(config, EncDecConfig), f"{where}: adapters are for decoders, and this model is a T5"))
    tensors = _read_tensors(where)
    # With these options not every layer need have adapters. (PEFT takes one layer as a number, which may be 0.)
    some = raw.get("layers_to_transform") not in (None, []) or raw.get("exclude_modules")
    some = some or isinstance(raw.get("target_modules"), str) or any("." in t for t in raw.get("target_modules") or ())
    layers = abstract_params(config)["layers"]
    _, common = _rank_and_scale({**raw, "rank_pattern": None, "alpha_pattern": None}, "")
    widest = max(raw["r"], *(raw.get("rank_pattern") or {"": 1}).values())
    out: Params = {"layers": {}}
    used: set[str] = set()
    for name in (n for n in KERNELS if n in layers):
        row, (L, rows, columns) = module(config, name), layers[name]["kernel"].shape
        stems = [row.name.format(i=i) for i in range(L)]
        there = [f"{_PREFIX}{stem}.lora_A.weight" in tensors for stem in stems]
        if not any(there):
            continue
        a, b = np.zeros((L, rows, widest), np.float32), np.zeros((L, widest, columns), np.float32)
        for i, stem in enumerate(stems):
            rank, scale = _rank_and_scale(raw, stem)
            if not there[i] and some:
                continue
            keys = [f"{_PREFIX}{stem}.lora_{x}.weight" for x in "AB"]
            for key, shape in zip(keys, [(rank, rows), (row.fused_width, rank)]):
                fits = key in tensors and tensors[key].shape == shape
                needs = f"{row.name} needs a tensor {shape} in each of {L} layers"
                require((fits, f"{where}: {needs}; these are of another model"))
            used.update(keys)
            # Modules of a smaller rank are filled up with zeros: stacked layers have one shape.
            part = tensors[keys[1]].T[:, row.start : row.start + columns]
            a[i, :, :rank] = tensors[keys[0]].T
            # One scale serves all modules of ours, so that a module's other scale goes into its B.
            b[i, :rank] = part if scale == common else scale / common * part
        out["layers"][name] = {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
    if f"{_PREFIX}score.weight" in tensors:
        head = {k: tensors.pop(f"{_PREFIX}score.{n}", np.zeros(0)) for k, n in (("kernel", "weight"), ("bias", "bias"))}
        fits = [x.shape for x in head.values()] == [(1, config.hidden_size), (1,)]
        require((fits, f"{where}: score must be one output with a bias: tensors (1, {config.hidden_size}) and (1,)"))
        out["value"] = {k: jnp.asarray(v.T) for k, v in head.items()}
    rest = sorted(tensors.keys() - used)
    require((not rest, f"{where}: {rest and rest[0]} is no LoRA of a kernel in this model's layers; {_MERGE}"))
    require((bool(out["layers"]), f"{where}: holds no adapters"))
    plain = widest == raw["r"] and not raw.get("use_rslora")
    return out, Lora(widest, float(raw["lora_alpha"]) if plain else common * widest, tuple(out["layers"]))
