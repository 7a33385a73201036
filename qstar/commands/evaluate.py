"""`qstar evaluate`: measures a model on a task."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from qstar import preemption
from qstar.distributed import start_jax
from qstar.errors import UserError, require
from qstar.flags import COUNT, MODEL, POSITIVE, SEED, TEMPERATURE, Parser, folder, json_object
from qstar.tasks import task_names
from qstar.tasks.prompts import FORMATS

EVERY = {"model", "task", "harness", "limit", "json", "device", "dtype", "seed"}
TASK, SAMPLES = {"task_options", "split", "metric"}, {"samples", "temperature", "max_new_tokens"}
THOUGHTS = {"thoughts", "thought_temperature"}
FLAGS = {  # of each kind of evaluation, besides EVERY
    "--harness": {"num_fewshot", "include_path", "chat", "max_new_tokens", "out", *THOUGHTS},
    "--metric=answers": {"verifier", "out", "too_long", "format", *TASK, *SAMPLES},
    "--metric=expected": {"passes", *TASK, *THOUGHTS},
    "--metric=cot": {*TASK, *SAMPLES, *THOUGHTS},
}


def _evaluate_parser() -> Parser:
    p = Parser("evaluate", "Greedy accuracy, pass@k and majority@k of a model on a task, with 95% intervals.")
    p.flag("--model DIR", MODEL, required=True)
    p.flag("--task NAME", f"{', '.join(task_names())}; or a class of your own: file.py:Class, package.module:Class")
    p.flag("--harness NAMES", "tasks of lm-evaluation-harness in place of --task: arc_easy,gsm8k or yaml files")
    p.flag("--task-options JSON", 'e.g. {"test": "test.jsonl"}; of numeric, multiple_choice and exact the fields, too: '
           '"question": "Body Question", "answer": "Answer" (qstar/tasks/generic.py); "prompts": a folder of few-shot files, '
           'or null for none; "shots": worked examples of a chat', json_object, {})  # fmt: skip
    p.flag("--format", "of prompts: chat messages, worked examples in front, or the problem alone (auto: chat if the model "
           "has a template)", choices=FORMATS, default="auto")  # fmt: skip
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
    p.flag("--num-fewshot N", "examples of a harness task (default: as the task says)", COUNT)
    p.flag("--include-path DIR", "folder of further task files (yaml) of the harness")
    p.flag("--dtype", "to compute in (default: as stored)", choices=("float32", "bfloat16", "float16"))
    p.switch("--chat", "apply the tokenizer's chat template to the harness's texts")
    return p


def main(argv: list[str]) -> int:
    """qstar evaluate --model=DIR --task=NAME"""
    p = _evaluate_parser()
    a = p.parse_args(argv)
    one = "evaluate: give --task=NAME or --harness=NAMES (see qstar evaluate --help)"
    require((bool(a.task) != bool(a.harness), one))
    changed = {name for name in vars(a) if getattr(a, name) != p.get_default(name)}
    kind = "--harness" if a.harness else f"--metric={a.metric}"
    wrong = sorted(changed - EVERY - FLAGS[kind])
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
    kinds = " or ".join(other for other, names in FLAGS.items() if names.issuperset(wrong))
    only = f", only with {kinds}" if kinds else ""
    require((not wrong, f"evaluate: {flags} {'do' if len(wrong) > 1 else 'does'} not go with {kind}{only}"))
    start_jax(a.device)
    if a.harness:
        return _evaluate_harness(a)
    if a.metric != "answers":
        return _evaluate_quiet(a)
    from rich.console import Console

    from qstar.methods.score_samples import by_scores
    from qstar.models.model import load
    from qstar.report.pages.v_star import curve_rows, write_evaluation
    from qstar.runs.evaluate import evaluate_model, result_rows, unanswered
    from qstar.tasks.prompts import make_prompted
    from qstar.train.metrics import show_table

    asked = {} if a.format == "auto" else {"format": a.format}
    require((not asked or "format" not in a.task_options, "evaluate: --task-options has a format, too; leave one out"))
    task, form = make_prompted(a.task, {**a.task_options, **asked})
    task.problems(a.split)  # reports a fault in the data before the model is read
    scorers = _scorers(a.verifier, task, a.dtype)
    require((a.samples > 0 or not a.verifier, "evaluate: --verifier scores samples; give --samples=N, too"))
    # `made_with` identifies the kept answers: flags that change what is counted, but no answer, are not part of it.
    used = {"model", "task", "limit", "seed", "dtype"} | FLAGS["--metric=answers"] - {"verifier", "out", "metric"}
    made_with = {k: v for k, v in vars(a).items() if k in used and not (k == "dtype" and v is None)}
    out = folder("--out", a.out) if a.out else None
    same = ("split", "limit", "samples", "max_new_tokens", "temperature", "seed", "too_long")
    options = {name: getattr(a, name) for name in same} | {"out": out, "made_with": made_with, "prompt_format": form}
    options["score"] = lambda rows, folder, own: by_scores(rows, a.samples, scorers, folder, own, task.ballots)
    try:
        result = evaluate_model(load(a.model, dtype=a.dtype), task, **options)
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
        console.print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if a.samples:
        show_table(console, "probability to be right with k samples (95% interval over problems)", curve_rows(result))
        gains = result_rows({k: v for k, v in result.items() if k.startswith("gain@")})
        show_table(console, "differences on the same samples, paired over problems", gains)
    if page:
        console.print(f"curves: {page}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _scorers(flags: list[str], task: Any, dtype: str | None) -> dict[str, Any]:
    from qstar.methods.verifier import SCORES, Verifier
    from qstar.models.model import load

    out: dict[str, Any] = {}
    for flag in flags:
        name, equals, folder = flag.partition("=")
        # Only a known score after the last colon is a rule: paths may contain colons.
        folder, _, rule = folder.rpartition(":") if folder.rpartition(":")[2] in SCORES else (folder, "", "")
        if not equals or not re.fullmatch(r"\w+", name) or name in ("generator", *out):
            raise UserError(f"evaluate: --verifier={flag} must be NAME=DIR, each NAME once and not 'generator'")
        out[name] = Verifier(load(folder, dtype=dtype), rule, steps=task.steps)
        _ = out[name].rule  # raises, before anything is sampled, if the score does not fit the model
    return out


def _evaluate_harness(a: argparse.Namespace) -> int:
    out = folder("--out", a.out) if a.out else None
    from qstar.methods.harness import evaluate_harness, tables, write_results
    from qstar.runs.folder import end_run, open_run

    where = {name: getattr(a, name) for name in ("limit", "num_fewshot", "include_path", "chat")}
    thoughts = {"auto": None, "on": True, "off": False}[a.thoughts]
    how = {"thoughts": thoughts, "thought_temperature": a.thought_temperature, "seed": a.seed, "dtype": a.dtype}
    how["max_gen_toks"] = a.max_new_tokens
    if out is not None:
        # Before the work: a folder of other results is refused, and one that cannot be written.
        open_run(out, {"model": a.model, "harness": a.harness, **where, **how}, "--out")
    found = evaluate_harness(a.model, a.harness.split(","), **where, **how)
    names = ("results", "groups", "n-shot", "n-samples", "versions")
    print(json.dumps({k: found[k] for k in names if k in found}) if a.json else tables(found), flush=True)
    if out is not None:
        write_results(found, out)
        end_run(out)
    return 0


def _evaluate_quiet(a: argparse.Namespace) -> int:
    # Zero-shot expected accuracy and cot-majority of the Quiet-STaR paper. Neither keeps answers or shortens prompts.
    from rich.console import Console

    from qstar.methods.quiet_eval import expected_accuracy, zero_shot_cot
    from qstar.models.model import load
    from qstar.runs.evaluate import result_rows
    from qstar.tasks import make_task
    from qstar.train.metrics import show_table

    task = make_task(a.task, **a.task_options)
    task.problems(a.split)  # reports a fault in the data before the model is read
    model = load(a.model, dtype=a.dtype)
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
