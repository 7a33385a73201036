"""Texts with their thoughts: read from a run's files, the gain of each thought, and their packing into a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qstar.data.sources import read_jsonl
from qstar.errors import UserError
from qstar.report import render

Numbers = list[float | None]
LEAST = 0.005  # nats: a smaller gain neither helps nor hurts
PER_TEXT = 2  # extremes of one text at most, so that a single odd text does not fill the table
MOST_TEXTS = 400  # of one arm and step
FEW = 20  # texts from whose size the number that fits is estimated
LEAST_SCALE = 0.1  # nats at full colour, at least: where thoughts bring nothing, nothing is painted


@dataclass(frozen=True)
class Pass:
    """One thought after every token but the last; entry j is about token j + 1."""

    tokens: list[list[str]]  # [N-1][S]; empty where there is no thought
    nll: Numbers  # [N-1] of token j + 1 with the thought mixed in, nats
    weight: Numbers  # [N-1] mixing weight
    reward: Numbers  # [N-1] nats


@dataclass(frozen=True)
class Text:
    """One text of N tokens."""

    id: str
    tokens: list[str]  # [N]
    classes: list[str]  # [N]
    base_nll: Numbers  # [N-1] of token j + 1 without thoughts, nats; None where it is not predicted
    passes: list[Pass]

    @property
    def gains(self) -> Numbers:
        """[N-1] base nll - nll of token j + 1, mean over passes, nats."""
        return [_gain(base, [p.nll[j] for p in self.passes]) for j, base in enumerate(self.base_nll)]


class Extreme(NamedTuple):
    """A token that its thoughts helped or hurt."""

    text: int  # index among the texts
    entry: int  # j; the token is j + 1
    gain: float


def _gain(base: float | None, nlls: Numbers) -> float | None:
    known = [nll for nll in nlls if nll is not None]
    return None if base is None or not known else base - sum(known) / len(known)


def read_texts(path: Path) -> list[Text]:
    """The texts of `thoughts/step_NNNNNN.jsonl`. Raises UserError for a row with missing fields or wrong lengths."""
    return [_read(row, f"{path}:{number}") for number, row in enumerate(read_jsonl(path), 1)]


def _read(row: Any, where: str) -> Text:
    try:
        tokens = [str(token) for token in row["tokens"]]
        passes = [
            Pass(
                [[str(token) for token in thought or ()] for thought in p["tokens"]],
                *(list(p[name]) for name in ("nll", "weight", "reward")),
            )
            for p in row["thoughts"]
        ]
        classes = [str(name) for name in row.get("classes") or [""] * len(tokens)]
        text = Text(str(row["text"]), tokens, classes, list(row["base_nll"]), passes)
    except (KeyError, TypeError, AttributeError) as error:
        line = f"{where}: not a text with thoughts ({error!r}); delete the file to report without it"
        raise UserError(line) from None
    # Checked here, where the line is known for the message.
    lengths = {"classes": len(classes) - 1, "base_nll": len(text.base_nll)}
    for number, p in enumerate(passes):
        lengths |= {f"thoughts[{number}].{name}": len(values) for name, values in vars(p).items()}
    for name, length in lengths.items():
        if length != len(tokens) - 1:
            line = f"{where}: {name} does not fit its {len(tokens)} tokens; delete the file to report without it"
            raise UserError(line)
    return text


def extremes(texts: Sequence[Text], count: int = 20) -> tuple[list[Extreme], list[Extreme]]:
    """The tokens helped most and those hurt most, the strongest first, at most `PER_TEXT` of one text each."""
    found = [Extreme(t, j, g) for t, text in enumerate(texts) for j, g in enumerate(text.gains) if g is not None]
    sides: list[list[Extreme]] = []
    for sign in (1, -1):
        kept: list[Extreme] = []
        taken: Counter[int] = Counter()
        # Ties by place, so that the same run gives the same page.
        for e in sorted((e for e in found if sign * e.gain > LEAST), key=lambda e: (-sign * e.gain, e.text, e.entry)):
            taken[e.text] += 1
            if taken[e.text] <= PER_TEXT and len(kept) < count:
                kept.append(e)
        sides.append(kept)
    return sides[0], sides[1]


def class_gains(texts: Sequence[Text]) -> dict[str, tuple[float, int]]:
    """Class -> (mean gain in nats, tokens), over predicted tokens, in the order in which classes appear."""
    found: dict[str, list[float]] = {}
    for text in texts:
        for j, gain in enumerate(text.gains):
            if gain is not None:
                found.setdefault(text.classes[j + 1], []).append(gain)
    return {name: (sum(gains) / len(gains), len(gains)) for name, gains in found.items()}


def scale(texts: Sequence[Text]) -> float:
    """Nats at full colour: the 99th percentile of |gain|."""
    # The 99th percentile: a single outlier would make all other colours pale.
    gains = sorted(abs(g) for text in texts for g in text.gains if g is not None)
    return round(max(LEAST_SCALE, gains[int(0.99 * (len(gains) - 1))] if gains else 0.0), 2)


def pack(texts: Sequence[Text], budget: int) -> tuple[str, int]:
    """As many texts as fit in `budget` bytes, as a string for a page (base64 of gzip of JSON), and their number."""
    # Texts with the extreme tokens always stay: the page's tables link to them.
    ends = extremes(texts)
    needed = {e.text for side in ends for e in side}
    count = min(len(texts), MOST_TEXTS)
    # Packing all texts only to find that they do not fit takes long: a few are packed first.
    count = min(count, int(1.1 * FEW * budget / len(render.packed(_content(texts, range(min(count, FEW)), ((), ()))))))
    while True:
        kept = sorted({*range(count), *needed})
        packed = render.packed(_content(texts, kept, ends))
        if len(packed) <= budget or not count:
            return packed, len(kept)
        # In proportion, and 3% less: compressed size is not quite linear, and every further try packs all again.
        count = min(count - 1, int(count * 0.97 * budget / len(packed)))


def _content(texts: Sequence[Text], kept: Sequence[int], ends: Sequence[Sequence[Extreme]]) -> dict[str, Any]:
    # The format of `viewer.js`. Strings are indices into `vocab`: tokens repeat, above all within thoughts.
    vocab: dict[str, int] = {}

    def ids(words: Sequence[str]) -> list[int]:
        return [vocab.setdefault(word, len(vocab)) for word in words]

    rows = []
    for text in (texts[number] for number in kept):
        passes = [[[ids(t) for t in p.tokens], *map(_short, (p.nll, p.weight, p.reward))] for p in text.passes]
        rows.append([text.id, ids(text.tokens), ids(text.classes), _short(text.base_nll), passes])
    place = {number: at for at, number in enumerate(kept)}
    helped, hurt = ([[place[e.text], e.entry] for e in side] for side in ends)
    gains = [[name, round(mean, 4), count] for name, (mean, count) in class_gains(texts).items()]
    return {"vocab": list(vocab), "texts": rows, "helped": helped, "hurt": hurt, "classes": gains}


def _short(values: Sequence[float | None]) -> list[float | None]:
    # Rounded: every digit of every token counts against the page's budget.
    return [None if value is None else round(value, 3) for value in values]
