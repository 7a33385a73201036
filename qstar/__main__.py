"""Entry point of the command line: `qstar COMMAND ...`, or `python -m qstar COMMAND ...`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from qstar import __version__, preemption
from qstar.distributed import is_first, leave, say
from qstar.errors import QstarWarning, UserError, machine_fault, seconds_of, unknown

COMMANDS = {
    "train": "runs a config: --config=star_arithmetic --workdir=runs/x",
    "configs": "lists, shows and copies the configs that ship with qstar",
    "sample": "writes continuations of a prompt",
    "evaluate": "accuracy, pass@k and majority@k of a model on a task",
    "export": "takes a model out of a run, in the Hugging Face layout",
    "runs": "lists run folders: method, status, headline number, date",
    "report": "writes the HTML page of a run, or of a comparison of several",
    "compare": "asks people which of two rationales is better; counts their votes",
    "plan": "whether a config fits on a TPU slice or GPUs, and its speed at best",
    "bench": "measures speed beside transformers + PyTorch",
}
PEERS_SECONDS = 20.0  # a process that ends with an error waits so long for the others to end, too
# Commands that stop gracefully on SIGTERM -> what is kept, where the command does not say it. The others end as usual.
KEPT = {"train": "what its stages have finished is saved", "evaluate": "nothing is kept without --out"}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for a user's mistake, 1 for a training that failed.

    Without `argv`, reads the command line and ends the process.
    """
    is_process = argv is None
    argv = sys.argv[1:] if argv is None else list(argv)
    # Sampled text holds any character; one that the terminal's encoding lacks is escaped instead of raising.
    # A notebook's stream has no `reconfigure`, and a closed one refuses it.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sigterm = preemption.listening(last=is_process) if argv and argv[0] in KEPT else contextlib.nullcontext()
    with warnings.catch_warnings(), _quiet_threads(), _second_interrupt_ends(), sigterm:
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
        code = _run(argv)
    # All processes are preempted together, and one may still save: no error.
    leave(well=code in (0, preemption.exit_code()))
    if is_process:
        _end(code)
    return code


def dispatch(argv: list[str]) -> int:
    """Calls the command with its arguments."""
    if not argv:
        raise UserError(f"no command given; there are {', '.join(COMMANDS)} (qstar --help says more)")
    if argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
        print("usage: qstar COMMAND ...", "", *lines, "", "qstar COMMAND --help lists the options of each.", sep="\n")
        return 0
    if argv[0] in ("--version", "-V", "version"):
        print(f"qstar {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise unknown(f"command {argv[0]!r}", argv[0], COMMANDS)
    # Here, not at the top: --help and --version do not import argparse, ml_collections and the flags.
    return importlib.import_module(f"qstar.commands.{argv[0]}").main(argv[1:])


def check_texts(argv: list[str]) -> None:
    """Raises UserError if an argument or the current folder is not UTF-8 text, or the current folder is gone."""
    # Python decodes undecodable bytes to surrogates, which fail only when a path is written to JSON or to the screen.
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder does not exist any more; change to another one") from None
    for what, text in [("the current folder", folder), *(("argument", text) for text in argv)]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what} {text!r}: is not UTF-8 text; rename it or name another path") from None


# ------------------------------------------------------------------------------------------- ends of a process


def _run(argv: list[str]) -> int:
    """Runs a command and turns what it raises into one line and an exit code. Bugs keep their traceback."""
    # Exit codes above 128 follow the shell: 128 + SIGINT (2) = 130, 128 + SIGPIPE (13) = 141.
    again = "; the same command goes on from here" if argv[:1] == ["train"] else ""
    try:
        check_texts(argv)
        seconds_of("QSTAR_STOP_SECONDS", preemption.SECONDS)
        code = dispatch(argv)
        # A full disk shows here, where it becomes one line and exit code 2, not in the interpreter's shutdown.
        sys.stdout.flush()
        preemption.over()
        return code
    except UserError as e:
        preemption.over()
        say(" ".join(str(e).split()))
        return e.code
    except preemption.Preempted as e:
        if is_first():
            again = "start again" if argv[0] == "evaluate" and not e.saved else "go on"
            say(f"stopped by SIGTERM; {e.saved or KEPT.get(argv[0], '')}; {again} with: qstar {shlex.join(argv)}")
        return preemption.exit_code()
    except KeyboardInterrupt:
        say(f"interrupted{again}")
        return 130
    # `qstar sample ... | head` closes the pipe; rich turns the BrokenPipeError into SystemExit.
    except (BrokenPipeError, SystemExit) as e:
        if not isinstance(e, BrokenPipeError) and not isinstance(e.__context__, BrokenPipeError):
            raise
        _drop_stdout()
        if again:
            say(f"stopped, since nobody reads its output any more{again}")
        return 141
    except Exception as e:
        line = machine_fault(e)
        if line is None:
            raise
        # An OSError of standard output has no file name; a trial write tells it from others without one.
        if isinstance(e, OSError) and e.filename is None:
            try:
                os.write(sys.stdout.fileno(), b"\n")
            except (OSError, ValueError):
                line = f"standard output cannot be written ({e.strerror}); send it elsewhere"
        _drop_stdout()
        say(f"{line}{again}")
        return 2


def _drop_stdout() -> None:
    # What is buffered goes to /dev/null: Python flushes when it ends, which would fail once more.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(code: int) -> None:
    """Ends the process without the interpreter's shutdown."""
    # Threads of XLA may still compute, mostly after an interruption, and have crashed in the shutdown. Other exit
    # functions run; JAX's own would delete the backends that those threads use.
    jax = sys.modules.get("jax")
    if jax is not None:
        from jax._src import api

        atexit.unregister(getattr(api, "clean_up", _end))  # `_end`: registered nowhere
        if jax.distributed.is_initialized():
            # Without it, the coordination service of the other processes reports a crash. It waits for them: after an
            # error of this process alone for minutes, and then aborts this one, whose exit code would be lost.
            ends = threading.Thread(target=jax.distributed.shutdown, daemon=True)
            ends.start()
            ends.join(None if code in (0, preemption.exit_code()) else PEERS_SECONDS)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _show_warning(usual: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Prints a `QstarWarning` as one line, on process 0, and other warnings as usual."""
    if not issubclass(category, QstarWarning):
        usual(message, category, *where)
    elif is_first():
        say("warning: " + " ".join(str(message).split()))


def _of_orbax(args: Any) -> bool:
    code = getattr(args.object, "cr_code", None)  # of a coroutine
    return "Event loop is closed" in str(args.exc_value) or code is not None and "orbax" in code.co_filename


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    # Orbax writes in threads: a full disk there is reported by the main thread, which waits for them.
    usual = threading.excepthook, sys.unraisablehook
    threading.excepthook = lambda args: None if machine_fault(args.exc_value) else usual[0](args)
    # After such a failure orbax still sends messages to its event loop, which is closed by then; and of several reads that
    # fail one is raised, and the others are left to the garbage collector.
    sys.unraisablehook = lambda args: None if _of_orbax(args) else usual[1](args)
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = usual


@contextlib.contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """A second Ctrl-C ends the process at once, even if the first is still being handled."""
    old = signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers; somebody's own handler, or none (nohup), stays.
    if threading.current_thread() is not threading.main_thread() or old is not signal.default_int_handler:
        yield
        return

    def first(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, second)
        raise KeyboardInterrupt

    def second(number: int, frame: Any) -> None:
        # `os.write`: `print` is not reentrant and raises if the signal interrupts another print.
        os.write(2, b"qstar: interrupted again, ends at once; the last checkpoint stays\n")
        os._exit(130)

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, old)


if __name__ == "__main__":
    sys.exit(main())
