"""Sampling beside transformers' `generate`: plain batches, and the load that STaR really has."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.bench.common import (
    LLAMAS,
    SMALL_BLOCKS,
    matmul_rate,
    median,
    memory_rate,
    paired_ratio,
    random_model,
    show,
    torch_twin,
)
from qstar.bench.sides import Sides, Turns
from qstar.models.config import ModelConfig, preset
from qstar.models.model import Model, save
from qstar.models.scoring import logits
from qstar.sample.batching import generate

PROMPT, NEW = 16, 64
SHOTS, LONGEST, SAMPLES = 1000, 256, 4  # of the STaR-shaped load
EOS = 1


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto") -> None:
    """Measures plain batches and the STaR-shaped load and prints both tables in one."""
    rows, repeats = [], 5 if quick else 9
    with Sides(device) as sides, tempfile.TemporaryDirectory() as folder:
        limits = matmul_rate(repeats=repeats, sides=sides), memory_rate(repeats=repeats, sides=sides)
        for name, changes in LLAMAS[: 1 if quick else 2]:
            for batch in (64,) if quick else (64, 256):
                rows.append(plain(sides, folder, name, changes, batch, 1 if quick else 3, limits))
        rows.append(star_shaped(sides, folder, 1, limits, problems=16 if quick else 256))
    notes = {
        "matmul GFLOP/s": round(limits[0] / 1e9),
        "memory GB/s": round(limits[1] / 1e9, 1),
        "flop rule": "2 per matmul parameter and token, prompt once per prompt",
        "products alone": "share of the matmul rate of a step's products, with no attention, cache or draw between them",
        "roofline": "needed FLOPs at the matmul rate (f), or needed bytes at the memory rate (b: weights once per step, and"
        " the filled cache): of max(f, b), and of f + b, where the two do not overlap; the letter says which is larger",
    }
    show("sampling, float32", rows, notes, as_json)


def plain(
    sides: Sides,
    folder: str,
    name: str,
    changes: dict[str, Any],
    batch: int,
    repeats: int,
    limits: tuple[float, float],
) -> dict[str, Any]:
    """`batch` prompts of 16 tokens, 64 new tokens each, sampled at temperature 1; nobody stops early."""
    config = preset("llama_20m", **changes)
    prompts = np.random.default_rng(0).integers(2, config.vocab_size, (batch, PROMPT)).tolist()
    sides.make("qstar", ours_plain, folder=folder, changes=changes, prompts=prompts)
    sides.make("torch", theirs_plain, folder=folder, prompts=prompts)
    flops = 2 * config.matmul_params * batch * (PROMPT + NEW)
    turns = sides.interleaved(repeats)
    sides.make("qstar", ours_products, changes=changes, batch=batch)
    seconds = median(sides.interleaved(3 * repeats, sides=("qstar",)).seconds["qstar"])
    alone = 2 * config.matmul_params * batch / seconds / limits[0]
    return _row(f"{name}, {batch} rows", turns, flops, limits, needed_bytes(config, batch), alone)


def needed_bytes(config: ModelConfig, batch: int) -> float:
    """Returns the bytes that a plain batch must read: all weights at every step, and what the cache holds by then."""
    steps = np.arange(1, NEW)
    pairs = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return 4.0 * (config.matmul_params * NEW + pairs * batch * float(np.sum(PROMPT + steps)))


def ours_plain(folder: str, changes: dict[str, Any], prompts: list[list[int]]) -> Callable[[], int]:
    """Saves the model in the folder; returns a function that samples and returns the number of tokens."""
    model = random_model(preset("llama_20m", **changes))
    save(model, folder)

    def run() -> int:
        found = generate(model, prompts, max_new_tokens=NEW, temperature=1.0)
        return sum(len(c.tokens) for row in found for c in row)

    return run


def ours_products(changes: dict[str, Any], batch: int) -> Callable[[], None]:
    """Returns a function that runs the products with matrices of one step of decoding, alone and independent of each other:
    what share of the matmul rate XLA would reach if nothing else were to be done."""
    c = preset("llama_20m", **changes)
    E, heads, pairs, I = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    layer = [(E, heads), (E, pairs), (E, pairs), (heads, E), (E, I), (E, I), (I, E)]
    key = jax.random.key(0)
    args = [
        [jax.random.normal(key, s) for s in ((batch, a), (a, b))] for a, b in [*layer * c.num_layers, (E, c.vocab_size)]
    ]
    step = jax.jit(lambda args: [x @ kernel for x, kernel in args])

    def run() -> None:
        jax.block_until_ready(step(args))

    return run


def theirs_plain(folder: str, prompts: list[list[int]]) -> Callable[[], int]:
    """The same with transformers."""
    twin = torch_twin(folder)
    return lambda: torch_generate(twin, prompts, NEW, eos=None).numel() - len(prompts) * PROMPT


def star_shaped(sides: Sides, folder: str, repeats: int, limits: tuple[float, float], problems: int) -> dict[str, Any]:
    """1,000 tokens of shots shared by all problems, 4 samples each, answers that stop by themselves (mean 40 tokens).

    `generate` of transformers gets the first 16 problems x 4 samples, as one batch: its rate does not depend on how
    many batches there are, and all of them would take ten minutes.
    """
    prefix, prompts = star_prompts(problems)
    sides.make("qstar", ours_star, folder=folder, problems=problems)
    sides.make("torch", theirs_star, folder=folder, problems=problems)
    turns = sides.interleaved(repeats)
    params = preset("llama_20m", **SMALL_BLOCKS).matmul_params
    flops = 2 * params * (SHOTS + sum(map(len, prompts)) + turns.results["qstar"][-1])
    return _row(f"STaR load, {problems} x {SAMPLES}", turns, flops, limits)


def star_prompts(problems: int) -> tuple[list[int], list[list[int]]]:
    """Returns the shots and the problems, the same on both sides."""
    rng = np.random.default_rng(0)
    vocab = preset("llama_20m", **SMALL_BLOCKS).vocab_size
    prefix = rng.integers(2, vocab, SHOTS).tolist()
    return prefix, [rng.integers(2, vocab, rng.integers(40, 64)).tolist() for _ in range(problems)]


def ours_star(folder: str, problems: int) -> Callable[[], int]:
    """Saves the model in the folder; returns a function that answers all problems and returns the number of tokens."""
    model = stopping_model(mean_length=40)
    save(model, folder)
    prefix, prompts = star_prompts(problems)

    def run() -> int:
        found = generate(model, prompts, max_new_tokens=LONGEST, temperature=1.0, n=SAMPLES, prefix=prefix)
        return sum(len(c.tokens) for row in found for c in row)

    return run


def theirs_star(folder: str, problems: int) -> Callable[[], int]:
    """Its first 16 problems with transformers."""
    twin, (prefix, prompts) = torch_twin(folder), star_prompts(problems)
    rows = [prefix + p for p in prompts[:16]]

    def run() -> int:
        out = torch_generate(twin, rows, LONGEST, eos=EOS, samples=SAMPLES)
        new = out[:, max(len(r) for r in rows) :].numpy()
        return int(np.sum(np.cumsum(new == EOS, axis=1) - (new == EOS) == 0))

    return run


def stopping_model(mean_length: float) -> Model:
    """Returns a random Llama of 3.4M parameters whose every token ends the text with probability 1 / mean_length.

    All embeddings share a direction that survives to the last hidden state, and the EOS column of the head reads it.
    """
    model = random_model(preset("llama_20m", **SMALL_BLOCKS))
    params = model.params
    E = model.config.hidden_size
    shared = jnp.asarray(np.random.default_rng(1).normal(size=E) / np.sqrt(E), jnp.float32)
    params["embed"]["table"] = params["embed"]["table"] + 4.0 * shared
    probe = np.random.default_rng(2).integers(2, model.config.vocab_size, (4, 64))
    low, high = 0.0, 20.0
    for _ in range(12):
        a = (low + high) / 2
        kernel = params["head"]["kernel"].at[:, EOS].set(a * shared)
        trial = model.replace(params={**params, "head": {"kernel": kernel}}, config=model.config.replace(eos_id=EOS))
        share = float(jnp.mean(jax.nn.softmax(logits(trial, probe))[..., EOS]))
        low, high = (a, high) if share < 1 / mean_length else (low, a)
    return trial


def torch_generate(twin: Any, rows: Sequence[Sequence[int]], new: int, *, eos: int | None, samples: int = 1) -> Any:
    """Runs transformers' `generate` on left-padded rows."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    extra = {"min_new_tokens": new} if eos is None else {}
    with torch.no_grad():
        return twin.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            num_return_sequences=samples,
            pad_token_id=0,
            eos_token_id=eos,
            **extra,
        )


def _row(
    load: str,
    turns: Turns,
    flops: float,
    limits: tuple[float, float],
    read: float | None = None,
    alone: float | None = None,
) -> dict[str, Any]:
    seconds = {side: median(each) for side, each in turns.seconds.items()}
    rates = {side: [n / s for n, s in zip(turns.results[side], turns.seconds[side])] for side in seconds}
    row = {
        "load": load,
        "qstar tokens/s": round(median(rates["qstar"])),
        "torch tokens/s": round(median(rates["torch"])),
        "qstar/torch": paired_ratio(rates["torch"], rates["qstar"]),
        "share of matmul rate": flops / seconds["qstar"] / limits[0],
    }
    if read is None:
        row |= dict.fromkeys(("share of roofline", "bound", "share of f + b"))
    else:
        f, b = flops / limits[0], read / limits[1]
        row["share of roofline"], row["bound"] = max(f, b) / seconds["qstar"], "f" if f > b else "b"
        row["share of f + b"] = (f + b) / seconds["qstar"]
    row["products alone"] = alone
    return row | {"qstar s": seconds["qstar"], "torch s": seconds["torch"], "recompiles": turns.recompiles["qstar"]}
