"""Pages of runs: one module per method that collects the data of its template, and `write_report`."""

from __future__ import annotations

import os
from pathlib import Path

from qstar.errors import UserError
from qstar.files import Damaged, read, record_path
from qstar.report import render
from qstar.report.pages import guided_cot, quiet_star, star
from qstar.report.read import read_config, read_run
from qstar.train import metrics

_PAGES = {"quiet_star": quiet_star.page, "guided_cot": guided_cot.page}  # of other methods: star.page


def write_report(run_folder: str | os.PathLike) -> Path:
    """Writes `report.html` into a run's folder, atomically, and returns its path. The run may still go on.

    Raises:
      UserError: the folder is missing or not a run's, a file in it is broken, or it cannot be written to.
    """
    folder, config = read_config(run_folder)
    try:
        text = _PAGES.get(str(config["method"]), star.page)(read_run(folder))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if (culprit := _unverified(folder)) is None:
            # The files are as the run wrote them: a bug of qstar, which keeps its traceback.
            raise
        line = f"{culprit}: not as a run writes it ({type(error).__name__}: {error}); delete the file or mend it"
        raise UserError(line) from error
    path = folder / "report.html"
    try:
        render.write(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def _unverified(folder: Path) -> Path | None:
    # A file without a checksum record, or that differs from it, may have been edited: the likely cause of the error.
    for path in sorted(p for p in folder.rglob("*.json*") if ".checksums" not in p.parts and p.is_file()):
        try:
            damaged = metrics.read_content(folder)[1] if path.name == "metrics.jsonl" else read(path) is None
        except Damaged:
            damaged = True
        if damaged or not record_path(path).exists():
            return path
    return None
