"""Safetensors files of a model folder: tensors by name over memory maps, and one-line errors for other folders."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from qstar.errors import UserError
from qstar.files import read_json
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.hf_names import BUFFERS, Row, embedding_names, file_names, file_shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
T5_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the embedding, "shared.weight"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
# Ending of a file -> what it is, for messages about models in other formats.
FORMATS = {
    ".gguf": "GGUF is the format of llama.cpp, mostly quantised, and is not read",
    **dict.fromkeys((".bin", ".pth", ".pt"), "a pickle can run code and is not read"),
    ".ckpt": "a checkpoint of another program is not read",
    ".h5": "TensorFlow's format is not read",
    ".msgpack": "Flax' format is not read",
    ".onnx": "ONNX is not read",
}
# Parts that training programs put into the names of parameters: torch.compile, DDP, FSDP.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|quant_state\..*|SCB|weight_scale(_inv)?|weight_packed)$"
)


def other_format(folder: pathlib.Path) -> str:
    """Returns which other format a folder without config.json or safetensors holds, and what to do."""
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if "adapter_config.json" in there:  # first, because trainers put pickles and a config.json beside it
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        merge = "merge it into its base model first (PEFT: `merge_and_unload`, then `save_pretrained`)"
        return f"this is a PEFT adapter (of {base}) and no whole model; {merge} and give that folder"
    for name in there:
        if what := next((what for end, what in FORMATS.items() if name.endswith(end)), ""):
            return f"{name}: {what}; give the model's safetensors (save_pretrained of a current transformers)"
    if "params.json" in there:
        return "params.json is the layout of the model's makers; give its folder in the Hugging Face layout"
    if other := [name for name in there if name.endswith(".safetensors")]:
        return f"{other[0]} is not named {SINGLE} or listed in {INDEX}; rename it, or copy what is missing"
    return "this is no model folder in the Hugging Face layout"


class WeightFiles:
    """The tensors of a folder by name, over memory-mapped files: only slices are read."""

    def __init__(self, folder: pathlib.Path, config: ModelConfig | EncDecConfig | None = None):
        self.folder = folder
        self.slices: dict[str, Callable[[], Any]] = {}
        for file in _weight_files(folder):
            try:
                handle = safe_open(file, framework="np")
            except (SafetensorError, OSError) as e:
                raise UserError(f"{file}: truncated or no safetensors file ({e}); copy it again") from None
            for name in handle.keys():
                self.slices[WRAPPERS.sub("", name)] = functools.partial(handle.get_slice, name)
        # The base model's prefix, which files saved from a bare model lack (early GPT-2 uploads).
        self.drop = ""
        if config is not None:
            self._settle_names(*embedding_names(config), config)

    def _settle_names(self, table: str, prefix: str, config: ModelConfig | EncDecConfig) -> None:
        """Removes a prefix that a wrapping module put before all names; finds the embedding under its other names."""
        bare = table.removeprefix(prefix)
        for goal in (table, bare):
            leads = {n.removesuffix(goal) for n in self.slices if n.endswith("." + goal)}
            if goal not in self.slices and len(leads) == 1:
                (lead,) = leads
                self.slices = {n.removeprefix(lead): get for n, get in self.slices.items()}
            if goal in self.slices:
                self.drop = prefix if goal != table else ""
                return
        kept_as = [*T5_COPIES, *((HEAD, "model.embed_tokens.weight") if config.tie_embeddings else ())]
        if found := next((name for name in kept_as if name in self.slices), ""):
            self.slices[table] = self.slices[found]

    def key(self, name: str) -> str:
        """Returns the name in these files of a tensor of the table of names."""
        return name.removeprefix(self.drop)

    def __getitem__(self, name: str) -> Any:
        return self.slices[self.key(name)]()

    def equal(self, a: str, b: str) -> bool:
        """Returns whether two tensors are the same, compared in slices: a large one is never whole in memory."""
        x, y = self.slices[a], self.slices[b]
        rows, step = x().get_shape()[0], 4096
        parts = [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
        return x().get_shape() == y().get_shape() and all(np.array_equal(x()[p], y()[p]) for p in parts)

    def check(self, rows: Iterable[tuple[Row, tuple[int, ...]]], tied: bool) -> None:
        """Compares names, shapes and dtypes with the table, before anything is read.

        Raises:
          UserError: a tensor is missing, left over, quantised, an adapter, or of another shape or dtype; an embedding
            of one stack of a T5 differs from the shared one (transformers keeps both then, qstar has one for both).
        """
        for name in self.slices:
            if _QUANTISED.search(name):
                what = "the weights are quantised, which are not read here; give the model before quantisation"
                raise UserError(f"{self.folder}: tensor {name!r}: {what}")
            if ".lora_A." in name or ".base_layer." in name:
                what = "adapters stand beside their weights; merge them first (PEFT: `merge_and_unload`)"
                raise UserError(f"{self.folder}: tensor {name!r}: {what}")
        # Copies of a tied table: the head, and the scaled embedding of a `tiny` model (`hf_names.copies`).
        unread = (HEAD, "model.embed_tokens.weight") if tied else ()
        wanted = {self.key(n): file_shape(row, shape) for row, shape in rows for n in file_names(row, shape)}
        found = {n for n in self.slices if not BUFFERS.search(n) and n not in unread}
        if missing := sorted(wanted.keys() - self.slices.keys()):
            there = "" if wanted.keys() & found or not found else f"; there are others, such as {min(found)!r}"
            named = f"{missing[0]!r}{others(missing)}"
            raise UserError(f"{self.folder}: tensor {named} that config.json asks for is missing{there}")
        if extra := sorted(found - wanted.keys()):
            named = ", ".join(map(repr, extra[:3])) + others(extra[2:])
            raise UserError(f"{self.folder}: unexpected tensors {named}; config.json describes another model")
        for name, shape in wanted.items():
            view, place = self.slices[name](), f"{self.folder}: tensor {name!r}"
            if tuple(view.get_shape()) != shape:
                raise UserError(f"{place} has shape {tuple(view.get_shape())}, but config.json asks for {shape}")
            if view.get_dtype() not in DTYPES:
                raise UserError(f"{place} has dtype {view.get_dtype()}; only {', '.join(DTYPES)} are supported")
        for copy in T5_COPIES if "shared.weight" in wanted else ():
            if copy in self.slices and not self.equal(copy, "shared.weight"):
                fault = f"tensor {copy!r} differs from 'shared.weight'; separate embeddings are not supported"
                raise UserError(f"{self.folder}: {fault}")


def others(names: list[str]) -> str:
    """Returns " (and N more)" for the names beyond the first, which a message has named."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        if pickles := sorted(p.name for p in folder.glob("pytorch_model*.bin")):
            fault = f"the weights are a pickle ({pickles[0]}), which can run code and is not read here"
            advice = "convert them to safetensors (save_pretrained of a current transformers)"
            raise UserError(f"{folder}: {fault}; {advice}")
        raise UserError(f"{folder}: no weights found (neither {SINGLE} nor {INDEX}); {other_format(folder)}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{folder / INDEX}: weight_map is missing, empty or no map to file names; copy the file again")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: the file is missing, but {INDEX} lists it; copy it, too")
    return files


def all_finite(x: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, which have all bits of the exponent set."""
    # On integers, because NumPy is slow with bfloat16.
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[x.dtype.name]
    bits = x.view(np.dtype(f"u{x.dtype.itemsize}"))
    return not x.size or int((bits & exponent).max()) < exponent
