"""Benchmark of one accelerator: an update's MFU, decoding's share of the bandwidth, Quiet-STaR's step, attention kernels.

Every row is a multiple of what this device does in the same run: the rate of bfloat16 matrix products and the bandwidth of
a copy. Where PyTorch finds the same GPU, transformers runs the update and the decoding, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.bench.common import measure, our_model, show, torch_twin
from qstar.bench.generate import torch_generate
from qstar.bench.train import ours_update, random_rows, stepper, torch_stepper
from qstar.models import decoder
from qstar.models.attention import attend, causal_mask, text_segment
from qstar.models.config import ModelConfig, preset
from qstar.models.flash import platform_of
from qstar.models.thought_config import ThoughtConfig
from qstar.sample.batching import generate
from qstar.thoughts import layout
from qstar.thoughts import loss as thought_loss
from qstar.train import flops

# Llama-3.2-1B's blocks (1.1B parameters here) and SmolLM2-135M's, with random weights.
LLAMA_1B: dict[str, Any] = dict(
    hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, intermediate_size=8192,
    vocab_size=32000, max_positions=4096, dtype="bfloat16", remat="block", scan_unroll=1,
)  # fmt: skip
SMOL_135M: dict[str, Any] = dict(
    hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536,
    vocab_size=49152, max_positions=4096, dtype="bfloat16", remat="block", scan_unroll=1, tie_embeddings=True,
)  # fmt: skip
SMALL: dict[str, Any] = {"hidden_size": 128, "num_layers": 2, "vocab_size": 512, "intermediate_size": 256}


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto") -> None:
    """Measures all rows and prints one table."""
    small, repeats = SMALL if quick else {}, 1 if quick else 5
    call = partial(measure, "qstar", device=device, repeats=repeats)
    size, megabytes = (512, 64) if quick else (8192, 2048)
    product, copy = call(matmul, size=size), call(copying, megabytes=megabytes)
    rate, bandwidth = 2 * size**3 / median(product["seconds"]), 2e6 * megabytes / median(copy["seconds"])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        B, T = (2, 128) if quick else (8, 2048)
        config = preset("llama_20m", **LLAMA_1B | small)
        needed, _ = flops.update(config, B, T)
        options: dict[str, Any] = dict(folder=folder, changes=LLAMA_1B | small)
        found = call(ours_update, rows=B, length=T, **options)
        theirs = _torch(product["device"], torch_update, repeats, rows=B, length=T, **options)
        rows.append(_row(f"SFT, {config.matmul_params / 1e9:.2f}B, {B} x {T}", found, needed, rate, theirs))
        new = 16 if quick else 128
        for batch in (8,) if quick else (128, 256):
            found = call(decoding, batch=batch, new=new, **options)
            bytes_read = new * found["results"][-1]
            theirs = _torch(product["device"], torch_decoding, repeats, batch=batch, new=new, **options)
            rows.append(_row(f"decoding, {batch} x {new} tokens", found, bytes_read, bandwidth, theirs))
    N = 64 if quick else 256
    found = call(thinking, length=N, changes=small)
    config = _thinker(small)
    needed, _ = flops.update(config, 1, N, with_thoughts=True)
    rows.append(_row(f"Quiet-STaR, {config.matmul_params / 1e6:.0f}M, N {N}, n_ahead 8", found, needed, rate, None))
    vendor = flops.peak(product["device"])
    notes = {"device": product["device"], "matmul TFLOP/s": round(rate / 1e12, 2), "copy GB/s": round(bandwidth / 1e9)}
    notes |= {"peak TFLOP/s": vendor and vendor / 1e12, "at limit s": "needed FLOPs or bytes at the measured rate"}
    for kind in ("cudnn", "splash", "tiles"):
        (*_, difference) = call(attention, kind=kind, length=128 if quick else 2048)["results"]
        if difference is not None:
            notes[f"attention by {kind}, gradients beside XLA's, largest relative difference"] = difference
    show("one accelerator, bfloat16", rows, notes, as_json)


def _row(name: str, found: dict[str, Any], needed: float, rate: float, theirs: Any) -> dict[str, Any]:
    seconds = median(found["seconds"])
    row = {"row": name, "s": seconds, "at limit s": needed / rate, "share of limit": needed / rate / seconds}
    return row | {"torch/qstar": theirs and median(theirs["seconds"]) / seconds, "recompiles": found["recompiles"]}


def _torch(device: str, maker: Callable[..., Any], repeats: int, **options: Any) -> dict[str, Any] | None:
    try:
        import torch
    except ImportError:
        return None
    return measure("torch", maker, repeats, **options) if torch.cuda.is_available() and flops.peak(device) else None


# ------------------------------------------------------------------------------------------------------- the sides


def matmul(size: int) -> dict[str, Callable[[], Any]]:
    """Returns a product of size x size in bfloat16, and the kind of device."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    return {"run": lambda: jax.block_until_ready(product(x)), "device": lambda: jax.devices()[0].device_kind}


def copying(megabytes: int) -> Callable[[], Any]:
    """Returns a function that reads and writes an array of so many MB."""
    x = jnp.zeros(megabytes * 10**6 // 2, jnp.bfloat16)
    copy = jax.jit(lambda a: -a)
    return lambda: jax.block_until_ready(copy(x))


def decoding(folder: str, changes: dict[str, Any], batch: int, new: int) -> Callable[[], Any]:
    """Returns a function that samples `new` tokens of each row, and returns the bytes that a step must read."""
    model = our_model("", changes)
    model = model.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    c = model.config
    prompts = random_rows(c.vocab_size, batch, new).tolist()
    pairs = 2 * c.num_layers * c.num_kv_heads * c.head_dim * batch * 1.5 * new  # of prompt and half of the new tokens

    def run() -> float:
        generate(model, prompts, max_new_tokens=new, temperature=1.0)
        return 2.0 * (c.matmul_params + pairs)

    return run


def _thinker(changes: dict[str, Any]) -> ModelConfig:
    thoughts = ThoughtConfig(thought_tokens=5, talk_tokens=4, thoughts_per_position=2)
    return preset("llama_20m", **SMOL_135M | changes).replace(thoughts=thoughts)


def thinking(changes: dict[str, Any], length: int) -> Callable[[], Any]:
    """Returns a function that makes a Quiet-STaR update on one text and returns its loss."""
    config = _thinker(changes)
    params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
    tokens = random_rows(config.vocab_size, 1, length)
    batch = layout.text_batch(tokens, np.ones_like(tokens))
    return stepper(partial(thought_loss.loss, config=config), params, batch, {})


def attention(kind: str, length: int) -> Callable[[], Any]:
    """Returns a function that gives the largest difference to XLA's products, relative; None where it cannot run."""
    config = ModelConfig(num_heads=32, num_kv_heads=8, head_dim=64, dtype="bfloat16", attention=kind)
    ids = jnp.ones(length, jnp.int32)
    has = {"cudnn": ("gpu",), "splash": ("tpu",), "tiles": ("cpu", "gpu", "tpu")}[kind]
    if platform_of(ids) not in has:
        return lambda: None
    shapes = ((length, 32, 64), (8, length, 64), (8, length, 64), (length, 32, 64))
    *arrays, weight = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes))

    def grads(config: ModelConfig) -> Any:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            mask = causal_mask(config, ids, one_text=True, must=True)
            out = attend(q, [text_segment(k, v, mask)], scale=0.125)
            return jnp.sum((out * weight).astype(jnp.float32))

        return jax.jit(jax.grad(total, (0, 1, 2)))

    exact, ours = grads(config.replace(attention="xla"))(*arrays), grads(config)

    def run() -> float:
        pairs = zip(jax.block_until_ready(ours(*arrays)), exact)
        return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)

    return run


def torch_update(folder: str, changes: dict[str, Any], rows: int, length: int) -> Callable[[], float]:
    """Returns an update with transformers, in bfloat16 with checkpointing, on the same GPU."""
    twin = torch_twin(folder, "bfloat16").to("cuda").train()
    twin.gradient_checkpointing_enable()
    return torch_stepper(twin, random_rows(twin.config.vocab_size, rows, length), fused=True)


def torch_decoding(folder: str, changes: dict[str, Any], batch: int, new: int) -> Callable[[], int]:
    """Returns the same sampling with transformers."""
    twin = torch_twin(folder, "bfloat16").to("cuda").eval()
    prompts = random_rows(twin.config.vocab_size, batch, new).tolist()
    return lambda: torch_generate(twin, prompts, new, eos=None).numel()
