"""Texts with their thoughts: read from a run's files, and what each thought brought."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qstar.data.sources import read_jsonl
from qstar.errors import UserError

Numbers = list[float | None]
LEAST = 0.005  # nats: a smaller gain helps or hurts nobody
PER_TEXT = 2  # extremes that one text may give, so that a single odd text does not fill the table


@dataclass(frozen=True)
class Pass:
    """One thought after every token but the last; entry j is about token j + 1."""

    tokens: list[list[str]]  # [N-1][S]; empty where nothing was thought
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
        """[N-1] what the thoughts before token j + 1 brought it: base nll - nll, mean over passes, nats."""
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
    """All texts of one `thoughts/step_NNNNNN.jsonl`.

    Raises:
        UserError: a row without a field, or with lists whose lengths do not fit; the line is named.
    """
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
        raise UserError(
            f"{where}: not a text with thoughts ({error!r}); delete the file to report without it"
        ) from None
    lengths = {"classes": len(classes) - len(tokens), "base_nll": len(text.base_nll) + 1 - len(tokens)}
    for number, p in enumerate(passes):
        for name in ("tokens", "nll", "weight", "reward"):
            lengths[f"thoughts[{number}].{name}"] = len(getattr(p, name)) + 1 - len(tokens)
    wrong = [name for name, difference in lengths.items() if difference]
    if wrong:
        raise UserError(
            f"{where}: {wrong[0]} does not fit its {len(tokens)} tokens; delete the file to report without it"
        )
    return text


def extremes(texts: Sequence[Text], count: int = 20) -> tuple[list[Extreme], list[Extreme]]:
    """The tokens helped most and those hurt most, the strongest first, at most `PER_TEXT` of one text each."""
    found = [Extreme(t, j, g) for t, text in enumerate(texts) for j, g in enumerate(text.gains) if g is not None]
    helped = sorted((e for e in found if e.gain > LEAST), key=lambda e: (-e.gain, e.text, e.entry))
    hurt = sorted((e for e in found if e.gain < -LEAST), key=lambda e: (e.gain, e.text, e.entry))
    return _spread(helped, count), _spread(hurt, count)


def _spread(found: Iterable[Extreme], count: int) -> list[Extreme]:
    taken: dict[int, int] = defaultdict(int)
    kept = []
    for extreme in found:
        taken[extreme.text] += 1
        if taken[extreme.text] <= PER_TEXT:
            kept.append(extreme)
        if len(kept) == count:
            break
    return kept


def class_gains(texts: Sequence[Text]) -> dict[str, tuple[float, int]]:
    """Class -> (mean gain in nats, tokens), over predicted tokens, in the order in which classes appear."""
    found: dict[str, list[float]] = {}
    for text in texts:
        for j, gain in enumerate(text.gains):
            if gain is not None:
                found.setdefault(text.classes[j + 1], []).append(gain)
    return {name: (sum(gains) / len(gains), len(gains)) for name, gains in found.items()}
