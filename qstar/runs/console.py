"""Terminal output of a run: lines and progress bars, or plain lines where the output is a file."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from qstar import distributed
from qstar.types import Rollout

# Fields of a run that hold a section of its config, and the section.
SECTIONS = {n: n for n in "train sample base thoughts sft pairs rpo dpo orm prm select distil distil_train".split()}
SECTIONS |= {"evaluation": "evaluate", "sight": "evaluate"}
SECONDS_A_LINE = 60  # of progress, where it goes to a file
FIRST_LINE = 15  # seconds until the first


class Screen:
    """Prints on `console`, from process 0 alone."""

    console: Console

    def settings(self) -> dict[str, Any]:
        """Returns the sections of the config that this run has read, as their settings classes."""
        fields = {f.name.removesuffix("_settings"): getattr(self, f.name) for f in dataclasses.fields(self)}
        return {section: fields[name] for name, section in SECTIONS.items() if fields.get(name) is not None}

    def say(self, text: str) -> None:
        """Prints a line (process 0)."""
        if distributed.is_first():
            self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar with rate and time left; on a plain stream, a line a minute.

        Yields `update(done, extra)`. An empty `extra` says what earlier processes did (None: so many more samples; {}: up to
        this step); rate and time left are of what this process does.
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
            offset, said, resumed = 0, began - SECONDS_A_LINE + FIRST_LINE, 0
            pending = ""  # to be said when something is done

            def update(done: int, extra: Any = None) -> None:
                nonlocal began, offset, said, resumed, pending
                now = time.perf_counter()
                if not extra:
                    offset = resumed = offset + done
                    began, pending = now, f"resumed at {'' if extra is None else 'step '}{resumed:,}" if resumed else ""
                    progress.reset(job, completed=resumed, rate="", note=pending)
                    return
                if pending:
                    self.say(f"{what:>14}  {pending} of {total:,}")
                    pending = ""
                if isinstance(extra, Rollout):  # rounds count from 1 again
                    offset += 1
                    done, note = offset, one_line(extra)
                else:
                    note = f"loss {extra['loss']:.4f}"
                speed = (done - resumed) / max(now - began, 1e-9)
                rate = f"{speed:,.1f}/s"
                progress.update(job, completed=done, rate=rate, note=note)
                if plain and now - said >= SECONDS_A_LINE:
                    said = now
                    left = datetime.timedelta(seconds=round((total - done) / max(speed, 1e-9)))
                    loss = note if note.startswith("loss") else ""
                    clock = f"{datetime.datetime.now():%H:%M}"
                    self.say(f"{what:>14}  {clock}  {done:,} of {total:,}  {rate}  {left} left  {loss}".rstrip())

            yield update


def one_line(r: Rollout, width: int = 90) -> str:
    """The end of a prompt and its completion, on a line."""
    text = f"{r.prompt[-60:]}{r.completion}".replace("\n", "⏎")
    return text if len(text) <= width else text[: width - 1] + "…"
