"""The commands behind `qstar`: each reads its flags, sets the platform up, and calls one function."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from qstar import preemption
from qstar.distributed import is_first
from qstar.errors import SEEDS, UserError, require
from qstar.flags import SHARE, TEMPERATURE, command_parser, json_object, local_folder, number, whole_number
from qstar.start import start_jax, start_plan

# ----------------------------------------------------------------------------------------------------------- train


def train(argv: list[str]) -> int:
    """qstar train --config=FILE[:ARG] --workdir=DIR [--config.key=value ...]"""
    p = command_parser(
        "train",
        "Runs the method of a config file; called again after an interruption, goes on where it stopped.",
        epilog="qstar train --config=configs/star_arithmetic.py:smoke --config.train.lr=1e-3 --workdir=runs/x",
    )
    p.add_argument("--config", metavar="FILE[:ARG]", help="config file, with its argument after a colon")
    p.add_argument("--config.KEY", dest="_", metavar="VALUE", help="replaces a value of the config; may be repeated")
    p.add_argument("--workdir", metavar="DIR", help="run folder (default: runs/<config.name>)")
    p.add_argument("--profile", metavar="FIRST:LAST", help="traces these updates to WORKDIR/profile, e.g. 10:13")
    a, rest = p.parse_known_args(argv)
    from qstar.config_file import parse_overrides, read_config

    overrides = parse_overrides(rest)
    if a.config is None:
        raise UserError("train: --config=FILE is missing, e.g. --config=configs/star_arithmetic.py")
    config = read_config(a.config, overrides)
    workdir = local_folder("--workdir", a.workdir) if a.workdir else _default_workdir(config.get("name", "run"))
    start_jax(a.device, several=True)
    from rich.console import Console

    from qstar import methods
    from qstar.report.pages import write_report
    from qstar.train import profile

    console = Console(quiet=not is_first())
    with profile.tracing(a.profile, workdir / "profile"):
        methods.run(config, workdir, console)
    if is_first():
        console.print(f"report: {write_report(workdir)}", highlight=False, soft_wrap=True)
    return 0


def _default_workdir(name: Any) -> Path:
    """Returns runs/NAME, which a name cannot leave."""
    parts = Path(name).parts if isinstance(name, str) and name.isprintable() else ()
    inside = bool(parts) and not Path(name).is_absolute() and ".." not in parts
    require((inside, f"config.name={name!r} must name a folder inside runs/; or give --workdir=DIR"))
    return Path("runs", name)


# ---------------------------------------------------------------------------------------------------------- sample


def sample(argv: list[str]) -> int:
    """qstar sample --model=DIR --prompt=TEXT"""
    p = command_parser("sample", "Writes continuations of a prompt.")
    p.add_argument("--model", metavar="DIR", required=True, help="model folder in the Hugging Face layout")
    p.add_argument("--prompt", metavar="TEXT", action="append", required=True, help="repeatable; '' starts from BOS")
    p.add_argument(
        "--max-new-tokens", metavar="N", type=whole_number(1), default=128, help="at most so many (default: 128)"
    )
    p.add_argument("--temperature", metavar="T", type=TEMPERATURE, default=1.0, help="0 = greedy (default: 1)")
    p.add_argument("--top-k", metavar="K", type=whole_number(0), default=0, help="only the K likeliest tokens (0: all)")
    p.add_argument("--top-p", metavar="P", type=SHARE, default=1.0, help="only the likeliest that hold a share P")
    p.add_argument("--n", metavar="N", type=whole_number(1), default=1, help="samples per prompt (default: 1)")
    p.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends a continuation; repeatable")
    p.add_argument("--seed", metavar="N", type=whole_number(0, SEEDS - 1), default=0, help="of the draws (default: 0)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in (default: as stored)")
    p.add_argument(
        "--weights", choices=("", "int8"), default="", help="int8: the blocks' in 8 bits (default: as stored)"
    )
    p.add_argument("--json", action="store_true", help="an object per continuation, with tokens and log-probabilities")
    a = p.parse_args(argv)
    start_jax(a.device)
    import qstar

    model = qstar.load(a.model, dtype=a.dtype)
    found = qstar.generate(
        model,
        a.prompt,
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        n=a.n,
        stop=tuple(a.stop),
        seed=a.seed,
        weights=a.weights,
    )
    pairs = [(prompt, c) for prompt, completions in zip(a.prompt, found) for c in completions]
    if a.json:
        print("\n".join(json.dumps({"prompt": prompt, **c.__dict__}) for prompt, c in pairs))
    else:
        print("\n\n".join(f"{prompt}{c.text}" for prompt, c in pairs))
    return 0


# -------------------------------------------------------------------------------------------------------- evaluate


def evaluate(argv: list[str]) -> int:
    """qstar evaluate --model=DIR --task=NAME"""
    p = command_parser("evaluate", "Greedy accuracy, pass@k and majority@k of a model on a task, with 95% intervals.")
    p.add_argument("--model", metavar="DIR", required=True, help="model folder in the Hugging Face layout")
    p.add_argument("--task", metavar="NAME", required=True, help="arithmetic, commonsense_qa, gsm8k, math, mbpp ...")
    p.add_argument("--task-options", type=json_object, default={}, metavar="JSON", help='e.g. {"test": "test.jsonl"}; '
                   '"prompts": a folder of few-shot files, or null for none (default: built-in examples)')  # fmt: skip
    p.add_argument("--split", choices=("train", "val", "test"), default="test", help="(default: test)")
    p.add_argument("--limit", metavar="N", type=whole_number(0), default=0, help="first N problems (0: all)")
    p.add_argument(
        "--max-new-tokens", metavar="N", type=whole_number(1), default=256, help="of an answer (default: 256)"
    )
    p.add_argument(
        "--samples", metavar="N", type=whole_number(0), default=0, help="per problem, for pass@k and majority@k"
    )
    p.add_argument("--temperature", metavar="T", type=TEMPERATURE, default=0.7, help="of those samples (default: 0.7)")
    p.add_argument("--verifier", metavar="NAME=DIR[:SCORE]", action="append", default=[], help=_VERIFIER)
    p.add_argument("--seed", metavar="N", type=whole_number(0, SEEDS - 1), default=0, help="of the draws (default: 0)")
    p.add_argument("--out", metavar="DIR", help="keeps the answers (JSONL), so that a second call only counts")
    p.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    p.add_argument("--too-long", choices=("error", "skip", "truncate"), default="error", help="prompts beyond the context: "
                   "stop, leave those problems out, or drop the first tokens of the prompt (default: error)")  # fmt: skip
    p.add_argument("--metric", choices=("answers", "expected", "cot"), default="answers", help=_METRICS)
    p.add_argument("--thoughts", choices=("auto", "on", "off"), default="auto", help="for expected and cot: think before "
                   "every token, beside the numbers without (default: if the model can)")  # fmt: skip
    p.add_argument("--passes", metavar="P", type=whole_number(1), default=1, help="thoughts per position, for expected")
    p.add_argument("--thought-temperature", metavar="T", type=TEMPERATURE, help="0: greedy (default: as trained)")
    a = p.parse_args(argv)
    start_jax(a.device)
    if a.metric != "answers":
        return _evaluate_quiet(a)
    from rich.console import Console

    from qstar.methods.score_samples import by_scores
    from qstar.models.model import load
    from qstar.report.pages.v_star import curve_rows, write_evaluation
    from qstar.runs.evaluate import evaluate_model, result_rows, unanswered
    from qstar.tasks import has_examples, make_task
    from qstar.train.metrics import show_table

    a.task_options = ({"prompts": "built-in"} if has_examples(a.task) else {}) | a.task_options
    task = make_task(a.task, **a.task_options)
    task.problems(a.split)  # a fault in the data shows before the model is read
    scorers = _scorers(a.verifier, task)
    require((a.samples > 0 or not a.verifier, "evaluate: --verifier scores samples; give --samples=N, too"))
    unused = ("verifier", "out", "json", "device", "metric", "thoughts", "passes", "thought_temperature")
    made_with = {k: v for k, v in vars(a).items() if k not in unused}
    out = local_folder("--out", a.out) if a.out else None
    try:
        result = evaluate_model(
            load(a.model),
            task,
            split=a.split,
            limit=a.limit,
            samples=a.samples,
            max_new_tokens=a.max_new_tokens,
            temperature=a.temperature,
            seed=a.seed,
            out=out,
            made_with=made_with,
            score=lambda rows, *where: by_scores(rows, a.samples, scorers, *where, task.ballots),
            too_long=a.too_long,
        )
    except preemption.Preempted:
        raise preemption.Preempted(f"finished rounds of answers are kept in {out}" if out else "") from None
    title = f"{a.task}, {a.split}"
    page = write_evaluation(out, title, result, a.samples) if out and a.samples else None
    if a.json:
        print(json.dumps(result))
        return 0
    console = Console()
    show_table(console, title, result_rows({k: v for k, v in result.items() if "@" not in k and ":" not in k}))
    if warning := unanswered(result):
        console.print(warning, style="yellow", highlight=False, soft_wrap=True)
    if a.samples:
        show_table(console, "chance to be right with k samples (95% interval over problems)", curve_rows(result))
        gains = result_rows({k: v for k, v in result.items() if k.startswith("gain@")})
        show_table(console, "differences on the same samples, paired over problems", gains)
    if page:
        console.print(f"curves: {page}", highlight=False, soft_wrap=True)
    return 0


_VERIFIER = (
    "a model that scores the samples, for best-of-k: the folder of a `qstar export --verifier`; SCORE is logp (without a "
    "head), mean_logp, orm, prm_min or prm_product; repeatable"
)
_METRICS = (
    "answers: what the model writes, judged (default); expected: zero-shot probability of the right answer, and exact match; "
    "cot: majority votes after zero-shot reasoning. The last two are those of Quiet-STaR, with thoughts and without"
)


def _scorers(flags: list[str], task: Any) -> dict[str, Any]:
    """Reads NAME=DIR[:SCORE] of --verifier."""
    import re

    from qstar.methods.verifier import SCORES, Verifier
    from qstar.models.model import load

    out: dict[str, Any] = {}
    for flag in flags:
        name, equals, folder = flag.partition("=")
        folder, _, rule = folder.rpartition(":") if folder.rpartition(":")[2] in SCORES else (folder, "", "")
        if not equals or not re.fullmatch(r"\w+", name) or name in ("generator", *out):
            raise UserError(f"evaluate: --verifier={flag} must be NAME=DIR, each NAME once and not 'generator'")
        verifier = Verifier(load(folder), rule, steps=task.steps)
        verifier.rule  # noqa: B018  a score that does not fit the model shows before anything is sampled
        out[name] = verifier
    return out


def _evaluate_quiet(a: argparse.Namespace) -> int:
    """`evaluate` with the metrics of Quiet-STaR."""
    if a.too_long != "error":
        raise UserError(
            f"evaluate: --too-long={a.too_long} is of --metric=answers; --metric={a.metric} knows only error"
        )
    if a.out:
        raise UserError(f"evaluate: --out keeps the answers of --metric=answers; --metric={a.metric} writes none")
    from rich.console import Console

    from qstar.methods.quiet_eval import expected_accuracy, zero_shot_cot
    from qstar.models.model import load
    from qstar.runs.evaluate import result_rows
    from qstar.tasks import make_task
    from qstar.train.metrics import show_table

    task = make_task(a.task, **a.task_options)
    task.problems(a.split)  # a fault in the data shows before the model is read
    model = load(a.model)
    thoughts = a.thoughts == "on" or (a.thoughts == "auto" and model.config.thoughts is not None)
    if thoughts and a.thought_temperature is not None and model.config.thoughts is not None:
        thoughts = model.config.thoughts.replace(temperature=a.thought_temperature)
    common = dict(split=a.split, limit=a.limit, thoughts=thoughts, seed=a.seed)
    if a.metric == "expected":
        result = expected_accuracy(model, task, passes=a.passes, **common)
    else:
        text = dict(samples=a.samples or 8, max_new_tokens=a.max_new_tokens, temperature=a.temperature)
        result = zero_shot_cot(model, task, **text, **common)
    if a.json:
        print(json.dumps(result))
    else:
        show_table(Console(), f"{a.task}, {a.split}", result_rows(result))
    return 0


# ------------------------------------------------------------------------------------------- export, report, bench


def export(argv: list[str]) -> int:
    """qstar export --run=DIR --arm=NAME [--iteration=N] --out=DIR"""
    p = command_parser("export", "Writes a model of a run as a folder in the Hugging Face layout.")
    p.add_argument("--run", metavar="DIR", required=True, help="run folder: the --workdir of qstar train")
    p.add_argument("--arm", metavar="NAME", help="arm of the run (default: the only one)")
    p.add_argument(
        "--iteration", metavar="N", type=whole_number(0), help="loop of the arm, 0: base (default: the last)"
    )
    p.add_argument("--verifier", choices=("dpo", "orm", "prm"), default="", help="of a V-STaR run, not its generator")
    p.add_argument("--out", metavar="DIR", required=True, help="new folder, or an earlier export to replace")
    a = p.parse_args(argv)
    start_jax(a.device)
    from qstar.methods.export import export_model

    print(export_model(local_folder("--run", a.run), a.arm, a.iteration, local_folder("--out", a.out), a.verifier))
    return 0


def report(argv: list[str]) -> int:
    """qstar report RUN"""
    p = command_parser("report", "Writes RUN/report.html: one self-contained page.", device=False)
    p.add_argument("run", metavar="RUN", help="run folder: the --workdir of qstar train")
    a = p.parse_args(argv)
    from qstar.report.pages import write_report

    print(write_report(Path(a.run)))
    return 0


def compare(argv: list[str]) -> int:
    """qstar compare --a=NAME=FILE --b=NAME=FILE --out=DIR | --out=DIR --votes=FILE"""
    p = command_parser(
        "compare",
        "Writes a page that asks which of two rationales is better without telling whose they are; with --votes, counts "
        "what people said.",
        device=False,
        epilog="qstar compare --a=star=runs/x/rat/evaluation/iter_003.jsonl --b=gold=gold.jsonl --out=compare",
    )
    p.add_argument("--a", metavar="NAME=FILE", help="rationales: JSONL with problem_id, prompt and completion")
    p.add_argument("--b", metavar="NAME=FILE", help="those they are compared with")
    p.add_argument("--out", metavar="DIR", required=True, help="folder of compare.html and key.json")
    p.add_argument("--count", metavar="N", type=whole_number(1), default=50, help="questions at most (default: 50)")
    p.add_argument(
        "--seed", metavar="N", type=whole_number(0, SEEDS - 1), default=0, help="of the draw, the order and the sides"
    )
    p.add_argument("--right", action="store_true", help="only problems that both got right")
    p.add_argument("--votes", metavar="FILE", action="append", default=[], help="votes.jsonl of the page; repeatable")
    p.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    a = p.parse_args(argv)
    from rich.console import Console

    from qstar.report.compare import Side, count_votes, write_comparison
    from qstar.train.metrics import show_table

    folder = local_folder("--out", a.out)
    require((not a.votes or not (a.a or a.b), "compare: --votes counts what was asked before; leave --a and --b out"))
    if not a.votes:
        sides = {flag: (getattr(a, flag) or "").partition("=") for flag in ("a", "b")}
        for flag, (name, _, file) in sides.items():
            require(
                (
                    bool(name and file),
                    f"compare: --{flag}=NAME=FILE is missing or incomplete (see qstar compare --help)",
                )
            )
        made = [Side(name, file) for name, _, file in sides.values()]
        print(write_comparison(*made, folder, count=a.count, seed=a.seed, right=a.right))
        return 0
    found = count_votes(folder, a.votes)
    if a.json:
        print(json.dumps(found))
    else:
        title = f"{found.pop('a')} against {found.pop('b')}: win rate of the first"
        show_table(Console(), title, [found])
    return 0


def plan(argv: list[str]) -> int:
    """qstar plan --config=FILE[:ARG] --topology=v5e:4x4[,v5e:8x8] [--config.key=value ...]"""
    p = command_parser(
        "plan",
        "Compiles what a config would run, for a slice that is not here: memory, collectives, time at best. Exit code 1: no.",
        epilog="qstar plan --config=configs/star_gsm8k.py --topology=v6e:2x4 --config.train.batch_size=16",
        device=False,
    )
    p.add_argument("--config", metavar="FILE[:ARG]", help="config file, with its argument after a colon")
    p.add_argument("--config.KEY", dest="_", metavar="VALUE", help="replaces a value of the config; may be repeated")
    p.add_argument(
        "--topology", metavar="NAME", required=True, help="v5e:4x4, v5p:2x2x1, v6e:2x4, gpu:8, cpu:8; or several"
    )
    p.add_argument(
        "--search", action="store_true", help="finds the cheapest layout that fits (mesh, remat, accumulate)"
    )
    p.add_argument("--only", metavar="TEXT", default="", help="programs whose names hold this text")
    p.add_argument(
        "--rows-per-chip", metavar="N", type=whole_number(0), default=0, help="instead of the config's batch size"
    )
    p.add_argument("--hlo", metavar="DIR", default="", help="keeps the compiled texts there")
    p.add_argument("--hbm", metavar="GIB", type=number(lambda x: x > 0, "above 0"), default=0.0, help="per chip")
    p.add_argument("--prompt-tokens", metavar="N", type=whole_number(1), default=256, help="of a prompt (default: 256)")
    p.add_argument(
        "--prefix-tokens", metavar="N", type=whole_number(0), default=0, help="of a few-shot prefix (default: 0)"
    )
    p.add_argument(
        "--full-effort", action="store_true", help="optimise as for a run: slower, temporaries a little smaller"
    )
    p.add_argument("--json", action="store_true", help="one JSON object (a list, of several slices)")
    a, rest = p.parse_known_args(argv)
    from qstar.config_file import parse_overrides, read_config

    overrides = parse_overrides(rest)
    if a.config is None:
        raise UserError("plan: --config=FILE is missing, e.g. --config=configs/star_gsm8k.py")
    config = read_config(a.config, overrides)
    names = [name for name in a.topology.split(",") if name]
    start_plan(names)
    from qstar.plan import run
    from qstar.plan.cases import Assumed

    assumed = Assumed(a.prompt_tokens, a.prefix_tokens)
    options = dict(
        only=a.only, hbm=a.hbm, as_json=a.json, quick=not a.full_effort, rows_per_chip=a.rows_per_chip, keep=a.hlo
    )
    if a.search:
        from qstar.plan.search import main as search

        return search(config, names, assumed, **options)
    return run.main(config, names, assumed, **options)


BENCHES = ("distil", "generate", "quiet_star", "rl", "sandbox", "train")  # modules of qstar.bench


def bench(argv: list[str]) -> int:
    """qstar bench distil | generate | quiet_star | rl | sandbox | train [--json]"""
    p = command_parser(
        "bench", "Measures qstar beside what it could be replaced by, on this machine, in one interleaved run."
    )
    p.add_argument("what", choices=BENCHES, type=lambda text: "distil" if text == "distill" else text)
    p.add_argument("--json", action="store_true", help="JSON instead of a table")
    p.add_argument("--quick", action="store_true", help="one repetition of small sizes")
    a = p.parse_args(argv)
    bench = importlib.import_module(f"qstar.bench.{a.what}")
    if a.what in ("quiet_star", "sandbox"):
        start_jax(a.device)
        bench.main(as_json=a.json, quick=a.quick)
    else:  # both sides in processes of their own: this one starts no JAX
        bench.main(as_json=a.json, quick=a.quick, device=a.device)
    return 0
