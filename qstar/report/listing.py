"""Lists of run folders: method, status, headline number, date and size of each, without JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qstar.errors import UserError, require
from qstar.report import stats
from qstar.report.read import find_runs, read_run


def list_runs(root: Path) -> list[dict[str, Any]]:
    """One row per run folder below `root`, the newest first.

    A folder that cannot be read (another format version, a broken file) has the status "unreadable" and the reason.

    Raises:
      UserError: `root` is no folder.
    """
    require((root.is_dir(), f"{root}: no such folder; name the one that holds the run folders"))
    rows = [_row(folder, root) for folder in find_runs(root)]
    return sorted(rows, key=lambda row: row["started"] or "", reverse=True)


def _row(folder: Path, root: Path) -> dict[str, Any]:
    name = str(folder.relative_to(root)) if folder != root else folder.resolve().name
    row: dict[str, Any] = {"run": name, "method": None, "status": "", "measure": None, "arm": None}
    row |= dict.fromkeys(("value", "low", "high", "started", "seconds", "parameters"))
    try:
        run = read_run(folder, rollouts=False)
    except (UserError, OSError) as error:
        return row | {"status": "unreadable", "reason": str(error)}
    row |= {"method": run.method, "status": run.status}
    row |= {key: run.environment.get(key) for key in ("started", "seconds", "parameters")}
    if found := stats.numbers(run):
        row |= found[0]._asdict()
    return row


def as_table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows as a terminal shows them."""
    return [
        {
            "run": row["run"],
            "method": row["method"] or "-",
            "status": row["status"],
            "result": f"{stats.with_interval((row['value'], row['low'], row['high']))} {row['measure']}"
            if row["value"] is not None
            else "-",
            "started": (row["started"] or "-")[:16].replace("T", " "),
            "size": stats.size(row["parameters"]),
        }
        for row in rows
    ]
