"""Benchmark of train steps beside transformers + PyTorch, float32: Llamas of about 20M parameters, or a pretrained model.

A pretrained model makes updates of all parameters, where memory allows, and of LoRA adapters, beside PEFT.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import jax
import numpy as np

from qstar import tree
from qstar.bench.common import LLAMAS, in_turn, matmul_rate, our_model, paired_ratio, read_config, show, torch_twin
from qstar.models import lora
from qstar.models.config import preset
from qstar.thoughts.layout import text_batch
from qstar.train import flops, losses, optim
from qstar.train.state import create_state
from qstar.train.step import make_step
from qstar.types import Params

LR = 1e-4
LORA = lora.Lora(rank=16, alpha=32.0)
# Bytes per parameter of a full AdamW step in float32: the parameter, its gradient, two moments, and temporaries.
# Qwen2.5-0.5B (630M with its own head, 4 x 256 tokens) took 14 (PyTorch: 17) beside the loaded parameters' 4.
FULL_STEP = 22


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto", model: str = "", rounds: int = 0) -> None:
    """Measures forward + backward + clip + AdamW of every case and prints the table; 0 rounds are 3, or 1 if `quick`."""
    rate, rows = matmul_rate(repeats=5 if quick else 9), []
    B, T = ((2, 64) if quick else (4, 256)) if model else ((4, 64) if quick else (16, 128))
    rounds, repeats = rounds or (1 if quick else 3), 2 if quick or model else 3
    for name, config, case in _cases(model):
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = dict(folder=model or folder, rows=B, length=T, **case)
            found = in_turn({"qstar": ours_update, "torch": torch_update}, rounds, repeats, device, **options)
        ours, theirs = found["qstar"], found["torch"]
        row: dict[str, Any] = {"update": f"{name}, {B} x {T} tokens"}
        row |= {f"{side} s": median(f["seconds"]) for side, f in found.items()}
        row |= {"torch/qstar": paired_ratio(ours["seconds"], theirs["seconds"])}
        row |= {"qstar tokens/s": round(B * T / row["qstar s"])}
        row |= {f"{side} MiB": round(f["mib"]) for side, f in found.items()}
        needed, _ = flops.update(config, B, T, lora="adapters" in case)
        row |= {"share of matmul rate": needed / row["qstar s"] / rate, "recompiles": ours["recompiles"]}
        rows.append(row | {"loss difference": abs(ours["results"][0] - theirs["results"][0])})
    notes: dict[str, Any] = {"matmul GFLOP/s": round(rate / 1e9)}
    notes |= {"flop rule": "6 (LoRA: 4) per matmul parameter and token + causal attention"}
    notes |= {"LoRA": f"rank {LORA.rank} on {', '.join(LORA.targets)}"} if model else {}
    show("updates, float32", rows, notes, as_json)


def _cases(model: str) -> list[tuple[str, Any, dict[str, Any]]]:
    if not model:
        return [(name, preset("llama_20m", **changes), {"changes": changes}) for name, changes in LLAMAS]
    config, name = read_config(model), os.path.basename(os.path.normpath(model))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    full = FULL_STEP * (config.matmul_params + config.vocab_size * config.hidden_size) < 0.6 * memory
    return [(name, config, {})] * full + [(f"{name}, LoRA", config, {"adapters": True})]


def random_rows(vocab: int, rows: int, length: int) -> np.ndarray:
    """Returns tokens [B, T] int32, the same on both sides."""
    return np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)


def ours_update(
    folder: str, rows: int, length: int, changes: dict[str, Any] | None = None, adapters: bool = False
) -> Callable[[], float]:
    """Returns a function that runs one update of all parameters or of LoRA adapters and returns its loss."""
    model = our_model(folder, changes)
    config, params, frozen = model.config, tree.cast(model.params, np.float32), {}
    loss: Any = partial(losses.sft_loss, config=config)
    if adapters:
        loss, frozen = lora.through(loss, LORA.scale), {"base": params}
        params = lora.init(config, LORA, jax.random.key(0))
    tokens = random_rows(config.vocab_size, rows, length)
    return stepper(loss, params, text_batch(tokens, np.ones_like(tokens)), frozen)


def stepper(loss: Any, params: Params, batch: Any, frozen: dict[str, Params]) -> Callable[[], float]:
    """Returns a function that runs one update of the parameters and returns its loss."""
    # The state is donated to the step, and the caller's references end when it returns: no copy is kept.
    tx = optim.adamw(b2=0.999)
    step, state, batch = make_step(loss, tx), create_state({"policy": params}, tx, seed=0), jax.device_put(batch)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch, np.float32(LR), frozen)
        return float(metrics["loss"])

    return run


def torch_update(
    folder: str, rows: int, length: int, changes: dict[str, Any] | None = None, adapters: bool = False
) -> Callable[[], float]:
    """Returns the same with PyTorch, and PEFT for adapters."""
    twin = torch_twin(folder).train()
    tokens = random_rows(twin.config.vocab_size, rows, length)
    if adapters:
        import peft

        names = [f"{n}_proj" for n in LORA.targets]
        options: dict[str, Any] = dict(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=names)
        twin = peft.get_peft_model(twin, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    return torch_stepper(twin, tokens)


def torch_stepper(twin: Any, tokens: np.ndarray, **options: Any) -> Callable[[], float]:
    """Returns a function that runs one update of what trains in a PyTorch model; `options` are AdamW's."""
    import torch

    trained, ids = [p for p in twin.parameters() if p.requires_grad], torch.from_numpy(tokens).long().to(twin.device)
    optimiser = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), weight_decay=0.0, **options)

    def run() -> float:
        loss = twin(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return run
