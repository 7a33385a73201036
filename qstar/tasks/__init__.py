"""Tasks: problems, prompts, and how answers are parsed and compared. No jax here."""

from __future__ import annotations

import copyreg
import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any

from qstar.data.user_code import is_spec, load_object, user_errors
from qstar.errors import UserError, check_type, unknown
from qstar.tasks.base import DatasetTask, Problem, Task
from qstar.tasks.ready_made import READY_MADE

__all__ = ["DatasetTask", "Problem", "Task", "make_task", "task_names"]

# Configs name a task by text; its module is imported only when it is made.
_TASKS = {
    "2wikimultihopqa": "multihop:TwoWikiMultiHopQA",
    "arithmetic": "arithmetic:Arithmetic",
    "exact": "generic:Exact",
    "hotpotqa": "multihop:HotpotQA",
    "humaneval": "code:HumanEval",
    "math": "math:MATH",
    "mbpp": "code:MBPP",
    "multiple_choice": "generic:MultipleChoice",
    "numeric": "generic:Numeric",
}


def task_names() -> list[str]:
    """The names that `make_task` takes, besides the user's own "file.py:Class"."""
    return sorted({*_TASKS, *READY_MADE})


def make_task(name: str, /, **options: Any) -> Task:
    """The task called `name`, or the class "file.py:Class" or "package.module:Class", with its options.

    Raises:
        UserError: unknown name or option (the known ones are listed), a value of another type or that the task refuses;
            a class that is not there, raises, or lacks a method of a task.
    """
    if is_spec(name):
        return _own_task(name, options)
    if name not in task_names():
        raise unknown(f"task {name!r}", name, [*task_names(), "file.py:Class or package.module:Class"])
    kind, preset = READY_MADE.get(name, (name, {}))
    module, cls = _TASKS[kind].split(":")
    task = getattr(importlib.import_module(f"qstar.tasks.{module}"), cls)
    _check_options(name, task, options)
    return task(**{"name": name} | preset | options if name in READY_MADE else options)


def _check_options(name: str, task: type, options: dict[str, Any]) -> None:
    known = inspect.signature(task).parameters
    hints = typing.get_type_hints(vars(task).get("__init__", task.__init__))  # type: ignore[misc]
    # A constructor's own TypeError would not list the known options.
    for option, value in options.items():
        if option not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise unknown(f"task {name!r}: option {option!r}", option, known)
        check_type(f"task {name!r}: option {option}", value, hints.get(option, Any))


def _own_task(spec: str, options: dict[str, Any]) -> Task:
    given = load_object(spec, "task", fits=inspect.isclass, form="a class")
    place, path = spec.rpartition(":")[0], inspect.getsourcefile(given)
    cls = _task_class(given)
    reader = "to_problem" if issubclass(cls, DatasetTask) else "problems"
    missing = [m for m in (reader, "parse") if getattr(cls, m) in (getattr(DatasetTask, m), getattr(Task, m, None))]
    if missing:
        need = "a task has problems(split), or to_problem(record) of a DatasetTask, and parse(completion)"
        where = f"{need} (qstar/tasks/base.py)"
        raise UserError(f"task {spec}: {given.__name__} has no {' and no '.join(missing)}; {where}")
    # A worker process may have another current folder; the class of a file is found by its path alone.
    found = f"{path}:{given.__name__}" if place.endswith(".py") else spec
    copyreg.pickle(cls, lambda task: (_empty, (found,), vars(task)))
    with user_errors(f"task {place}", path):
        _check_options(spec, cls, options)
        task = cls(**options)
    task.name = task.name or given.__name__
    return task


@functools.cache
def _task_class(given: type) -> type[Task]:
    """A subclass whose methods of the user's own raise one-line errors, and which takes from `Task` what it lacks."""
    path = inspect.getsourcefile(given)
    cls = type(given.__name__, (given,) if issubclass(given, Task) else (given, Task), {"__module__": given.__module__})

    def guarded(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(given, name))
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with user_errors(f"task {path}", path):
                return getattr(super(cls, self), name)(*args, **kwargs)

        return call

    # `_problem` reports what `to_problem` raises with the place of the record.
    names = [n for n, method in vars(Task).items() if inspect.isfunction(method) and callable(getattr(given, n, None))]
    for name in names:
        if not str(getattr(getattr(given, name), "__module__", "")).startswith("qstar."):
            setattr(cls, name, guarded(name))
    return cls


def _empty(spec: str) -> Task:
    cls = _task_class(load_object(spec, "task"))
    return cls.__new__(cls)
