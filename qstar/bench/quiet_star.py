"""Benchmark of Quiet-STaR's train step and generation: time and memory beside a dense mask and the official code."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.bench import dense
from qstar.bench.common import matmul_rate, measure, show
from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.models.thought_config import ThoughtConfig
from qstar.sample.logits import SamplingParams
from qstar.sample.sampler import Sampler, prepare
from qstar.thoughts import decode, layout
from qstar.thoughts import loss as thought_loss
from qstar.thoughts.rollout import sampler
from qstar.train import flops, optim
from qstar.train.state import create_state
from qstar.train.step import make_step

SIZES = [(V, N, A) for V in (512, 32002) for N in (64, 128, 256) for A in (4, 8, 12)]  # vocabulary, tokens, n_ahead
DENSE_MIB = 8_000  # sizes at which the dense mask is expected to need more are left out of its rows
NEW = 32  # tokens written per measurement of generation, which includes reading the text


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto") -> None:
    """Measures all rows and prints them."""
    sizes, repeats, rows = ([(512, 64, 4)], 1, []) if quick else (SIZES, 5, [])
    rate = matmul_rate(1024 if quick else 2048, repeats=3 if quick else 9)
    # The official code's CPU seconds and MiB over the baseline, by vocabulary / tokens / n_ahead: recorded.
    official = json.loads((Path(__file__).parent / "official.json").read_text())
    cases = [("step", schedule, size) for size in sizes for schedule in ("replay", "joint", "dense")]
    cases += [("token", form, size) for size in sizes if size[0] == 512 for form in ("cached", "again")]
    for what, form, (V, N, A) in cases:
        if form == "dense" and dense_mib(N, A) > DENSE_MIB:
            continue
        call = partial(measure, "qstar", step if what == "step" else token, device=device, form=form, V=V, N=N, A=A)
        # Two fresh processes. The first compiles the program into the cache, so that neither the compiler's memory nor
        # another row's is in the peak of the second.
        call(repeats=0)
        # "cached" writes NEW tokens per call; "again" repeats the whole pass for one.
        found, per = call(repeats=repeats), NEW if form == "cached" else 1
        wall, cpu, mib = median(found["seconds"]) / per, median(found["cpu"]) / per, round(found["mib"])
        needed = flops.update(bench_config(V, A), 1, N, with_thoughts=True)[0] / rate if what == "step" else None
        theirs = official[what].get(f"{V}/{N}/{A}", {})
        row: dict[str, Any] = {"row": f"{what}, {form}, V={V} N={N} n_ahead={A}", "wall s": round(wall, 5)}
        row |= {"CPU s": round(cpu, 5), "MiB over baseline": mib, "recompiles": found["recompiles"]}
        row |= {"needed s": needed and round(needed, 4), "x needed": needed and round(wall / needed, 1)}
        row |= {"official CPU s": theirs.get("cpu"), "faster": theirs.get("cpu") and round(theirs["cpu"] / cpu, 1)}
        row |= {
            "official MiB": theirs.get("mib"),
            "leaner": theirs.get("mib") and round(theirs["mib"] / max(mib, 1), 1),
        }
        rows.append(row)
    notes = {
        "matmul GFLOP/s": round(rate / 1e9),
        "needed": "3 x the forward FLOPs of decomposed threads, half of the causal square, at that rate",
        "x needed": "wall s / needed s",
        "official": f"recorded: {official['source']}. CPU s, MiB over the baseline; faster, leaner: that / ours",
    }
    show("Quiet-STaR step and token, float32", rows, notes, as_json)


def dense_mib(N: int, A: int, T: int = 4, P: int = 2) -> float:
    """Returns a rough size of what the dense form keeps: probabilities of all layers and heads, and their mask."""
    # Iteration i attends to i + 1 blocks of N keys: runs (runs + 1) / 2 blocks in all.
    runs = A + T - 1
    return 3 * 4 * 4 * 4 * P * N * N * runs * (runs + 1) / 2 / 2**20


def bench_config(V: int, A: int, T: int = 4, P: int = 2) -> ModelConfig:
    """Returns the model of all rows: hidden 128, 4 layers and heads, intermediate 448, the official code's choices."""
    sizes: dict[str, Any] = dict(hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=4, intermediate_size=448)
    thoughts = dict(thought_tokens=A - 3, talk_tokens=T, thoughts_per_position=P, forbidden_ids=(V - 2, V - 1))
    more: dict[str, Any] = dict(max_positions=1024, tie_embeddings=False, eos_id=2, dtype="float32", scan_unroll=4)
    return ModelConfig(vocab_size=V, head_dim=32, thoughts=ThoughtConfig.parity(**thoughts), **sizes, **more)


def step(form: str, V: int, N: int, A: int) -> Callable[[], float]:
    """Returns a function that makes an update on one text, with a schedule of ours or the dense mask."""
    config = bench_config(V, A)
    loss = dense.loss if form == "dense" else partial(thought_loss.loss, schedule=form)
    tx = optim.adamw(b2=0.999, weight_decay=0.001)
    # The parameters are donated to the step: what is alive at once is part of what is measured.
    state = create_state({"policy": jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))}, tx, seed=0)
    tokens = np.random.default_rng(0).integers(4, V - 2, (1, N))
    batch = jax.device_put(layout.text_batch(tokens, np.ones_like(tokens)))
    # Compiled here, not by the first call: the compiler's memory is then in the baseline.
    update: Any = make_step(partial(loss, config=config), tx)
    program = update.lower(state, batch, np.float32(1e-6)).compile()

    def run() -> float:
        nonlocal state
        state, metrics = program(state, batch, np.float32(1e-6))
        return float(metrics["loss"])

    return run


def token(form: str, V: int, N: int, A: int) -> Callable[[], Any]:
    """Returns a function that writes 32 tokens with a cache ("cached"), or one from the dense form ("again")."""
    config = bench_config(V, A, T=1, P=1)
    params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(4, V - 2, (1, N)).astype(np.int32)
    if form == "again":

        @jax.jit
        def last(params: Any, batch: Any) -> Any:
            positions = layout.all_positions(batch)
            sample_fn = sampler(params, config, batch, positions, jax.random.key(0), 1)
            found, _ = dense.paths(params, config, batch, positions, 1, sample_fn)
            return jnp.argmax(decoder.unembed(params, config, found.mixed[0, 0, -1, 0]))

        batch = jax.device_put(layout.text_batch(tokens, np.ones_like(tokens)))
        return lambda: int(last(params, batch))
    params, settings = prepare(params, config), Sampler(config, (), 1, N, NEW, V)
    keys, lengths = jax.random.split(jax.random.key(0), 1), np.asarray([N], np.int32)
    options = (tokens, lengths, keys, SamplingParams.make(1.0), jnp.float32(1))
    return lambda: jax.block_until_ready(decode.generate_rows(params, settings, *options))
