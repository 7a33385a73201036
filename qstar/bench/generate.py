"""Sampling beside transformers' `generate`: plain batches, and the load that STaR really has."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.bench.common import (
    LLAMAS,
    SMALL_BLOCKS,
    interleaved,
    matmul_rate,
    median,
    paired_ratio,
    random_model,
    show,
    torch_twin,
)
from qstar.models.config import preset
from qstar.models.model import Model, logits
from qstar.sample.batching import generate
from qstar.train.profile import Compiles

PROMPT, NEW = 16, 64
EOS = 1


def main(*, as_json: bool = False, quick: bool = False) -> None:
    """Measures plain batches and the STaR-shaped load and prints both tables in one."""
    compiles = Compiles()
    rate = matmul_rate(repeats=5 if quick else 9)
    rows = []
    for name, changes in LLAMAS[: 1 if quick else 2]:
        model = random_model(preset("llama_20m", **changes))
        for batch in (64,) if quick else (64, 256):
            rows.append(plain(model, name, batch, 1 if quick else 3, rate, compiles))
    rows.append(star_shaped(1, rate, compiles, problems=16 if quick else 256))
    notes = {
        "matmul GFLOP/s": round(rate / 1e9),
        "flop rule": "2 per matmul parameter and token, prompt once per prompt",
    }
    show("sampling, float32", rows, notes, as_json)


def plain(model: Model, name: str, batch: int, repeats: int, rate: float, compiles: Compiles) -> dict[str, Any]:
    """`batch` prompts of 16 tokens, 64 new tokens each, sampled at temperature 1; nobody stops early."""
    prompts = np.random.default_rng(0).integers(2, model.config.vocab_size, (batch, PROMPT)).tolist()
    twin = torch_twin(model)

    def ours() -> int:
        found = generate(model, prompts, max_new_tokens=NEW, temperature=1.0)
        return sum(len(c.tokens) for row in found for c in row)

    def theirs() -> int:
        return torch_generate(twin, prompts, NEW, eos=None).numel() - batch * PROMPT

    seconds = interleaved({"qstar": ours, "torch": theirs}, repeats, compiles)
    flops = 2 * model.config.matmul_params * batch * (PROMPT + NEW)
    return _row(f"{name}, {batch} rows", seconds, batch * NEW, batch * NEW, flops, rate, compiles.count)


def star_shaped(repeats: int, rate: float, compiles: Compiles, problems: int) -> dict[str, Any]:
    """1,000 tokens of shots shared by all problems, 4 samples each, answers that stop by themselves (mean 40 tokens).

    `generate` of transformers gets the first 16 problems x 4 samples, as one batch: its rate does not depend on how
    many batches there are, and all of them would take ten minutes.
    """
    model = stopping_model(mean_length=40)
    rng = np.random.default_rng(0)
    vocab = model.config.vocab_size
    prefix = rng.integers(2, vocab, 1000).tolist()
    prompts = [rng.integers(2, vocab, rng.integers(40, 64)).tolist() for _ in range(problems)]
    twin = torch_twin(model)
    counts: dict[str, int] = {}

    def ours() -> None:
        found = generate(model, prompts, max_new_tokens=256, temperature=1.0, n=4, prefix=prefix)
        counts["qstar"] = sum(len(c.tokens) for row in found for c in row)

    def theirs() -> None:
        rows = [prefix + p for p in prompts[:16]]
        out = torch_generate(twin, rows, 256, eos=EOS, samples=4)
        new = out[:, max(len(r) for r in rows) :].numpy()
        counts["torch"] = int(np.sum(np.cumsum(new == EOS, axis=1) - (new == EOS) == 0))

    seconds = interleaved({"qstar": ours, "torch": theirs}, repeats, compiles)
    flops = 2 * model.config.matmul_params * (1000 + sum(map(len, prompts)) + counts["qstar"])
    row = _row(f"STaR load, {problems} x 4", seconds, counts["qstar"], counts["torch"], flops, rate, compiles.count)
    return row


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


def torch_generate(twin: Any, rows: list[list[int]], new: int, *, eos: int | None, samples: int = 1) -> Any:
    """Runs transformers' `generate` on left-padded rows."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
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


def _row(name, seconds, ours, theirs, flops, rate, recompiles) -> dict[str, Any]:
    rates_ours = [ours / s for s in seconds["qstar"]]
    rates_theirs = [theirs / s for s in seconds["torch"]]
    return {
        "load": name,
        "qstar tokens/s": round(median(rates_ours)),
        "torch tokens/s": round(median(rates_theirs)),
        "qstar/torch": paired_ratio(rates_theirs, rates_ours),
        "share of matmul rate": flops / median(seconds["qstar"]) / rate,
        "qstar s": median(seconds["qstar"]),
        "torch s": median(seconds["torch"]),
        "recompiles": recompiles,
    }
