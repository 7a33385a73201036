"""Questions over several paragraphs: HotpotQA (1809.09600), 2WikiMultiHopQA (2011.01060), with LM-Guided CoT's prompts.

Both published shapes are read, the original JSON and the hub's columns.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qstar.data.sources import text_field
from qstar.errors import UserError, bounded
from qstar.tasks import answer_text
from qstar.tasks.answer_parsing import final_phrases
from qstar.tasks.base import DatasetTask, Problem
from qstar.tasks.qa_metrics import answer_key, includes, normalise

CONTEXTS = ("distractor", "gold", "supporting_only")

# The paper's wording is known in outline only (2404.03414, figure 1); these sentences are ours.
ASK = "Answer the question based on the context."
THINK = "Answer the question based on the context. Think step by step."
EXPLAIN = "Given the context, generate a step-wise rationale to answer the question."
# A model continues with a question of its own.
RUN_ON = ("\nContext:", "\nQuestion:")
_MARKER = re.compile(r"(?:so|therefore,?)?\s*the answer is:?|answer\s*:", re.IGNORECASE)
_SLOTS = re.compile(r"\b(?:answer|question|context|reasoning|prediction)\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class Paragraph:
    """A titled paragraph; `gold` if it holds a supporting fact."""

    title: str
    sentences: tuple[str, ...]
    gold: bool

    def text(self) -> str:
        """ "title: sentences" on one line."""
        # HotpotQA's sentences bring their spaces along, those of 2WikiMultiHopQA have none.
        space = "" if any(sentence[:1].isspace() for sentence in self.sentences[1:]) else " "
        return " ".join(f"{self.title}: {space.join(self.sentences)}".split())


def paragraphs(problem: Problem, mode: str) -> list[Paragraph]:
    """The paragraphs of a problem in a mode: all, those with supporting facts, or only the supporting sentences."""
    every = problem.meta["paragraphs"]
    if mode == "distractor":
        return list(every)
    gold = [p for p in every if p.gold]
    if mode == "gold":
        return gold
    wanted = {(title, at) for title, at in problem.meta["supporting_facts"]}
    kept = [tuple(s for i, s in enumerate(p.sentences) if (p.title, i) in wanted) for p in gold]
    return [Paragraph(p.title, s, True) for p, s in zip(gold, kept) if s]


def fit(
    parts: Sequence[Paragraph],
    frame: Callable[[str], str],
    limit: int,
    count: Callable[[str], int],
    *,
    keep_gold: bool = False,
) -> tuple[str, bool]:
    """frame(context) with as many paragraphs as fit, and whether any was left out.

    Args:
        frame: makes the prompt around a context; nothing of it is ever cut.
        limit: in units of `count` (tokens of a text); 0 = none.
        keep_gold: drop paragraphs without supporting facts first (for training rows).

    Raises:
        UserError: the frame alone is too long.
    """
    kept = list(parts)
    while True:
        prompt = frame(" ".join(p.text() for p in kept))
        if not limit or count(prompt) <= limit:
            return prompt, len(kept) < len(parts)
        if not kept:
            length = f"a question and its rationale take {count(prompt)} tokens"
            raise UserError(f"{length}, above the limit of {limit}; raise it")
        # Paragraphs are dropped whole: half a paragraph may lose the one fact that the answer needs. In training an
        # answer cannot be learnt without its gold paragraphs. At evaluation it is unknown which are gold, and using
        # that would leak the labels: the last paragraphs are dropped.
        spare = [i for i, p in enumerate(kept) if not p.gold] if keep_gold else []
        kept.pop(spare[-1] if spare else -1)


def frame_for(style: str, question: str, rationale: str = "") -> Callable[[str], str]:
    """The prompt of a style as a function of the context; `student` asks for a rationale, `guided` contains one."""
    head, tail = {
        "standard": (ASK, "Answer:"),
        "cot": (THINK, "Reasoning:"),
        "student": (EXPLAIN, "Reasoning:"),
        "guided": (ASK, f"Reasoning: {clean_rationale(rationale)} Answer:"),
    }[style]
    # One line, since T5's tokenizer has no line breaks.
    return lambda context: f"{head} Context: {context} Question: {question} {tail}"


def split_reasoning(text: str) -> tuple[str, str | None]:
    """(rationale, answer) of a chain of thought, cut at its last "the answer is" or "Answer:"; no answer: None."""
    found = list(_MARKER.finditer(text))
    if not found:
        return text.strip(), None
    lines = text[found[-1].end() :].strip().splitlines()
    answer = lines[0].strip().rstrip(".").strip() if lines else ""
    return text[: found[-1].start()].strip(), answer or None


def clean_rationale(text: str) -> str:
    """A rationale for a guided prompt: on one line, and without a slot of its own ("Answer: ...")."""
    # A slot's name inside the rationale would read as the prompt's own "Answer:".
    return " ".join(_SLOTS.sub(" ", text).split())


def coverage(problem: Problem, rationale: str) -> float:
    """Share of the supporting facts whose title occurs in a rationale (ours, not official)."""
    # A fact's sentence may be paraphrased; its title is a name and mostly is not.
    titles = [title for title, _ in problem.meta["supporting_facts"]]
    return sum(includes(rationale, t) for t in titles) / max(1, len(titles))


@dataclass(kw_only=True, eq=False)
class MultiHop(DatasetTask):
    """Base of the two data sets.

    Options:
        context: one of CONTEXTS.
        style: "standard" or "cot".
        limit: words of a prompt (0: no limit). Methods that have a tokenizer count its tokens instead, with `fit`.
        strict: read an answer as the papers do: the first line (of `style="cot"`: behind the last "the answer is" or
            "Answer:"), whole.
    """

    context: str = bounded("distractor", choices=CONTEXTS)
    style: str = bounded("standard", choices=("standard", "cot"))
    limit: int = bounded(0, ge=0, note="0 is no limit")
    strict: bool = False

    fields = ("question", "answer", "context", "supporting_facts")
    # The hub's test rows have no answers.
    test_split = "validation"

    def __post_init__(self) -> None:
        super().__post_init__()
        # A chain of thought may have paragraphs.
        cot = self.style == "cot"
        self.stop = ("\nQuestion:", f"\n{ASK}") if cot and not self.strict else ("\n\n",)
        steps = "Think step by step, and end with the answer alone in a sentence: So the answer is 1954."
        self.instruction = steps if cot else "Give the answer alone, in as few words as possible, without a sentence."

    def to_problem(self, record: dict) -> Problem:
        # Some may lie outside the context: many in the full-wiki setting.
        facts = _facts(record["supporting_facts"])
        titles = {title for title, _ in facts}
        parts = tuple(Paragraph(t, tuple(s), t in titles) for t, s in _context(record["context"]))
        question, answer = text_field(record, "question"), text_field(record, "answer")
        if not question.strip() or not answer.strip():
            raise ValueError("field 'question' or 'answer' is blank")
        # The worked examples that come with qstar have a rationale, the data sets have none.
        end = f"{record.get('rationale')} So the answer is {answer}." if self.style == "cot" else answer
        return Problem(
            id=str(record.get("_id") or record.get("id") or ""),
            question=" ".join(question.split()),
            gold=normalise(answer) if self.strict else answer_key(answer),
            solution=f" {end}" if "rationale" in record else None,
            group=str(record.get("type") or self.name).replace("-", "_"),
            meta={"answer": answer, "paragraphs": parts, "supporting_facts": facts},
        )

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        frame = frame_for(self.style, problem.question)
        # Words, since a task has no tokenizer.
        return fit(paragraphs(problem, self.context), frame, self.limit, lambda text: len(text.split()))[0]

    def parse(self, completion: str) -> str | None:
        if self.strict:
            text = self.cut(completion)
            answer = split_reasoning(text)[1] if self.style == "cot" else text.strip().partition("\n")[0]
            return normalise(answer) if answer else None

        def read(part: str, key: Callable[[str], str]) -> str | None:
            return next(filter(None, map(key, final_phrases(part, reasoning=self.style == "cot"))), None)

        # Dashes stay, since the official metric tells them from hyphens.
        text = answer_text.strip_markup(completion, {}).text
        found = (answer_text.first_found(text, functools.partial(read, key=key)) for key in (normalise, answer_key))
        return next(filter(None, found), None)


class HotpotQA(MultiHop):
    """Two paragraphs out of ten answer the question; types bridge and comparison."""

    name = "hotpotqa"
    default_source = "hotpotqa/hotpot_qa:distractor"


class TwoWikiMultiHopQA(MultiHop):
    """Two to four out of ten; types comparison, inference, compositional, bridge_comparison; with evidence triples."""

    name = "2wikimultihopqa"
    # Files of a repository with a loading script, which `datasets` 4 no longer runs.
    default_source = "hf://datasets/xanhho/2WikiMultihopQA/train.parquet"
    default_test = "hf://datasets/xanhho/2WikiMultihopQA/dev.parquet"


def _from_json(value: Any) -> Any:
    # Some mirrors keep lists as JSON text.
    return json.loads(value) if isinstance(value, str) else value


def _text(value: Any) -> str:
    # null would become the word None.
    if not isinstance(value, str | int | float):
        raise TypeError(f"{json.dumps(value)[:40]} is not text")
    return str(value)


def _context(value: Any) -> list[tuple[str, list[str]]]:
    try:
        if isinstance(value := _from_json(value), dict):
            value = zip(value["title"], value.get("sentences") or value["content"], strict=True)
        # Unpacked, an object with two keys would give the keys.
        rows = [(row["title"], row["sentences"]) if isinstance(row, dict) else row for row in value]
        pairs = [(_text(title), [s] if isinstance(s, str) else list(map(_text, s))) for title, s in rows]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"field 'context' is neither [[title, [sentences]]] nor titles and sentences: {e!r}") from e
    if not pairs:
        raise ValueError("field 'context' has no paragraph")
    return pairs


def _facts(value: Any) -> list[tuple[str, int]]:
    try:
        if isinstance(value := _from_json(value), dict):
            value = zip(value["title"], value["sent_id"], strict=True)
        return [(_text(title), int(at)) for title, at in value]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"field 'supporting_facts' is neither [[title, sentence]] nor title and sent_id: {e!r}") from e
