"""Eight aspects of a rationale's quality, each in [0, 1], measured without the gold answer or a gold rationale.

LM-Guided CoT (2404.03414) names the aspects and does not define their measures; these are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

from qstar.tasks.qa_metrics import normalise

# Function words: they do not tell what a text is about.
STOP = frozenset(
    "a an the and or but if so then than that this these those is are was were be been being am do does did has have had of "
    "in on at by for from to with as it its he she his her they them their there here which who whom whose what when where "
    "why how not no yes also both same more most such into about after before over under between during i you we us".split()
)
BAND = (15, 60)  # words of a readable rationale
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_NEGATIONS = frozenset(("not", "no", "never", "isnt", "wasnt", "arent", "werent", "doesnt", "didnt"))


@dataclasses.dataclass(frozen=True)
class View:
    """The inputs of an aspect."""

    question: str
    context: str
    rationale: str

    @functools.cached_property
    def words(self) -> list[str]:
        return normalise(self.rationale).split()

    @functools.cached_property
    def sentences(self) -> list[list[str]]:
        return [w for w in (normalise(s).split() for s in _SENTENCE.split(self.rationale.strip())) if w]


def content(words: Sequence[str]) -> list[str]:
    """The words that are no function words, in order."""
    return [w for w in words if w not in STOP]


def factuality(v: View) -> float:
    """Share of the rationale's pairs of neighbouring content words that occur together in a sentence of the context."""
    # Pairs, since single words also match a false statement that is made of the context's words.
    pairs = [p for s in v.sentences for p in zip(content(s), content(s)[1:])]
    if not pairs:
        return float(set(content(v.words)) <= set(normalise(v.context).split()))
    sources = [set(normalise(s).split()) for s in _SENTENCE.split(v.context)]
    return sum(any(a in s and b in s for s in sources) for a, b in pairs) / len(pairs)


def relevance(v: View) -> float:
    """Share of the question's content words that the rationale names."""
    asked = set(content(normalise(v.question).split()))
    return len(asked & set(v.words)) / len(asked) if asked else 1.0


def logicality(v: View) -> float:
    """Share of neighbouring steps with a common content word, halved if the last adds none to the question's."""
    steps = [set(content(s)) for s in v.sentences]
    # The middle of the scale: a single step can be neither linked nor unlinked.
    if len(steps) < 2:
        return 0.5
    linked = sum(bool(a & b) for a, b in zip(steps, steps[1:])) / (len(steps) - 1)
    new = bool(steps[-1] - set(content(normalise(v.question).split())))
    return linked if new else linked / 2


def consistency(v: View) -> float:
    """1 less the share of sentences that occur together with their negation."""
    seen: dict[tuple[str, ...], set[bool]] = {}
    for s in v.sentences:
        bare = tuple(w for w in s if w not in _NEGATIONS)
        # An even number of negations affirms.
        seen.setdefault(bare, set()).add(len(bare) % 2 == len(s) % 2)
    clashes = sum(len(signs) > 1 for signs in seen.values())
    return 1.0 - clashes / max(1, len(seen))


def coherence(v: View) -> float:
    """Similarity of neighbouring sentences: shared content words over those of the shorter, averaged, 1 at a half."""
    steps = [set(content(s)) for s in v.sentences]
    pairs = [(a, b) for a, b in zip(steps, steps[1:]) if a and b]
    if not pairs:
        return 0.5
    # Over the shorter sentence, which bounds how many words can be shared.
    return min(1.0, 2 * sum(len(a & b) / min(len(a), len(b)) for a, b in pairs) / len(pairs))


def fluency(v: View) -> float:
    """The share of sentences with a full stop."""
    parts = [s for s in _SENTENCE.split(v.rationale.strip()) if s.strip()]
    return sum(s.rstrip().endswith((".", "!", "?")) for s in parts) / max(1, len(parts))


def naturalness(v: View) -> float:
    """1 less the share of repeated word triples; 0 for an echo of the question and for less than four words."""
    # An echo of the question has full relevance; without this term copying it would pay.
    if len(v.words) < 4 or normalise(v.question) in " ".join(v.words) and len(v.words) < 1.5 * len(v.question.split()):
        return 0.0
    triples = list(zip(v.words, v.words[1:], v.words[2:]))
    return len(set(triples)) / len(triples)


def readability(v: View) -> float:
    """1 in the band of lengths, falling linearly to 0 at no words and at three times the longest."""
    n, (low, high) = len(v.words), BAND
    return n / low if n < low else 1.0 if n <= high else 1.0 - (n - high) / (2 * high)


def _aspect(measure: Callable[[View], float]) -> Callable[[View], float]:
    # Some measures are 1 where nothing is said, such as consistency.
    return lambda view: min(1.0, max(0.0, measure(view))) if view.words else 0.0


ASPECTS = {
    f.__name__: _aspect(f)
    for f in (factuality, relevance, logicality, consistency, coherence, fluency, naturalness, readability)
}


def bare_answer(rationale: str, answer: str, spare: int = 2) -> bool:
    """Whether a rationale is the answerer's own answer (not the gold one) and at most `spare` other content words."""
    # A degenerate optimum to watch for: with accuracy alone as reward, writing the bare answer is optimal.
    said = normalise(answer).split()
    words = normalise(rationale).split()
    if not said or not set(said) <= set(words):
        return False
    left = content(words)
    for w in said:
        if w in left:
            left.remove(w)
    return len(left) <= spare
