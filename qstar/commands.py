"""The commands behind `python -m qstar`: each reads its flags, sets the platform up, and calls one function."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from qstar.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def _parser(name: str, summary: str) -> _Parser:
    parser = _Parser(prog=f"qstar {name}", description=summary, allow_abbrev=False)
    parser.add_argument("--device", choices=("auto", "cpu", "gpu", "tpu"), default="auto", help="where to run (default: the best there is)")
    return parser


def start_jax(device: str = "auto") -> None:
    """Chooses the platform and switches the persistent compilation cache on. Called before anything imports jax.

    Raises:
      UserError: the device is not there.
    """
    if device != "auto":
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(device, device)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "qstar" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    import jax

    try:
        jax.devices()
    except RuntimeError as e:
        raise UserError(f"--device={device}: JAX finds none ({str(e).splitlines()[0]}); install the extra for it, or use --device=cpu") from None


# ----------------------------------------------------------------------------------------------------------- train


def train(argv: list[str]) -> int:
    """qstar train --config=FILE[:ARG] --workdir=DIR [--config.key=value ...]"""
    from absl import flags

    values = _train_flags(argv)
    if values is None:
        return 0
    if values.config is None:
        raise UserError("qstar train: --config=FILE is missing, e.g. --config=configs/star_arithmetic.py")
    config = values.config
    workdir = Path(values.workdir or f"runs/{config.name}").expanduser()
    start_jax(values.device)
    from rich.console import Console

    from qstar import methods
    from qstar.report.html import write_report

    del flags
    console = Console()
    methods.run(config, workdir, console)
    console.print(f"report: {write_report(workdir)}", highlight=False)
    return 0


def _train_flags(argv: list[str]) -> Any:
    """Parses `train`'s flags with ml_collections, every mistake as one line. None after --help."""
    from absl import flags
    from ml_collections import config_flags

    fv = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "config file, with its argument after a colon", flag_values=fv, lock_config=True)
    flags.DEFINE_string("workdir", None, "run folder (default: runs/<config.name>)", flag_values=fv)
    flags.DEFINE_enum("device", "auto", ["auto", "cpu", "gpu", "tpu"], "where to run", flag_values=fv)
    if "--help" in argv or "-h" in argv:
        print(train.__doc__ + "\n\n" + fv.get_help())
        return None
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "").split(":")[0]
    if path:
        if not Path(path).is_file():
            raise UserError(f"--config={path}: no such file")
        root = str(Path(path).resolve().parent.parent)  # so that a config can import configs.common
        if root not in sys.path:
            sys.path.insert(0, root)
    try:
        rest = fv(["qstar train", *argv])
    except UserError:
        raise
    except Exception as e:  # noqa: BLE001  absl, ml_collections and the config file itself raise what they like
        raise UserError(f"{_config_error(e)}") from None
    if len(rest) > 1:
        raise UserError(f"qstar train: {rest[1]!r} is no flag; flags are written --name=value")
    return fv


def _config_error(e: Exception) -> str:
    text = " ".join(str(e).strip().strip("\"'").split())
    return text[:400] if isinstance(e, (AttributeError, KeyError, TypeError, ValueError)) or "Flag" in type(e).__name__ else f"{type(e).__name__}: {text[:400]}"


# ---------------------------------------------------------------------------------------------------------- sample


def sample(argv: list[str]) -> int:
    """qstar sample --model=DIR --prompt=TEXT"""
    p = _parser("sample", "Writes continuations of a prompt.")
    p.add_argument("--model", required=True, help="model folder in the Hugging Face layout")
    p.add_argument("--prompt", action="append", required=True, help="may be given several times; '' starts from BOS")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=1.0, help="0 = greedy")
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--n", type=int, default=1, help="samples per prompt")
    p.add_argument("--stop", action="append", default=[], help="string that ends a completion; may be repeated")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", default=None, help="float32 or bfloat16 (default: as stored)")
    p.add_argument("--json", action="store_true", help="one JSON object per completion, with tokens and log-probabilities")
    a = p.parse_args(argv)
    start_jax(a.device)
    import qstar

    model = qstar.load(a.model, dtype=a.dtype)
    found = qstar.generate(
        model, a.prompt, max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, n=a.n,
        stop=tuple(a.stop), seed=a.seed,
    )
    for prompt, completions in zip(a.prompt, found):
        for c in completions:
            if a.json:
                print(json.dumps({"prompt": prompt, **c.__dict__}))
            else:
                print(f"{prompt}{c.text}\n")
    return 0


# -------------------------------------------------------------------------------------------------------- evaluate


def evaluate(argv: list[str]) -> int:
    """qstar evaluate --model=DIR --task=NAME"""
    p = _parser("evaluate", "Greedy accuracy, pass@k and majority@k of a model on a task, with 95% intervals over problems.")
    p.add_argument("--model", required=True)
    p.add_argument("--task", required=True, help="arithmetic, gsm8k or commonsense_qa")
    p.add_argument("--task-options", type=json.loads, default={}, metavar="JSON", help="e.g. '{\"test\": \"gsm8k/test.jsonl\"}'")
    p.add_argument("--split", default="test")
    p.add_argument("--limit", type=int, default=0, help="first so many problems (0: all)")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--samples", type=int, default=0, help="samples per problem for pass@k and majority@k (0: greedy only)")
    p.add_argument("--temperature", type=float, default=0.7, help="of those samples")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default=None, help="folder for the answers (JSONL), so that a second call only counts")
    p.add_argument("--json", action="store_true")
    a = p.parse_args(argv)
    start_jax(a.device)
    from qstar.methods.evaluation import evaluate_model
    from qstar.models.model import load
    from qstar.tasks import make_task

    result = evaluate_model(
        load(a.model), make_task(a.task, **a.task_options), split=a.split, limit=a.limit, samples=a.samples,
        max_new_tokens=a.max_new_tokens, temperature=a.temperature, seed=a.seed, out=Path(a.out) if a.out else None,
    )
    _print_result(result, a.json)
    return 0


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console

    from qstar.train.metrics import show_table

    rows = [
        {"metric": k, "value": v, "95% low": result.get(_bound(k, "low")), "95% high": result.get(_bound(k, "high"))}
        for k, v in result.items() if "_low" not in k and "_high" not in k
    ]
    show_table(Console(), "evaluation", rows)


def _bound(key: str, side: str) -> str:
    name, slash, group = key.partition("/")
    return f"{name}_{side}{slash}{group}"


# -------------------------------------------------------------------------------------------------- export, report


def export(argv: list[str]) -> int:
    """qstar export --run=DIR --arm=NAME [--iteration=N] --out=DIR"""
    p = _parser("export", "Writes a model of a run as a folder in the Hugging Face layout.")
    p.add_argument("--run", required=True)
    p.add_argument("--arm", default=None, help="default: the first one")
    p.add_argument("--iteration", type=int, default=None, help="default: the last one")
    p.add_argument("--out", required=True)
    a = p.parse_args(argv)
    start_jax(a.device)
    from qstar.methods.evaluation import export_model

    print(export_model(Path(a.run), a.arm, a.iteration, Path(a.out)))
    return 0


def report(argv: list[str]) -> int:
    """qstar report RUN"""
    p = _parser("report", "Writes RUN/report.html: one self-contained page.")
    p.add_argument("run", help="run folder")
    a = p.parse_args(argv)
    from qstar.report.html import write_report

    print(write_report(Path(a.run)))
    return 0


def bench(argv: list[str]) -> int:
    """qstar bench generate | train [--json]"""
    p = _parser("bench", "Measures qstar beside transformers + PyTorch on this machine, in one interleaved run.")
    p.add_argument("what", choices=("generate", "train"))
    p.add_argument("--json", action="store_true")
    p.add_argument("--quick", action="store_true", help="one repetition of small sizes")
    a = p.parse_args(argv)
    start_jax(a.device)
    from qstar.bench import generate as bench_generate
    from qstar.bench import train as bench_train

    {"generate": bench_generate, "train": bench_train}[a.what].main(as_json=a.json, quick=a.quick)
    return 0
