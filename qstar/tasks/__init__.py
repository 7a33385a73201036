"""Tasks: where problems come from and how their answers are judged. No jax here."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import typing
from typing import Any

from qstar.errors import UserError, check_type, unknown
from qstar.tasks.base import DatasetTask, Problem, Task

__all__ = ["DatasetTask", "Problem", "Task", "has_examples", "make_task"]

# Configs name a task by text, so the names have to stand somewhere; each is imported only when asked for.
_TASKS = {
    "arithmetic": ("qstar.tasks.arithmetic", "Arithmetic"),
    "commonsense_qa": ("qstar.tasks.commonsense_qa", "CommonsenseQA"),
    "hotpotqa": ("qstar.tasks.multihop", "HotpotQA"),
    "2wikimultihopqa": ("qstar.tasks.multihop", "TwoWikiMultiHopQA"),
    "strategy_qa": ("qstar.tasks.strategy_qa", "StrategyQA"),
    "gsm8k": ("qstar.tasks.gsm8k", "GSM8K"),
    "humaneval": ("qstar.tasks.humaneval", "HumanEval"),
    "math": ("qstar.tasks.math", "MATH"),
    "mbpp": ("qstar.tasks.mbpp", "MBPP"),
}


def has_examples(name: str) -> bool:
    """Whether a task has worked examples of its own, `prompts="built-in"`."""
    return (pathlib.Path(__file__).with_name("examples") / f"{name}.jsonl").is_file()


def make_task(name: str, **options: Any) -> Task:
    """The task called `name`, with its options.

    Raises:
        UserError: unknown name or option (the known ones are listed), a value of another type or that the
            task refuses.
    """
    if name not in _TASKS:
        raise unknown(f"task {name!r}", name, sorted(_TASKS))
    module, cls = _TASKS[name]
    task = getattr(importlib.import_module(module), cls)
    known = {**inspect.signature(task).parameters, **({} if name == "arithmetic" else {"bad_rows": None})}
    hints = typing.get_type_hints(task.__init__) | {"bad_rows": float}
    for option, value in options.items():
        if option not in known:
            raise unknown(f"task {name!r}: option {option!r}", option, known)
        check_type(f"task {name!r}: option {option}", value, hints.get(option, Any))
    bad_rows = options.pop("bad_rows", task.bad_rows)
    if not 0 <= bad_rows < 1:
        raise UserError(f"task {name!r}: option bad_rows={bad_rows} must be a share of the records, from 0 to below 1")
    made = task(**options)
    made.bad_rows = bad_rows
    return made
