"""Questions over several paragraphs: HotpotQA (1809.09600) and 2WikiMultiHopQA (2011.01060), with LM-Guided CoT's prompts.

Both published shapes are read, the original JSON and the hub's columns; a prompt is one line, since T5's tokenizer knows
no line breaks. Where a context is too long, whole paragraphs of it are dropped, never a word of the question or rationale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qstar.errors import UserError
from qstar.tasks import answers
from qstar.tasks.base import DatasetTask, Problem
from qstar.tasks.qa_metrics import includes, normalise

CONTEXTS = ("distractor", "gold", "supporting_only")
STYLES = ("standard", "cot", "guided", "student")
COUNT = Callable[[str], int]  # tokens of a text

# The paper's wording is known in outline only (2404.03414, figure 1); these sentences are ours.
ASK = "Answer the question based on the context."
THINK = "Answer the question based on the context. Think step by step."
EXPLAIN = "Given the context, generate a step-wise rationale to answer the question."
RUN_ON = ("\nContext:", "\nQuestion:")  # where a model goes on with a question of its own making
_MARKER = re.compile(r"(?:so|therefore,?)?\s*the answer is:?|answer\s*:", re.IGNORECASE)
_SLOTS = re.compile(r"\b(?:answer|question|context|reasoning|prediction)\s*:", re.IGNORECASE)
_NEXT_SLOT = re.compile(r"(?<=\S)\s+(?:Question|Context)\s*:")
_VERDICT = re.compile(r"\W*((?i:yes|no))\b(?=\s*(?:[.;:!]|$|[,-]\s+[a-z]|because\b|since\b))")
_REASON = re.compile(r",?\s+(?:because|since)\b")
_ABBREVIATIONS = {"mrs", "prof", "inc", "ltd", "gen", "col", "rev", "hon", "capt", "sgt", "etc", "vol"}
_SHORT = 8  # words of a first line that is an answer although another follows


@dataclass(frozen=True)
class Paragraph:
    """A titled paragraph; `gold` if a supporting fact stands in it."""

    title: str
    sentences: tuple[str, ...]
    gold: bool

    def text(self) -> str:
        """ "title: sentences" on one line."""
        return " ".join(f"{self.title}: {''.join(self.sentences)}".split())


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
    parts: Sequence[Paragraph], frame: Callable[[str], str], limit: int, count: COUNT, *, keep_gold: bool = False
) -> tuple[str, bool]:
    """Returns frame(context) with as many paragraphs as fit, and whether any was left out.

    Args:
      frame: makes the prompt around a context; nothing of it is ever cut. limit: in units of `count`; 0 = none.
      keep_gold: drop paragraphs without supporting facts first (training rows: with all gone the answer cannot be learnt);
        at evaluation the last paragraphs go, since nobody knows which are gold.

    Raises:
      UserError: the frame alone is too long.
    """
    kept = list(parts)
    prompt = frame(" ".join(p.text() for p in kept))
    if not limit or count(prompt) <= limit:
        return prompt, False
    while kept:
        spare = [i for i, p in enumerate(kept) if not p.gold] if keep_gold else []
        kept.pop(spare[-1] if spare else -1)
        prompt = frame(" ".join(p.text() for p in kept))
        if count(prompt) <= limit:
            return prompt, True
    raise UserError(f"a question and its rationale take {count(prompt)} tokens, above the limit of {limit}; raise it")


def frame_for(style: str, question: str, rationale: str = "") -> Callable[[str], str]:
    """Returns the prompt of a style as a function of the context.

    `standard` and `cot` ask a model to answer; `student` asks for a rationale; `guided` gives one and asks for the answer.
    """
    if style not in STYLES:
        raise UserError(f"prompt style {style!r} is not one of {', '.join(STYLES)}")
    head = {"standard": ASK, "cot": THINK, "guided": ASK, "student": EXPLAIN}[style]
    tail = {
        "standard": "Answer:",
        "cot": "Reasoning:",
        "student": "Reasoning:",
        "guided": f"Reasoning: {clean_rationale(rationale)} Answer:",
    }[style]
    return lambda context: f"{head} Context: {context} Question: {question} {tail}"


def split_reasoning(text: str) -> tuple[str, str | None]:
    """Returns (rationale, answer) of a chain of thought, cut at its last "the answer is" or "Answer:"; no answer: None."""
    found = list(_MARKER.finditer(text))
    if not found:
        return text.strip(), None
    answer = text[found[-1].end() :].strip().splitlines()[:1]
    answer = answer[0].strip().rstrip(".").strip() if answer else ""
    return text[: found[-1].start()].strip(), answer or None


def clean_rationale(text: str) -> str:
    """A rationale as it may stand in a guided prompt: on one line, and without a slot of its own ("Answer: ...")."""
    return " ".join(_SLOTS.sub(" ", text).split())


def coverage(problem: Problem, rationale: str) -> float:
    """Share of the supporting facts whose title stands in a rationale (ours, not official)."""
    titles = [title for title, _ in problem.meta["supporting_facts"]]
    return sum(includes(rationale, t) for t in titles) / max(1, len(titles))


class MultiHop(DatasetTask):
    """Base of the two: what the records hold, and how a completion is read."""

    fields = ("question", "answer", "context", "supporting_facts")
    test_split = "validation"
    stop = ("\n\n",)

    def __init__(
        self,
        *,
        train: str | None = None,
        test: str | None = None,
        context: str = "distractor",
        style: str = "standard",
        limit: int = 0,
        strict: bool = False,
    ):
        """`train`, `test` as in `DatasetTask`; `context` is one of CONTEXTS, `style` of STYLES.

        Args:
          strict: read an answer as the papers do: the first line (of `style="cot"`: behind the last "the answer is" or
            "Answer:"), with all that stands in it.
          limit: words of a prompt (0: no limit). Methods that know a tokenizer count its tokens instead, with `fit`.
        """
        for what, value, known in (("context", context, CONTEXTS), ("style", style, STYLES[:2])):
            if value not in known:
                raise UserError(f"{self.name}: {what}={value!r} is not one of {', '.join(known)}")
        if limit < 0:
            raise UserError(f"{self.name}: limit={limit} must be 0 (none) or more words")
        super().__init__(train=train, test=test)
        self.context, self.style, self.limit, self.strict = context, style, limit, strict
        if style == "cot" and not strict:
            self.stop = ("\nQuestion:",)  # reasoning may have paragraphs
        self.out_of_range = 0  # supporting facts that are not in the context: many in the full-wiki setting

    def to_problem(self, record: dict) -> Problem:
        parts = _context(record["context"])
        wanted = _facts(record["supporting_facts"])
        titles = {title for title, _ in wanted}
        lengths = {title: len(sentences) for title, sentences in parts}
        self.out_of_range += sum(at >= lengths.get(title, 0) for title, at in wanted)
        if not isinstance(record["answer"], str) or not isinstance(record["question"], str):
            raise ValueError("question and answer must be text")
        return Problem(
            id=str(record.get("_id") or record.get("id") or ""),
            question=" ".join(record["question"].split()),
            gold=normalise(record["answer"]),
            group=str(record.get("type") or self.name).replace("-", "_"),
            meta={
                "answer": record["answer"],
                "paragraphs": tuple(Paragraph(t, tuple(s), t in titles) for t, s in parts),
                "supporting_facts": wanted,
                "evidences": [tuple(e) for e in _plain(record.get("evidences") or [])],
                "level": record.get("level", ""),
            },
        )

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        frame = frame_for(self.style, problem.question)
        return fit(paragraphs(problem, self.context), frame, self.limit, lambda text: len(text.split()))[0]

    def parse(self, completion: str) -> str | None:
        if not self.strict:
            text = answers.plain(completion).text
            return next(filter(None, (_read(text[:end], self.style) for end in answers.ends(text))), None)
        text = self.cut(completion)
        answer = split_reasoning(text)[1] if self.style == "cot" else text.strip().splitlines()[:1]
        answer = answer[0] if isinstance(answer, list) and answer else answer
        return normalise(answer) if answer else None


def _read(text: str, style: str) -> str | None:
    """The answer of a text without markup: what it states last, or a short first line where no reasoning was asked for."""
    text = _NEXT_SLOT.split(text.strip(), maxsplit=1)[0]
    first, stated = text.partition("\n")[0], answers.statements(text)
    in_first = bool(stated) and stated[0][0] < len(first)
    if style != "cot" and not in_first and (not stated or len(first.split()) <= _SHORT):
        return normalise(_phrase(first)) or None
    phrases = (_phrase(answers.line_at(text, start)) for _, start in reversed(stated))
    return next(filter(None, map(normalise, phrases)), None)


def _phrase(line: str) -> str:
    """The answer that a line begins with: its first sentence, without a reason, "yes" or "no" alone."""
    line = line.replace(answers.BOX, " ").strip()
    if verdict := _VERDICT.match(line):
        return verdict[1]
    for stop in re.finditer(r"[.!?]\s+(?=[A-Z])", line):
        word = line[: stop.start()].split()[-1:]
        if word and len(word[0]) > 2 and word[0].lower() not in _ABBREVIATIONS:
            line = line[: stop.start()]
            break
    return _REASON.split(line, maxsplit=1)[0]


class HotpotQA(MultiHop):
    """Two paragraphs out of ten answer the question; types bridge and comparison."""

    name = "hotpotqa"
    default_source = "hotpotqa/hotpot_qa:distractor"


class TwoWikiMultiHopQA(MultiHop):
    """Two to four out of ten; types comparison, inference, compositional, bridge_comparison; with evidence triples."""

    name = "2wikimultihopqa"
    # The files of that repository, since it has a loading script, which `datasets` 4 no longer runs.
    default_source = "hf://datasets/xanhho/2WikiMultihopQA/train.parquet"
    default_test = "hf://datasets/xanhho/2WikiMultihopQA/dev.parquet"


def _plain(value: Any) -> Any:
    """Some mirrors keep lists as JSON text."""
    return json.loads(value) if isinstance(value, str) else value


def _context(value: Any) -> list[tuple[str, list[str]]]:
    """[[title, [sentences]], ..] from that, or from the hub's {"title": [..], "sentences": [[..], ..]}."""
    value = _plain(value)
    try:
        if isinstance(value, dict):
            sentences = value.get("sentences", value.get("content"))
            pairs = list(zip(value["title"], sentences, strict=True))
        else:
            pairs = [(title, sentences) for title, sentences in value]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"field 'context' is neither [[title, [sentences]]] nor titles and sentences: {e!r}") from e
    if not pairs:
        raise ValueError("field 'context' has no paragraph")
    return [(str(t), list(map(str, s))) for t, s in pairs]


def _facts(value: Any) -> list[tuple[str, int]]:
    value = _plain(value)
    try:
        if isinstance(value, dict):
            return [(str(t), int(i)) for t, i in zip(value["title"], value["sent_id"], strict=True)]
        return [(str(t), int(i)) for t, i in value]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"field 'supporting_facts' is neither [[title, sentence]] nor title and sent_id: {e!r}") from e
