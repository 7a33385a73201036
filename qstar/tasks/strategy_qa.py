"""StrategyQA (2101.02235): yes-or-no questions whose reasoning steps are implicit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qstar.errors import bounded
from qstar.tasks.answer_parsing import YES_NO, final_yes_no
from qstar.tasks.base import Problem, text_field
from qstar.tasks.multiple_choice import ChoiceTask

_WORD = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)


@dataclass(kw_only=True, eq=False)
class StrategyQA(ChoiceTask):
    """The solution is the record's facts and "So the answer is yes."

    Options:
        facts: put the first `limit` facts (0: all) before the question.
        strict: read the first yes, no, true or false behind the last "answer is", or at the start.
    """

    facts: bool = False
    limit: int = bounded(0, ge=0, note="0 is all facts")

    name = "strategy_qa"
    default_source = "ChilleD/StrategyQA"
    fields = ("question", "answer")

    def to_problem(self, record: dict) -> Problem:
        answer = YES_NO.get(str(record["answer"]).strip().lower())
        if answer is None:
            raise ValueError(f"field 'answer' is {record['answer']!r}, neither yes nor no")
        facts = record.get("facts") or []
        # One line per fact: a blank line inside one would look like the end of an example.
        facts = [" ".join(str(fact).split()) for fact in ([facts] if isinstance(facts, str) else facts)]
        return Problem(
            id=str(record.get("id") or record.get("qid") or ""),
            question=text_field(record, "question"),
            gold=answer,
            solution=" ".join(["", *filter(None, [" ".join(facts)]), f"So the answer is {answer}."]),
            # Accuracy for each answer shows a model that always gives the same one.
            group=answer,
            meta={"facts": facts, "decomposition": record.get("decomposition") or []},
        )

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        facts = problem.meta["facts"][: self.limit or None] if self.facts else []
        hint_text = f" ({problem.gold})" if hint else ""
        return "".join(f"{fact}\n" for fact in facts) + f"Q: {problem.question}{hint_text}\nA:"

    def parse(self, completion: str) -> str | None:
        if not self.strict:
            return final_yes_no(completion)
        text = self.cut(completion)
        at = text.lower().rfind("answer is")
        found = _WORD.search(text, at + 9) if at >= 0 else _WORD.match(text.strip())
        return YES_NO[found[1].lower()] if found else None
