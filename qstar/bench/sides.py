"""The sides of a comparison, each in a process of its own: they live through the whole run and take turns.

In one process they would share an allocator, and the threads of the one, which wait for work by spinning, would take time
from the other. Here each has what its users have: qstar starts as the command line does, PyTorch as it comes.

A side is made by a function that, called in the side's process, returns what is to be called: one function, or a dict.
Arguments and results go through JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qstar.errors import UserError

SIDES = ("qstar", "torch")


class Sides:
    """Two processes that do what they are told, one at a time. A context manager: at its end the processes end."""

    def __init__(self, device: str = "auto"):
        """Starts both. device: where qstar's side computes."""
        command = [sys.executable, "-m", "qstar.bench.sides"]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        self._processes = {
            name: subprocess.Popen(
                [*command, name, device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
            for name in SIDES
        }

    def __enter__(self) -> Sides:
        """Nothing to do: they have started."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends both."""
        for process in self._processes.values():
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def make(self, side: str, maker: Callable[..., Any], **settings: Any) -> None:
        """Calls `maker(**settings)` in the side's process; what it made before is let go.

        Raises:
          UserError: it raised something; the side has died.
        """
        self._ask(side, {"make": f"{maker.__module__}:{maker.__qualname__}", "settings": settings})

    def call(self, side: str, name: str = "run", **arguments: Any) -> Any:
        """Returns the result of calling what the side has made.

        Raises:
          UserError: as `make`.
        """
        return self._ask(side, {"call": name, "arguments": arguments})["result"]

    def interleaved(self, repeats: int, name: str = "run", sides: Sequence[str] = SIDES) -> Turns:
        """Calls both in turn: one warm-up each, then A B A B ...

        Raises:
          UserError: as `make`.
        """
        turns = Turns({s: [] for s in sides}, {s: [] for s in sides}, dict.fromkeys(sides, 0))
        for i in range(1 + repeats):
            for side in sides:
                reply = self._ask(side, {"call": name, "arguments": {}})
                if i:
                    turns.seconds[side].append(reply["seconds"])
                    turns.results[side].append(reply["result"])
                    turns.recompiles[side] += reply["compiled"]
        return turns

    def _ask(self, side: str, message: dict[str, Any]) -> dict[str, Any]:
        process = self._processes[side]
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise UserError(
                f"bench: the process of the {side} side died (exit code {process.wait()}); is there enough memory?"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(f"bench, {side} side: {reply['error']}")
        return reply


class Turns:
    """What `interleaved` saw."""

    def __init__(self, seconds: dict[str, list[float]], results: dict[str, list[Any]], recompiles: dict[str, int]):
        """Args: by side: wall seconds and results of the turns after the warm-up, and compilations in them."""
        self.seconds, self.results, self.recompiles = seconds, results, recompiles


# -------------------------------------------------------------------------------------------- in the process of a side


def main(name: str, device: str) -> None:
    """Reads one message a line and answers each by one line, until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    compiles, made = None, {}
    if name == "qstar":
        from qstar.start import start_jax

        start_jax(device)
        from qstar.train.profile import Compiles

        compiles = Compiles()
    for line in sys.stdin:
        try:
            message = json.loads(line)
            reply: dict[str, Any] = {}
            if "make" in message:
                made.clear()
                module, _, function = message["make"].partition(":")
                found = getattr(importlib.import_module(module), function)(**message["settings"])
                made.update(found if isinstance(found, dict) else {"run": found})
            else:
                before, began = compiles.count if compiles else 0, time.perf_counter()
                reply["result"] = made[message["call"]](**message["arguments"])
                reply["seconds"] = time.perf_counter() - began
                reply["compiled"] = compiles.count - before if compiles else 0
        except Exception as e:  # whatever it is: the parent says it in one line
            kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
            reply = {"error": kind + next(iter(str(e).splitlines()), "")}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (BrokenPipeError, KeyboardInterrupt):  # nobody is there to listen
        os._exit(1)
