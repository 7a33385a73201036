"""The recorded case of the official code, as a checkpoint folder in its own layout, and as arrays."""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
from safetensors.numpy import save_file

import qstar
from qstar import tree
from qstar.models.hf_names import file_names, name_map
from qstar.models.model import Model
from qstar.models.thought_config import ThoughtConfig

FILE = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "quiet_star_sampled_p2.npz"
CONFIG = {
    "model_type": "mistral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_thoughts": 11,  # n_ahead 6 + 4 + 1
    "use_weighted_talk_head": True,
}
THOUGHTS = ThoughtConfig.parity(thought_tokens=3, talk_tokens=3, forbidden_ids=(62, 63))


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """Everything in the file; the case's own arrays without their prefix."""
    with np.load(FILE) as z:
        return {k.removeprefix("sampled_p2/"): z[k] for k in z.files}


def named(prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `prefix/`, by the official parameter names."""
    return {k.removeprefix(prefix + "/"): v for k, v in arrays().items() if k.startswith(prefix + "/")}


def write(folder: pathlib.Path, **config) -> pathlib.Path:
    """Writes an official-style checkpoint and returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in named("param").items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


@functools.cache
def model(thoughts: ThoughtConfig = THOUGHTS) -> Model:
    """The recorded weights through `qstar.load`."""
    with tempfile.TemporaryDirectory() as folder:
        return qstar.load(write(pathlib.Path(folder)), thoughts=thoughts)


def under_official_names(params) -> dict[str, np.ndarray]:
    """A tree like the parameters (say, of gradients) by the official names, in PyTorch's layout."""
    leaves, out = dict(tree.named_leaves(jax.device_get(params))), {}
    for row, shape in name_map(model().config):
        x = leaves[row.path]
        for i, name in enumerate(file_names(row, shape)):
            one = x[i] if "{i}" in row.name else x
            out[name] = np.stack([one, 0 * one]) if row.spare else one.T if row.transpose else one
    return out
