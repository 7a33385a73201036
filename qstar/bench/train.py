"""The supervised train step beside transformers + PyTorch: a Llama of about 20M parameters, float32, same batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from qstar.bench.common import LLAMAS, matmul_rate, median, paired_ratio, random_model, show, torch_twin
from qstar.bench.sides import Sides
from qstar.models.config import preset
from qstar.models.model import save
from qstar.train import losses, optim
from qstar.train.flops import update_flops
from qstar.train.state import create_state
from qstar.train.step import make_step
from qstar.types import Batch

LR = 1e-4


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto") -> None:
    """Measures forward + backward + clip + AdamW for every size and prints the table."""
    rows = []
    B, T, repeats = (4, 64, 2) if quick else (16, 128, 7)
    with Sides(device) as sides, tempfile.TemporaryDirectory() as folder:
        rate = matmul_rate(repeats=5 if quick else 9, sides=sides)
        for name, changes in LLAMAS:
            load = {"folder": folder, "vocab": preset("llama_20m", **changes).vocab_size, "rows": B, "length": T}
            sides.make("qstar", ours_step, changes=changes, **load)
            sides.make("torch", torch_step, **load)
            first_loss = sides.call("qstar"), sides.call("torch")
            turns = sides.interleaved(repeats)
            seconds = turns.seconds
            flops = update_flops(preset("llama_20m", **changes), whole_rows(random_rows(load["vocab"], B, T)))
            rows.append(
                {
                    "size": name,
                    "batch": f"{B}x{T}",
                    "qstar s": median(seconds["qstar"]),
                    "torch s": median(seconds["torch"]),
                    "torch/qstar": paired_ratio(seconds["qstar"], seconds["torch"]),
                    "qstar tokens/s": round(B * T / median(seconds["qstar"])),
                    "share of matmul rate": flops / median(seconds["qstar"]) / rate,
                    "loss difference": abs(first_loss[0] - first_loss[1]),
                    "recompiles": turns.recompiles["qstar"],
                }
            )
    notes = {"matmul GFLOP/s": round(rate / 1e9), "flop rule": "6 per matmul parameter and token + causal attention"}
    show("SFT step, float32", rows, notes, as_json)


def random_rows(vocab: int, rows: int, length: int) -> np.ndarray:
    """Returns tokens [B, T] int32, the same on both sides."""
    return np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)


def whole_rows(tokens: np.ndarray) -> Batch:
    """Returns rows [B, T] of one text each, all of it to be predicted."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens, np.ones(tokens.shape, np.float32), np.ones(tokens.shape, np.int32), positions)


def ours_step(folder: str, changes: dict[str, Any], vocab: int, rows: int, length: int) -> Callable[[], float]:
    """Saves the model in the folder; returns a function that runs one of our updates and returns its loss."""
    model = random_model(preset("llama_20m", **changes))
    save(model, folder)
    tx = optim.adamw(b2=0.999)
    step = make_step(partial(losses.sft_loss, config=model.config), tx)
    holder = [create_state({"policy": model.params}, tx, seed=0)]
    batch = jax.device_put(whole_rows(random_rows(vocab, rows, length)))

    def run() -> float:
        holder[0], metrics = step(holder[0], batch, np.float32(LR))
        return float(metrics["loss"])

    return run


def torch_step(folder: str, vocab: int, rows: int, length: int) -> Callable[[], float]:
    """Returns a function that runs one update of the PyTorch twin and returns its loss."""
    import torch

    twin = torch_twin(folder)
    twin.train()
    optimiser = torch.optim.AdamW(twin.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    tokens = torch.from_numpy(random_rows(vocab, rows, length)).long()

    def run() -> float:
        loss = twin(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return run
