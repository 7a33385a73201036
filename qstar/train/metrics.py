"""Where numbers go: `metrics.jsonl`, TensorBoard, optionally wandb, and a table in the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qstar.processes import is_first

KEYS = ("arm", "student", "part", "iteration", "stage", "step")  # rows that differ in one are different rows


class Writer:
    """Appends rows to `metrics.jsonl` and scalars to TensorBoard events beside it.

    A run that was killed may repeat a few rows after it resumes: readers keep the last row of each `KEYS`; `read` does.
    """

    def __init__(self, folder: Path, *, wandb: dict[str, Any] | None = None):
        """Opens the files, in the first process of several; `wandb` (keyword arguments of `wandb.init`) also logs there."""
        self.folder = Path(folder)
        self._file = self._wandb = None
        self._boards: dict[str, Any] = {}
        if not is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = open(path, "a", buffering=1, encoding="utf-8")
        if torn:  # a killed process was writing that line: the next row must not become part of it
            self._file.write("\n")
        if wandb is not None:
            import wandb as wandb_module  # an extra: most runs do without

            self._wandb = wandb_module.init(dir=str(self.folder), **wandb)

    def write(self, *, stage: str, step: int, arm: str = "", iteration: int = 0, **values: Any) -> None:
        """Writes one row. Numbers that are not finite become null (JSON has no NaN)."""
        if self._file is None:
            return
        row = {"arm": arm, "iteration": iteration, "stage": stage, "step": step, **values}
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        source = "_".join([arm, *(f"{k}_{values[k]}" for k in ("student", "part") if k in values)])
        board = self._board(source)
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in KEYS:
                board.add_scalar(f"{stage}/{name}", value, iteration if stage == "iteration" else step)
        if self._wandb is not None:
            self._wandb.log({f"{source}/{stage}/{k}": v for k, v in values.items()})

    def _board(self, arm: str) -> Any:
        if arm not in self._boards:
            from tensorboardX import SummaryWriter

            self._boards[arm] = SummaryWriter(str(self.folder / "tensorboard" / (arm or "run")))
        return self._boards[arm]

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
        for board in self._boards.values():
            board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl, the last of each `KEYS`, in file order."""
    path = Path(folder) / "metrics.jsonl"
    rows: dict[tuple, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line a killed process was writing
            continue
        key = tuple(map(row.get, KEYS))
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


def show_table(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows of equal keys as a table, in as few columns of the terminal as they take."""
    if not rows:
        return
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in rows[0]:
        text = isinstance(rows[0][name], str) and not rows[0][name][:1].isdigit()
        table.add_column(name, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(v) for v in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
