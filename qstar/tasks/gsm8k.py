"""Grade-school word problems (Cobbe et al., 2110.14168) as STaR uses them (2203.14465, section 4.4)."""

from __future__ import annotations

import re
from fractions import Fraction

from qstar.errors import UserError
from qstar.tasks import answers
from qstar.tasks.base import DatasetTask, Problem, ZeroShot, leak_marker

MARK = "####"
_LONGEST, _MINUS, _DIGITS = answers.LONGEST, answers.MINUS, answers.DIGITS
_ANSWER = re.compile(
    r"\s*[$€£]?\s*(?P<sign>[-+]?)\s*[$€£]?\s*"
    rf"(?P<number>{_DIGITS}(?:\s*/\s*{_DIGITS})?)"
    r"[^0-9]*"  # units, %, a full stop: anything without another digit, so neither 1e3 nor "5 or 6" passes
)
_MARK = re.compile(r"#{4,}[\s:]*(?:[A-Za-z]{2}[A-Za-z ]{0,40}[:=](?=[^A-Za-z\n]*[0-9]))?\s*")  # "#### Total: 72"
_ENUMERATION = re.compile(r"1?[0-9][.)]\s+[A-Za-z]")  # "#### 2. Add up" is a heading
_INTEGER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*")
_NUMBER = re.compile(rf"(?<![0-9.,])-?{_DIGITS}")
# A number or unknown joined by an operator to another or to a bracket: what a rationale has to have before
# it may state its result. A hyphen before a word ("a 120-page book") is not one.
_STEP = re.compile(
    rf"(?:{_DIGITS}|\.[0-9]+|\b[A-Za-z])[%)]*(?:\s+[A-Za-z]+){{0,3}}\s*"
    r"(?:[-+*/x×÷]\s*[($]*(?:-?\.?[0-9]|[A-Za-z]\b)|\()"
)


def number(text: str) -> Fraction | None:
    """The number that an answer states, or None.

    Accepts $, % and a currency sign, thousands commas, decimals, fractions, a unicode minus, and units or a
    full stop behind the number; refuses exponents, a second number, words in front. Exact: 29 == 29.00.
    """
    match = _ANSWER.fullmatch(text.translate(_MINUS))
    if match is None:
        return None
    return answers.number_of(match)


class GSM8K(DatasetTask):
    """Question, reasoning in lines with ``<<48/2=24>>`` marks, and ``#### 72``.

    The answer is the number behind the last ``####``, in whatever markup; without one, the last number that the
    text states as its answer ("The answer is 72", ``\\boxed{72}``, a bold number in the last line) or consists of. It
    is compared as an exact fraction. `strict` is the STaR release instead: the first line with ``####``, text
    compared letter by letter in lower case.

    The release appends the whole human solution as the hint while its hinted few-shot file shows only
    " (72)"; `hint` chooses, and the default agrees with the file.
    """

    name = "gsm8k"
    stop = ("\nQ:",)
    fields = ("question", "answer")
    default_source = "openai/gsm8k:main"
    prompt_files = ("gsm_prompts.txt", "gsm_prompts_answer_key.txt")

    def __init__(
        self,
        *,
        train: str | None = None,
        test: str | None = None,
        prompts: str | None = None,
        hint: str = "answer",
        strict: bool = False,
    ):
        """`train`, `test`, `prompts` as in `DatasetTask`; `hint` is "answer" or "solution"."""
        if hint not in ("answer", "solution"):
            raise UserError(f"gsm8k: hint={hint!r} is neither 'answer' nor 'solution'")
        super().__init__(train=train, test=test, prompts=prompts)
        self.hint = hint
        self.strict = strict

    def to_problem(self, record: dict) -> Problem:
        question, answer = record["question"], record["answer"]
        for field, text in (("question", question), ("answer", answer)):
            if not isinstance(text, str):
                raise ValueError(f"field {field!r} is of type {type(text).__name__}, not text")
        written = answer.rpartition(MARK)[2].strip()
        if MARK not in answer:
            raise ValueError(f"field 'answer' has no '{MARK}' line")
        gold = written.lower() if self.strict else _normal(written)
        if not gold:
            raise ValueError(f"field 'answer' ends in {written!r}, which is not a number")
        return Problem(
            id="", question=question, gold=gold, solution=" " + answer, group=self.name, meta={"written": written}
        )

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        if not hint:
            return f"Q: {problem.question}\nA:"
        hint_text = problem.meta["written"] if self.hint == "answer" else problem.solution.strip()
        return f"Q: {problem.question} ({hint_text})\nA:"

    def zero_shot(self, problem: Problem) -> ZeroShot:
        """As Quiet-STaR's official code: digits and the end of the line count, commas, points and signs do not."""
        return ZeroShot(f"Q: {problem.question}\nA:", f" {problem.meta['written']}\n", tuple("0123456789\n"))

    def step_by_step(self, problem: Problem) -> tuple[str, str]:
        """As Quiet-STaR's official code (Kojima et al., 2205.11916)."""
        prompt = f"Q: {problem.question}\nA: Let's think step by step."
        return prompt, "\nTherefore, the answer (arabic numerals) is"

    def parse_closing(self, completion: str) -> str | None:
        found = _INTEGER.search(completion.translate(_MINUS))
        return _normal(found[0]) if found and len(found[0]) <= _LONGEST else None

    def cut(self, completion: str) -> str:
        text = super().cut(completion)
        found = None if self.strict else read(text)
        if found is not None:
            return text[: found[1]]
        at = text.find(MARK) if self.strict else text.rfind(MARK)
        return text if at < 0 else text[:at] + text[at:].partition("\n")[0]

    def parse(self, completion: str) -> str | None:
        text = super().cut(completion)
        if self.strict:
            return text.partition(MARK)[2].partition("\n")[0].rpartition(MARK)[2].strip().lower() or None
        found = read(text)
        return str(found[0]) if found else None

    def correct(self, problem: Problem, answer: str | None) -> bool:
        if answer is None or self.strict:
            return super().correct(problem, answer)
        return _normal(answer) == problem.gold

    def leak(self, problem: Problem, completion: str) -> str | None:
        """Besides the hint markers: the answer stands there before anything was computed.

        "Before" is the text up to the first two numbers joined by an operator (all of the rationale when
        there is no such step). A number that the question itself names may be quoted at any time.
        """
        if marker := leak_marker(completion, problem.question):
            return marker
        rationale = super().cut(completion).partition(MARK)[0].translate(_MINUS)
        step = _STEP.search(rationale)
        given = {number(match) for match in _NUMBER.findall(problem.question)}
        gold = number(problem.gold)
        early = [number(match) for match in _NUMBER.findall(rationale[: step.start()] if step else rationale)]
        return "states the answer before computing anything" if gold in early and gold not in given else None


def read(text: str) -> tuple[Fraction, int] | None:
    """The answer of a completion and where it ends there; see `GSM8K` for what counts as one."""
    clean = answers.plain(text)
    for end in answers.ends(clean.text):
        part = clean.text[:end]
        marks = [mark.end() for mark in _MARK.finditer(part)]
        found, unreadable = _marked(part, marks)
        if found is None and not unreadable:
            stated = (answers.number_at(part, at, words=True) for _, at in reversed(answers.statements(part)))
            found = next(filter(None, stated), None) or _enumerated(part, marks)
        if found is not None:
            return found.value, clean.original_end(found.end, text)
        if unreadable:
            return None
        if (value := _implied(part, text[: clean.at[end]])) is not None:
            return value, clean.original_end(len(part.rstrip()), text)
    return None


def _implied(part: str, original: str) -> Fraction | None:
    """The number in bold in the last line, that of a concluding sentence, or that which is all of the text."""
    for piece in reversed(answers.emphasised(original)):
        if found := answers.number_at(answers.plain(piece).text, 0, words=True):
            return found.value
    found = next((answers.number_at(part, at, words=True) for at in answers.concluded(part)), None)
    return found.value if found else number(part)


def _marked(text: str, marks: list[int]) -> tuple[answers.Found | None, bool]:
    """The number behind the last mark that is none of a heading, and whether there is one that cannot be read."""
    for at in reversed(marks):
        line, found = answers.line_at(text, at), answers.number_at(text, at)
        if found and not _ENUMERATION.match(line):
            return found, False
        if not found and not line[:1].isalpha():
            return None, True
        for start, tail in answers.statements(text):  # "#### Final answer: 72"
            if at <= start <= at + len(line) and (found := answers.number_at(text, tail, words=True)):
                return found, False
    return None, False


def _enumerated(text: str, marks: list[int]) -> answers.Found | None:
    """The number of the last mark where that looks like a numbered heading, and no other answer is stated."""
    return next(filter(None, (answers.number_at(text, at) for at in reversed(marks))), None)


def _normal(text: str) -> str | None:
    """A number in its one normal form ("29", "1/2"), so that votes for 29 and $29.00 count together."""
    value = number(text)
    return None if value is None else str(value)
