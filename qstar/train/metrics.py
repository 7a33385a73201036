"""Metrics of a run: `metrics.jsonl`, TensorBoard, optionally wandb, and tables in the terminal."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qstar.distributed import is_first
from qstar.errors import UserError
from qstar.files import append, as_path, is_remote, record_of, record_path, warn, write

UPLOAD_SECONDS = 10.0  # between two writes of metrics.jsonl into a bucket
KEYS = ("arm", "student", "part", "iteration", "stage", "step")  # identify a row


class Writer:
    """Appends rows to `metrics.jsonl` and scalars to TensorBoard events beside it.

    A run that was killed may repeat a few rows after it resumes: `read` keeps the last row of each `KEYS`.
    """

    def __init__(self, folder: Path, config: dict[str, Any] | None = None):
        """Opens the files, in the first process of several; and wandb, if the run's `config` has options in `log.wandb`."""
        self.folder = as_path(folder)
        self._is_open = False
        self._waiting, self._flushed = b"", 0.0
        self._wandb: Any = None
        self._boards: dict[str, Any] = {}
        self._axes: set[str] = set()
        if not is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content, self._damaged = read_content(self.folder)
        self._hash = hashlib.blake2b(content, digest_size=16)
        self._bytes, self._rows = len(content), content.count(b"\n")
        self._is_open = True
        if content[-1:] not in (b"", b"\n"):  # the partial line of a killed process ends here
            self._waiting = b"\n"
            self.flush()
        if config is not None and (options := (config.get("log") or {}).get("wandb")):
            self._wandb = _wandb_run(self.folder, {"config": config, **options})

    def write(self, *, stage: str, step: int, arm: str = "", iteration: int = 0, **values: Any) -> None:
        """Writes one row. Numbers that are not finite become null (JSON has no NaN)."""
        if not self._is_open:
            return
        row = {"arm": arm, "iteration": iteration, "stage": stage, "step": step, **values}
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._waiting += (json.dumps(clean) + "\n").encode()
        # A bucket writes the whole file again, and takes one write a second.
        frequent = is_remote(self.folder) and stage in ("train", "rl")
        if not frequent or time.monotonic() - self._flushed > UPLOAD_SECONDS:
            self.flush()
        source = "_".join([arm, *(f"{k}_{values[k]}" for k in ("student", "part") if k in values)])
        board = self._board(source)
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in KEYS:
                board.add_scalar(f"{stage}/{name}", value, iteration if stage == "iteration" else step)
        if self._wandb is not None:
            # wandb's own step may not decrease, but every stage counts from 0: each logs its step as the x axis.
            prefix = "/".join(filter(None, (source, stage)))
            if prefix not in self._axes:
                self._wandb.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
                self._axes.add(prefix)
            at = {"step": iteration if stage == "iteration" else step, "iteration": iteration}
            self._wandb.log({f"{prefix}/{k}": v for k, v in {**values, **at}.items()})

    def flush(self) -> None:
        """Writes the rows that wait (in a bucket), then the checksum record."""
        lines, self._waiting = self._waiting, b""
        if not lines:
            return
        # A row is in the file before its checksum is in the record, so that a killed process loses none.
        append(self.folder / "metrics.jsonl", lines)
        self._flushed = time.monotonic()
        self._hash.update(lines)
        self._bytes, self._rows = self._bytes + len(lines), self._rows + lines.count(b"\n")
        record = {"bytes": self._bytes, "rows": self._rows, "blake2b": self._hash.hexdigest(), "damaged": self._damaged}
        path = record_path(self.folder / "metrics.jsonl")
        path.parent.mkdir(exist_ok=True)
        write(path, (json.dumps(record) + "\n").encode(), durable=False)  # there are many rows

    def _board(self, arm: str) -> Any:
        if arm not in self._boards:
            from tensorboardX import SummaryWriter

            self._boards[arm] = SummaryWriter(str(self.folder / "tensorboard" / (arm or "run")))
        return self._boards[arm]

    def close(self) -> None:
        """Flushes everything."""
        self.flush()
        for board in self._boards.values():
            board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(folder: Path, options: dict[str, Any]) -> Any:
    # The id is stored in the folder, so that a run that resumes continues its wandb run, too.
    import wandb  # an optional dependency

    path = folder / "wandb_id.txt"
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(8)
        path.write_text(known + "\n", encoding="utf-8")
    options = {"dir": str(folder), "id": known, "resume": "allow", **options}
    try:
        return wandb.init(**options)
    except Exception as e:  # not logged in, no network, an option that it does not have
        line = " ".join(str(e).split()) or type(e).__name__
        advice = "correct it, or leave config.log.wandb empty"
        raise UserError(f"config.log.wandb: wandb.init refused ({line}); {advice}") from None


def read(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl that can be parsed, the last of each `KEYS`; warns of damage."""
    rows: dict[tuple, dict[str, Any]] = {}
    for line in read_content(as_path(folder))[0].splitlines():
        try:
            row = json.loads(line)
            known = [type(row[k]) for k in ("arm", "iteration", "stage", "step")]
            key = tuple(map(row.get, KEYS))
            if known not in ([str, int, str, int], [str, int, str, type(None)]):
                continue
            # Popped, so that the last row of a key also has the place of the last.
            rows.pop(key, None)
        except (ValueError, KeyError, TypeError, RecursionError):  # a damaged or partial line
            continue
        rows[key] = row
    return list(rows.values())


def read_content(folder: Path) -> tuple[bytes, bool]:
    """Returns the content of metrics.jsonl, and whether it is or was damaged (with a warning)."""
    path = folder / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    record = record_path(path)
    if not record.exists():
        return content, False  # nothing was written yet
    try:
        found = json.loads(record.read_bytes())
        known = content[: found["bytes"]]  # after a kill the file may hold a row more than the record
        damaged = found.pop("damaged") or found != record_of(known)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        damaged = True
    if damaged:
        warn(f"{path}: damaged; rows of metrics may be missing or wrong (models and answers are not read from it)")
    return content, damaged


def show_table(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows of equal keys as a table; a table wider than the terminal is split, or printed as a column."""
    if not rows:
        return
    widths = {name: max(len(name), *(len(_cell(row[name])) for row in rows)) + 2 for name in rows[0]}
    if sum(widths.values()) > console.width + 2:
        if len(rows) == 1:
            return show_table(console, title, [{"": name, "value": _cell(value)} for name, value in rows[0].items()])
        first, *others = rows[0]
        fits: list[str] = []
        used = widths[first]
        for name in others:
            used += widths[name]
            if fits and used > console.width + 2:
                break
            fits.append(name)
        if fits != others:
            show_table(console, title, [{k: row[k] for k in (first, *fits)} for row in rows])
            return show_table(console, "", [{k: v for k, v in row.items() if k not in fits} for row in rows])
    plain: dict[str, Any] = dict(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table = Table(title=escape(title) or None, title_justify="left", title_style="bold", header_style="bold", **plain)
    for name in rows[0]:
        text = isinstance(rows[0][name], str) and not rows[0][name][:1].isdigit()
        table.add_column(escape(name), justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(_cell(v)) for v in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
