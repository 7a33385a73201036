"""Tasks: where problems come from and how their answers are judged. No jax here."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from qstar.errors import UserError
from qstar.tasks.base import DatasetTask, Problem, Task

__all__ = ["DatasetTask", "Problem", "Task", "make_task"]

# Configs name a task by text, so the names have to stand somewhere; each is imported only when asked for.
_TASKS = {
    "arithmetic": ("qstar.tasks.arithmetic", "Arithmetic"),
    "commonsense_qa": ("qstar.tasks.commonsense_qa", "CommonsenseQA"),
    "gsm8k": ("qstar.tasks.gsm8k", "GSM8K"),
}


def make_task(name: str, **options: Any) -> Task:
    """The task called `name`, with its options.

    Raises:
        UserError: unknown name or option (the known ones are listed), or a value the task refuses.
    """
    if name not in _TASKS:
        raise UserError(f"unknown task {name!r}; known are {', '.join(sorted(_TASKS))}")
    module, cls = _TASKS[name]
    task = getattr(importlib.import_module(module), cls)
    known = inspect.signature(task).parameters
    for option in options:
        if option not in known:
            raise UserError(f"task {name!r} has no option {option!r}; it has {', '.join(known)}")
    return task(**options)
