"""The searchable list of attempts on a page: what the script `browser.js` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qstar.report import stats
from qstar.report.rationales import Kind, Row, kind
from qstar.report.read import Run

RATIONALE_BYTES = 2_200_000  # of JSON, before it is packed
LONGEST_TEXT = 3000  # characters of a prompt or a completion; the files keep the rest
_FILTERS = ("arm", "loop", *Kind._fields)
_TEXTS = ("id", "prompt", "hint", "completion", "gold", "answer", "truncated")


def embedded(run: Run) -> dict[str, Any]:
    """Counts of the attempts of every kind, and as many of the sampled rows as there is room for, at least one of a kind."""
    found = [(arm.name, n, attempts) for arm in run.arms for n, attempts in arm.attempts.items()]
    parts = [[[arm, n, *kind(row), *_texts(row)] for row in attempts.shown] for arm, n, attempts in found]
    return {
        "unit": stats.unit(run),
        "filters": _FILTERS,
        "columns": (*_FILTERS, *_TEXTS),
        "arms": {arm.name: stats.arm_title(run, arm) for arm in run.arms},
        "groups": {key.group: stats.group_label(run, key.group) for *_, a in found for key in a.counts if key.group},
        "counts": [[arm, n, *key, count] for arm, n, attempts in found for key, count in attempts.counts.items()],
        "rows": fitting(parts, RATIONALE_BYTES, lambda values: tuple(values[: len(_FILTERS)])),
    }


def fitting(
    parts: Sequence[Iterable[list[Any]]], limit: int, kind_of: Callable[[list[Any]], Any] = lambda values: None
) -> list[list[Any]]:
    """The rows of the parts that fit into `limit` bytes of JSON, and of every part at least one row of a kind."""
    rows = []
    for part in parts:
        # An equal share for every part: the first ones would otherwise leave nothing for the last.
        room, kinds = limit / len(parts), set()
        for values in part:
            room -= len(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))
            if room >= 0 or kind_of(values) not in kinds:
                rows.append(values)
            kinds.add(kind_of(values))
    return rows


def shortened(row: Row) -> tuple[str, str]:
    """Prompt and completion for a page: of a long prompt the end, where the question is; of a completion the beginning."""
    # Those of models without a tokenizer are lists of ids.
    prompt, completion = (
        x if isinstance(x, str) else json.dumps(x) for x in (row.get("prompt") or "", row.get("completion") or "")
    )
    if len(prompt) > LONGEST_TEXT:
        prompt = "…" + prompt[1 - LONGEST_TEXT :]
    if len(completion) > LONGEST_TEXT:
        completion = f"{completion[:LONGEST_TEXT]}… ({len(completion) - LONGEST_TEXT:,} more characters)"
    return prompt, completion


def _texts(row: Row) -> list[Any]:
    # The values of _TEXTS.
    prompt, completion = shortened(row)
    dropped = max(0, len(row.get("prompt") or "") - LONGEST_TEXT)
    # Positions move with what was dropped; a hint in the dropped part has none.
    hint = [[start - dropped, end - dropped] for start, end in row.get("hint", ()) if start > dropped or not dropped]
    name, gold, answer = (None if row.get(key) is None else str(row[key]) for key in ("problem_id", "gold", "answer"))
    return [name or "", prompt, hint, completion, gold or "", answer, bool(row.get("truncated"))]
