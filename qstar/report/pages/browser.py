"""The searchable list of attempts on a page: what the script `rationales.js` reads."""

from __future__ import annotations

import json
from typing import Any

from qstar.report import render, stats
from qstar.report.rationales import Kind, Row, kind
from qstar.report.read import Run

RATIONALE_BYTES = 2_200_000  # of JSON, before it is packed
LONGEST_TEXT = 3000  # characters of a prompt or a completion; the files keep the rest
_FILTERS = ("arm", "loop", *Kind._fields)
_TEXTS = ("id", "prompt", "hint", "completion", "gold", "answer", "truncated")


def packed(run: Run) -> str:
    """`embedded`, as text for a page."""
    return render.packed(embedded(run))


def embedded(run: Run) -> dict[str, Any]:
    """Counts of the attempts of every kind, and as many of the sampled rows as there is room for, at least one of a kind."""
    found = [(arm.name, n, attempts) for arm in run.arms for n, attempts in arm.attempts.items()]
    rows = []
    for arm, n, attempts in found:
        # An equal part for every arm and iteration: the first ones would otherwise leave nothing for the last.
        room, kinds = RATIONALE_BYTES / len(found), set()
        for row in attempts.shown:
            values = [arm, n, *kind(row), *_texts(row)]
            room -= len(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))
            if room >= 0 or kind(row) not in kinds:
                rows.append(values)
            kinds.add(kind(row))
    return {
        "unit": stats.unit(run),
        "filters": _FILTERS,
        "columns": (*_FILTERS, *_TEXTS),
        "arms": {arm.name: stats.arm_title(run, arm) for arm in run.arms},
        "groups": {key.group: stats.group_label(run, key.group) for *_, a in found for key in a.counts if key.group},
        "counts": [[arm, n, *key, count] for arm, n, attempts in found for key, count in attempts.counts.items()],
        "rows": rows,
    }


def _texts(row: Row) -> list[Any]:
    # The values of _TEXTS. Of a long prompt the end is kept, where the question is; of a completion the beginning.
    prompt, completion = str(row.get("prompt") or ""), str(row.get("completion") or "")
    dropped = max(0, len(prompt) - LONGEST_TEXT)
    if dropped:
        prompt = "…" + prompt[dropped + 1 :]
    if len(completion) > LONGEST_TEXT:
        completion = f"{completion[:LONGEST_TEXT]}… ({len(completion) - LONGEST_TEXT:,} more characters)"
    # Positions move with what was dropped; a hint in the dropped part has none.
    hint = [[start - dropped, end - dropped] for start, end in row.get("hint", ()) if start > dropped or not dropped]
    name, gold, answer = (None if row.get(key) is None else str(row[key]) for key in ("problem_id", "gold", "answer"))
    return [name or "", prompt, hint, completion, gold or "", answer, bool(row.get("truncated"))]
