"""Prompt formats: a task's problems as chat messages, behind worked examples, or as they are.

    task = formatted(make_task("gsm8k"), tokenizer)     # chat if the tokenizer has a template

In the chat format a problem and the task's instruction are a user's message, worked examples (`shots`) are earlier turns,
and the reply is the completion. The view is a task like any other: methods, packing and records go on with texts.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qstar.errors import Settings, UserError, bounded, check_type, require
from qstar.tasks import make_task
from qstar.tasks.base import Problem, Task
from qstar.text.chat import ChatTemplate, template_of
from qstar.text.tokenizer import Tokenizer

FORMATS = ("auto", "chat", "few_shot", "plain")
_HINTED = (
    "The correct answer is given in brackets with the question. Explain how it is found, step by step, as if you had not "
    "been told it, and end as asked."
)
_THINK = ("<think>", "<thinking>")
# A word that no template changes.
_BODY = "qstarMessageText"


@dataclass(frozen=True)
class PromptFormat(Settings):
    """Options of every task in a config's `task` section and in --task-options.

    Options:
        format: "chat", "few_shot", "plain", or "auto": few_shot where the option `prompts` is given; else chat for a
            tokenizer with a chat template; else few_shot for a task with worked examples; else plain.
        shots: worked examples of a chat.
    """

    format: str = bounded("auto", choices=FORMATS)
    shots: int = bounded(0, ge=0)


def make_prompted(name: str, options: Mapping[str, Any]) -> tuple[Task, PromptFormat]:
    """The task called `name`, and its prompt format, both from a config's options; errors: see `make_task`."""
    own = {key: value for key, value in options.items() if key not in ("format", "shots")}
    task = make_task(name, **own)
    # Some tasks have options of these names, too: `format="boxed"` of MATH, the numbers of MBPP's own `shots`.
    kinds = typing.get_type_hints(type(task).__init__)
    given = {key: options[key] for key in options.keys() - own.keys()}
    ours = {key: value for key, value in given.items() if key not in kinds or _is_ours(key, value, kinds[key])}
    if given != ours:
        task = make_task(name, **own, **{key: value for key, value in given.items() if key not in ours})
    for key, value in ours.items():
        check_type(f"task {name!r}: option {key}", value, str if key == "format" else int)
    return task, PromptFormat(**({"format": "plain"} if own.get("prompts", "") is None else {}) | ours)


def _is_ours(key: str, value: Any, kind: Any) -> bool:
    return value in FORMATS if key == "format" else type(value) is int and kind is not int


def formatted(task: Task, tokenizer: Tokenizer, settings: PromptFormat | None = None) -> Task:
    """A view of the task whose prompts have a format; a view stays as it is.

    Raises:
        UserError: chat without a chat template or with a folder of `prompts`, few_shot without worked examples.
    """
    settings = settings or PromptFormat()
    if isinstance(task, ChatTask):
        return task
    files = getattr(task, "prompts", None) is not None
    format = settings.format
    if format == "auto":
        format = "few_shot" if files else "chat" if tokenizer.chat else "few_shot" if task.examples() else "plain"
    if format != "chat":
        require((not settings.shots, f"shots={settings.shots} are turns of a chat, and the prompt format is {format}"))
        return task.in_format(format)
    require((not files, f"{task.name}: prompts are few-shot text, and format is chat: leave one of them out"))
    return ChatTask(task.in_format("plain"), template_of(tokenizer), settings.shots)


if TYPE_CHECKING:
    _View = Task
else:
    # Attributes of a base class would hide those of the task that a view is of.
    _View = object


class ChatTask(_View):
    """A task in the chat format. What is not defined here is the task's own."""

    # A reply ends with its turn.
    stop: tuple[str, ...] = ()
    # The task's own method would use the task's `opening`, not this object's.
    behind = Task.behind

    def __init__(self, task: Task, template: ChatTemplate, shots: int):
        """`shots`: worked examples in `prefix`. Raises UserError if the template cannot write a user's message."""
        self.task, self.template, self.shots = copy.copy(task), template, shots
        # A reply may have paragraphs, and a blank line often follows </think>; an invented "\nQ:" still ends the text kept.
        self.task.stop = tuple(text for text in task.stop if text.strip())
        found = len(task.examples()) if shots else 0
        require((shots <= found, f"{task.name}: shots={shots}, but the task has {found} worked examples"))
        self.opening, _, self._after = self._around([])
        self.opens_thinking = self._after.rstrip().endswith(_THINK)

    def __getattr__(self, name: str) -> Any:
        # Copies and unpickled objects ask for names before `task` is set.
        if name.startswith("__") or name == "task":
            raise AttributeError(name)
        return getattr(self.task, name)

    def prefix(self, hint: bool = False) -> str:
        if not self.shots:
            return ""
        turns = []
        for example in self.task.examples()[: self.shots]:
            reply = (self.task.solution(example) or "").strip()
            turns += [("user", self._body(example, hint)), ("assistant", reply)]
        return self._around([{"role": role, "content": text} for role, text in turns])[0]

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        return f"{self.opening}{self._body(problem, hint)}{self._after}"

    def solution(self, problem: Problem) -> str | None:
        text = self.task.solution(problem)
        return text if text is None else self.template.turn.lead + text.strip()

    def in_format(self, format: str) -> Task:
        return self

    def drop_example(self) -> bool:
        if self.shots:
            self.shots -= 1
            return True
        return False

    def _around(self, turns: list[dict[str, str]]) -> tuple[str, str, str]:
        # Split where the message stands: the text before it is the same for all problems, and is computed once.
        text = self.template.render([*turns, {"role": "user", "content": _BODY}])
        if text.count(_BODY) != 1:
            raise UserError("the tokenizer's chat template does not write a user's message as it is; use format=plain")
        return text.partition(_BODY)

    def _body(self, problem: Problem, hint: bool) -> str:
        parts = (self.task.message(problem, hint), self.task.instruction, _HINTED if hint else "")
        return "\n\n".join(filter(None, parts))
