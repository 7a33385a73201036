"""Multiple choice: base classes of tasks whose answer is one of a few labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from qstar.tasks.answer_parsing import final_letter
from qstar.tasks.base import BUILT_IN, DatasetTask, Problem, ZeroShot


@dataclass(kw_only=True, eq=False)
class ChoiceTask(DatasetTask):
    """A task whose gold answer is a label.

    Options:
        strict: read answers as the papers do, not as instruction-tuned models write them.
    """

    strict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # The built-in examples are for instruction-tuned models, whose answers may have paragraphs.
        paragraphs = self.prompts == BUILT_IN and not self.strict
        self.stop = ("\nQ:",) if paragraphs else ("\n\n", "\nQ:")


@dataclass(kw_only=True, eq=False)
class LetteredChoiceTask(ChoiceTask):
    """A question with lettered choices: `Problem.meta["choices"]` is {"a": text, ..}, `gold` a letter.

    `strict` reads the last "(x)", not the last statement of an answer (`answer_parsing.final_letter`).
    """

    last_letter: ClassVar[str] = "e"

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        lines = [f"Q: {problem.question}", "Answer Choices:"]
        for label, text in problem.meta["choices"].items():
            # STaR's hint marks the right choice where it stands; `leak_marker` finds it in copied text.
            mark = " (CORRECT)" if hint and label == problem.gold else ""
            lines.append(f"({label}) {text}{mark}")
        return "\n".join([*lines, "A:"])

    def zero_shot(self, problem: Problem) -> ZeroShot:
        """As Quiet-STaR's official code: the letter and the end of the line count."""
        choices = [f"({label.upper()}) {text}" for label, text in problem.meta["choices"].items()]
        letters = map(chr, range(ord("A"), ord(self.last_letter.upper()) + 1))
        prompt = "\n".join([f"Q: {problem.question}", *choices, "A:"])
        return ZeroShot(prompt, f" {problem.gold.upper()}\n", (*letters, "\n"))

    def cut(self, completion: str) -> str:
        text = super().cut(completion)
        found = self._final(text)
        return text[: found[1]] if found else text

    def parse(self, completion: str) -> str | None:
        # The last "(x)" may belong to a problem that the model invents; `final_letter` ignores those.
        found = self._final(super().cut(completion) if self.strict else completion)
        return found[0] if found else None

    def _final(self, text: str) -> tuple[str, int] | None:
        if not self.strict:
            return final_letter(text, self.last_letter)
        found = list(re.finditer(rf"\(([a-{self.last_letter}])\)\.?", text, re.IGNORECASE))
        return (found[-1][1].lower(), found[-1].end()) if found else None
