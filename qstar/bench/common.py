"""Fair measuring on a noisy machine: both sides in turn (`bench.sides`), medians and ratios, and the machine's own limits."""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qstar.bench.sides import Sides
from qstar.errors import UserError
from qstar.models import scoring
from qstar.models.model import Model

# Changes to the preset llama_20m: 512 ids put the work into the blocks, 32,000 into the vocabulary.
SMALL_BLOCKS = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 4,
    "intermediate_size": 688,
    "scan_unroll": 4,
}
LLAMAS = (("20M, vocab 512", {}), ("20M, vocab 32000", {"vocab_size": 32000, **SMALL_BLOCKS}))
READ_BYTES = 2**29  # more than any cache


def median(values: list[float]) -> float:
    """Returns the median."""
    return statistics.median(values)


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Returns the median over pairs of theirs / ours: above 1, qstar is faster."""
    return statistics.median(b / a for a, b in zip(ours, theirs))


def matmul_rate(size: int = 2048, repeats: int = 9, sides: Sides | None = None) -> float:
    """Returns this machine's float32 matrix-product rate in FLOP/s, the better of JAX's and PyTorch's medians."""
    return 2 * size**3 / _best("product", size, repeats, sides)


def memory_rate(repeats: int = 9, sides: Sides | None = None) -> float:
    """Returns the rate in bytes/s at which this machine reads an array that no cache holds, the better of both medians."""
    return READ_BYTES / _best("read", READ_BYTES, repeats, sides)


def _best(what: str, size: int, repeats: int, sides: Sides | None) -> float:
    with contextlib.nullcontext(sides) if sides else Sides() as both:
        both.make("qstar", jax_limit, what=what, size=size)
        both.make("torch", torch_limit, what=what, size=size)
        return min(map(median, both.interleaved(repeats).seconds.values()))


def jax_limit(what: str, size: int) -> Callable[[], None]:
    """Returns a product of size x size, or a reading of `size` bytes."""
    if what == "read":
        x, f = jnp.ones(size // 4), jax.jit(jnp.sum)
    else:
        x = jax.random.normal(jax.random.key(0), (size, size))
        f = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))

    def run() -> None:
        f(x).block_until_ready()

    return run


def torch_limit(what: str, size: int) -> Callable[[], None]:
    """The same of PyTorch."""
    torch = _torch()
    x = torch.ones(size // 4) if what == "read" else torch.randn(size, size)
    out = torch.empty_like(x)

    def run() -> None:
        x.sum() if what == "read" else torch.matmul(x, x, out=out)

    return run


def random_model(config: scoring.AnyConfig, seed: int = 0) -> Model:
    """Returns a model with random weights and no tokenizer."""
    return Model(config, jax.jit(lambda key: scoring.init(config, key))(jax.random.key(seed)))


def torch_twin(folder: str | Path) -> Any:
    """Returns a saved model as a transformers model on the CPU, float32.

    Raises:
      UserError: PyTorch is not installed.
    """
    torch = _torch()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    extra = {"dropout_rate": 0.0} if seq2seq else {}  # the same work on both sides
    return auto.from_pretrained(folder, dtype=torch.float32, **extra)


def _torch() -> Any:
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        raise UserError("qstar bench compares with transformers + PyTorch: pip install 'torch==2.13.0'") from None
    return torch


def show(title: str, rows: list[dict[str, Any]], notes: dict[str, Any], as_json: bool) -> None:
    """Prints the table, or one JSON object."""
    if as_json:
        print(json.dumps({"title": title, **notes, "rows": rows}))
        return
    from rich.console import Console

    from qstar.train.metrics import show_table

    show_table(Console(width=160), title, rows)
    for name, value in notes.items():
        print(f"{name}: {value}")
