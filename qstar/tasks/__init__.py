"""Tasks: problems, prompts, and how answers are parsed and compared. No jax here."""

from __future__ import annotations

import importlib
import inspect
import typing
from typing import Any

from qstar.errors import check_type, unknown
from qstar.tasks.base import DatasetTask, Problem, Task

__all__ = ["DatasetTask", "Problem", "Task", "make_task"]

# Configs name a task by text; its module is imported only when it is made.
_TASKS = {
    "arithmetic": "arithmetic:Arithmetic",
    "commonsense_qa": "commonsense_qa:CommonsenseQA",
    "hotpotqa": "multihop:HotpotQA",
    "2wikimultihopqa": "multihop:TwoWikiMultiHopQA",
    "strategy_qa": "strategy_qa:StrategyQA",
    "gsm8k": "gsm8k:GSM8K",
    "humaneval": "code:HumanEval",
    "math": "math:MATH",
    "mbpp": "code:MBPP",
}


def make_task(name: str, **options: Any) -> Task:
    """The task called `name`, with its options.

    Raises:
        UserError: unknown name or option (the known ones are listed), a value of another type or that the task refuses.
    """
    if name not in _TASKS:
        raise unknown(f"task {name!r}", name, sorted(_TASKS))
    module, cls = _TASKS[name].split(":")
    task = getattr(importlib.import_module(f"qstar.tasks.{module}"), cls)
    known = inspect.signature(task).parameters
    hints = typing.get_type_hints(task.__init__)
    # A constructor's own TypeError would not list the known options.
    for option, value in options.items():
        if option not in known:
            raise unknown(f"task {name!r}: option {option!r}", option, known)
        check_type(f"task {name!r}: option {option}", value, hints.get(option, Any))
    return task(**options)
