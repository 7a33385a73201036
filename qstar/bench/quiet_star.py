"""Quiet-STaR's train step and its generation: time and memory beside a dense mask, the FLOPs it needs, and the official code.

Every row is measured in a process of its own, which finds its program in the compilation cache: an earlier process has put it
there, so that neither the compiler's memory nor another row's is in the peak.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SIZES = [(512, N, A) for N in (64, 128, 256) for A in (4, 8, 12)]
SIZES += [(32002, N, A) for N in (64, 128, 256) for A in (4, 8, 12)]
SIDES = ("replay", "joint", "dense")
DENSE_MIB = 8_000  # sizes at which the dense mask is expected to need more are left out of its rows

# The official code (ezelikman/quiet-star @ 892446b, PyTorch 2.13, one thread of this kind of machine): CPU seconds per step,
# MiB over the baseline. Batch 1, T 4, P 2, forward + backward + clip + AdamW.
OFFICIAL = {
    (512, 64, 4): (0.118, 254),
    (512, 64, 8): (0.209, 378),
    (512, 64, 12): (0.322, 495),
    (512, 128, 4): (0.255, 419),
    (512, 128, 8): (0.483, 657),
    (512, 128, 12): (0.755, 901),
    (512, 256, 4): (0.676, 778),
    (512, 256, 8): (1.485, 1268),
    (512, 256, 12): (2.6, 1770),
    (32002, 128, 12): (7.372, 11300),
}
OFFICIAL_TOKEN = {(8, 64): 0.033, (8, 128): 0.068, (8, 256): 0.161, (12, 64): 0.061, (12, 128): 0.116, (12, 256): 0.299}
NEW = 32  # tokens written per measurement of generation, which includes reading the text


def main(*, as_json: bool = False, quick: bool = False) -> None:
    """Measures all rows and prints them."""
    from qstar.bench.common import matmul_rate, show

    sizes = [(512, 64, 4)] if quick else SIZES
    rate = matmul_rate(1024 if quick else 2048, repeats=3 if quick else 9)
    rows = []
    for V, N, A in sizes:
        official = OFFICIAL.get((V, N, A), (None, None))
        needed = needed_flops(V, N, A) / rate
        for side in SIDES:
            if side == "dense" and dense_mib(V, N, A) > DENSE_MIB:
                continue
            spec = {"what": "step", "side": side, "V": V, "N": N, "A": A, "repeats": 1 if quick else 5}
            rows.append(_beside(f"{side} V={V} N={N} n_ahead={A}", measured(spec), needed, *official))
        found = measured({"what": "products", "V": V, "N": N, "A": A, "repeats": 1 if quick else 5})
        rows.append(_beside(f"its products V={V} N={N} n_ahead={A}", found, needed, None, None))
    for A, N in [(4, 64)] if quick else [(A, N) for A in (4, 8, 12) for N in (64, 128, 256)]:
        for side in ("cached", "again"):
            found = measured({"what": "token", "side": side, "V": 512, "N": N, "A": A, "repeats": 1 if quick else 5})
            rows.append(_beside(f"token {side} length={N} n_ahead={A}", found, None, OFFICIAL_TOKEN.get((A, N)), None))
    notes = {
        "matmul GFLOP/s": round(rate / 1e9),
        "needed": "3 x the forward FLOPs of decomposed threads, half of the causal square, at that rate",
        "x needed": "wall s / needed s",
        "its products": "replay's products with the matrices of layers and vocabulary, alone and independent of each other",
        "official": "recorded: CPU s on one thread, MiB over the baseline; faster, leaner: that / ours",
    }
    show("Quiet-STaR step and token, float32", rows, notes, as_json)


def _beside(
    name: str, found: dict[str, Any], needed: float | None, cpu: float | None, mib: float | None
) -> dict[str, Any]:
    """One row: what was found, the time its FLOPs need, and the official code's recorded costs as multiples of ours."""
    return {
        "row": name,
        **found,
        "needed s": needed and round(needed, 4),
        "x needed": needed and round(found["wall s"] / needed, 1),
        "official CPU s": cpu,
        "faster": cpu and round(cpu / found["CPU s"], 1),
        "official MiB": mib,
        "leaner": mib and round(mib / max(found["MiB over baseline"], 1), 1),
    }


def needed_flops(V: int, N: int, A: int, T: int = 4, P: int = 2) -> float:
    """Returns the FLOPs of one step on one text: 3 x the decomposed forward pass, causal attention counted once."""
    import numpy as np

    from qstar.bench.train import whole_rows
    from qstar.train.flops import update_flops

    return update_flops(bench_config(V, A, T, P), whole_rows(np.zeros((1, N), np.int32)), thinks=True)


def dense_mib(V: int, N: int, A: int, T: int = 4, P: int = 2) -> float:
    """Returns a rough size of what the dense form keeps: probabilities of all layers and heads, and their mask."""
    runs = A + T - 1
    return 3 * 4 * 4 * 4 * P * N * N * runs * (runs + 1) / 2 / 2**20


def bench_config(V: int, A: int, T: int = 4, P: int = 2) -> Any:
    """Returns the model of all rows: hidden 128, 4 layers and heads, intermediate 448, the official code's choices."""
    from qstar.models.config import ModelConfig
    from qstar.models.thought_config import ThoughtConfig

    sizes = dict(thought_tokens=A - 3, talk_tokens=T, thoughts_per_position=P)
    return ModelConfig(
        vocab_size=V,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        intermediate_size=448,
        max_positions=1024,
        tie_embeddings=False,
        eos_id=2,
        dtype="float32",
        scan_unroll=4,
        thoughts=ThoughtConfig.parity(forbidden_ids=(V - 2, V - 1), **sizes),
    )


# ------------------------------------------------------------------------------------------- one row, in its own process

# As a command starts: the compilation cache and the allocator's settings come before jax.
CHILD = """
import json, sys
from qstar.start import start_jax
start_jax()
from qstar.bench.quiet_star import row
print(json.dumps(row(json.loads(sys.argv[1]))))
"""


def measured(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs one row twice in fresh processes, to compile and to measure, and returns what the second found."""
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found = ""
    for once in ({"repeats": 0}, {}):
        command = [sys.executable, "-c", CHILD, json.dumps({**spec, **once})]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the measurement of {spec} failed:\n{done.stderr[-2000:]}")
        found = done.stdout.splitlines()[-1]
    return json.loads(found)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak() -> float:
    """The most that was resident since `_forget_peak`; where the system does not say, since the process began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def row(spec: dict[str, Any]) -> dict[str, Any]:
    """Measures one row in this process; with 0 repeats it only fills the compilation cache, and returns nothing."""
    from qstar.train.profile import Compiles

    make = {"step": _step, "token": _token, "products": _products}[spec["what"]]
    run, per = make(spec)
    _forget_peak()  # the program is loaded: what that took is not the step's
    compiles, began = Compiles(), _resident()
    wall, cpu = [], []
    for i in range(spec["repeats"] + 2):
        if i == 2:
            compiles.count = 0
        a, b = time.perf_counter(), time.process_time()
        run()
        wall.append((time.perf_counter() - a) / per)
        cpu.append((time.process_time() - b) / per)
    peak = _peak()
    if not spec["repeats"]:
        return {}
    return {
        "wall s": round(statistics.median(wall[2:]), 5),
        "CPU s": round(statistics.median(cpu[2:]), 5),
        "MiB over baseline": round(peak - began),
        "recompiles": compiles.count,
    }


def _step(spec: dict[str, Any]) -> tuple[Callable[[], None], int]:
    import jax
    import numpy as np

    from qstar.bench import dense
    from qstar.models import decoder
    from qstar.thoughts import layout
    from qstar.thoughts import loss as thought_loss
    from qstar.train import optim
    from qstar.train.state import create_state
    from qstar.train.step import make_step

    config, side = bench_config(spec["V"], spec["A"]), spec["side"]
    loss = dense.loss if side == "dense" else partial(thought_loss.loss, schedule=side)
    tx = optim.adamw(b2=0.999, weight_decay=0.001)
    step = make_step(partial(loss, config=config), tx)
    # The parameters are given up to the step: what is held at once is part of what is measured.
    tree = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
    holder = [create_state({"policy": tree}, tx, seed=0)]
    tokens = np.random.default_rng(0).integers(4, config.vocab_size - 2, (1, spec["N"]))
    batch = jax.device_put(layout.text_batch(tokens, np.ones_like(tokens)))
    program = step.lower(holder[0], batch, np.float32(1e-6)).compile()

    def run() -> None:
        holder[0], metrics = program(holder[0], batch, np.float32(1e-6))
        float(metrics["loss"])

    return run, 1


def _products(spec: dict[str, Any]) -> tuple[Callable[[], None], int]:
    """The products with matrices of the replay's step, in its sizes (its second forward pass included, the mixing head not):
    what of its time is XLA's, before attention, elementwise passes and the optimiser."""
    import jax
    import jax.numpy as jnp

    from qstar.train.losses import chunks

    c, M = bench_config(spec["V"], spec["A"]), spec["N"] - 1
    E, I, V, t = c.hidden_size, c.intermediate_size, c.vocab_size, c.thoughts
    S, T, P = t.thought_tokens, t.talk_tokens, t.thoughts_per_position
    layers, head = [*[(E, E)] * 4, (E, I), (E, I), (I, E)] * c.num_layers, [(E, V)]
    pieces = -(-M * P * t.thread_tokens // c.piece_tokens)
    # Rows, matrices, how often forward, and how often backward (to the rows and to the matrices).
    work = [(M, layers, 1, 1), (P * M, layers, S, 0), (P * M * (T + 1), layers, 1, 0)]  # text, rollout, talk
    work += [(P * M * t.thread_tokens // pieces, layers, pieces, pieces)]  # replay
    work += [(P * M, head, S, 0)]  # the draws
    for rows in (M, *[P * M] * T, (P - 1) * M * S):  # scores of the text, of talk, and of thoughts
        (found,) = jax.eval_shape(lambda rows=rows: chunks((jnp.zeros((rows,)),), V))
        work.append((found.shape[1], head, found.shape[0], found.shape[0]))
    kinds = (lambda x, g, w: x @ w, lambda x, g, w: g @ w.T, lambda x, g, w: x.T @ g)
    calls = []
    for rows, matrices, forward, backward in work:
        keys = iter(jax.random.split(jax.random.key(0), 3 * len(matrices)))
        args = [[jax.random.normal(next(keys), s) for s in ((rows, a), (rows, b), (a, b))] for a, b in matrices]
        for kind, count in zip(kinds, (forward, backward, backward)):
            alone = jax.jit(lambda args, kind=kind: [kind(*each) for each in args])
            calls += [partial(alone, args)] * count

    def run() -> None:
        for call in calls:
            jax.block_until_ready(call())

    return run, 1


def _token(spec: dict[str, Any]) -> tuple[Callable[[], None], int]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qstar.bench import dense
    from qstar.models import decoder
    from qstar.sample.logits import SamplingParams
    from qstar.sample.sampler import prepare
    from qstar.thoughts import decode, layout
    from qstar.thoughts.rollout import sampler

    config = bench_config(spec["V"], spec["A"], T=1, P=1)
    params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(4, config.vocab_size - 2, (1, spec["N"])).astype(np.int32)
    if spec["side"] == "again":

        @jax.jit
        def last(params: Any, batch: Any) -> Any:
            positions = layout.all_positions(batch)
            draw = sampler(params, config, batch, positions, jax.random.key(0), 1)
            found, _ = dense.paths(params, config, batch, positions, 1, draw)
            return jnp.argmax(decoder.unembed(params, config, found.mixed[0, 0, -1, 0]))

        batch = jax.device_put(layout.text_batch(tokens, np.ones_like(tokens)))
        return lambda: int(last(params, batch)), 1
    params, talker = prepare(params, config), decode.ThoughtSamplerConfig(config, (), NEW, config.vocab_size)
    keys, lengths = jax.random.split(jax.random.key(0), 1), np.asarray([spec["N"]], np.int32)

    def run() -> None:
        jax.block_until_ready(
            decode.generate(params, talker, tokens, lengths, keys, SamplingParams.make(1.0), jnp.float32(1))
        )

    return run, NEW
