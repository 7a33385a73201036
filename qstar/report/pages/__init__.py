"""Pages of runs: one module per method that collects the data of its template, `write_report` and `watch`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2

from qstar.errors import UserError, require
from qstar.files import Damaged, as_path, below, read, record_path
from qstar.report import render
from qstar.report.pages import comparison, guided_cot, pairs, quiet_star, star
from qstar.report.read import read_config, read_run
from qstar.runs.access import is_running
from qstar.train import metrics

MARK = b'<meta name="generator" content="qstar">'  # by which a page of qstar is known
# Of other methods: star.page.
_PAGES = {"quiet_star": quiet_star.page, "guided_cot": guided_cot.page, **dict.fromkeys(pairs.METHODS, pairs.page)}


def write_report(run_folder: str | os.PathLike, refresh: int = 0) -> Path:
    """Writes `report.html` into a run's folder, atomically, and returns its path. The run may still go on.

    Args:
      refresh: seconds after which the page reloads itself in a browser; 0: never.

    Raises:
      UserError: the folder is missing or not a run's, a file in it is broken, or it cannot be written to.
    """
    folder, config = read_config(run_folder)
    try:
        text = _PAGES.get(str(config["method"]), star.page)(dataclasses.replace(read_run(folder), refresh=refresh))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.UndefinedError) as error:
        if (culprit := _unverified(folder)) is None:
            # The files are as the run wrote them: a bug of qstar, which keeps its traceback.
            raise
        line = f"{culprit}: not as a run writes it ({type(error).__name__}: {error}); delete the file or mend it"
        raise UserError(line) from error
    return _write(folder / "report.html", text)


def compare_runs(folders: Sequence[str | os.PathLike], out: Path, refresh: int = 0) -> Path:
    """Writes the page that compares several runs, and returns its path; `refresh` as in `write_report`.

    Raises:
      UserError: as `write_report`; a run is named twice; or `out` is a file that is no page of qstar.
    """
    paths = [as_path(folder).resolve() for folder in folders]
    twice = next((folder for folder, path in zip(folders, paths) if paths.count(path) > 1), None)
    require((twice is None, f"report: {twice} is named twice; name different runs"))
    ours = not out.exists() or (out.is_file() and MARK in out.read_bytes()[:1000])
    require((ours, f"--out={out}: is there, and no page of qstar; name another file"))
    return _write(out, comparison.page([read_run(folder, rollouts=False) for folder in folders], refresh))


def watch(folders: Sequence[str | os.PathLike], write: Callable[[int], Path], seconds: int) -> Path:
    """Writes a page every so many seconds while one of the runs goes on, and a last time without its refresh."""
    places = [read_config(folder)[0] for folder in folders]
    running = lambda: any(map(is_running, places))  # noqa: E731
    try:
        while running():
            write(seconds)
            for _ in range(seconds):
                if running():
                    time.sleep(1)
    finally:
        # Also after Ctrl-C: a page that nobody writes any more does not reload itself.
        path = write(0)
    return path


def _write(path: Path, text: str) -> Path:
    try:
        render.write(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def _unverified(folder: Path) -> Path | None:
    # A file without a checksum record, or that differs from it, may have been edited: the likely cause of the error.
    for path in (p for p in below(folder) if ".json" in p.name and ".checksums" not in p.parts):
        try:
            damaged = metrics.read_content(folder)[1] if path.name == "metrics.jsonl" else read(path) is None
        except Damaged:
            damaged = True
        if damaged or not record_path(path).exists():
            return path
    return None
