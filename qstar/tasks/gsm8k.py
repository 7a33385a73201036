"""GSM8K (Cobbe et al., 2110.14168): grade-school word problems, as STaR uses them (2203.14465, section 4.4)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qstar.errors import bounded
from qstar.tasks.answer_parsing import MARK, final_number, number
from qstar.tasks.answer_text import DIGITS, LONGEST, MINUS
from qstar.tasks.base import DatasetTask, Problem, ZeroShot, leak_marker, text_field

_INTEGER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*")
_NUMBER = re.compile(rf"(?<![0-9.,])-?{DIGITS}")
# A number or unknown joined by an operator to another or to a bracket: what a rationale must contain before
# it may state its result. A hyphen before a word ("a 120-page book") is not one.
_STEP = re.compile(
    rf"(?:{DIGITS}|\.[0-9]+|\b[A-Za-z])[%)]*(?:\s+[A-Za-z]+){{0,3}}\s*"
    r"(?:[-+*/x×÷]\s*[($]*(?:-?\.?[0-9]|[A-Za-z]\b)|\()"
)


@dataclass(kw_only=True, eq=False)
class GSM8K(DatasetTask):
    """Question, reasoning in lines with ``<<48/2=24>>`` marks, and ``#### 72``.

    The answer is read by `answer_parsing.final_number` and compared as an exact fraction.

    Options:
        hint: "answer" or "solution". The release appends the whole human solution as the hint while its hinted few-shot
            file shows only " (72)"; the default agrees with the file.
        strict: read answers as the STaR release: the first line with ``####``, compared letter by letter in lower case.
    """

    hint: str = bounded("answer", choices=("answer", "solution"))
    strict: bool = False

    name = "gsm8k"
    stop = ("\nQ:",)
    instruction = (
        "Solve the problem step by step. End with a line that holds #### and the number alone, like this: #### 42"
    )
    fields = ("question", "answer")
    default_source = "openai/gsm8k:main"
    prompt_files = ("gsm_prompts.txt", "gsm_prompts_answer_key.txt")

    def to_problem(self, record: dict) -> Problem:
        question, answer = text_field(record, "question"), text_field(record, "answer")
        if MARK not in answer:
            raise ValueError(f"field 'answer' has no '{MARK}' line")
        written = answer.rpartition(MARK)[2].strip()
        gold = written.lower() if self.strict else _normal(written)
        if not gold:
            raise ValueError(f"field 'answer' ends in {written!r}, which is not a number")
        meta = {"written": written, "answer": answer}
        return Problem(id="", question=question, gold=gold, solution=f" {answer}", group=self.name, meta=meta)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        hint_text = problem.meta["written"] if self.hint == "answer" else problem.meta["answer"].strip()
        return f"Q: {problem.question}" + (f" ({hint_text})" if hint else "") + "\nA:"

    def zero_shot(self, problem: Problem) -> ZeroShot:
        """As Quiet-STaR's official code: digits and the end of the line count; commas, points and signs do not."""
        return ZeroShot(self.prompt(problem), f" {problem.meta['written']}\n", tuple("0123456789\n"))

    def step_by_step(self, problem: Problem) -> tuple[str, str]:
        """As Quiet-STaR's official code (Kojima et al., 2205.11916)."""
        prompt = f"{self.prompt(problem)} Let's think step by step."
        return prompt, "\nTherefore, the answer (arabic numerals) is"

    def parse_closing(self, completion: str) -> str | None:
        found = _INTEGER.search(completion.translate(MINUS))
        return _normal(found[0]) if found and len(found[0]) <= LONGEST else None

    def cut(self, completion: str) -> str:
        text = super().cut(completion)
        if not self.strict and (found := final_number(text)):
            return text[: found.end]
        # The release reads the first line with the mark; elsewhere the last one counts.
        at = text.find(MARK) if self.strict else text.rfind(MARK)
        return text if at < 0 else text[:at] + text[at:].partition("\n")[0]

    def parse(self, completion: str) -> str | None:
        text = super().cut(completion)
        if self.strict:
            return text.partition(MARK)[2].partition("\n")[0].rpartition(MARK)[2].strip().lower() or None
        found = final_number(text)
        return str(found.value) if found else None

    def correct(self, problem: Problem, answer: str | None) -> bool:
        if answer is None or self.strict:
            return super().correct(problem, answer)
        return _normal(answer) == problem.gold

    def leak(self, problem: Problem, completion: str) -> str | None:
        """Besides the hint markers: the answer stands before the first two numbers joined by an operator."""
        if marker := leak_marker(completion, problem.question):
            return marker
        rationale = super().cut(completion).partition(MARK)[0].translate(MINUS)
        step = _STEP.search(rationale)
        # A number of the question may be quoted at any time.
        given = {number(match) for match in _NUMBER.findall(problem.question)}
        gold = number(problem.gold)
        early = [number(match) for match in _NUMBER.findall(rationale[: step.start()] if step else rationale)]
        return "states the answer before computing anything" if gold in early and gold not in given else None


def _normal(text: str) -> str | None:
    value = number(text)
    # An exact fraction has one normal form ("29", "1/2"): votes for 29 and $29.00 count together.
    return None if value is None else str(value)
