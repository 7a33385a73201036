"""Benchmark of a pretrained model beside transformers and PEFT: sampling, the SFT step and the LoRA step, float32."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from qstar import tree
from qstar.bench.common import in_turn, matmul_rate, median, paired_ratio, show, torch_twin
from qstar.bench.generate import torch_generate
from qstar.bench.train import LR, random_rows, whole_rows
from qstar.models import lora
from qstar.models.config import ModelConfig
from qstar.models.model import Model, load
from qstar.sample.batching import generate
from qstar.train import losses, optim
from qstar.train.flops import update_flops
from qstar.train.state import create_state
from qstar.train.step import make_step

PROMPT = 48  # tokens
LORA = lora.Lora(rank=16, alpha=32.0)
# Bytes per parameter of a full AdamW step in float32: the parameter, its gradient and two moments, before and after
# the update where the optimiser does not work in place.
FULL_STEP = 24


def sampling(folder: str, *, as_json: bool, quick: bool, device: str) -> None:
    """Measures sampling at temperature 1, n samples of every prompt, none of which ends early; prints the table."""
    prompts, samples, new, rounds = (4, 2, 32, 1) if quick else (32, 4, 128, 3)
    options = dict(folder=folder, prompts=prompts, samples=samples, new=new)
    found = in_turn({"qstar": ours_sampling, "torch": theirs_sampling}, rounds, 1, device, **options)
    count = prompts * samples * new
    row: dict[str, Any] = {"load": f"{prompts} prompts of {PROMPT} x {samples} samples of {new} tokens"}
    row |= {f"{side} tokens/s": round(count / median(f["seconds"])) for side, f in found.items()}
    row |= {"qstar/torch": paired_ratio(found["qstar"]["seconds"], found["torch"]["seconds"])}
    row |= {f"{side} MiB": round(f["mib"]) for side, f in found.items()}
    show(f"sampling, float32: {_name(folder)}", [row | {"recompiles": found["qstar"]["recompiles"]}], {}, as_json)


def training(folder: str, *, as_json: bool, quick: bool, device: str) -> None:
    """Measures an update of all parameters, where memory allows, and one of LoRA adapters; prints the table."""
    B, T, rounds, repeats = (2, 64, 1, 2) if quick else (4, 256, 3, 2)
    rate, model = matmul_rate(repeats=5 if quick else 9), load(folder, dtype="float32")
    flops = update_flops(cast(ModelConfig, model.config), whole_rows(random_rows(model.config.vocab_size, B, T)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    full = FULL_STEP * tree.size(model.params) < memory / 2
    del model
    rows = []
    for what in ("SFT", "LoRA") if full else ("LoRA",):
        options = dict(folder=folder, rows=B, length=T, adapters=what == "LoRA")
        found = in_turn({"qstar": ours_update, "torch": theirs_update}, rounds, repeats, device, **options)
        ours, theirs = found["qstar"], found["torch"]
        row: dict[str, Any] = {"update": f"{what}, {B} x {T} tokens"}
        row |= {f"{side} s": median(f["seconds"]) for side, f in found.items()}
        row |= {"torch/qstar": paired_ratio(ours["seconds"], theirs["seconds"])}
        row |= {f"{side} MiB": round(f["mib"]) for side, f in found.items()}
        # Frozen kernels need no gradient: two of the three products of a full update.
        needed = flops * (2 / 3 if what == "LoRA" else 1)
        row |= {"share of matmul rate": needed / row["qstar s"] / rate, "recompiles": ours["recompiles"]}
        rows.append(row | {"loss difference": abs(ours["results"][0] - theirs["results"][0])})
    notes = {"matmul GFLOP/s": round(rate / 1e9), "LoRA": f"rank {LORA.rank} on {', '.join(LORA.targets)}"}
    show(f"updates, float32: {_name(folder)}", rows, notes, as_json)


def _name(folder: str) -> str:
    return os.path.basename(os.path.normpath(folder))


# ------------------------------------------------------------------------------------------------------- the sides


def _prompts(vocab: int, count: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(10, vocab - 10, (count, PROMPT)).tolist()


def _endless(folder: str) -> Model:
    # Without end ids every sample has the same length on both sides.
    model = load(folder, dtype="float32")
    return model.replace(config=model.config.replace(eos_id=None, also_eos=()), tokenizer=None)


def ours_sampling(folder: str, prompts: int, samples: int, new: int) -> Callable[[], int]:
    """Returns a function that samples and returns the number of tokens."""
    model = _endless(folder)
    ids = _prompts(model.config.vocab_size, prompts)
    options: dict[str, Any] = dict(max_new_tokens=new, n=samples, temperature=1.0)
    return lambda: sum(len(c.tokens) for row in generate(model, ids, **options) for c in row)


def theirs_sampling(folder: str, prompts: int, samples: int, new: int) -> Callable[[], int]:
    """Returns the same with transformers."""
    twin = torch_twin(folder).eval()
    ids = _prompts(twin.config.vocab_size, prompts)
    return lambda: torch_generate(twin, ids, new, eos=None, samples=samples).numel() - prompts * samples * PROMPT


def ours_update(folder: str, rows: int, length: int, adapters: bool) -> Callable[[], float]:
    """Returns a function that runs one update of all parameters or of LoRA adapters, and returns its loss."""
    model, tx = load(folder, dtype="float32"), optim.adamw(b2=0.999)
    params = tree.cast(model.params, np.float32)
    config, roles, frozen = cast(ModelConfig, model.config), {"policy": params}, {}
    loss: Any = partial(losses.sft_loss, config=config)
    if adapters:
        loss, frozen = lora.through(loss, LORA.scale), {"base": params}
        roles = {"policy": lora.init(config, LORA, jax.random.key(0))}
    step, state = make_step(loss, tx), create_state(roles, tx, seed=0)
    del model, params, roles  # the state is donated to the step: a second reference would keep a copy
    batch = jax.device_put(whole_rows(random_rows(_vocab(folder), rows, length)))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch, np.float32(LR), frozen)
        return float(metrics["loss"])

    return run


def theirs_update(folder: str, rows: int, length: int, adapters: bool) -> Callable[[], float]:
    """Returns the same with PyTorch, and PEFT for adapters."""
    import torch

    twin = torch_twin(folder).train()
    if adapters:
        import peft

        names = [f"{n}_proj" for n in LORA.targets]
        options: dict[str, Any] = dict(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=names)
        twin = peft.get_peft_model(twin, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    tokens = torch.from_numpy(random_rows(_vocab(folder), rows, length)).long()

    def run() -> float:
        loss = twin(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return run


def _vocab(folder: str) -> int:
    from qstar.models.hf import read_config
    from qstar.models.hub import resolve

    return read_config(resolve(folder))["vocab_size"]
