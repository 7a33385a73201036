"""CommonsenseQA (1811.00937): five choices, one right, as STaR uses it (2203.14465, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

from qstar.tasks.base import Problem
from qstar.tasks.multiple_choice import LetteredChoiceTask


@dataclass(kw_only=True, eq=False)
class CommonsenseQA(LetteredChoiceTask):
    """Stem, lettered choices, and a rationale that ends "Therefore, the answer is blotter (e)."

    As in the papers, scores are on the development rows ("test" here). "val" is cut out of train.

    Options:
        direct: answer "(e)." without a rationale.
    """

    direct: bool = False

    name = "commonsense_qa"
    default_source = "tau/commonsense_qa"
    # The published test split has no labels.
    # Model selection uses "val", never these reported rows.
    test_split = "validation"
    fields = ("question", "answerKey")

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
        # With its leading space, since prompts end in "A:" without one.
        solution = f" ({gold})." if self.direct else record.get("rationale")
        return Problem(record.get("id") or "", stem, gold, solution, group=self.name, meta={"choices": choices})


def _stem_and_choices(record: dict) -> tuple[str, dict[str, str]]:
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
    # The data labels choices A to E; STaR's few-shot files write (a) to (e).
    choices = {str(label).lower(): text for label, text in pairs}
    if not choices or len(choices) != len(pairs) or not set(choices) <= set("abcde"):
        raise ValueError(f"choices are labelled {[label for label, _ in pairs]}; each of A to E once is expected")
    return stem, choices
