"""Weights in and out of the Hugging Face safetensors layout, streamed tensor by tensor onto the mesh.

params = read_params("mistral-7b", from_hf(read_config("mistral-7b")), mesh)
write_params("tuned", config, params)
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qstar import distributed, tree
from qstar.errors import QstarWarning, UserError
from qstar.files import local_path, read_json
from qstar.mesh import shardings, to_host
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.fields import IDS
from qstar.models.hf_config import to_hf
from qstar.models.hf_names import Row, abstract_params, copies, embedding_names, file_names, name_map
from qstar.models.layers import PARAM_AXES
from qstar.models.weight_files import DTYPES, FORMATS, HEAD, INDEX, WeightFiles, all_finite, other_format, others
from qstar.types import Params

# ---------------------------------------------------------------------------------------------------- reading


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the parsed `config.json` of a model folder.

    Raises:
      UserError: no such folder, no config.json in it, or broken JSON.
    """
    folder = local_path(folder)
    if folder.is_file():
        what = next((say for end, say in FORMATS.items() if folder.name.endswith(end)), "it is one file of a model")
        raise UserError(f"{folder}: {what}; give the folder of the model in the Hugging Face layout (safetensors)")
    if not folder.is_dir():
        advice = "give a local folder in the Hugging Face layout, or a name on the hub (owner/name)"
        raise UserError(f"model folder {str(folder)!r} does not exist; {advice}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: config.json is missing; {other_format(folder)}")
    config = read_json(folder / "config.json")
    ids: dict[int, None] = {}
    for path in (folder / "config.json", folder / "generation_config.json"):
        # The second file is where chat models list all the ids that end a turn.
        eos = read_json(path).get("eos_token_id") if path.is_file() else None
        if eos is not None and not IDS.holds(eos):
            raise UserError(f"{path}: eos_token_id={eos!r} must be {IDS.expected}; copy the file again")
        ids |= dict.fromkeys(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if ids:
        config["eos_token_id"] = list(ids) if len(ids) > 1 else next(iter(ids))
    return config


def settle_head(folder: str | os.PathLike, config: ModelConfig | EncDecConfig) -> ModelConfig | EncDecConfig:
    """Returns the config with `tie_embeddings` by the tensors, whatever config.json says, as transformers 5 reads it.

    A `lm_head.weight` that differs from the embedding is an untied head; a T5 without one is tied.
    """
    weights = WeightFiles(local_path(folder), config)
    table, encdec = weights.key(embedding_names(config)[0]), isinstance(config, EncDecConfig)
    # A T5's config.json cannot be relied on. A decoder that needs a head is refused by `WeightFiles.check`.
    if HEAD not in weights.slices:
        return config.replace(tie_embeddings=True) if encdec else config
    untied = not encdec and not config.tie_embeddings
    if untied or table not in weights.slices or weights.equal(HEAD, table):
        return config
    if not encdec:
        fault = f"config.json says tie_word_embeddings, but {HEAD} differs from {table}"
        advice = "the model is read with this head (set tie_word_embeddings to false to silence this)"
        warnings.warn(f"{folder}: {fault}; {advice}", QstarWarning, 3)
    return config.replace(tie_embeddings=False)


def read_params(folder: str | os.PathLike, config: ModelConfig | EncDecConfig, mesh: Mesh | None = None) -> Params:
    """Reads parameters from `model.safetensors`, or from the shards listed in `model.safetensors.index.json`.

    Args:
      folder: a local folder.
      config: of the weights; see `models.hf_config.from_hf`.
      mesh: where to put them. Each parameter is created in its sharding, never whole on a device.

    Returns:
      The parameter tree of `scoring.init`, layers stacked on the leading axis, in the stored dtypes.

    Raises:
      UserError: weights missing, truncated, pickled, or unlike the config; the line names file and tensor.
    """
    rows = name_map(config)
    weights = WeightFiles(local_path(folder), config)
    weights.check(rows, config.tie_embeddings)
    by_path = {row.path: row for row, _ in rows}
    shapes = abstract_params(config)
    where = dict(tree.named_leaves(shardings(shapes, PARAM_AXES, mesh))) if mesh is not None else {}

    def create(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        stored = (DTYPES[weights[n].get_dtype()] for n in file_names(by_path[path], leaf.shape))
        # Layers are stacked in one array, so their stored dtypes are promoted to a common one.
        kind = jnp.dtype(functools.reduce(jnp.promote_types, stored))

        @functools.cache  # devices that hold the same part share one read
        def part(*bounds: tuple[int, int]) -> np.ndarray:
            return read_part(weights, by_path[path], leaf.shape, bounds, kind)

        def read(index: Any) -> np.ndarray:
            return part(*(s.indices(n)[:2] for s, n in zip(index, leaf.shape)))

        if mesh is None:
            return jnp.asarray(read((slice(None),) * len(leaf.shape)))
        # Every device's part is sliced out of the memory-mapped files: a sharded parameter is never whole on a device.
        return jax.make_array_from_callback(leaf.shape, where[path], read)

    return tree.map_named(create, shapes)


def read_part(
    weights: WeightFiles, row: Row, shape: tuple[int, ...], bounds: Sequence[tuple[int, int]], dtype: np.dtype
) -> np.ndarray:
    """Reads bounds = ((start, stop) per axis) of a parameter of this shape, and nothing else, from the files."""
    stacked = "{i}" in row.name
    inner = [slice(*b) for b in (bounds[1:] if stacked else bounds)]
    inner[-1] = slice(inner[-1].start + row.start, inner[-1].stop + row.start)
    index: tuple[Any, ...] = tuple(inner[::-1] if row.transpose else inner)
    index = (0, *index) if row.spare else index
    out = np.empty([stop - start for start, stop in bounds], dtype)
    names = file_names(row, shape)
    for target, name in zip(out if stacked else out[None], names[slice(*bounds[0])] if stacked else names):
        piece = weights[name][index]
        if not all_finite(piece):
            raise UserError(f"{weights.folder}: tensor {name!r} holds NaN or infinity; copy the file again")
        target[...] = piece.T if row.transpose else piece
    return out


# ---------------------------------------------------------------------------------------------------- writing


def write_params(
    folder: str | os.PathLike,
    config: ModelConfig | EncDecConfig,
    params: Params,
    max_shard_bytes: int = 5 * 2**30,
    extras: Callable[[pathlib.Path], None] = lambda folder: None,
) -> None:
    """Writes config.json and safetensors (in shards with an index beyond `max_shard_bytes`), all or nothing.

    A tied head is not written: transformers makes it from the embedding. All processes must call this; one writes.

    Args:
      folder: absent, empty, or an earlier export, which is replaced.
      config: of the model. params: its parameters, in any sharding; each tensor is written in its own dtype.
      extras: writes the other files of the folder (tokenizer, generation config), given its path.

    Raises:
      UserError: the folder holds something else, the parameters are not the config's, or the disk refuses.
    """
    target = local_path(folder).resolve()
    leaves = _checked_leaves(config, params)
    tensors = _tensors(config)
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda pieces: sum(_piece_bytes(leaves, p) for p in pieces),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    writer = jax.process_index() == 0
    # Hidden and beside the target, on one file system: renamed when complete, it appears at once or not at all.
    new = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        if writer:
            refuse_foreign(target)
            new.mkdir(parents=True)
        for file, names in shards.filename_to_tensors.items():
            # A collective: all processes take part, though one writes. One file at a time bounds the host's memory.
            arrays = {name: _gather(leaves, tensors[name]) for name in names}
            if writer:
                save_file(arrays, new / file, metadata={"format": "pt"})
        if writer:
            # transformers casts what it loads to `torch_dtype`, so it is the stored and not the compute dtype.
            write_json(new / "config.json", {**to_hf(config), "torch_dtype": str(leaves["embed/table"].dtype)})
            if shards.is_sharded:
                write_json(new / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
            extras(new)
            _publish(new, target)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{target}: the export cannot be written ({e}); nothing was changed") from e
    finally:
        if writer:
            shutil.rmtree(new, ignore_errors=True)
    # A barrier: no process may read the folder before it is complete.
    distributed.broadcast_bool(True)


def _checked_leaves(config: ModelConfig | EncDecConfig, params: Params) -> dict[str, Any]:
    leaves = dict(tree.named_leaves(params))
    wanted = {row.path: shape for row, shape in name_map(config)}
    for path in sorted(leaves.keys() ^ wanted.keys()):
        fault = "missing" if path in wanted else "not one of this config"
        raise UserError(f"parameter {path} is {fault}; cannot export")
    for path, shape in wanted.items():
        leaf = leaves[path]
        if leaf.shape != shape:
            raise UserError(f"parameter {path} has shape {leaf.shape}, but the config asks for {shape}; cannot export")
        if leaf.dtype not in DTYPES.values():
            raise UserError(f"parameter {path} has dtype {leaf.dtype}; export float32, bfloat16 or float16")
    return leaves


Piece = tuple[Row, int]  # one parameter's share of a tensor: its row, and the layer (-1: it has none)


def _tensors(config: ModelConfig | EncDecConfig) -> dict[str, list[Piece]]:
    """Returns every tensor of the files with its pieces (several for a fused one), layer by layer."""
    out: dict[str, list[Piece]] = {}
    rows = name_map(config) + copies(config)
    for layer in range(-1, max(shape[0] for row, shape in rows if "{i}" in row.name)):
        for row, shape in rows:
            if ("{i}" in row.name) == (layer >= 0) and layer < shape[0]:
                out.setdefault(row.name.format(i=layer), []).append((row, layer))
    return {name: sorted(pieces, key=lambda piece: piece[0].part or 0) for name, pieces in out.items()}


def _piece_bytes(leaves: dict[str, Any], piece: Piece) -> int:
    leaf = leaves[piece[0].path]
    return math.prod(leaf.shape[1:] if piece[1] >= 0 else leaf.shape) * leaf.dtype.itemsize * (1 + piece[0].spare)


def _gather(leaves: dict[str, Any], pieces: list[Piece]) -> np.ndarray:
    parts = []
    for row, layer in pieces:
        x = np.asarray(to_host(leaves[row.path][layer] if layer >= 0 else leaves[row.path]))
        # In float32, so that the product is rounded once.
        x = x if row.factor == 1 else (x.astype(np.float32) * np.float32(row.factor)).astype(x.dtype)
        parts.append(np.stack([x, np.zeros_like(x)]) if row.spare else x)
    x = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    # safetensors writes the buffer in memory order: a transposed view would be saved scrambled, without an error.
    return np.ascontiguousarray(x.T if row.transpose else x)


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes a small JSON file as Hugging Face does: indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# The files of an export. Anything else is a user's work, and replacing the folder would delete it.
_OWN_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json"
    r"|chat_template\.(json|jinja)|tokenizer(_config)?\.json|(tokenizer|spiece)\.model"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|additional_chat_templates(/[^/]+\.jinja)?"
)


def refuse_foreign(target: pathlib.Path) -> None:
    """Raises UserError unless the target is absent, an empty folder, or a model export and nothing besides."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; give the name of a folder to export to")
    inside = (*target.iterdir(), *target.glob("additional_chat_templates/*"))
    names = sorted(p.relative_to(target).as_posix() for p in inside)
    if foreign := [n for n in names if not _OWN_FILES.fullmatch(n)]:
        named = f"{foreign[0]!r}{others(foreign)}"
        raise UserError(f"{target} holds {named}, which is no part of a model export; choose another folder")
    if names and "model_type" not in (read_json(target / "config.json") if "config.json" in names else {}):
        raise UserError(f"{target} is not empty and no model export; choose another folder")


def _publish(new: pathlib.Path, target: pathlib.Path) -> None:
    # An earlier export is moved aside and deleted only when the new one has its name; on a failure it is moved back.
    mode = (new / "config.json").stat().st_mode
    for file in filter(pathlib.Path.is_file, new.rglob("*")):
        # safetensors creates files readable by their owner only; config.json has the mode of the umask.
        file.chmod(mode)
        # On disk before the rename, or a crash could leave the target's name on incomplete files.
        with file.open("rb") as f:
            os.fsync(f.fileno())
    old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
