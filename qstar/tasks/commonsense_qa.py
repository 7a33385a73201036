"""CommonsenseQA (1811.00937), five choices, one right, as STaR uses it (2203.14465, section 4.3)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qstar.tasks import answers
from qstar.tasks.base import BUILT_IN, DatasetTask, Problem, ZeroShot

_ANSWER = re.compile(r"\(([a-e])\)\.?", re.IGNORECASE)
_BRACKETED = re.compile(r"(?<!not )(?<!n't )[(\[]([a-e])[)\]](?!\s+or\b)", re.IGNORECASE)
_ENDS = r"(?=\s*(?:[.,;:!\"')\n]|$|(?i:because|since|as|is|-)\b))"  # behind a letter that is no article
# A letter at the start of an answer: "E", "option e", "E) blotter", "E. blotter", "E blotter", but not "a blotter".
_LETTER = re.compile(
    rf"[\s\"'{answers.BOX}:]*(?i:(?:most likely|probably|likely|clearly)\s+)?"
    r"(?i:(?:the\s+)?(?:option|choice|letter|answer)\s+)?"
    rf"[\"'(\[]?(?!\w[)\]]?\s+(?:or|and)\b)(?:([A-E])(?:[)\]]|{_ENDS})|([B-E])\b|([a-e])(?:[)\]](?!\.)|[.:]\s+\w|(?=[.!\s\"']*$)))"
)
# Without a statement of an answer: "E is correct", "I choose option E", "Therefore, E.", letters in brackets.
_SAID = tuple(
    map(
        re.compile,
        (
            r"\b([A-E]|(?<=\()[a-e](?=\)))\)?[\"']?\s+is\s+(?:the\s+)?(?:most\s+)?(?:correct|right|best|answer|likely)\b",
            r"(?i:\b(?:option|choice|choose|pick|select|must be|therefore|thus|hence|so)\b,?)\s+\(?([A-E])\b\)?"
            r"(?=\s*(?:[.,;:!]|$))",
        ),
    )
)
_WRONG = re.compile(r"[(\[]?[A-Ea-e][)\]]?[^.\n]{0,40}\s(?:is|are)\s+(?:wrong|incorrect|not|out)\b")


class CommonsenseQA(DatasetTask):
    """Stem, lettered choices, and a rationale that ends "Therefore, the answer is blotter (e)."

    The answer is the letter of the last statement of one ("the answer is blotter (e)", "Answer: E", a box), else the
    letter that the text begins with, else the last "(x)". `strict` is the last "(x)" with x from a to e, not the third
    character from the end as in the release.
    As in the papers the scores are on the development rows ("test" here; the real test set has no labels),
    and "val" is carved out of train, so nothing is ever selected on the rows that are reported.
    """

    name = "commonsense_qa"
    stop = ("\n\n", "\nQ:")
    default_source = "tau/commonsense_qa"
    test_split = "validation"
    fields = ("question", "answerKey")

    def __init__(
        self,
        *,
        train: str | None = None,
        test: str | None = None,
        prompts: str | None = None,
        direct: bool = False,
        strict: bool = False,
    ):
        """`train`, `test`, `prompts` as in `DatasetTask`; `direct` answers "(e)." without a rationale."""
        self.direct, self.strict = direct, strict
        if prompts == BUILT_IN and not strict:
            self.stop = ("\nQ:",)  # an answer may have paragraphs
        base = "commonsenseqa_prompts_direct" if direct else "commonsenseqa_prompts"
        self.prompt_files = (f"{base}.txt", f"{base}_answer_key.txt")
        super().__init__(train=train, test=test, prompts=prompts)

    def to_problem(self, record: dict) -> Problem:
        stem, choices = _stem_and_choices(record)
        gold = str(record["answerKey"]).lower()
        if gold not in choices:
            raise ValueError(
                f"answerKey {record['answerKey']!r} is none of the choices {', '.join(choices)} "
                "(the published test split has no labels and cannot be scored)"
            )
        return Problem(
            id=record.get("id") or "",
            question=stem,
            gold=gold,
            group=self.name,
            solution=f" ({gold})." if self.direct else record.get("rationale"),
            meta={"choices": choices},
        )

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
        if self.strict:
            found = list(_ANSWER.finditer(text))
            return text[: found[-1].end()] if found else text
        read = _read(text)
        return text[: read[1]] if read else text

    def parse(self, completion: str) -> str | None:
        if self.strict:
            found = _ANSWER.findall(super().cut(completion))
            return found[-1].lower() if found else None
        read = _read(completion)
        return read[0] if read else None


def _read(text: str) -> tuple[str, int] | None:
    """The letter that a completion answers with, and where the answer ends there."""
    clean = answers.plain(text)
    for end in answers.ends(clean.text):
        part = clean.text[:end]
        found = _stated(part) or next((m for said in _SAID for m in _last(said, part)), None)
        found = (
            found
            or (_LETTER.match(part) if not _WRONG.match(part.strip()) else None)
            or next(_last(_BRACKETED, part), None)
        )
        if found:
            group = found.lastindex
            return found[group].lower(), clean.original_end(found.end(group), text, more=r")\].")
        for bold in reversed(answers.emphasised(text[: clean.at[end]])):
            if found := _LETTER.match(answers.plain(bold).text):
                return found[found.lastindex].lower(), clean.original_end(len(part.rstrip()), text)
    return None


def _stated(text: str) -> re.Match | None:
    """The letter of the last statement of an answer that holds one."""
    for _, start in reversed(answers.statements(text)):
        end = start + len(answers.sentence_at(text, start))
        if found := _LETTER.match(text, start) or _BRACKETED.search(text, start, end):
            return found
    return None


def _last(pattern: re.Pattern, text: str) -> Iterator[re.Match]:
    return reversed(list(pattern.finditer(text)))


def _stem_and_choices(record: dict) -> tuple[str, dict[str, str]]:
    """Reads both published shapes: the hub's columns and the original question object.

    Returns:
        The stem and {"a": text, ..} in the order given.
    """
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
        labels = [label for label, _ in pairs]
        raise ValueError(f"choices are labelled {labels}; each of A to E once is expected")
    return stem, choices
