"""`Model`, the config, parameters and tokenizer of a model, and how it is loaded and saved.

model = load("stories260k")  # or a name on the hub: load("Qwen/Qwen3-0.6B")
save(model, "copy")
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pathlib
import warnings
from typing import Any, cast

import jax.numpy as jnp
from jax.sharding import Mesh

from qstar import tree
from qstar.errors import QstarWarning, UserError, require
from qstar.models import hf
from qstar.models.config import DTYPES, RUN, ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.hf_config import from_hf, official_thoughts, to_hf
from qstar.models.hf_names import THOUGHT_SIGN
from qstar.models.hub import resolve
from qstar.models.thought_config import ThoughtConfig
from qstar.models.weight_files import WeightFiles
from qstar.text.tokenizer import Tokenizer, load_tokenizer
from qstar.types import Params

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


# No field-wise `==`: the comparison of arrays has no truth value.
@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder or an encoder-decoder with its weights, and the mesh (if any) that these are sharded over."""

    config: ModelConfig | EncDecConfig
    params: Params
    tokenizer: Tokenizer | None = None
    mesh: Mesh | None = None
    source: str = ""  # name or folder that the weights were read from; "": not read, or changed since

    def __post_init__(self) -> None:
        if self.tokenizer is not None and isinstance(self.config, EncDecConfig):
            # A copy: a decoder may have the same tokenizer.
            object.__setattr__(self, "tokenizer", copy.copy(self.tokenizer))
            self.tokenizer.encoder_end = self.config.eos_id

    def replace(self, **changes: Any) -> Model:
        changes = {"source": "", **changes} if "params" in changes else changes
        return dataclasses.replace(self, **changes)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the tokenizer's EOS, those of config.json and generation_config.json, and the end of
        a turn in the chat template."""
        first, chat = (self.tokenizer.eos_id, self.tokenizer.chat) if self.tokenizer else (None, None)
        ids = (first, self.config.eos_id, *self.config.also_eos, chat.turn.end_id if chat else None)
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def __repr__(self) -> str:
        c = self.config
        text = "no tokenizer" if self.tokenizer is None else f"tokenizer of {self.tokenizer.vocab_size}"
        count = f"{tree.size(self.params):,}"
        return f"Model({c.family}, {count} parameters, {c.dtype}, {text}, mesh={self.mesh})"


def load(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: Any = None,
    thoughts: ThoughtConfig | None = None,
    *,
    revision: str | None = None,
) -> Model:
    """Loads a model in the Hugging Face layout, from a local folder or from the hub.

    Args:
      path: a local folder with config.json, safetensors and (not necessarily) tokenizer files, or a name on the hub,
        `owner/name[@revision]` (see `hub.resolve`).
      mesh: where to put the parameters, each created directly in its sharding (see `mesh.make_mesh`).
      dtype: of the computation: float32, bfloat16 or float16. None takes bfloat16 for models whose config.json says
        that they are kept in half precision, and float32 otherwise. Parameters keep their stored dtype.
      thoughts: the thought config, in place of that of config.json. Checkpoints of the official Quiet-STaR code have
        none there: without this they are read with the sizes of the release (n_ahead 8).
      revision: branch, tag or commit of a hub model.

    Raises:
      UserError: a missing, broken or unsupported file, which the line names; a model that the hub does not give.
    """
    folder = resolve(path, revision)
    raw = hf.read_config(folder)
    config = from_hf(raw, where=str(folder / "config.json")).replace(dtype=_compute_dtype(raw, dtype))
    if isinstance(config, EncDecConfig):
        require((thoughts is None, f"{folder}: an encoder-decoder has no thoughts; leave `thoughts` out"))
    # The official code's config.json may not say that the weights hold a thought mixer.
    elif thoughts is not None or config.thoughts is None and THOUGHT_SIGN in WeightFiles(folder).slices:
        config = config.replace(thoughts=thoughts or official_thoughts(raw))
    config = hf.settle_head(folder, config)
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        check_vocabulary(config, tokenizer, str(folder))
    source = os.fspath(path) + (f"@{revision}" if revision else "")
    return Model(config, hf.read_params(folder, config, mesh), tokenizer, mesh, source)


def _compute_dtype(raw: dict[str, Any], dtype: Any) -> str:
    if dtype is None:
        # Not float16 for float16 files, because it overflows in the residual stream of many models.
        half = ("bfloat16", "float16")
        return "bfloat16" if raw.get("dtype", raw.get("torch_dtype")) in half else "float32"
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return name


def save(model: Model, path: str | os.PathLike) -> None:
    """Writes a folder that `load` and transformers' `from_pretrained` read: all of it or nothing.

    Raises:
      UserError: the folder holds something else than an earlier export, the config has options that its family's
        config.json cannot express, or the disk refuses.
    """
    config = model.config
    _check_expressible(config)
    if isinstance(config, ModelConfig) and config.family == "tiny" and not config.portable_family:
        fault = "no other program can load this model: no family of transformers is like it"
        warnings.warn(f"{path}: {fault}", QstarWarning, 2)
    hf.write_params(path, config, model.params, extras=functools.partial(_write_extras, model))


def _write_extras(model: Model, folder: pathlib.Path) -> None:
    """Writes tokenizer files and generation_config.json, whose EOS ids include the tokenizer's."""
    bos, ends = model.config.bos_id, model.stop_ids
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
        bos = model.tokenizer.bos_id
    ids = {"bos_token_id": bos, "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None)}
    if isinstance(model.config, EncDecConfig):  # `generate` of transformers reads the start here and nowhere else
        ids |= dict.fromkeys(("decoder_start_token_id", "pad_token_id"), model.config.start_id)
    hf.write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})


def _check_expressible(config: ModelConfig | EncDecConfig) -> None:
    """Raises UserError where config.json would read back as another graph (say, a Llama with scaled embeddings)."""
    if isinstance(config, EncDecConfig):
        to_hf(config)  # raises
        return
    # None and head_dim mean the same rotation.
    both = (config, cast(ModelConfig, from_hf(to_hf(config))))
    there, back = (c.replace(rotary_dim=c.rotary_dim or c.head_dim) for c in both)
    for name in (f.name for f in dataclasses.fields(config) if f.name not in RUN):
        a, b = getattr(there, name), getattr(back, name)
        written = f"{name}={a!r} cannot be written as a {config.family!r} model (it would read back as {b!r})"
        require((a == b, f"model config: {written}; use family 'tiny'"))


def check_vocabulary(config: ModelConfig | EncDecConfig, tokenizer: Any, where: str) -> None:
    """Compares special ids of a tokenizer and a config with the rows of the embedding; an id beyond them computes NaN.

    Raises:
      UserError: the id of a special token is beyond the model's vocabulary.
    """
    size = config.vocab_size
    ids = [(f"{role}_id", getattr(tokenizer.hf, f"{role}_id")) for role in ROLES]
    ids += [("eos_token_id", i) for i in (config.eos_id, *config.also_eos)]
    bad = next((f"{name}={i}" for name, i in ids if i is not None and i >= size), "")
    fault = f"{where}: {bad} is beyond the model's vocabulary of {size}"
    require((not bad, f"{fault}; resize the embedding to the tokenizer, or use the tokenizer of these weights"))
    # Other tokens may be beyond, where larger models share the tokenizer: `encode` refuses text that needs them.
    tokenizer.limit = size
