"""Functions for programs and notebooks: fine-tuning, preferences, distillation and evaluation in one call each.

model, summary = qstar.fine_tune("owner/name", [{"prompt": "2+3=", "completion": "5"}], steps=20, lora_rank=8)

They run the methods `sft`, `dpo` and `distil` of `qstar train` in `workdir`, or in a temporary folder: a call that was
interrupted continues in its `workdir`, and one with other rows or options is refused there.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from qstar import methods
from qstar.distributed import is_first
from qstar.errors import require, unknown
from qstar.files import as_path
from qstar.methods.pairs import CONTEXTS
from qstar.models.model import Model, load
from qstar.runs.access import unlock
from qstar.runs.evaluate import evaluate_model
from qstar.runs.folder import data_hash, norm_and_sum
from qstar.tasks import Task
from qstar.tasks.prompts import PromptFormat, make_prompted

AnyModel = Model | str | os.PathLike
Rows = Iterable[Mapping[str, Any]] | str | os.PathLike
Result = tuple[Model, dict[str, Any]]


def fine_tune(model: AnyModel, pairs: Rows, *, workdir: str | os.PathLike | None = None, **options: Any) -> Result:
    """Fine-tunes a copy of a model on prompts with completions, or on conversations.

    Args:
      model: a Model, a folder or a name on the hub.
      pairs: dicts {"prompt", "completion"} or {"messages"}, or a file or hub data set of them; see `data.pairs`. Texts are
        taken as they are, messages are written in the model's chat template; the loss is on what the assistant says.
      workdir: run folder, with checkpoints, metrics and completions; None: a temporary one.
      options: fields of `methods.pairs.SFTTrain`, most of all steps or epochs (1), batch_size (8), lr (1e-5; with LoRA
        2e-4) and lora_rank (0: all parameters train); also seed (0), held_out (share of the rows, 0), examples (held-out
        prompts to complete, 0) and quiet (False).

    Returns:
      The new model, with float32 parameters, or with LoRA in the dtype of the old one (adapters are float32 and merged);
      and the numbers of rows and updates with the last and the held-out losses.

    Raises:
      UserError: a faulty row (named), an unknown option, rows longer than the context, or a `workdir` of another run.
    """
    return _train("sft", model, pairs, workdir, options)


def prefer(model: AnyModel, preferences: Rows, *, workdir: str | os.PathLike | None = None, **options: Any) -> Result:
    """Trains a copy of a model by DPO (arXiv 2305.18290) on preferences; the reference is the model itself.

    Args:
      preferences: dicts {"prompt", "chosen", "rejected"}, or a file or hub data set of them.
      options: as of `fine_tune`, and fields of `methods.pairs.DPOTrain`: beta (0.1), alpha (0); lr is 1e-6, with LoRA 2e-5.

    Otherwise as `fine_tune`.
    """
    return _train("dpo", model, preferences, workdir, options)


def distil(
    student: AnyModel, teacher: AnyModel, rows: Rows, *, workdir: str | os.PathLike | None = None, **options: Any
) -> Result:
    """Trains a copy of `student` towards a teacher's predictions.

    Args:
      rows: dicts {"prompt"}, of which some may have a "completion" (the teacher writes the missing ones), or texts, the
        prompts themselves; or a file or hub data set.
      options: as of `fine_tune` (no LoRA), and fields of `train.distil.DistilSettings`: kind ("forward_kl"), on_policy (0);
        max_new_tokens (256) and temperature (0: greedy) of what the teacher writes, softmax_temperature (1) of the loss.

    Otherwise as `fine_tune`. Raises UserError also for a soft loss between different vocabularies.
    """
    if isinstance(rows, Iterable) and not isinstance(rows, str):
        rows = [{"prompt": x} if isinstance(x, str) else x for x in rows]
    return _train("distil", student, rows, workdir, options, teacher)


def evaluate(
    model: AnyModel, task: Task | str, *, workdir: str | os.PathLike | None = None, **options: Any
) -> dict[str, Any]:
    """Measures a model on a task: greedy accuracy, and from samples pass@k and majority@k, with 95% intervals.

    Args:
      task: a Task, or the name of one.
      workdir: keeps the answers as JSONL; a second call only counts them.
      options: task_options ({}, what the task of this name is made with), format ("auto": chat for a model with a chat
        template, else worked examples; or "chat", "few_shot", "plain"), shots (0, worked examples of a chat); and those of
        `runs.evaluate.evaluate_model`: split ("test"), limit (0: all), samples (0), max_new_tokens (256), temperature
        (0.7, of the samples), seed (0), too_long ("error").

    Returns:
      The metrics by name: accuracy, accuracy_low, accuracy_high, answered, truncation_rate, pass@k ...
    """
    what = {"task": str(getattr(task, "name", task)), **options}
    task_options = dict(options.pop("task_options", {}))
    how: dict[str, Any] = {key: options.pop(key) for key in ("format", "shots") if key in options}
    if isinstance(task, str):
        require((not how.keys() & task_options.keys(), "evaluate: task_options has format or shots; leave one out"))
        task, prompt_format = make_prompted(task, {**task_options, **how})
    else:
        prompt_format = PromptFormat(**how)
    known = inspect.signature(evaluate_model).parameters.keys() - {"model", "task", "out", "made_with", "prompt_format"}
    for name in options.keys() - known:
        raise unknown(f"evaluate: option {name!r}", name, sorted(known | {"task_options", "format", "shots"}))
    options["prompt_format"] = prompt_format
    if workdir is None:
        return evaluate_model(_loaded(model), task, **options)
    out = as_path(workdir)
    made_with = {"model": _rounded(model) if isinstance(model, Model) else os.fspath(model), **what}
    try:
        return evaluate_model(_loaded(model), task, out=out, made_with=made_with, **options)
    finally:
        unlock(out)


def _loaded(model: AnyModel) -> Model:
    return model if isinstance(model, Model) else load(model)


# Options of a call that are keys of other sections than `train`: name -> (section, key).
_ELSEWHERE = {
    **{name: ("data", name) for name in ("held_out", "limit", "bad_rows", "split")},
    "examples": ("evaluate", "examples"),
}
_OF_DISTIL = {
    **{name: ("distil", name) for name in ("kind", "beta", "soft_share", "on_policy")},
    "softmax_temperature": ("distil", "temperature"),
    **{name: ("sample", name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")},
}
_RATES = {"sft": (1e-5, 2e-4), "dpo": (1e-6, 2e-5), "distil": (1e-5, 1e-5)}  # of all parameters, of adapters
_NAMES = {"sft": "fine_tune", "dpo": "prefer", "distil": "distil"}


def _train(
    method: str,
    model: AnyModel,
    rows: Rows,
    workdir: str | os.PathLike | None,
    options: dict[str, Any],
    teacher: AnyModel | None = None,
) -> Result:
    elsewhere = _ELSEWHERE | (_OF_DISTIL if method == "distil" else {})
    fields = set(CONTEXTS[method].TRAIN.__dataclass_fields__)
    config: dict[str, Any] = {"method": method, "name": method, "arms": {method: {}}, "evaluate": {"examples": 0}}
    config |= {"seed": options.pop("seed", 0), "mesh": options.pop("mesh", "data=1,fsdp=-1"), "data": {"held_out": 0.0}}
    quiet = options.pop("quiet", False)
    train: dict[str, Any] = {}
    for name, value in options.items():
        if name not in fields | elsewhere.keys():
            raise unknown(f"{_NAMES[method]}: option {name!r}", name, sorted(fields | elsewhere.keys()))
        section, key = elsewhere.get(name, ("", name))
        (config.setdefault(section, {}) if section else train)[key] = value
    train.setdefault("lr", _RATES[method][bool(train.get("lora_rank"))])
    given: dict[str, Any] = {}
    for section, some in {"model": model, **({"teacher": teacher} if teacher is not None else {})}.items():
        config[section] = {"path": "" if isinstance(some, Model) else os.fspath(some)}
        if isinstance(some, Model):
            given["start" if section == "model" else "teacher"] = some
            # The start model has no fingerprint here: its stage compares the parameters, with a tolerance.
            config[section] = {"path": ""} if section == "model" else {"fingerprint": _rounded(some)}
    if isinstance(rows, str | os.PathLike):
        config["data"]["source"] = os.fspath(rows)
    else:
        found = rows if isinstance(rows, Iterable) else [rows]
        given["rows"] = [dict(x) if isinstance(x, Mapping) else x for x in found]
        config["data"]["source"] = f"{len(given['rows'])} rows, {data_hash(given['rows'])}"
    with tempfile.TemporaryDirectory() if workdir is None else contextlib.nullcontext(workdir) as folder:
        console = Console(quiet=quiet or not is_first())
        return methods.run(ConfigDict({**config, "train": train}), as_path(folder), console, **given)


def _rounded(model: Model) -> list[float]:
    # Sums of floats differ between machines.
    return [float(f"{x:.4g}") for x in norm_and_sum(model.params)]
