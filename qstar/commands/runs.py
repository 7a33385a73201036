"""`qstar runs`: lists run folders."""

from __future__ import annotations

import json

from qstar.files import as_path
from qstar.flags import Parser


def main(argv: list[str]) -> int:
    """qstar runs [DIR] [--json]"""
    p = Parser("runs", "Lists run folders: method, status, headline number, date, size of the model.", device=False)
    p.flag("dir DIR", "folder that holds run folders (default: runs)", default="runs", nargs="?")
    p.switch("--json", "one JSON object per run instead of a table")
    a = p.parse_args(argv)
    from rich.console import Console

    from qstar.report.listing import as_table, list_runs
    from qstar.train.metrics import show_table

    rows = list_runs(as_path(a.dir))
    if a.json:
        for row in rows:
            print(json.dumps(row))
    elif rows:
        show_table(Console(), "", as_table(rows))
        for row in rows:
            if "reason" in row:
                print(row["reason"])
    else:
        print(f"{a.dir}: holds no run folder")
    return 0
