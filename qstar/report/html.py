"""One self-contained HTML page of a run: no network, no dependencies, light and dark, wide and narrow."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qstar.errors import UserError
from qstar.files import Damaged, read, record_path
from qstar.report import appendix, frames, guided, sections, shell
from qstar.report.markup import Safe, tag
from qstar.report.pieces import note, section
from qstar.report.quiet.page import page as quiet_page
from qstar.report.quiet.run import read_quiet_run
from qstar.report.rationales import Row, kind
from qstar.report.reinforce import reinforce_section
from qstar.report.run import Run, read_config, read_run
from qstar.report.selection import selection_section
from qstar.train import metrics

RATIONALE_BYTES = 2_200_000  # of the page's about 3 MB
LONGEST_TEXT = 3000  # characters of a prompt or a completion; the files keep the rest
_FILTERS = ("arm", "loop", "verdict", "reason", "hinted", "group", "valid")
_COLUMNS = (*_FILTERS, "id", "prompt", "hint", "completion", "gold", "answer", "truncated")


def write_report(run_folder: str | os.PathLike) -> Path:
    """Writes `report.html` into a run's folder, all at once, and returns its path. The run may still go on.

    Raises:
        UserError: the folder is missing or not a run's, a file in it is broken, or it cannot be written to.
    """
    folder, config = read_config(run_folder)
    pages = {
        "quiet_star": lambda: quiet_page(read_quiet_run(folder)),
        "guided_cot": lambda: guided.page(guided.read_guided(folder)),
    }
    method = config["method"]
    try:
        text = (pages.get(method) if isinstance(method, str) and method in pages else lambda: page(read_run(folder)))()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if (culprit := _unverified(folder)) is None:
            raise  # the files are as the run wrote them: a bug of ours
        line = f"{culprit}: not as a run writes it ({type(error).__name__}: {error}); delete the file or mend it"
        raise UserError(line) from error
    path = folder / "report.html"
    try:
        shell.write(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def _unverified(folder: Path) -> Path | None:
    """The first file of a run that has no checksum record, or differs from it."""
    for path in sorted(p for p in folder.rglob("*.json*") if ".checksums" not in p.parts and p.is_file()):
        try:
            if path.name == "metrics.jsonl":
                damaged = metrics.read_content(folder)[1]
            else:
                damaged = read(path) is None
        except Damaged:
            damaged = True
        if damaged or not record_path(path).exists():
            return path
    return None


def page(run: Run) -> str:
    """The page of a STaR run as text."""
    parts = [
        sections.loop_section(run),
        selection_section(run),
        sections.accuracy_section(run),
        sections.outcome_section(run),
        sections.audit_section(run),
        reinforce_section(metrics.read(run.folder)) if run.method == "rl" else None,
        rationale_section(run),
        appendix.training_section(run),
        appendix.gates_section(run),
        appendix.numbers_section(run),
        appendix.config_section(run),
    ]
    return shell.document(run.name, _header(run), parts)


def _header(run: Run) -> list[Safe | None]:
    chip = {"finished": "ok", "stopped": "bad"}.get(run.status, "open")
    return [
        tag("h1", f"{run.name} · {run.method}", tag("span", run.status, class_=f"chip {chip}")),
        _headline(run),
        appendix.provenance(run.environment),
        sections.stopped(run),
        sections.summary(run),
    ]


def _headline(run: Run) -> Safe:
    """The sentence, its intervals in small print."""
    pieces = re.split(r"( \([^)]*–[^)]*\))", frames.headline(run))
    return tag("p", *(tag("small", p) if n % 2 else p for n, p in enumerate(pieces)), class_="headline")


def rationale_section(run: Run) -> Safe | None:
    """The searchable rationales: data as JSON, drawn by the page's script."""
    data = embedded(run)
    if not data["counts"]:
        return None
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # "<" can only stand inside JSON strings: escaped there, no "</script>" or "<!--" can end the element.
    written = written.replace("<", "\\u003c")
    return section(
        "rationales",
        "Read the rationales",
        note("What the models wrote. Open a line for the whole of it; hints are marked in the prompt."),
        tag("div", id="browser"),
        tag("noscript", note("This list needs JavaScript; everything else on the page does not.")),
        tag("script", Safe(written), type="application/json", id="rationale-data"),
    )


def embedded(run: Run) -> dict[str, Any]:
    """What the rationale browser needs: rows and counts, whose filter fields are indices into `values`."""
    groups = [(arm, loop, attempts) for arm in run.arms for loop, attempts in arm.attempts.items()]
    budget = RATIONALE_BYTES // max(1, len(groups))
    counts = [
        [arm.name, loop, *(getattr(kind, f) for f in _FILTERS[2:]), count]
        for arm, loop, attempts in groups
        for kind, count in attempts.counts.items()
    ]
    rows = [row for arm, loop, attempts in groups for row in _affordable(arm.name, loop, attempts.shown, budget)]
    values = {field: _distinct(row[at] for row in counts) for at, field in enumerate(_FILTERS)}
    for row in (*counts, *rows):
        row[: len(_FILTERS)] = [_index(values[field], row[at]) for at, field in enumerate(_FILTERS)]
    names = {group: frames.group_label(run, group) for group in values["group"] if group}
    return {
        "method": run.method,
        "columns": _COLUMNS,
        "values": values,
        "groups": names,
        "counts": counts,
        "rows": rows,
    }


def _affordable(arm: str, loop: int, shown: Sequence[Row], budget: int) -> list[list[Any]]:
    """The first rows of a sample that fit in so many bytes, but at least one of every kind."""
    rows: list[list[Any]] = []
    kinds: set[tuple[Any, ...]] = set()
    spent = 0
    for row in shown:
        packed = _packed(arm, loop, row)
        spent += len(json.dumps(packed, ensure_ascii=False).encode("utf-8", "surrogatepass")) + 5 * str(packed).count(
            "<"
        )
        key = tuple(packed[2 : len(_FILTERS)])
        if spent <= budget or key not in kinds:
            rows.append(packed)
        kinds.add(key)
    return rows


def _packed(arm: str, loop: int, row: Row) -> list[Any]:
    """A row in the order of _COLUMNS. Of a long prompt the end is kept (the question), else the beginning."""
    prompt, completion = _text(row.get("prompt")), _text(row.get("completion"))
    dropped = max(0, len(prompt) - LONGEST_TEXT)
    if dropped:
        prompt = "…" + prompt[dropped + 1 :]
    if len(completion) > LONGEST_TEXT:
        completion = f"{completion[:LONGEST_TEXT]}… ({len(completion) - LONGEST_TEXT:,} more characters)"
    hint = [[start - dropped, end - dropped] for start, end in row.get("hint", ()) if start > dropped or not dropped]
    answer = None if row.get("answer") is None else _text(row["answer"])
    return [
        arm,
        loop,
        *kind(row),
        _text(row.get("problem_id")),
        prompt,
        hint,
        completion,
        _text(row.get("gold")),
        answer,
        bool(row.get("truncated")),
    ]


def _text(value: Any) -> str:
    """As text that UTF-8 can hold: a byte-level model may write half a surrogate pair."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def _distinct(values: Any) -> list[Any]:
    return sorted(set(values), key=lambda v: (str(type(v)), v if isinstance(v, (int, float)) else 0, str(v)))


def _index(values: list[Any], value: Any) -> int:
    return next(at for at, other in enumerate(values) if other == value and type(other) is type(value))
