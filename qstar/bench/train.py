"""Benchmark of the supervised train step beside transformers + PyTorch: a Llama of about 20M parameters, float32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from qstar.bench.common import LLAMAS, in_turn, matmul_rate, median, paired_ratio, random_model, show, torch_twin
from qstar.models.config import preset
from qstar.train import losses, optim
from qstar.train.flops import update_flops
from qstar.train.state import create_state
from qstar.train.step import make_step
from qstar.types import Batch

LR = 1e-4


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto") -> None:
    """Measures forward + backward + clip + AdamW for every size and prints the table."""
    B, T, rounds, repeats, rows = (4, 64, 1, 2, []) if quick else (16, 128, 3, 3, [])
    rate = matmul_rate(repeats=5 if quick else 9)
    for name, changes in LLAMAS:
        config = preset("llama_20m", **changes)
        with tempfile.TemporaryDirectory() as folder:
            options = dict(folder=folder, changes=changes, rows=B, length=T)
            found = in_turn({"qstar": ours_step, "torch": torch_step}, rounds, repeats, device, **options)
        ours, theirs = found["qstar"], found["torch"]
        seconds = median(ours["seconds"])
        flops = update_flops(config, whole_rows(random_rows(config.vocab_size, B, T)))
        row = {"size": name, "batch": f"{B}x{T}", "qstar s": seconds, "torch s": median(theirs["seconds"])}
        row |= {
            "torch/qstar": paired_ratio(ours["seconds"], theirs["seconds"]),
            "qstar tokens/s": round(B * T / seconds),
        }
        row |= {"share of matmul rate": flops / seconds / rate, "recompiles": ours["recompiles"]}
        rows.append(row | {"loss difference": abs(ours["results"][0] - theirs["results"][0])})
    notes = {"matmul GFLOP/s": round(rate / 1e9), "flop rule": "6 per matmul parameter and token + causal attention"}
    show("SFT step, float32", rows, notes, as_json)


def random_rows(vocab: int, rows: int, length: int) -> np.ndarray:
    """Returns tokens [B, T] int32, the same on both sides."""
    return np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)


def whole_rows(tokens: np.ndarray) -> Batch:
    """Returns rows [B, T] of one text each, with every token as a target."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    rows: list[Any] = [tokens, np.ones(tokens.shape, np.float32), np.ones(tokens.shape, np.int32), positions]
    return Batch(*rows)


def ours_step(folder: str, changes: dict[str, Any], rows: int, length: int) -> Callable[[], float]:
    """Saves the model; returns a function that runs one update and returns its loss."""
    config = preset("llama_20m", **changes)
    # Saved, so that the torch side starts from the same weights: the difference of losses checks the comparison.
    model, tx = random_model(config, folder), optim.adamw(b2=0.999)
    step = make_step(partial(losses.sft_loss, config=config), tx)
    state = create_state({"policy": model.params}, tx, seed=0)
    batch = jax.device_put(whole_rows(random_rows(config.vocab_size, rows, length)))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch, np.float32(LR))
        return float(metrics["loss"])

    return run


def torch_step(folder: str, changes: dict[str, Any], rows: int, length: int) -> Callable[[], float]:
    """Returns a function that runs one update of the PyTorch twin and returns its loss."""
    import torch

    twin = torch_twin(folder).train()
    optimiser = torch.optim.AdamW(twin.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    tokens = torch.from_numpy(random_rows(preset("llama_20m", **changes).vocab_size, rows, length)).long()

    def run() -> float:
        loss = twin(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return run
