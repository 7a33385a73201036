"""Fair measuring on a noisy machine: both sides in one process, in turn, medians and ratios, and the machine's own limit."""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qstar.errors import UserError
from qstar.models import policy
from qstar.models.encdec_config import EncDecConfig
from qstar.models.model import Model, save
from qstar.train.profile import Compiles

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


def interleaved(
    sides: dict[str, Callable[[], Any]], repeats: int, compiles: Compiles | None = None
) -> dict[str, list[float]]:
    """Returns wall seconds per side: one warm-up each (compilation; `compiles` counts from there on), then A B A B ..."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for f in sides.values():
        f()
    if compiles is not None:
        compiles.count = 0
    for _ in range(repeats):
        for name, f in sides.items():
            began = time.perf_counter()
            f()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median(values: list[float]) -> float:
    """Returns the median."""
    return statistics.median(values)


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Returns the median over pairs of theirs / ours: above 1, qstar is faster."""
    return statistics.median(b / a for a, b in zip(ours, theirs))


def matmul_rate(size: int = 2048, repeats: int = 9) -> float:
    """Returns this machine's float32 matrix-product rate in FLOP/s, the best of JAX's and PyTorch's medians."""
    import torch

    x = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    t = torch.randn(size, size)
    with torch.no_grad():
        seconds = interleaved({"jax": lambda: product(x).block_until_ready(), "torch": lambda: t @ t}, repeats)
    return 2 * size**3 / min(median(s) for s in seconds.values())


def random_model(config: policy.AnyConfig, seed: int = 0) -> Model:
    """Returns a model with random weights and no tokenizer."""
    return Model(config, jax.jit(lambda key: policy.init(config, key))(jax.random.key(seed)))


def torch_twin(model: Model) -> Any:
    """Returns the same weights as a transformers model on the CPU.

    Raises:
      UserError: PyTorch is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        from transformers.utils import logging as transformers_logging
    except ImportError:
        raise UserError("qstar bench compares with transformers + PyTorch: pip install 'torch==2.13.0'") from None
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model")
        auto = AutoModelForSeq2SeqLM if isinstance(model.config, EncDecConfig) else AutoModelForCausalLM
        extra = {"dropout_rate": 0.0} if isinstance(model.config, EncDecConfig) else {}  # the same work on both sides
        return auto.from_pretrained(Path(folder) / "model", dtype=torch.float32, **extra)


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
