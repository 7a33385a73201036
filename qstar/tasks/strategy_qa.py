"""StrategyQA (2101.02235): yes or no, where the steps that lead there are not in the question."""

from __future__ import annotations

import re

from qstar.errors import UserError
from qstar.tasks.base import DatasetTask, Problem

_WORD = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


class StrategyQA(DatasetTask):
    """The solution is the record's facts and "So the answer is yes."; the answer is what stands after the last of these."""

    name = "strategy_qa"
    stop = ("\n\n", "\nQ:")
    default_source = "ChilleD/StrategyQA"
    fields = ("question", "answer")

    def __init__(self, *, train: str | None = None, test: str | None = None, facts: bool = False, limit: int = 0):
        """`train`, `test` as in `DatasetTask`; `facts` puts the first `limit` facts (0: all) before the question."""
        if limit < 0:
            raise UserError(f"strategy_qa: limit={limit} must be 0 (all) or more facts")
        super().__init__(train=train, test=test)
        self.facts, self.limit = facts, limit

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
        told = f" ({problem.gold})" if hint else ""
        return "".join(f"{' '.join(f.split())}\n" for f in facts) + f"Q: {problem.question}{told}\nA:"

    def parse(self, completion: str) -> str | None:
        text = self.cut(completion)
        at = text.lower().rfind("answer is")
        found = _WORD.search(text, at + 9) if at >= 0 else _WORD.match(text.strip())
        return _YES[found[1].lower()] if found else None
