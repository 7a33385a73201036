"""CommonsenseQA (1811.00937): five choices, one right, as STaR uses it (2203.14465, section 4.3)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qstar.tasks.answer_parsing import final_letter
from qstar.tasks.base import BUILT_IN, DatasetTask, Problem, ZeroShot

_STRICT = re.compile(r"\(([a-e])\)\.?", re.IGNORECASE)


@dataclass(kw_only=True, eq=False)
class CommonsenseQA(DatasetTask):
    """Stem, lettered choices, and a rationale that ends "Therefore, the answer is blotter (e)."

    As in the papers the scores are on the development rows ("test" here; the real test set has no labels),
    and "val" is carved out of train, so nothing is ever selected on the rows that are reported.

    Options:
        direct: answer "(e)." without a rationale.
        strict: read the last "(x)", not the last statement of an answer (`answer_parsing.final_letter`). The release reads
            the third character from the end.
    """

    direct: bool = False
    strict: bool = False

    name = "commonsense_qa"
    default_source = "tau/commonsense_qa"
    test_split = "validation"
    fields = ("question", "answerKey")

    def __post_init__(self) -> None:
        super().__post_init__()
        # The built-in examples are for chat models, whose answers may have paragraphs.
        paragraphs = self.prompts == BUILT_IN and not self.strict
        self.stop = ("\nQ:",) if paragraphs else ("\n\n", "\nQ:")

    def few_shot_files(self) -> tuple[str, ...]:
        base = "commonsenseqa_prompts_direct" if self.direct else "commonsenseqa_prompts"
        return f"{base}.txt", f"{base}_answer_key.txt"

    def to_problem(self, record: dict) -> Problem:
        stem, choices = _stem_and_choices(record)
        gold = str(record["answerKey"]).lower()
        if gold not in choices:
            raise ValueError(
                f"answerKey {record['answerKey']!r} is none of the choices {', '.join(choices)} "
                "(the published test split has no labels and cannot be scored)"
            )
        solution = f" ({gold})." if self.direct else record.get("rationale")
        return Problem(record.get("id") or "", stem, gold, solution, group=self.name, meta={"choices": choices})

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        lines = [f"Q: {problem.question}", "Answer Choices:"]
        for label, text in problem.meta["choices"].items():
            mark = " (CORRECT)" if hint and label == problem.gold else ""
            lines.append(f"({label}) {text}{mark}")
        return "\n".join([*lines, "A:"])

    def zero_shot(self, problem: Problem) -> ZeroShot:
        """As Quiet-STaR's official code: the letter and the end of the line count."""
        choices = [f"({label.upper()}) {text}" for label, text in problem.meta["choices"].items()]
        prompt = "\n".join([f"Q: {problem.question}", *choices, "A:"])
        return ZeroShot(prompt, f" {problem.gold.upper()}\n", ("A", "B", "C", "D", "E", "\n"))

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
            return final_letter(text)
        found = list(_STRICT.finditer(text))
        return (found[-1][1].lower(), found[-1].end()) if found else None


def _stem_and_choices(record: dict) -> tuple[str, dict[str, str]]:
    """The stem and {"a": text, ..} of both published shapes: the hub's columns and the original question object."""
    question = record["question"]
    try:
        if isinstance(question, dict):  # {"stem", "choices": [{"label", "text"}, ..]}
            stem = question["stem"]
            pairs = [(choice["label"], choice["text"]) for choice in question["choices"]]
        else:  # choices: {"label": [..], "text": [..]}
            stem = question
            pairs = list(zip(record["choices"]["label"], record["choices"]["text"], strict=True))
    except (KeyError, TypeError) as error:
        raise ValueError(
            "neither the hub's columns (question, choices.label, choices.text) nor the original "
            f"shape (question.stem, question.choices): {error!r}"
        ) from error
    if not isinstance(stem, str):
        raise ValueError(f"the question is of type {type(stem).__name__}, not text")
    choices = {str(label).lower(): text for label, text in pairs}
    if not choices or len(choices) != len(pairs) or not set(choices) <= set("abcde"):
        raise ValueError(f"choices are labelled {[label for label, _ in pairs]}; each of A to E once is expected")
    return stem, choices
