"""Scores of multi-hop answers, as in the official scripts of HotpotQA and 2WikiMultiHopQA (v1.1).

Both normalise alike: lower case, ASCII punctuation deleted (not replaced: "U.S." is "us", "co-op" is "coop"), the articles a,
an, the replaced by a space, white space collapsed. Accents, long dashes and curly quotes stay.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
SPECIAL = ("yes", "no", "noanswer")  # an answer that is one of these shares no words with any other


class Score(NamedTuple):
    """Exact match, and F1 with its parts, each in [0, 1]."""

    em: float
    f1: float
    precision: float
    recall: float


ZERO = Score(0.0, 0.0, 0.0, 0.0)


def normalise(text: str) -> str:
    """Returns a text as it is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_score(prediction: str, gold: str) -> Score:
    """Scores an answer: equality, and words in common counted with their number.

    Where one side is yes, no or noanswer and the other is not the same, F1 is 0. Two empty sides: EM 1, F1 0.
    """
    a, b = normalise(prediction), normalise(gold)
    em = float(a == b)
    if a != b and (a in SPECIAL or b in SPECIAL):
        return ZERO._replace(em=em)
    words, wanted = a.split(), b.split()
    return _parts(em, sum((collections.Counter(words) & collections.Counter(wanted)).values()), len(words), len(wanted))


def best_score(prediction: str, golds: Iterable[str]) -> Score:
    """The best of each number over the gold answer and its aliases (2Wiki v1.1)."""
    scores = [answer_score(prediction, g) for g in golds]
    return Score(*(max(x) for x in zip(*scores)))


def includes(output: str, gold: str) -> bool:
    """Whether the gold answer's words stand together somewhere in an output (no official metric): "no" is not in "north"."""
    words, wanted = normalise(output).split(), normalise(gold).split()
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def set_score(predicted: Iterable[Any], gold: Iterable[Any]) -> Score:
    """Scores a set of supporting facts or evidence triples."""
    predicted, gold = set(predicted), set(gold)
    hits = len(predicted & gold)
    return _parts(float(predicted == gold), hits, len(predicted), len(gold))


def joint_score(*scores: Score) -> Score:
    """Answer and evidence together: precisions, recalls and exact matches multiply; F1 is of the products."""
    em = precision = recall = 1.0
    for s in scores:
        em, precision, recall = em * s.em, precision * s.precision, recall * s.recall
    return Score(em, _f1(precision, recall), precision, recall)


def facts(pairs: Iterable[Sequence[Any]], *, lower: bool = False) -> list[tuple[str, int]]:
    """Supporting facts as comparable pairs; 2Wiki v1.1 lower-cases the titles, HotpotQA does not."""
    return [(title.lower() if lower else title, int(at)) for title, at in pairs]


def evidence(triples: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Evidence triples as 2Wiki compares them: lower case, no punctuation, white space collapsed, articles kept."""
    return [tuple(" ".join(x.lower().translate(_PUNCTUATION).split()) for x in triple) for triple in triples]


def evaluate(
    golds: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, Mapping[str, Any]], *, two_wiki: bool = False
) -> dict[str, float]:
    """Means over all gold questions, of which those without a prediction count 0.

    Args:
      golds: id -> {"answer", "supporting_facts", and for 2Wiki "evidences"; "aliases" if there are any}.
      predictions: id -> {"answer", "sp": [[title, sentence]], and for 2Wiki "evidence"}; a part that is missing counts 0.

    Returns:
      em, f1, prec, recall; sp_*, joint_*; evi_* with `two_wiki`. In [0, 1], not rounded.
    """
    parts = ("", "sp_", "evi_", "joint_") if two_wiki else ("", "sp_", "joint_")
    sums: dict[str, float] = {f"{p}{n}": 0.0 for p in parts for n in ("em", "f1", "prec", "recall")}
    for key, gold in golds.items():
        said = predictions.get(key, {})
        found = {"": ZERO, "sp_": ZERO, "evi_": ZERO}
        if said.get("answer") is not None:
            options = [gold["answer"], *(gold.get("aliases", ()) if two_wiki else ())]
            found[""] = best_score(said["answer"], options)
        if said.get("sp") is not None:
            found["sp_"] = set_score(facts(said["sp"], lower=two_wiki), facts(gold["supporting_facts"], lower=two_wiki))
        if two_wiki and said.get("evidence") is not None:
            found["evi_"] = set_score(evidence(said["evidence"]), evidence(gold["evidences"]))
        complete = all(said.get(k) is not None for k in ("answer", "sp", *(("evidence",) if two_wiki else ())))
        joined = [found[p] for p in parts[:-1]]
        found["joint_"] = joint_score(*joined) if complete else ZERO
        for p in parts:
            for name, value in zip(("em", "f1", "prec", "recall"), found[p]):
                sums[p + name] += value
    return {name: total / max(1, len(golds)) for name, total in sums.items()}


def _parts(em: float, hits: int, said: int, wanted: int) -> Score:
    if not hits:
        return ZERO._replace(em=em)
    precision, recall = hits / said, hits / wanted
    return Score(em, _f1(precision, recall), precision, recall)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
