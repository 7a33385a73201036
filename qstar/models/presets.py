"""Shapes of published models, so that a job can be planned before their weights are downloaded.

Each entry of presets.json is the config.json of a published model; `torch_dtype` is that of its files.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from qstar.errors import unknown
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.hf_config import from_hf

_CONFIGS: dict[str, dict[str, Any]] = json.loads(
    pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
NAMES = tuple(_CONFIGS)


def _key(name: str) -> str:
    return pathlib.PurePath(name).name.lower().removesuffix("-hf")


def is_published(name: str) -> bool:
    """Returns whether the table has a model of this name (see `published`)."""
    return _key(name) in _CONFIGS


def published(name: str) -> tuple[ModelConfig | EncDecConfig, str]:
    """Returns the config of a published model and the dtype of its files, by the name of its folder.

    Case, the folders above and the ending "-hf" do not matter: `models/Llama-2-7b-hf` is llama-2-7b.

    Raises:
      UserError: a model that is not in the table.
    """
    key = _key(name)
    if key not in _CONFIGS:
        raise unknown(f"model {name!r} is no folder here, and as a published model", key, NAMES)
    return from_hf(_CONFIGS[key], key), _CONFIGS[key]["torch_dtype"]
