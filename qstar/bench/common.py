"""Measurements of two sides in turn, each in a process of its own, and the machine's own limits."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from qstar.errors import UserError, require

# Changes to the preset llama_20m: 512 ids put the work into the blocks, 32,000 into the vocabulary.
SMALL_BLOCKS = dict(hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=4, intermediate_size=688, scan_unroll=4)
LLAMAS: tuple[tuple[str, dict[str, int]], ...] = (
    ("20M, vocab 512", {}),
    ("20M, vocab 32000", {"vocab_size": 32000, **SMALL_BLOCKS}),
)
# The qstar side starts as the command line does: the platform and the allocator's settings come before jax.
_CHILD = """
import sys
side, device, *rest = sys.argv[1:]
if side == "qstar":
    from qstar.distributed import start_jax
    start_jax(device)
from qstar.bench.common import child
child(*rest)
"""

# ----------------------------------------------------------------------------------------------------- measurements


def measure(
    side: str, maker: Callable[..., Any], repeats: int, device: str = "auto", **settings: Any
) -> dict[str, Any]:
    """Calls `maker(**settings)` in a fresh process, and what it returns `repeats` times after a warm-up.

    The maker returns a function, or a dict of functions: "run" is measured, "warm" is the warm-up (without it a call of
    "run"), the others are called once. Returns their results; per call "seconds", "cpu" (CPU seconds) and "results";
    "recompiles" after the warm-up; "mib", the peak of memory over that before the first call. Settings and results are
    JSON. Raises UserError if the process failed.
    """
    # In one process both sides would share an allocator, and the threads of one, which wait for work by spinning, would
    # take time from the other.
    call = [f"{maker.__module__}:{maker.__qualname__}", json.dumps({"repeats": repeats, **settings})]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    # A program that another process compiled is read from the cache, so that the compiler is not in the peak of memory.
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", _CHILD, side, device, *call]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        died = f"the process died (exit code {done.returncode}); is there enough memory?"
        last = [died, *done.stderr.splitlines()][-1]
        raise UserError(f"bench, {side} side: {last.removeprefix('qstar.errors.UserError: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str, settings: str) -> None:
    """Makes one measurement and prints it, in the process that `measure` starts."""
    options = json.loads(settings)
    repeats = options.pop("repeats")
    module, _, function = name.partition(":")
    made = getattr(importlib.import_module(module), function)(**options)
    more = made if isinstance(made, dict) else {"run": made}
    run = more.pop("run")
    warm_up = more.pop("warm", run)
    # Recompilation during the measurement would be counted as run time: it is reported. The torch side imports no JAX.
    compiles: Any = None
    if "jax" in sys.modules:
        from qstar.train.profile import Compiles

        compiles = Compiles()
    with contextlib.suppress(OSError):
        # proc(5): resets the peak, so that loading the program is not in it.
        Path("/proc/self/clear_refs").write_text("5")
    found: dict[str, list[Any]] = {"seconds": [], "cpu": [], "results": []}
    before = _memory("VmRSS")
    warm_up()
    warm = compiles.count if compiles else 0
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        found["seconds"].append(time.perf_counter() - wall)
        found["cpu"].append(time.process_time() - cpu)
        found["results"].append(result if isinstance(result, (int, float, list)) else None)
    recompiles, mib = compiles.count - warm if compiles else 0, _memory("VmHWM") - before
    print("\n" + json.dumps({**found, "recompiles": recompiles, "mib": mib, **{k: f() for k, f in more.items()}}))


def in_turn(makers: dict[str, Callable[..., Any]], rounds: int, repeats: int, device: str, **settings: Any) -> Any:
    """Measures the sides alternately, because the speed of a machine drifts, and joins each side's rounds."""
    found: dict[str, dict[str, Any]] = {}
    for i in range(rounds):
        for side, maker in makers.items():
            new = measure(side, maker, repeats, device, **settings)
            # A pretrained model takes minutes per round, and the table comes at the end.
            call = f"{maker.__name__}, round {i + 1} of {rounds}"
            print(f"bench: {call}: {median(new['seconds']):.3g} s", file=sys.stderr, flush=True)
            old = found.get(side, dict.fromkeys(("seconds", "cpu", "results"), []) | {"recompiles": 0})
            found[side] = new | {k: old[k] + new[k] for k in ("seconds", "cpu", "results", "recompiles")}
    return found


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Returns the median over pairs of theirs / ours: above 1, qstar is faster."""
    # Of pairs measured one after the other, in which drift cancels, rather than a ratio of two medians.
    return median([b / a for a, b in zip(ours, theirs)])


def _memory(name: str) -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024  # kB in MiB


# ------------------------------------------------------------------------------------------- limits of the machine


def matmul_rate(size: int = 2048, repeats: int = 9) -> float:
    """Returns this machine's float32 matrix-product rate in FLOP/s, the better of JAX's and PyTorch's medians."""
    found = in_turn({"qstar": jax_product, "torch": torch_product}, 1, repeats, "cpu", size=size)
    return 2 * size**3 / min(median(side["seconds"]) for side in found.values())


def jax_product(size: int) -> Callable[[], Any]:
    """Returns a product of size x size."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    return lambda: jax.block_until_ready(product(x))


def torch_product(size: int) -> Callable[[], Any]:
    """Returns the same in PyTorch."""
    torch = _torch()
    x, out = torch.randn(size, size), torch.empty(size, size)
    return lambda: torch.matmul(x, x, out=out)


# ---------------------------------------------------------------------------------------------------------- models


def random_model(config: Any, folder: str = "") -> Any:
    """Returns a model with random weights and no tokenizer; saves it, too, if a folder is given."""
    import jax

    from qstar.models import scoring
    from qstar.models.model import Model, save

    model = Model(config, jax.jit(lambda key: scoring.init(config, key))(jax.random.key(0)))
    if folder:
        save(model, folder)
    return model


def our_model(folder: str, changes: dict[str, Any] | None = None) -> Any:
    """Returns a saved model, float32; or a random one, of the preset with changes, which is saved for the other side."""
    # The sides start from the same weights: the difference of their results checks the comparison.
    from qstar.models.config import preset
    from qstar.models.model import load

    if changes is None:
        return load(folder, dtype="float32")
    return random_model(preset("llama_20m", **changes), folder)


def read_config(folder: str) -> Any:
    """Returns the config of a saved decoder, without its weights."""
    from qstar.models import hf, hf_config
    from qstar.models.config import ModelConfig

    config = hf_config.from_hf(hf.read_config(folder))
    fault = f"bench: {folder} is no decoder; give --model a model of a decoder alone"
    require((isinstance(config, ModelConfig), fault))
    return config


def torch_twin(folder: str | Path, dtype: str = "float32") -> Any:
    """Returns a saved model as a transformers model on the CPU; raises UserError without PyTorch."""
    torch = _torch()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    # T5's config has dropout, Llama's none; qstar trains without: the same work on both sides.
    extra = {"dropout_rate": 0.0} if seq2seq else {}
    return auto.from_pretrained(folder, dtype=getattr(torch, dtype), **extra)


def _torch() -> Any:
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        raise UserError("qstar bench compares with transformers + PyTorch: pip install 'torch==2.13.0'") from None
    return torch


def show(title: str, rows: list[dict[str, Any]], notes: dict[str, Any], as_json: bool) -> None:
    """Prints a table, or one JSON object."""
    if as_json:
        print(json.dumps({"title": title, **notes, "rows": rows}))
        return
    from rich.console import Console

    from qstar.train.metrics import show_table

    show_table(Console(width=160), title, rows)
    for name, value in notes.items():
        print(f"{name}: {value}")
