"""Tasks by options alone: `numeric`, `multiple_choice` and `exact`, whose fields, patterns and splits are named in options.

    qstar evaluate --task=numeric --task-options='{"test": "SVAMP.json", "question": "Body Question", "answer": "Answer"}'

`ready_made` holds the options of published data sets; `fields` reads the records.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from qstar.errors import UserError, bounded
from qstar.tasks import answer_text, fields
from qstar.tasks.answer_parsing import MARK, YES_NO, final_letter, final_number, final_phrases, final_yes_no, number
from qstar.tasks.answer_text import CHARACTERS, DIGITS, LONGEST
from qstar.tasks.base import BUILT_IN, DatasetTask, Problem, ZeroShot, leak_marker, stable_rng

_INTEGER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*")
_NUMBER = re.compile(rf"(?<![0-9.,])-?{DIGITS}")
# A number or unknown joined by an operator to another or to a bracket: what a rationale must contain before
# it may state its result. A hyphen before a word ("a 120-page book") is not one.
_STEP = re.compile(
    rf"(?:{DIGITS}|\b[A-Za-z])[%)]*(?:\s+[A-Za-z]+){{0,3}}\s*"
    r"(?:[-+*/x×÷]\s*[($]*(?:-?\.?[0-9]|[A-Za-z]\b)|\()"
)
_ARTICLE = re.compile(r"^(?:the|an?) (?=\S)")
_OUTER = " .,;:!?\"'`\u201c\u201d\u2018\u2019"
# The mark of a heading or list; brackets, but not those of an interval; the $ that ends a formula. "- 5", "- x" are numbers.
_WRAPPED = re.compile(r"(?:#{2,} ?|[#•] |- (?=[^\W\d_]{2,}(?!\S)))?(?:\(([^(),;]+)\)|\[([^][,;]+)\]|\$?([^$]+)\$|(.+))")
_WORD = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
# Few-shot files of STaR's release, without and with hints; those of `direct` have no rationales.
_RELEASE = {"gsm8k": "gsm_prompts", "commonsense_qa": "commonsenseqa_prompts"}
# Options that read the worked examples that come with qstar.
_SHIPPED: dict[str, Any] = {
    "question": "question", "question_pattern": "", "answer": "answer", "answer_pattern": "", "rationale": "rationale",
    "context": "context|", "context_limit": 0, "id": "", "group": "", "choices": "choices", "choices_pattern": "",
    "answer_as": "label", "max_choices": 26, "shuffle": False, "fields": (),
}  # fmt: skip


@dataclass(kw_only=True, eq=False)
class FieldsTask(DatasetTask):
    """A data set whose records are read as the options say; paths and templates are those of `fields`.

    Options:
        question: field, several fields joined by a space ("Body Question"), or a template ("{Body} {Question}").
        answer: the same for the gold answer.
        question_pattern, answer_pattern: regular expression; its last match (the first group if it has one) is taken.
        rationale: a gold rationale, "" for none; the statement of the answer is added where it has none.
        context: field whose text, or list of texts, stands before the question, a line each.
        context_limit: number of these texts.
        id, group: fields with the problem's name and the key by which accuracies are broken down.
        name: of the task, in ids and tables.
        strict: read answers as the papers do, not as instruction-tuned models write them.
    """

    question: str = "question"
    question_pattern: str = ""
    answer: str = "answer"
    answer_pattern: str = ""
    rationale: str = ""
    context: str = ""
    context_limit: int = bounded(0, ge=0, note="0 is all")
    id: str = "id|"
    group: str = ""
    name: str = ""
    strict: bool = False

    _examples_of = ""  # the data set whose worked examples stand for those of the kind

    def __post_init__(self) -> None:
        self.WHERE = f"{self.name}: "  # type: ignore[misc]  # a class for many data sets
        super().__post_init__()
        for option, pattern in vars(self).items():
            if option.endswith("_pattern"):
                try:
                    re.compile(pattern)
                except re.error as e:
                    raise UserError(f"{self.WHERE}{option}={pattern!r} is no regular expression ({e})") from None
        # The built-in examples are for instruction-tuned models, whose answers may have paragraphs.
        paragraphs = self.prompts == BUILT_IN and not self.strict
        self.stop = ("\nQ:",) if paragraphs or isinstance(self, Numeric) else ("\n\n", "\nQ:")

    def examples(self) -> list[Problem]:
        """Those of the data set, else of its kind: records of one shape, whatever the fields of the data are."""
        if self._examples is None:
            names = {field.name for field in dataclasses.fields(self)}
            reader = dataclasses.replace(self, prompts=None, **{k: v for k, v in _SHIPPED.items() if k in names})
            # A user's own reader is for the records of his own data.
            own = type(self).to_problem.__module__ != __name__
            self._examples = [] if own else reader._shipped(self.name) or reader._shipped(self._examples_of)
        return self._examples

    def few_shot_files(self) -> tuple[str, ...]:
        base = _RELEASE.get(self.name)
        return (f"{base}.txt", f"{base}_answer_key.txt") if base else ()

    def to_problem(self, record: dict) -> Problem:
        gold, written, meta = self.read_answer(record)
        rationale = fields.text(record, self.rationale, fields.ANY).rstrip() if self.rationale else ""
        if not (question := self._field(record, self.question, self.question_pattern)):
            raise ValueError(f"field {self.question!r} is blank")
        context = fields.value(record, self.context) if self.context else None
        lines = [" ".join(str(c).split()) for c in (context if isinstance(context, list) else [context]) if c]
        return Problem(
            id=fields.text(record, self.id, fields.ANY) if self.id else "",
            question=question,
            gold=gold,
            solution=self.gold_solution(rationale, gold, written),
            group=fields.text(record, self.group, fields.ANY) if self.group else self.name,
            meta={"written": written, "answer": rationale or written, "context": lines, **meta},
        )

    def read_answer(self, record: dict) -> tuple[str, str, dict[str, Any]]:
        """The gold answer as `parse` returns it and as it is written, and further entries of `Problem.meta`."""
        raise NotImplementedError

    def gold_solution(self, rationale: str, gold: str, written: str) -> str | None:
        """The rationale as a completion that states the answer; None without a rationale."""
        raise NotImplementedError

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        context = "".join(f"{line}\n" for line in problem.meta["context"][: self.context_limit or None])
        return f"{context}Q: {problem.question}{f' ({self.hint_text(problem)})' if hint else ''}\nA:"

    def hint_text(self, problem: Problem) -> str:
        return problem.meta["written"]

    def _field(self, record: dict, spec: str, pattern: str, kinds: tuple[type, ...] = (str,)) -> str:
        found = fields.text(record, spec, (str,) if pattern else kinds)
        return fields.matched(found, pattern, spec).strip() if pattern else found.strip()


@dataclass(kw_only=True, eq=False)
class Numeric(FieldsTask):
    """A question with a number as its answer, which completions give as GSM8K (2110.14168): ``#### 72``.

    The answer is read by `answer_parsing.final_number` and compared as an exact fraction.

    Options:
        tolerance: difference that still counts as right.
        hint: "answer" or "solution". STaR's release appends the whole human solution as the hint while its hinted
            few-shot file shows only " (72)"; the default agrees with the file.
        strict: read answers as the STaR release: the first line with ``####``, compared letter by letter in lower case.
    """

    tolerance: float = bounded(0.0, ge=0)
    hint: str = bounded("answer", choices=("answer", "solution"))

    name: str = "numeric"
    instruction = "Solve the problem step by step. Then write the final number in a last line, after the sign ####."
    _examples_of = "gsm8k"

    def read_answer(self, record: dict) -> tuple[str, str, dict[str, Any]]:
        written = self._field(record, self.answer, self.answer_pattern, fields.ANY)
        gold = written.lower() if self.strict else _normal_number(written)
        if not gold:
            raise ValueError(f"field {self.answer!r} ends in {written[-60:]!r}, which is not a number")
        return gold, written, {}

    def gold_solution(self, rationale: str, gold: str, written: str) -> str | None:
        end = "" if MARK in rationale.rpartition("\n")[2] else f"\n{MARK} {written}"
        return _after_prompt(rationale) + end if rationale else None

    def hint_text(self, problem: Problem) -> str:
        return problem.meta["written"] if self.hint == "answer" else problem.meta["answer"].strip()

    def zero_shot(self, problem: Problem) -> ZeroShot:
        """As Quiet-STaR's official code: digits and the end of the line count; commas, points and signs do not."""
        return ZeroShot(self.prompt(problem), f" {problem.meta['written']}\n", tuple("0123456789\n"))

    def step_by_step(self, problem: Problem) -> tuple[str, str]:
        """As Quiet-STaR's official code (Kojima et al., 2205.11916)."""
        prompt = f"{self.prompt(problem)} Let's think step by step."
        return prompt, "\nTherefore, the answer (arabic numerals) is"

    def parse_closing(self, completion: str) -> str | None:
        found = _INTEGER.search(completion.translate(CHARACTERS))
        return _normal_number(found[0]) if found and len(found[0]) <= LONGEST else None

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
        said, gold = number(answer), number(problem.gold)
        return said is not None and gold is not None and abs(said - gold) <= self.tolerance

    def leak(self, problem: Problem, completion: str) -> str | None:
        """Besides the hint markers: the answer stands before the first two numbers joined by an operator."""
        if marker := leak_marker(completion, problem.question):
            return marker
        rationale = super().cut(completion).partition(MARK)[0].translate(CHARACTERS)
        step = _STEP.search(rationale)
        # A number of the question may be quoted at any time.
        given = {number(match) for match in _NUMBER.findall(problem.question)}
        gold = number(problem.gold)
        early = [number(match) for match in _NUMBER.findall(rationale[: step.start()] if step else rationale)]
        return "states the answer before computing anything" if gold in early and gold not in given else None


@dataclass(kw_only=True, eq=False)
class MultipleChoice(FieldsTask):
    """A question with lettered choices: `Problem.meta["choices"]` is {"a": text, ..}, `gold` a letter.

    Prompts and hints are those of STaR on CommonsenseQA (2203.14465, section 4.3); a rationale ends "Therefore, the answer
    is blotter (e)."

    Options:
        choices: see `fields.choices`; choices_pattern: finds them in a text.
        answer_as: what the answer is: "label", "index" (from 0), "text" of a choice, or "auto", the first that fits.
        max_choices: the most that a question may have.
        shuffle: put the choices into a random order, the same in every run (where the right one always stands first).
        direct: answer "(e)." without a rationale.
        strict: read the last "(x)", not the last statement of an answer (`answer_parsing.final_letter`).
    """

    choices: str = "choices"
    choices_pattern: str = ""
    answer_as: str = bounded("auto", choices=("auto", "label", "index", "text"))
    max_choices: int = bounded(5, ge=2, le=26)
    shuffle: bool = False
    direct: bool = False

    name: str = "multiple_choice"
    _examples_of = "arc_easy"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.last_letter = chr(ord("a") + self.max_choices - 1)
        # Without an example of an answer: small models copy its letter.
        letter = "the letter of the right choice in brackets"
        reason = 'Explain in one or two sentences. Then finish with the words "Therefore, the answer is" and'
        self.instruction = f"Answer with {letter} alone." if self.direct else f"{reason} {letter}."

    def few_shot_files(self) -> tuple[str, ...]:
        files = super().few_shot_files()
        return tuple(f.replace("_prompts", "_prompts_direct") for f in files) if self.direct else files

    def read_answer(self, record: dict) -> tuple[str, str, dict[str, Any]]:
        pairs = fields.choices(record, self.choices, self.choices_pattern)
        if len(pairs) > self.max_choices:
            raise ValueError(f"field {self.choices!r} has {len(pairs)} choices, above max_choices={self.max_choices}")
        plain = not self.answer_pattern and "{" not in self.answer
        answer = fields.value(record, self.answer) if plain else self._field(record, self.answer, self.answer_pattern)
        at = fields.chosen(answer, pairs, self.answer_as, self.answer)
        order = list(range(len(pairs)))
        if self.shuffle:
            stable_rng(self.name, *(text for _, text in pairs)).shuffle(order)
        # STaR's few-shot files write (a) to (e), whatever the labels of the data are.
        texts = {chr(ord("a") + i): pairs[old][1] for i, old in enumerate(order)}
        gold = chr(ord("a") + order.index(at))
        return gold, f"{texts[gold]} ({gold})", {"choices": texts}

    def gold_solution(self, rationale: str, gold: str, written: str) -> str | None:
        if self.direct:
            return f" ({gold})."
        end = "" if f"({gold})" in rationale.rpartition("\n")[2] else f" Therefore, the answer is {written}."
        return _after_prompt(rationale) + end if rationale else None

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        # STaR's hint marks the right choice where it stands; `leak_marker` finds it in copied text.
        mark = {problem.gold: " (CORRECT)"} if hint else {}
        lines = [f"({label}) {text}{mark.get(label, '')}" for label, text in problem.meta["choices"].items()]
        return "\n".join([super().prompt(problem).removesuffix("\nA:"), "Answer Choices:", *lines, "A:"])

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


@dataclass(kw_only=True, eq=False)
class Exact(FieldsTask):
    """A question with a text as its answer, compared without case, article and punctuation around it.

    A rationale ends "So the answer is yes." A record may hold a list of answers: each is right.

    Options:
        yes_no: the answers are yes and no (true and false count as these); accuracies are broken down by them.
        strict: read what stands behind the last "answer is", or the first line.
    """

    yes_no: bool = False

    name: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._examples_of = "strategy_qa" if self.yes_no else "exact"
        end = "yes or no" if self.yes_no else "the answer in as few words as possible"
        self.instruction = f'Think step by step. Then finish with the words "So the answer is" and {end}.'

    def read_answer(self, record: dict) -> tuple[str, str, dict[str, Any]]:
        is_text = self.answer_pattern or "{" in self.answer
        found = None if is_text else fields.value(record, self.answer)
        if not isinstance(found, list):
            found = [self._field(record, self.answer, self.answer_pattern, fields.ANY)]
        said = [str(answer) for answer in found if answer is not None]
        # Completions lose their markup, so that `__init__` is read as "init".
        plain = [] if self.strict else [answer_text.strip_markup(answer).text for answer in said]
        golds = list(dict.fromkeys(filter(None, map(self._normal, said + plain))))
        if not golds:
            kind = "neither yes nor no" if self.yes_no else "no text"
            raise ValueError(f"field {self.answer!r} is {' '.join(said)[-60:]!r}, {kind}")
        return golds[0], golds[0] if self.yes_no else said[0], {"golds": golds}

    def to_problem(self, record: dict) -> Problem:
        problem = super().to_problem(record)
        # Accuracy for each answer shows a model that always gives the same one.
        return dataclasses.replace(problem, group=problem.gold) if self.yes_no and not self.group else problem

    def gold_solution(self, rationale: str, gold: str, written: str) -> str | None:
        end = "" if f"answer is {written}" in rationale else f" So the answer is {written}."
        return _after_prompt(rationale) + end if rationale else None

    def parse(self, completion: str) -> str | None:
        if self.strict:
            text = self.cut(completion)
            _, stated, tail = text.lower().rpartition("answer is")
            if self.yes_no:
                word = _WORD.search(tail) if stated else _WORD.match(text.strip())
                return YES_NO[word[1].lower()] if word else None
            return self._normal(tail.strip(" :").partition("\n")[0])
        if self.yes_no:
            return final_yes_no(completion)

        def read(part: str) -> str | None:
            # The first line answers where no answer is stated.
            phrases = final_phrases(part, reasoning=True) or final_phrases(part, reasoning=False)
            return next(filter(None, map(self._normal, phrases)), None)

        text, lightly_stripped = (answer_text.strip_markup(completion, light=light).text for light in (False, True))
        found = answer_text.first_found(text, read)
        # The answer may be markup: <html>.
        return found if found or answer_text.BOX in text else answer_text.first_found(lightly_stripped, read)

    def correct(self, problem: Problem, answer: str | None) -> bool:
        return answer is not None and answer in problem.meta["golds"]

    def _normal(self, text: str) -> str | None:
        plain = " ".join(text.translate(CHARACTERS).casefold().split()).strip(_OUTER)
        if self.yes_no:
            return YES_NO.get(plain)
        if not self.strict and (wrapped := _WRAPPED.fullmatch(plain)):
            plain = wrapped[wrapped.lastindex or 0].strip(_OUTER) or plain
        return _ARTICLE.sub("", plain) or None


def _normal_number(text: str) -> str | None:
    value = number(text)
    # An exact fraction has one normal form ("29", "1/2"): votes for 29 and $29.00 count together.
    return None if value is None else str(value)


def _after_prompt(text: str) -> str:
    # Prompts end in "A:" without a space.
    return text if text[:1].isspace() else f" {text}"
