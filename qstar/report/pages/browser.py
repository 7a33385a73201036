"""The searchable list of attempts on a page: what the script `rationales.js` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from qstar.report import stats
from qstar.report.rationales import Kind, Row, kind
from qstar.report.read import Run

RATIONALE_BYTES = 2_200_000  # of the page's about 3 MB
LONGEST_TEXT = 3000  # characters of a prompt or a completion; the files keep the rest
_FILTERS = ("arm", "loop", *Kind._fields)
_COLUMNS = (*_FILTERS, "id", "prompt", "hint", "completion", "gold", "answer", "truncated")


def embedded(run: Run) -> dict[str, Any]:
    """Rows and counts of the attempts; the fields that filters use are indices into `values`."""
    found = [(arm.name, n, attempts) for arm in run.arms for n, attempts in arm.attempts.items()]
    budget = RATIONALE_BYTES // max(1, len(found))
    counts = [[arm, n, *key, count] for arm, n, attempts in found for key, count in attempts.counts.items()]
    rows = [row for arm, n, attempts in found for row in _affordable(arm, n, attempts.shown, budget)]
    values = {field: _distinct(row[at] for row in counts) for at, field in enumerate(_FILTERS)}
    # 1 == True in Python: values are told apart by their types, too.
    places = {field: {(type(v), v): at for at, v in enumerate(known)} for field, known in values.items()}
    for row in (*counts, *rows):
        row[: len(_FILTERS)] = [places[field][type(row[at]), row[at]] for at, field in enumerate(_FILTERS)]
    return {
        "unit": stats.unit(run),
        "columns": _COLUMNS,
        "values": values,
        "arms": {arm.name: stats.arm_title(run, arm) for arm in run.arms},
        "groups": {group: stats.group_label(run, group) for group in values["group"] if group},
        "counts": counts,
        "rows": rows,
    }


def _affordable(arm: str, iteration: int, shown: Sequence[Row], budget: int) -> list[list[Any]]:
    """The first rows of a sample that fit in so many bytes, but at least one of every kind."""
    rows: list[list[Any]] = []
    kinds: set[tuple[Any, ...]] = set()
    spent = 0
    for row in shown:
        packed = _packed(arm, iteration, row)
        written = json.dumps(packed, ensure_ascii=False)
        spent += len(written.encode("utf-8", "surrogatepass")) + 5 * written.count("<")  # "<" is written \u003c
        key = tuple(packed[2 : len(_FILTERS)])
        if spent <= budget or key not in kinds:
            rows.append(packed)
        kinds.add(key)
    return rows


def _packed(arm: str, iteration: int, row: Row) -> list[Any]:
    """A row in the order of _COLUMNS. Of a long prompt the end is kept (the question), else the beginning."""
    prompt, completion = _text(row.get("prompt")), _text(row.get("completion"))
    dropped = max(0, len(prompt) - LONGEST_TEXT)
    if dropped:
        prompt = "…" + prompt[dropped + 1 :]
    if len(completion) > LONGEST_TEXT:
        completion = f"{completion[:LONGEST_TEXT]}… ({len(completion) - LONGEST_TEXT:,} more characters)"
    hint = [[start - dropped, end - dropped] for start, end in row.get("hint", ()) if start > dropped or not dropped]
    answer = None if row.get("answer") is None else _text(row["answer"])
    texts = [_text(row.get("problem_id")), prompt, hint, completion, _text(row.get("gold")), answer]
    return [arm, iteration, *kind(row), *texts, bool(row.get("truncated"))]


def _text(value: Any) -> str:
    """As text that UTF-8 can hold: a byte-level model may write half a surrogate pair."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def _distinct(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values), key=lambda v: (str(type(v)), v if isinstance(v, (int, float)) else 0, str(v)))
