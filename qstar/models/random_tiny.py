"""A random tiny Llama over bytes, as a model folder: it stands in for real weights where only the machinery is run."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path

import jax

NAME = "random-tiny"
_FOLDER = f"{NAME}-1"  # another number whenever its files change


@functools.cache
def folder() -> Path:
    """Returns the folder of the model (0.1M parameters, bytes as tokens, float32), made once per user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qstar"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return _made(cache)
    except OSError:  # a home that cannot be written
        return _made(Path(tempfile.mkdtemp(prefix="qstar-")))


def _made(cache: Path) -> Path:
    made = cache / _FOLDER
    if not made.exists():
        # Renamed when it is whole: several processes may make it at once.
        fresh = Path(tempfile.mkdtemp(dir=cache))
        _write(fresh / _FOLDER)
        try:
            os.rename(fresh / _FOLDER, made)
        except OSError:
            if not made.exists():
                raise
        shutil.rmtree(fresh, ignore_errors=True)
    return made


def _write(path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from qstar.models import decoder
    from qstar.models.config import ModelConfig
    from qstar.models.model import Model, save
    from qstar.text.tokenizer import Tokenizer

    alphabet, end = sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>"
    backend = Backend(models.BPE({c: i for i, c in enumerate([end, *alphabet])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end))
    config = ModelConfig(vocab_size=1 + len(alphabet), hidden_size=64, max_positions=4096, eos_id=0)
    save(Model(config, jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0)), tokenizer), path)
