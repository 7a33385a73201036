"""The command line: `qstar COMMAND ...`, or `python -m qstar COMMAND ...`."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from typing import Any

from qstar import __version__, stop
from qstar.errors import QstarWarning, UserError, unknown
from qstar.processes import is_first, leave

COMMANDS = {
    "train": "runs a config: --config=configs/star_arithmetic.py --workdir=runs/x",
    "sample": "writes continuations of a prompt",
    "evaluate": "accuracy, pass@k and majority@k of a model on a task",
    "export": "takes a model out of a run, in the Hugging Face layout",
    "report": "writes the HTML page of a run",
    "compare": "asks people which of two rationales is better; counts their votes",
    "plan": "whether a config fits on a TPU slice or GPUs, and its speed at best",
    "bench": "measures speed beside transformers + PyTorch",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, or 2 for a user's mistake (one line on standard error)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # what the terminal's encoding lacks is written as an escape
        with contextlib.suppress(AttributeError, ValueError):  # a notebook's stream, or a closed one
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
        code = _run(argv)
    leave()
    return code


def _show_warning(usual: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Prints a warning of ours as one line, in the first process, and those of others as usual."""
    if not issubclass(category, QstarWarning):
        usual(message, category, *place)
    elif is_first():
        print("qstar: warning: " + " ".join(str(message).split()), file=sys.stderr)


def _run(argv: list[str]) -> int:
    try:
        return dispatch(argv)
    except UserError as e:
        print("qstar: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    except stop.Stopped:
        if is_first():
            print(f"qstar: stopped by SIGTERM and saved; go on with: qstar {shlex.join(argv)}", file=sys.stderr)
        return stop.exit_code()
    except KeyboardInterrupt:
        more = "; the same command goes on from here" if argv[:1] == ["train"] else ""
        print(f"qstar: interrupted{more}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `qstar sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def dispatch(argv: list[str]) -> int:
    """Finds the command and hands over its arguments."""
    if not argv:
        raise UserError(f"no command given; there are {', '.join(COMMANDS)} (qstar --help says more)")
    if argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
        print("usage: qstar COMMAND ...", "", *lines, "", "qstar COMMAND --help tells the options of each.", sep="\n")
        return 0
    if argv[0] in ("--version", "-V", "version"):
        print(f"qstar {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise unknown(f"command {argv[0]!r}", argv[0], COMMANDS)
    from qstar import commands

    return getattr(commands, argv[0])(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
