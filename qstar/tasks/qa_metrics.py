"""Metrics of a multi-hop answer, as in the official scripts of HotpotQA and 2WikiMultiHopQA (v1.1).

Both normalise alike: lower case, ASCII punctuation deleted (not replaced: "U.S." is "us", "co-op" is "coop"), the
articles a, an, the replaced by a space, white space collapsed. Accents, long dashes and curly quotes stay.
"""

from __future__ import annotations

import collections
import re
import string
from typing import NamedTuple

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# As in the official scripts: without this rule "no" would score against "no one".
_SPECIAL = ("yes", "no", "noanswer")


class Score(NamedTuple):
    """Exact match and F1, each in [0, 1]."""

    em: float
    f1: float


def normalise(text: str) -> str:
    """A text in the form in which answers are compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_key(text: str) -> str:
    """As `normalise`, but what that deletes altogether stays as it is written: "!!!" is a band, "The The" another."""
    written = " ".join(text.lower().split())
    return normalise(text) or written.rstrip(".") or written


def answer_score(prediction: str, gold: str) -> Score:
    """EM and F1 of an answer; F1 is 0 where one side is yes, no or noanswer and the other differs."""
    a, b = normalise(prediction), normalise(gold)
    if a != b and (a in _SPECIAL or b in _SPECIAL):
        return Score(0.0, 0.0)
    words, wanted = a.split(), b.split()
    common = (collections.Counter(words) & collections.Counter(wanted)).total()
    # Also where both sides are empty: the official scripts then give EM 1 and F1 0.
    if not common:
        return Score(float(a == b), 0.0)
    precision, recall = common / len(words), common / len(wanted)
    return Score(float(a == b), 2 * precision * recall / (precision + recall))


def includes(output: str, gold: str) -> bool:
    """Whether the gold answer's words occur in a row in an output (no official metric): "no" is not in "north"."""
    words, wanted = normalise(output).split(), normalise(gold).split()
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))
