"""Benchmark of sampling beside transformers' `generate`: plain batches and a STaR iteration's load, or a pretrained model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.bench.common import (
    LLAMAS,
    SMALL_BLOCKS,
    in_turn,
    matmul_rate,
    our_model,
    paired_ratio,
    random_model,
    read_config,
    show,
    torch_twin,
)
from qstar.models.config import preset
from qstar.models.model import Model, save
from qstar.models.scoring import logits
from qstar.sample.batching import generate

SHOTS, LONGEST, SAMPLES = 1000, 256, 4  # of the STaR load
EOS = 1


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto", model: str = "", rounds: int = 0) -> None:
    """Measures sampling at temperature 1 and prints one table; 0 rounds are 3, or 1 if `quick`."""
    rows, rate, rounds = [], matmul_rate(repeats=5 if quick else 9), rounds or (1 if quick else 3)
    for name, config, case in _cases(model, quick):
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = dict(folder=model or folder) | case
            found = in_turn({"qstar": ours_plain, "torch": theirs_plain}, rounds, 1, device, **options)
        flops = 2 * config.matmul_params * case["prompts"] * (case["length"] + case["samples"] * case["new"])
        rows.append(_row(name, found, flops / rate))
    if not model:
        problems = 16 if quick else 256
        with tempfile.TemporaryDirectory() as folder:
            found = in_turn({"qstar": ours_star, "torch": theirs_star}, 1, 1, device, folder=folder, problems=problems)
        tokens = SHOTS + sum(map(len, star_prompts(problems)[1])) + found["qstar"]["results"][-1]
        flops = 2 * preset("llama_20m", **SMALL_BLOCKS).matmul_params * tokens
        rows.append(_row(f"STaR load, {problems} x {SAMPLES}", found, flops / rate))
    rule = "2 per matmul parameter and token, prompt once per prompt"
    notes = {"matmul GFLOP/s": round(rate / 1e9), "flop rule": rule}
    show("sampling, float32", rows, notes, as_json)


def _cases(model: str, quick: bool) -> list[tuple[str, Any, dict[str, Any]]]:
    # No text ends early: the same number of tokens on both sides.
    if model:
        prompts, samples, new = (4, 2, 32) if quick else (32, 4, 128)
        case = dict(prompts=prompts, samples=samples, length=48, new=new)
        load = f"{prompts} prompts of 48 x {samples} samples of {new} tokens"
        return [(f"{os.path.basename(os.path.normpath(model))}, {load}", read_config(model), case)]
    sizes = [(*llama, rows) for llama in LLAMAS[: 1 if quick else 2] for rows in ((64,) if quick else (64, 256))]
    case = dict(samples=1, length=16, new=64)
    return [
        (f"{name}, {n} rows", preset("llama_20m", **c), case | {"prompts": n, "changes": c}) for name, c, n in sizes
    ]


def _row(load: str, found: dict[str, Any], needed: float) -> dict[str, Any]:
    rates = {side: [n / s for n, s in zip(f["results"], f["seconds"])] for side, f in found.items()}
    row: dict[str, Any] = {"load": load} | {f"{side} tokens/s": round(median(each)) for side, each in rates.items()}
    row |= {"qstar/torch": paired_ratio(rates["torch"], rates["qstar"])}
    row |= {f"{side} s": median(f["seconds"]) for side, f in found.items()}
    row |= {f"{side} MiB": round(f["mib"]) for side, f in found.items()}
    return row | {"share of matmul rate": needed / row["qstar s"], "recompiles": found["qstar"]["recompiles"]}


# ------------------------------------------------------------------------------------------------------- the sides


def _prompts(vocab: int, prompts: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(10, vocab - 10, (prompts, length)).tolist()


def ours_plain(
    folder: str, prompts: int, samples: int, length: int, new: int, changes: dict[str, Any] | None = None
) -> Callable[[], int]:
    """Returns a function that samples and returns the number of tokens."""
    model = our_model(folder, changes)
    model = model.replace(config=model.config.replace(eos_id=None, also_eos=()), tokenizer=None)
    ids = _prompts(model.config.vocab_size, prompts, length)
    options: dict[str, Any] = dict(max_new_tokens=new, n=samples, temperature=1.0)
    return lambda: sum(len(c.tokens) for row in generate(model, ids, **options) for c in row)


def theirs_plain(
    folder: str, prompts: int, samples: int, length: int, new: int, changes: dict[str, Any] | None = None
) -> dict[str, Callable[[], Any]]:
    """Returns the same with transformers."""
    twin = torch_twin(folder).eval()
    ids = _prompts(twin.config.vocab_size, prompts, length)
    # PyTorch compiles nothing: two tokens load its code and start its threads.
    return {
        "run": lambda: torch_generate(twin, ids, new, eos=None, samples=samples).numel() - prompts * samples * length,
        "warm": lambda: torch_generate(twin, ids, 2, eos=None, samples=samples),
    }


def star_prompts(problems: int) -> tuple[list[int], list[list[int]]]:
    """Returns 1,000 tokens of shots and the problems, the same on both sides."""
    rng, vocab = np.random.default_rng(0), preset("llama_20m", **SMALL_BLOCKS).vocab_size
    prefix = rng.integers(2, vocab, SHOTS).tolist()
    return prefix, [rng.integers(2, vocab, rng.integers(40, 64)).tolist() for _ in range(problems)]


def ours_star(folder: str, problems: int) -> Callable[[], int]:
    """Saves the model; returns a function that answers all problems 4 times and returns the number of tokens."""
    model = stopping_model(mean_length=40)
    save(model, folder)
    prefix, prompts = star_prompts(problems)
    options: dict[str, Any] = dict(max_new_tokens=LONGEST, temperature=1.0, n=SAMPLES, prefix=prefix)
    return lambda: sum(len(c.tokens) for row in generate(model, prompts, **options) for c in row)


def theirs_star(folder: str, problems: int) -> dict[str, Callable[[], Any]]:
    """Returns the same with transformers, for the first 16 problems."""
    # They are one batch; the rate does not depend on the number of batches, and all of them would take ten minutes.
    # transformers shares no prefix: every row repeats the few-shot examples.
    twin, (prefix, prompts) = torch_twin(folder), star_prompts(problems)
    rows = [prefix + p for p in prompts[:16]]

    # Rows go on with padding until the longest ends: only tokens up to a row's first EOS count.
    def run() -> int:
        new = torch_generate(twin, rows, LONGEST, eos=EOS, samples=SAMPLES)[:, max(map(len, rows)) :].numpy()
        return int(np.sum(np.cumsum(new == EOS, axis=1) - (new == EOS) == 0))

    return {"run": run, "warm": lambda: torch_generate(twin, rows, 2, eos=EOS, samples=SAMPLES)}


def stopping_model(mean_length: float) -> Model:
    """Returns a random Llama of 3.4M parameters whose every token ends the text with probability 1 / mean_length."""
    # Random weights would hardly ever draw EOS, and rows of equal length would hide the gain of refilling slots. All
    # embeddings share a direction that survives to the last hidden state, and the EOS column of the head reads it.
    model = random_model(preset("llama_20m", **SMALL_BLOCKS))
    model = model.replace(config=model.config.replace(eos_id=EOS))
    params, E = model.params, model.config.hidden_size
    shared = jnp.asarray(np.random.default_rng(1).normal(size=E) / np.sqrt(E), jnp.float32)
    params["embed"]["table"] = params["embed"]["table"] + 4.0 * shared
    probe = np.random.default_rng(2).integers(2, model.config.vocab_size, (4, 64))
    low, high = 0.0, 20.0
    # Bisection: the probability rises with the column's scale.
    for _ in range(12):
        a = (low + high) / 2
        head = {"kernel": params["head"]["kernel"].at[:, EOS].set(a * shared)}
        trial = model.replace(params={**params, "head": head})
        share = float(jnp.mean(jax.nn.softmax(logits(trial, probe))[..., EOS]))
        low, high = (a, high) if share < 1 / mean_length else (low, a)
    return trial


def torch_generate(
    twin: Any, rows: list[list[int]], new: int, *, eos: int | None, samples: int = 1, greedy: bool = False
) -> Any:
    """Runs transformers' `generate` on left-padded rows."""
    # Left-padded: decoders continue from the last column of the prompt.
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows], device=twin.device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=twin.device)
    options: dict[str, Any] = dict(do_sample=not greedy, num_return_sequences=samples, pad_token_id=0)
    options |= {} if greedy else dict(temperature=1.0, top_k=0, top_p=1.0)
    options |= {"min_new_tokens": new} if eos is None else {}
    with torch.no_grad():
        return twin.generate(ids, attention_mask=mask, max_new_tokens=new, eos_token_id=eos, **options)
