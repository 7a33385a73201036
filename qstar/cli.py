"""Commands of `qstar`: each one reads its flags, starts JAX if it needs it, and calls one function.

Imports of heavy modules are local: `qstar COMMAND --help` and mistakes in flags cost no start of JAX.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path
from typing import Any

from qstar import preemption
from qstar.distributed import is_first, start_jax, start_plan
from qstar.errors import UserError, require
from qstar.flags import (
    COUNT,
    POSITIVE,
    SEED,
    SHARE,
    TEMPERATURE,
    Parser,
    json_object,
    local_folder,
    number,
    parse_overrides,
    read_config,
)

# ----------------------------------------------------------------------------------------------------------- train


def train(argv: list[str]) -> int:
    """qstar train --config=FILE[:ARG] --workdir=DIR [--config.key=value ...]"""
    p = Parser(
        "train",
        "Runs the method of a config file; called again after an interruption, goes on where it stopped.",
        epilog="qstar train --config=configs/star_arithmetic.py:smoke --config.train.lr=1e-3 --workdir=runs/x",
    )
    p.config()
    p.flag("--workdir DIR", "run folder (default: runs/<config.name>)")
    p.flag("--profile FIRST:LAST", "traces these updates to WORKDIR/profile, e.g. 10:13")
    a, rest = p.parse_known_args(argv)
    config = _read_config("train", a.config, rest, "configs/star_arithmetic.py")
    workdir = local_folder("--workdir", a.workdir) if a.workdir else _default_workdir(config.get("name", "run"))
    # After the flags and the config: a mistake in them ends before JAX starts and waits for other processes.
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


def _read_config(command: str, spec: str | None, rest: list[str], example: str) -> Any:
    overrides = parse_overrides(rest)
    if spec is None:
        raise UserError(f"{command}: --config=FILE is missing, e.g. --config={example}")
    return read_config(spec, overrides)


def _default_workdir(name: Any) -> Path:
    # The name comes from a config that may be somebody else's: it must not lead out of runs/.
    parts = Path(name).parts if isinstance(name, str) and name.isprintable() else ()
    inside = bool(parts) and not Path(name).is_absolute() and ".." not in parts
    require((inside, f"config.name={name!r} must name a folder inside runs/; or give --workdir=DIR"))
    return Path("runs", name)


# ---------------------------------------------------------------------------------------------------------- sample


def sample(argv: list[str]) -> int:
    """qstar sample --model=DIR --prompt=TEXT"""
    p = Parser("sample", "Writes continuations of a prompt.")
    p.flag("--model DIR", "model folder in the Hugging Face layout", required=True)
    p.flag("--prompt TEXT", "repeatable; '' starts from BOS", action="append", required=True)
    p.flag("--max-new-tokens N", "at most so many", POSITIVE, 128)
    p.flag("--temperature T", "0 = greedy", TEMPERATURE, 1.0)
    p.flag("--top-k K", "only the K likeliest tokens (0: all)", COUNT, 0)
    p.flag("--top-p P", "only the likeliest tokens that hold a share P", SHARE, 1.0)
    p.flag("--n N", "samples per prompt", POSITIVE, 1)
    p.flag("--stop TEXT", "ends a continuation; repeatable", default=[], action="append")
    p.flag("--seed N", "of the random draws", SEED, 0)
    p.flag("--dtype", "to compute in (default: as stored)", choices=("float32", "bfloat16", "float16"))
    p.flag("--weights", "int8: the blocks' weights in 8 bits (default: as stored)", default="", choices=("", "int8"))
    p.switch("--json", "an object per continuation, with tokens and log-probabilities")
    a = p.parse_args(argv)
    start_jax(a.device)
    import qstar

    flags = ("max_new_tokens", "temperature", "top_k", "top_p", "n", "seed", "weights")
    options = {name: getattr(a, name) for name in flags} | {"stop": tuple(a.stop)}
    found = qstar.generate(qstar.load(a.model, dtype=a.dtype), a.prompt, **options)
    pairs = [(prompt, c) for prompt, completions in zip(a.prompt, found) for c in completions]
    if a.json:
        print("\n".join(json.dumps({"prompt": prompt, **c.__dict__}) for prompt, c in pairs))
    else:
        print("\n\n".join(f"{prompt}{c.text}" for prompt, c in pairs))
    return 0


# -------------------------------------------------------------------------------------------------------- evaluate


def _evaluate_parser() -> Parser:
    p = Parser("evaluate", "Greedy accuracy, pass@k and majority@k of a model on a task, with 95% intervals.")
    p.flag("--model DIR", "model folder in the Hugging Face layout", required=True)
    p.flag("--task NAME", "arithmetic, commonsense_qa, gsm8k, math, mbpp ...", required=True)
    p.flag("--task-options JSON", 'e.g. {"test": "test.jsonl"}; "prompts": a folder of few-shot files, or null for none '
           "(default: built-in examples)", json_object, {})  # fmt: skip
    p.flag("--split", "part of the task's problems", default="test", choices=("train", "val", "test"))
    p.flag("--limit N", "first N problems (0: all)", COUNT, 0)
    p.flag("--max-new-tokens N", "of an answer", POSITIVE, 256)
    p.flag("--samples N", "per problem, for pass@k and majority@k (0: none)", COUNT, 0)
    p.flag("--temperature T", "of those samples", TEMPERATURE, 0.7)
    p.flag("--verifier NAME=DIR[:SCORE]", "a model that scores the samples, for best-of-k: the folder of a `qstar export "
           "--verifier`; SCORE is logp (without a head), mean_logp, orm, prm_min or prm_product; repeatable",
           default=[], action="append")  # fmt: skip
    p.flag("--seed N", "of the random draws", SEED, 0)
    p.flag("--out DIR", "keeps the answers (JSONL), so that a second call only counts")
    p.switch("--json", "one JSON object instead of a table")
    p.flag("--too-long", "prompts beyond the context: stop, leave those problems out, or drop the first tokens of the prompt",
           default="error", choices=("error", "skip", "truncate"))  # fmt: skip
    p.flag("--metric", "answers: correctness of generated answers; expected: zero-shot probability of the right answer, and "
           "exact match; cot: majority votes after zero-shot reasoning. The last two are those of Quiet-STaR, with and "
           "without thoughts (default: answers)", default="answers", choices=("answers", "expected", "cot"))  # fmt: skip
    p.flag("--thoughts", "for expected and cot: think before every token, too (default: if the model can)",
           default="auto", choices=("auto", "on", "off"))  # fmt: skip
    p.flag("--passes P", "thoughts per position, for expected", POSITIVE, 1)
    p.flag("--thought-temperature T", "0: greedy (default: as trained)", TEMPERATURE)
    return p


def evaluate(argv: list[str]) -> int:
    """qstar evaluate --model=DIR --task=NAME"""
    a = _evaluate_parser().parse_args(argv)
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
    task.problems(a.split)  # reports a fault in the data before the model is read
    scorers = _scorers(a.verifier, task)
    require((a.samples > 0 or not a.verifier, "evaluate: --verifier scores samples; give --samples=N, too"))
    # `made_with` identifies the kept answers: flags that change what is counted, but no answer, are not part of it.
    unused = {"verifier", "out", "json", "device", "metric", "thoughts", "passes", "thought_temperature"}
    made_with = {k: v for k, v in vars(a).items() if k not in unused}
    out = local_folder("--out", a.out) if a.out else None
    flags = ("split", "limit", "samples", "max_new_tokens", "temperature", "seed", "too_long")
    options = {name: getattr(a, name) for name in flags} | {"out": out, "made_with": made_with}
    options["score"] = lambda rows, *where: by_scores(rows, a.samples, scorers, *where, task.ballots)
    try:
        result = evaluate_model(load(a.model), task, **options)
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
        show_table(console, "probability to be right with k samples (95% interval over problems)", curve_rows(result))
        gains = result_rows({k: v for k, v in result.items() if k.startswith("gain@")})
        show_table(console, "differences on the same samples, paired over problems", gains)
    if page:
        console.print(f"curves: {page}", highlight=False, soft_wrap=True)
    return 0


def _scorers(flags: list[str], task: Any) -> dict[str, Any]:
    from qstar.methods.verifier import SCORES, Verifier
    from qstar.models.model import load

    out: dict[str, Any] = {}
    for flag in flags:
        name, equals, folder = flag.partition("=")
        # Only a known score after the last colon is a rule: paths may contain colons.
        folder, _, rule = folder.rpartition(":") if folder.rpartition(":")[2] in SCORES else (folder, "", "")
        if not equals or not re.fullmatch(r"\w+", name) or name in ("generator", *out):
            raise UserError(f"evaluate: --verifier={flag} must be NAME=DIR, each NAME once and not 'generator'")
        out[name] = Verifier(load(folder), rule, steps=task.steps)
        _ = out[name].rule  # raises, before anything is sampled, if the score does not fit the model
    return out


def _evaluate_quiet(a: argparse.Namespace) -> int:
    # Zero-shot expected accuracy and cot-majority of the Quiet-STaR paper. Neither keeps answers or shortens prompts.
    only = f"--metric={a.metric}"
    require(
        (a.too_long == "error", f"evaluate: --too-long={a.too_long} is of --metric=answers; {only} knows only error"),
        (not a.out, f"evaluate: --out keeps the answers of --metric=answers; {only} writes none"),
    )
    from rich.console import Console

    from qstar.methods.quiet_eval import expected_accuracy, zero_shot_cot
    from qstar.models.model import load
    from qstar.runs.evaluate import result_rows
    from qstar.tasks import make_task
    from qstar.train.metrics import show_table

    task = make_task(a.task, **a.task_options)
    task.problems(a.split)  # reports a fault in the data before the model is read
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


# --------------------------------------------------------------------------------- export, report, compare, bench


def export(argv: list[str]) -> int:
    """qstar export --run=DIR --arm=NAME [--iteration=N] --out=DIR"""
    p = Parser("export", "Writes a model of a run as a folder in the Hugging Face layout.")
    p.flag("--run DIR", "run folder: the --workdir of qstar train", required=True)
    p.flag("--arm NAME", "arm of the run (default: the only one)")
    p.flag("--iteration N", "outer iteration of the arm, 0: base (default: the last)", COUNT)
    p.flag("--verifier", "of a V-STaR run, instead of its generator", default="", choices=("dpo", "orm", "prm"))
    p.flag("--out DIR", "new folder, or an earlier export to replace", required=True)
    a = p.parse_args(argv)
    start_jax(a.device)
    from qstar.methods.export import export_model

    print(export_model(local_folder("--run", a.run), a.arm, a.iteration, local_folder("--out", a.out), a.verifier))
    return 0


def report(argv: list[str]) -> int:
    """qstar report RUN"""
    p = Parser("report", "Writes RUN/report.html: one self-contained page.", device=False)
    p.flag("run RUN", "run folder: the --workdir of qstar train")
    a = p.parse_args(argv)
    from qstar.report.pages import write_report

    print(write_report(Path(a.run)))
    return 0


def compare(argv: list[str]) -> int:
    """qstar compare --a=NAME=FILE --b=NAME=FILE --out=DIR | --out=DIR --votes=FILE"""
    p = Parser(
        "compare",
        "Writes a page that asks which of two rationales is better without telling whose they are; with --votes, counts "
        "what people said.",
        device=False,
        epilog="qstar compare --a=star=runs/x/rat/evaluation/iter_003.jsonl --b=gold=gold.jsonl --out=compare",
    )
    p.flag("--a NAME=FILE", "rationales: JSONL with problem_id, prompt and completion")
    p.flag("--b NAME=FILE", "those they are compared with")
    p.flag("--out DIR", "folder of compare.html and key.json", required=True)
    p.flag("--count N", "questions at most", POSITIVE, 50)
    p.flag("--seed N", "of the choice, the order and the sides", SEED, 0)
    p.switch("--right", "only problems that both got right")
    p.flag("--votes FILE", "votes.jsonl of the page; repeatable", default=[], action="append")
    p.switch("--json", "one JSON object instead of a table")
    a = p.parse_args(argv)
    from rich.console import Console

    from qstar.report.compare import Side, count_votes, write_comparison
    from qstar.train.metrics import show_table

    folder = local_folder("--out", a.out)
    require((not a.votes or not (a.a or a.b), "compare: --votes counts what was asked before; leave --a and --b out"))
    if not a.votes:
        sides = []
        for flag in ("a", "b"):
            name, _, file = (getattr(a, flag) or "").partition("=")
            missing = f"compare: --{flag}=NAME=FILE is missing or incomplete (see qstar compare --help)"
            require((bool(name and file), missing))
            sides.append(Side(name, file))
        print(write_comparison(*sides, folder, count=a.count, seed=a.seed, right=a.right))
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
    p = Parser(
        "plan",
        "Compiles what a config would run, for a slice that is not here: memory, collectives, time at best. Exit code 1: no.",
        epilog="qstar plan --config=configs/star_gsm8k.py --topology=v6e:2x4 --config.train.batch_size=16",
        device=False,
    )
    p.config()
    p.flag("--topology NAME", "v5e:4x4, v5p:2x2x1, v6e:2x4, gpu:8, cpu:8; or several", required=True)
    p.switch("--search", "finds the cheapest layout that fits (mesh, remat, accumulate)")
    p.flag("--only TEXT", "programs whose names hold this text", default="")
    p.flag("--rows-per-chip N", "instead of the config's batch size (0: that)", COUNT, 0)
    p.flag("--hlo DIR", "keeps the compiled texts there", default="")
    p.flag("--hbm GIB", "per chip (default: the chip's)", number(lambda x: x > 0, "above 0"), 0.0)
    p.flag("--prompt-tokens N", "of a prompt", POSITIVE, 256)
    p.flag("--prefix-tokens N", "of a few-shot prefix (0: none)", COUNT, 0)
    p.switch("--full-effort", "optimise as for a run: slower, temporaries a little smaller")
    p.switch("--json", "one JSON object (a list, of several slices)")
    a, rest = p.parse_known_args(argv)
    config = _read_config("plan", a.config, rest, "configs/star_gsm8k.py")
    # The simulated devices of the CPU backend are counted once, when JAX starts: all topologies are named before.
    names = [name for name in a.topology.split(",") if name]
    start_plan(names)
    from qstar.plan import run, search
    from qstar.plan.steps import Assumed

    assumed, options = (
        Assumed(a.prompt_tokens, a.prefix_tokens),
        run.Options(
            only=a.only, hbm=a.hbm, as_json=a.json, quick=not a.full_effort, rows_per_chip=a.rows_per_chip, keep=a.hlo
        ),
    )
    return (search if a.search else run).main(config, names, assumed, options)


BENCHES = ("generate", "quiet_star", "rl", "train")  # modules of qstar.bench


def bench(argv: list[str]) -> int:
    """qstar bench generate | quiet_star | rl | train [--json]"""
    p = Parser("bench", "Measures qstar beside what it could be replaced by, on this machine, in turn.")
    p.add_argument("what", choices=BENCHES)
    p.switch("--json", "JSON instead of a table")
    p.switch("--quick", "one repetition of small sizes")
    a = p.parse_args(argv)
    # Both sides of a comparison run in processes of their own; this one does not start JAX.
    importlib.import_module(f"qstar.bench.{a.what}").main(as_json=a.json, quick=a.quick, device=a.device)
    return 0
