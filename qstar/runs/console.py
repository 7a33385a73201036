"""Terminal output of a run: lines and progress bars, or plain lines where the output is a file."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from qstar import distributed
from qstar.train.metrics import show_table
from qstar.types import Rollout

# Seconds between lines of progress where the output is a file, and until the first one: early, so that a log soon shows
# whether a run works and how long it takes.
SECONDS_PER_LINE = 60
FIRST_LINE = 15


class Screen:
    """Prints on `console`, from process 0 alone."""

    console: Console

    def say(self, text: str) -> None:
        """Prints a line (process 0)."""
        if distributed.is_first():
            self.console.print(text, highlight=False, soft_wrap=True)

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Prints rows of equal keys as a table (process 0)."""
        if distributed.is_first():
            show_table(self.console, title, rows)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[..., None]]:
        """Shows a progress bar with rate and time left, or prints a line per minute where the output is a file.

        Yields `update(done, extra)`. `extra` is a Rollout (one more is done) or metrics with a loss; where it is empty
        the work was done by an earlier process: None counts `done` more samples, {} sets the step.
        """
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
            offset, printed, resumed = 0, began - SECONDS_PER_LINE + FIRST_LINE, 0
            pending = ""  # printed together with the first new work

            def update(done: int, extra: Any = None) -> None:
                nonlocal began, offset, printed, resumed, pending
                now = time.perf_counter()
                if not extra:
                    # Rate and time left are of this process' work: steps of an earlier one took no time here.
                    offset = resumed = offset + done
                    began, pending = now, f"resumed at {'' if extra is None else 'step '}{resumed:,}" if resumed else ""
                    progress.reset(job, completed=resumed, rate="", note=pending)
                    return
                if pending:
                    self.say(f"{what:>14}  {pending} of {total:,}")
                    pending = ""
                # Every round of samples counts `done` from 1 again.
                if isinstance(extra, Rollout):
                    offset += 1
                    done, note = offset, one_line(extra)
                else:
                    note = f"loss {extra['loss']:.4f}"
                speed = (done - resumed) / max(now - began, 1e-9)
                # Updates of a large model take longer than a second.
                rate = f"{speed:,.1f}/s" if speed >= 1 else f"{1 / max(speed, 1e-9):,.1f} s each"
                progress.update(job, completed=done, rate=rate, note=note)
                if plain and now - printed >= SECONDS_PER_LINE:
                    printed = now
                    left = f"  {rate}  {datetime.timedelta(seconds=round((total - done) / max(speed, 1e-9)))} left"
                    # The first few take as long as compilation does, which says nothing about the others.
                    left = left if (done - resumed) * 50 >= total - resumed else ""
                    loss = f"  {note}" if note.startswith("loss") else ""
                    self.say(f"{what:>14}  {datetime.datetime.now():%H:%M}  {done:,} of {total:,}{left}{loss}")

            yield update


def one_line(r: Rollout, width: int = 90) -> str:
    """Returns the end of a prompt and its completion on a line."""
    text = f"{r.prompt[-60:]}{r.completion}".replace("\n", "⏎")
    return text if len(text) <= width else text[: width - 1] + "…"
