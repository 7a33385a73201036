"""Metrics of multi-hop answers, as in the official scripts of HotpotQA and 2WikiMultiHopQA (v1.1).

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
_SPECIAL = ("yes", "no", "noanswer")  # such an answer shares no words with any other


class Score(NamedTuple):
    """Exact match, and F1 with its parts, each in [0, 1]."""

    em: float
    f1: float
    precision: float
    recall: float


ZERO = Score(0.0, 0.0, 0.0, 0.0)


def normalise(text: str) -> str:
    """A text in the form in which answers are compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_score(prediction: str, gold: str) -> Score:
    """Equality of an answer, and words in common counted with their number.

    Where one side is yes, no or noanswer and the other is not the same, F1 is 0. Two empty sides: EM 1, F1 0.
    """
    a, b = normalise(prediction), normalise(gold)
    if a != b and (a in _SPECIAL or b in _SPECIAL):
        return ZERO
    words, wanted = a.split(), b.split()
    common = (collections.Counter(words) & collections.Counter(wanted)).total()
    return _score(float(a == b), common, len(words), len(wanted))


def best_score(prediction: str, golds: Iterable[str]) -> Score:
    """The best of each number over the gold answer and its aliases (2Wiki v1.1)."""
    return Score(*(max(x) for x in zip(*(answer_score(prediction, g) for g in golds))))


def includes(output: str, gold: str) -> bool:
    """Whether the gold answer's words occur in a row in an output (no official metric): "no" is not in "north"."""
    words, wanted = normalise(output).split(), normalise(gold).split()
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def set_score(predicted: Iterable[Any], gold: Iterable[Any]) -> Score:
    """The score of a set of supporting facts or evidence triples."""
    predicted, gold = set(predicted), set(gold)
    return _score(float(predicted == gold), len(predicted & gold), len(predicted), len(gold))


def joint_score(*scores: Score) -> Score:
    """Answer and evidence together: precisions, recalls and exact matches multiply; F1 is of the products."""
    em = precision = recall = 1.0
    for s in scores:
        em, precision, recall = em * s.em, precision * s.precision, recall * s.recall
    return Score(em, _f1(precision, recall), precision, recall)


def evaluate(
    golds: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, Mapping[str, Any]], *, two_wiki: bool = False
) -> dict[str, float]:
    """Means over all gold questions; those without a prediction count 0.

    Args:
        golds: id -> {"answer", "supporting_facts", and for 2Wiki "evidences"; "aliases" if there are any}.
        predictions: id -> {"answer", "sp": [[title, sentence]], and for 2Wiki "evidence"}; a missing part counts 0.
        two_wiki: 2Wiki's rules: aliases, evidence, titles in lower case.

    Returns:
        em, f1, prec, recall; sp_*, joint_*; evi_* with `two_wiki`. In [0, 1], not rounded.
    """
    parts = ("", "sp_", "evi_", "joint_") if two_wiki else ("", "sp_", "joint_")
    sums: dict[str, float] = {f"{p}{n}": 0.0 for p in parts for n in ("em", "f1", "prec", "recall")}
    for key, gold in golds.items():
        said = {name: value for name, value in predictions.get(key, {}).items() if value is not None}
        found = dict.fromkeys(parts, ZERO)
        if "answer" in said:
            found[""] = best_score(said["answer"], [gold["answer"], *(gold.get("aliases", ()) if two_wiki else ())])
        if "sp" in said:
            found["sp_"] = set_score(*(_facts(x, lower=two_wiki) for x in (said["sp"], gold["supporting_facts"])))
        if two_wiki and "evidence" in said:
            found["evi_"] = set_score(_evidence(said["evidence"]), _evidence(gold["evidences"]))
        if {"answer", "sp", *(("evidence",) if two_wiki else ())} <= said.keys():
            found["joint_"] = joint_score(*(found[p] for p in parts[:-1]))
        for p, score in found.items():
            for name, value in zip(("em", "f1", "prec", "recall"), score):
                sums[p + name] += value
    return {name: total / max(1, len(golds)) for name, total in sums.items()}


def _facts(pairs: Iterable[Sequence[Any]], *, lower: bool) -> list[tuple[str, int]]:
    # 2Wiki v1.1 compares titles in lower case, HotpotQA does not.
    return [(title.lower() if lower else title, int(at)) for title, at in pairs]


def _evidence(triples: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    # As 2Wiki compares them: articles stay.
    return [tuple(" ".join(x.lower().translate(_PUNCTUATION).split()) for x in triple) for triple in triples]


def _score(em: float, hits: int, predicted: int, wanted: int) -> Score:
    if not hits:
        return ZERO._replace(em=em)
    precision, recall = hits / predicted, hits / wanted
    return Score(em, _f1(precision, recall), precision, recall)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
