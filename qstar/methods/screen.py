"""What a run shows on the terminal: lines and progress bars, or plain lines where it goes to a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from qstar import processes
from qstar.types import Rollout

SECONDS_A_LINE = 60  # of progress, where it goes to a file


class Screen:
    """Prints on `console`, from process 0 alone."""

    console: Console

    def say(self, text: str) -> None:
        """Prints a line (process 0)."""
        if processes.is_first():
            self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar with rate and time left; yields `update(done, ...)`. On a plain stream, a line a minute."""
        columns = (
            SpinnerColumn(),
            TextColumn(f"{what:>12}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        )
        plain = not self.console.is_terminal
        began = time.perf_counter()
        with Progress(*columns, console=self.console, transient=True, disable=plain, expand=True) as progress:
            job = progress.add_task(what, total=total, rate="", note="")
            offset, said = 0, began

            def update(done: int, extra: Any = None) -> None:
                nonlocal offset, said
                if isinstance(extra, Rollout):  # rounds count from 1 again
                    offset += 1
                    done, note = offset, one_line(extra)
                else:
                    note = f"loss {extra['loss']:.4f}" if extra else ""
                now = time.perf_counter()
                rate = f"{done / max(now - began, 1e-9):,.1f}/s"
                progress.update(job, completed=done, rate=rate, note=note)
                if plain and now - said >= SECONDS_A_LINE:
                    said = now
                    loss = note if note.startswith("loss") else ""
                    self.say(f"{what:>14}  {done:,} of {total:,}  {rate}  {loss}".rstrip())

            yield update


def one_line(r: Rollout, width: int = 90) -> str:
    """The end of a prompt and its completion, on a line."""
    text = f"{r.prompt[-60:]}{r.completion}".replace("\n", "⏎")
    return text if len(text) <= width else text[: width - 1] + "…"
