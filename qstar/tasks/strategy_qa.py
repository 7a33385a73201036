"""StrategyQA (2101.02235): yes or no, where the steps that lead there are not in the question."""

from __future__ import annotations

import re

from qstar.errors import UserError
from qstar.tasks import answers
from qstar.tasks.base import BUILT_IN, DatasetTask, Problem

_WORD = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
# "no" before a noun ("no proof") is no answer, nor is "yes and no".
_VERDICT = (
    r"(?:(?P<not>not)\s+)?\b(?P<verdict>yes|true|false|no)\b(?!\s+(?:and|or)\s+(?:yes|no|true|false)\b)"
    r"(?:(?<!no)|(?=\W*$|\s*[.,;:!)\"'\n-]|\s+(?:because|since|as|for|it|they|he|she|this|that|these|those|there|you|we|the|but"
    r"|so|if|in|unless|while|although|not|thus|therefore)\b))"
)
_ANSWER = re.compile(
    rf"[\s\"'(:{answers.BOX}]*(?:(?:that|it is|an?|most|very|likely|probably|clearly|definite(?:ly)?|simply|clear)\s+)*"
    + _VERDICT,
    re.IGNORECASE,
)
# Without a statement of an answer: a sentence that begins with one, what follows from the rest, what is said of a statement.
_SAID = tuple(
    re.compile(before + _VERDICT, re.IGNORECASE | re.MULTILINE)
    for before in (
        r"(?:^|[.!?]\s)[\s\"'(]*(?=(?:yes|no)\b|(?:true|false)\s*(?:[.,;:!]|$))",
        r"\b(?:so|thus|therefore|hence|in conclusion|overall)\b[\s,:]*",
        r"\b(?:statement|claim|that|this|it)\s+is\s+(?:(?:definitely|clearly)\s+)?(?=(?:not\s+)?(?:true|false)\b)",
    )
)
_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


class StrategyQA(DatasetTask):
    """The solution is the record's facts and "So the answer is yes."

    The answer is the last statement of one that is yes, no, true or false ("not yes" is no), else the last sentence that
    says so. `strict` takes the first of these words behind the last "answer is", or at the start.
    """

    name = "strategy_qa"
    stop = ("\n\n", "\nQ:")
    default_source = "ChilleD/StrategyQA"
    fields = ("question", "answer")

    def __init__(
        self,
        *,
        train: str | None = None,
        test: str | None = None,
        prompts: str | None = None,
        facts: bool = False,
        limit: int = 0,
        strict: bool = False,
    ):
        """`train`, `test` as in `DatasetTask`; `prompts` is "built-in" or None; `facts` puts the first `limit` facts (0: all)
        before the question.
        """
        if limit < 0:
            raise UserError(f"strategy_qa: limit={limit} must be 0 (all) or more facts")
        if prompts not in (None, BUILT_IN):
            raise UserError(
                f"strategy_qa: prompts={prompts!r} is neither {BUILT_IN!r} nor None; it has no few-shot files"
            )
        super().__init__(train=train, test=test, prompts=prompts)
        self.facts, self.limit, self.strict = facts, limit, strict
        if prompts and not strict:
            self.stop = ("\nQ:",)  # an answer may have paragraphs

    def to_problem(self, record: dict) -> Problem:
        answer = _YES.get(str(record["answer"]).strip().lower())
        if answer is None:
            raise ValueError(f"field 'answer' is {record['answer']!r}, neither yes nor no")
        if not isinstance(record["question"], str):
            raise ValueError(f"field 'question' is of type {type(record['question']).__name__}, not text")
        facts = record.get("facts") or []
        facts = [facts] if isinstance(facts, str) else list(map(str, facts))
        steps = " ".join(" ".join(f.split()) for f in facts)
        return Problem(
            id=str(record.get("id") or record.get("qid") or ""),
            question=record["question"],
            gold=answer,
            solution=f" {steps} So the answer is {answer}." if steps else f" So the answer is {answer}.",
            group=answer,
            meta={"facts": facts, "decomposition": record.get("decomposition") or []},
        )

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        facts = problem.meta["facts"][: self.limit or None] if self.facts else []
        hint_text = f" ({problem.gold})" if hint else ""
        return "".join(f"{' '.join(f.split())}\n" for f in facts) + f"Q: {problem.question}{hint_text}\nA:"

    def parse(self, completion: str) -> str | None:
        if self.strict:
            text = self.cut(completion)
            at = text.lower().rfind("answer is")
            found = _WORD.search(text, at + 9) if at >= 0 else _WORD.match(text.strip())
            return _YES[found[1].lower()] if found else None
        text = answers.plain(completion).text
        return next(filter(None, (_read(text[:end]) for end in answers.ends(text))), None)


def _read(text: str) -> str | None:
    """The answer of a text without markup."""
    stated = [_ANSWER.match(text, start) for _, start in reversed(answers.statements(text))]
    said = sorted((m for pattern in _SAID for m in pattern.finditer(text)), key=re.Match.start, reverse=True)
    for found in filter(None, (*stated, *said)):
        answer = _YES[found["verdict"].lower()]
        return {"yes": "no", "no": "yes"}[answer] if found["not"] else answer
    return None
