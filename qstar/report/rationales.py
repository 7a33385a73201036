"""Attempts of one iteration: counts by kind, a fixed sample for a page, and where a prompt holds its hint."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qstar.data.sources import read_jsonl

Row = dict[str, Any]
OUTCOMES = ("kept", "rationalised", "rejected")


class Kind(NamedTuple):
    """What attempts are counted, sampled and filtered by."""

    verdict: str
    reason: str  # up to its colon: "hint leak: ..." says behind it which words gave it away
    hinted: bool
    group: str
    valid: bool | None


@dataclass(frozen=True)
class Attempts:
    """One `rationales/iter_NNN.jsonl`.

    Attributes:
      counts: attempts of every kind, hinted ones included.
      problems: group ("" = all) -> outcome -> problems, by the best verdict that an attempt at them got.
      shown: a sample of the rows, see `sample`; `hint` holds the [start, end) of the hint in the prompt.
    """

    counts: Mapping[Kind, int] = field(default_factory=dict)
    problems: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    shown: Sequence[Row] = ()


@dataclass
class Answers:
    """Counts of greedy answers on held-out problems."""

    total: int = 0
    wrong: int = 0
    restated: int = 0  # wrong answers that begin by restating the sum
    miscopied: int = 0  # those of them that restate it wrongly


def read_attempts(path: Path, cap: int) -> Attempts:
    """Counts all rows of a rationales file and samples at most `cap` of them."""
    rows = read_jsonl(path)
    # The prompt of the same problem without the hint shows which part of the hinted one is the hint.
    plain = {row.get("problem_id"): row.get("prompt", "") for row in rows if not row.get("hinted")}
    shown = []
    for row in sample(rows, cap):
        unhinted = plain.get(row.get("problem_id"))
        spans = hint_spans(unhinted, row.get("prompt", ""), row.get("gold", "")) if row.get("hinted") else []
        shown.append({**row, "hint": spans})
    return Attempts(Counter(map(kind, rows)), _best(rows), shown)


def read_answers(path: Path) -> dict[str, Answers]:
    """Counts an evaluation file by group; "" holds all groups together."""
    counted: dict[str, Answers] = defaultdict(Answers)
    for row in read_jsonl(path):
        copied = None if row.get("correct") else miscopied(row.get("prompt", ""), row.get("completion", ""))
        for group in {"", str(row.get("group", ""))}:
            answers = counted[group]
            answers.total += 1
            answers.wrong += not row.get("correct")
            answers.restated += copied is not None
            answers.miscopied += copied is True
    return dict(counted)


def kind(row: Row) -> Kind:
    """The kind of an attempt; answers of an evaluation, which have no verdict, are right or wrong."""
    verdict = row.get("verdict") or ("right" if row.get("correct") else "wrong" if "correct" in row else "")
    texts = (str(verdict), str(row.get("reason") or "").split(":")[0])
    return Kind(*texts, bool(row.get("hinted")), str(row.get("group") or ""), row.get("valid"))


def sample(rows: Sequence[Row], cap: int) -> list[Row]:
    """At most `cap` rows, taken from the kinds in turn, so that every prefix holds the rare ones too."""
    piles: dict[Kind, list[Row]] = defaultdict(list)
    # Within a kind, by a hash of what identifies the attempt: every report shows the same sample.
    for row in sorted(rows, key=_hash):
        piles[kind(row)].append(row)
    order = sorted(piles.values(), key=len)  # rare kinds first: a short sample loses common ones
    rounds = max(map(len, order), default=0)
    return [pile[turn] for turn in range(rounds) for pile in order if turn < len(pile)][:cap]


def hint_spans(plain: str | None, hinted: str, gold: str) -> list[tuple[int, int]]:
    """[start, end) of the hint in a hinted prompt: what the plain prompt of the same problem lacks."""
    if plain is not None:
        # Line by line where both have equally many: few-shot examples are hinted too, each in a line of its own.
        pairs = list(zip(plain.split("\n"), hinted.split("\n")))
        if plain.count("\n") != hinted.count("\n"):
            pairs = [(plain, hinted)]
        spans, start = [], 0
        for before, after in pairs:
            if before != after:
                low = _common(before, after)
                # The common suffix may not reach into the prefix: in repeated characters both would count them.
                high = len(after) - min(_common(before[::-1], after[::-1]), len(before) - low, len(after) - low)
                spans.append((start + low, start + high))
            start += len(after) + 1
        if without(hinted, spans) == plain:
            return spans
    # No plain prompt, or the hinted one is no insertion into it: the last place that states `gold`, since few-shot
    # examples before the question may state it as well.
    at = hinted.rfind(gold) if gold else -1
    return [(at, at + len(gold))] if at >= 0 else []


def without(prompt: str, spans: Sequence[Sequence[int]]) -> str:
    """A prompt with its hint cut out, as it is trained on."""
    # From the end, so that the positions of earlier spans stay valid.
    for start, end in reversed(spans):
        prompt = prompt[:start] + prompt[end:]
    return prompt


def miscopied(prompt: str, completion: str) -> bool | None:
    """Whether an addition's scratchpad restates its operands wrongly; None where nothing is restated."""
    # The two formats of `tasks.arithmetic`: compact, and that of STaR's released code.
    if query := re.search(r"(\d+\+\d+)=(?:\(\d+\))?\s*\Z", prompt):
        return completion.split(",")[0] != query[1] if "," in completion else None
    if query := re.search(r"Input:\n([\d +]+)\nTarget:[\d ]*\n?\Z", prompt):
        restated = re.match(r"\s*<scratch>\n([^,\n]*)", completion)
        return restated[1].strip() != query[1].strip() if restated else None
    return None


def _best(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    # Each problem counts once, under the best verdict of its attempts: OUTCOMES is ordered from best to worst.
    best: dict[tuple[str, Any], int] = {}
    for row in rows:
        verdict = row.get("verdict")
        rank = OUTCOMES.index(verdict) if verdict in OUTCOMES else len(OUTCOMES) - 1
        key = str(row.get("group") or ""), row.get("problem_id")
        best[key] = min(rank, best.get(key, rank))
    counted: dict[str, dict[str, int]] = {"": dict.fromkeys(OUTCOMES, 0)}
    for (group, _), rank in best.items():
        for name in {"", group}:
            counted.setdefault(name, dict.fromkeys(OUTCOMES, 0))[OUTCOMES[rank]] += 1
    return counted


def _hash(row: Row) -> tuple[int, str]:
    identity = f"{row.get('problem_id')}/{row.get('hinted')}/{row.get('sample')}"
    # Not `hash`, which Python salts per process. "surrogatepass": a lone surrogate in an id has no UTF-8. The identity
    # breaks ties of the checksum.
    return zlib.crc32(identity.encode("utf-8", "surrogatepass")), identity


def _common(one: str, other: str) -> int:
    return len(os.path.commonprefix((one, other)))
