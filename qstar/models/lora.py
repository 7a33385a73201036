"""LoRA (arXiv 2106.09685) as a transform of the parameter tree: W + (alpha / r) A B beside frozen kernels W.

    layers/q/kernel [L, in, out]   ->   layers/q/lora_a [L, in, r]   layers/q/lora_b [L, r, out]

`attach` puts adapters beside their kernels and the decoder adds their product layer by layer, so that a training step never
holds the changed kernels (or their gradients) of all layers. `merge` makes plain parameters, for sampling and export.
`save_adapters` writes PEFT's layout, which PEFT loads beside the base model: its A is [r, in] and its B is [out, r].
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qstar import tree
from qstar.errors import UserError, require
from qstar.models.config import ModelConfig
from qstar.models.hf import read_json, write_json
from qstar.models.layers import with_adapters
from qstar.models.names import NAMES, abstract_params
from qstar.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which kernels get adapters, and how wide."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = KERNELS  # those that the model has

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
        """alpha / r."""
        return self.alpha / self.rank


def init(config: ModelConfig, lora: Lora, key: jax.Array) -> Params:
    """Returns fresh adapters, float32: A uniform as PEFT draws it (Kaiming, a = sqrt 5), B zero, so nothing changes at first.

    A value head is trained whole, beside them; `abstract_params` of a config without one has none.
    """
    layers = abstract_params(config)["layers"]
    out: Params = {"layers": {}}
    for i, name in enumerate(n for n in KERNELS if n in lora.targets and n in layers):
        L, rows, columns = layers[name]["kernel"].shape
        bound = 1 / math.sqrt(rows)
        a = jax.random.uniform(jax.random.fold_in(key, i), (L, rows, lora.rank), minval=-bound, maxval=bound)
        out["layers"][name] = {"lora_a": a, "lora_b": jnp.zeros((L, lora.rank, columns))}
    return out


def attach(params: Params, adapters: Params, scale: float) -> Params:
    """Returns the parameters with adapters beside their kernels (B times `scale`); other trees they hold replace those."""
    layers = dict(params["layers"])
    for name, pair in adapters["layers"].items():
        layers[name] = {**layers[name], "lora_a": pair["lora_a"], "lora_b": scale * pair["lora_b"]}
    rest = {k: v for k, v in adapters.items() if k != "layers"}
    return {**params, **rest, "layers": layers}


def merge(params: Params, adapters: Params, scale: float) -> Params:
    """Returns plain parameters, each in its own dtype: W + scale A B, added in float32."""
    attached = attach(params, adapters, scale)
    return {**attached, "layers": with_adapters(attached["layers"])}


def through(loss: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """Returns the loss as a function of {"policy": adapters, "base": frozen parameters}."""

    def adapted(params: dict[str, Params], batch: Any, rng: jax.Array) -> Any:
        base = jax.lax.stop_gradient(params["base"])
        return loss({"policy": attach(base, params["policy"], scale)}, batch, rng)

    return adapted


# ---------------------------------------------------------------------------------------------------- PEFT's layout


def peft_name(config: ModelConfig, name: str) -> str:
    """Returns the module that PEFT would adapt, with {i} for the layer: model.layers.{i}.self_attn.q_proj.

    Raises:
      UserError: the family keeps that kernel fused with others (GPT-2's q, k, v).
    """
    row = next(r for r in NAMES[config.family] if r.path == f"layers/{name}/kernel")
    if row.part is not None:
        raise UserError(f"lora: {config.family} keeps {name} fused with others in its files; choose other targets")
    return row.name.removesuffix(".weight")


def save_adapters(
    config: ModelConfig, adapters: Params, lora: Lora, folder: str | os.PathLike, base: str = ""
) -> pathlib.Path:
    """Writes adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` loads.

    Args:
      base: name or folder of the base model, for the config. A trained value head goes into the file as `score`.
    """
    folder = pathlib.Path(folder).expanduser()
    tensors: dict[str, np.ndarray] = {}
    names = {name: peft_name(config, name) for name in adapters["layers"]}
    for name, pair in adapters["layers"].items():
        for letter, leaf in (("A", pair["lora_a"]), ("B", pair["lora_b"])):
            for i, x in enumerate(np.asarray(leaf, np.float32)):
                tensors[f"{_PREFIX}{names[name].format(i=i)}.lora_{letter}.weight"] = np.ascontiguousarray(x.T)
    for path, leaf in tree.named_leaves(adapters.get("value", {})):
        part = {"kernel": "weight", "bias": "bias"}[path]
        tensors[f"{_PREFIX}score.{part}"] = np.ascontiguousarray(np.asarray(leaf, np.float32).T)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    written = {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS" if config.value_head else "CAUSAL_LM",
        "base_model_name_or_path": str(base) or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({n.rpartition(".")[2] for n in names.values()}),
        "modules_to_save": ["score"] if "value" in adapters else None,
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, written)
    return folder


def load_adapters(config: ModelConfig, folder: str | os.PathLike) -> tuple[Params, Lora]:
    """Reads adapters that `save_adapters` or PEFT wrote.

    Raises:
      UserError: a missing or broken file, or tensors that do not fit the model; the line names it.
    """
    folder = pathlib.Path(folder).expanduser()
    raw = read_json(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({e}); copy it again") from None
    layers = abstract_params(config)["layers"]
    out: Params = {"layers": {}}
    for name in (n for n in KERNELS if n in layers):
        stem = _PREFIX + peft_name(config, name)
        found = [
            [tensors.pop(f"{stem.format(i=i)}.lora_{x}.weight", None) for i in range(config.num_layers)] for x in "AB"
        ]
        if all(t is None for half in found for t in half):
            continue
        L, rows, columns = layers[name]["kernel"].shape
        want = [(raw.get("r"), rows), (columns, raw.get("r"))]
        for half, shape in zip(found, want):
            fault = (
                f"{folder / WEIGHTS}: {stem} needs a tensor {shape} in each of {L} layers; these are of another model"
            )
            require((all(t is not None and t.shape == shape for t in half), fault))
        a, b = (jnp.asarray(np.stack([t.T for t in half]).astype(np.float32)) for half in found)
        out["layers"][name] = {"lora_a": a, "lora_b": b}
    if f"{_PREFIX}score.weight" in tensors:
        head = {k: tensors.pop(f"{_PREFIX}score.{n}") for k, n in (("kernel", "weight"), ("bias", "bias"))}
        out["value"] = {k: jnp.asarray(v.T) for k, v in head.items()}
    require((not tensors, f"{folder / WEIGHTS}: {next(iter(tensors), '')} adapts nothing that this model has"))
    require((bool(out["layers"]), f"{folder / WEIGHTS}: holds no adapters"))
    return out, Lora(raw["r"], float(raw["lora_alpha"]), tuple(out["layers"]))
