"""The command line: `qstar COMMAND ...`, or `python -m qstar COMMAND ...`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from qstar import __version__, preemption
from qstar.distributed import is_first, leave
from qstar.errors import QstarWarning, UserError, machine_fault, unknown

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


KEPT = {  # what a SIGTERM leaves of these commands, unless they say it; the others end as ever
    "train": "what its stages have finished is saved",
    "evaluate": "nothing is kept without --out",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for a user's mistake, or 1 for a training that failed (one line on
    standard error). Without `argv`, the command line is read, and the process ends here."""
    is_process = argv is None  # called by the entry point: this process is the command
    argv = list(sys.argv[1:] if is_process else argv)
    for stream in (sys.stdout, sys.stderr):  # what the terminal's encoding lacks is written as an escape
        with contextlib.suppress(AttributeError, ValueError):  # a notebook's stream, or a closed one
            stream.reconfigure(errors="backslashreplace")
    sigterm = preemption.listening(last=is_process) if argv and argv[0] in KEPT else contextlib.nullcontext()
    with warnings.catch_warnings(), _quiet_threads(), _second_interrupt_ends(), sigterm:
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
        code = _run(argv)
    leave()
    if is_process:
        _end(code)
    return code


def _show_warning(usual: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Prints a warning of ours as one line, in the first process, and those of others as usual."""
    if not issubclass(category, QstarWarning):
        usual(message, category, *place)
    elif is_first():
        print("qstar: warning: " + " ".join(str(message).split()), file=sys.stderr)


def _end(code: int) -> None:
    """Ends the process without taking the interpreter down: threads of XLA may still compute, after an interruption above
    all, and have crashed in that. What others registered for the exit is done, but for JAX's deletion of its backends."""
    jax = sys.modules.get("jax")
    if jax is not None:
        from jax._src import api

        atexit.unregister(getattr(api, "clean_up", None))
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()  # the others would take a silent end for a crash
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _run(argv: list[str]) -> int:
    again = "; the same command goes on from here" if argv[:1] == ["train"] else ""
    try:
        check_texts(argv)
        code = dispatch(argv)
        sys.stdout.flush()  # a full disk shows here, not when Python ends
        preemption.over()
        return code
    except UserError as e:
        preemption.over()
        print("qstar: " + " ".join(str(e).split()), file=sys.stderr)
        return e.code
    except preemption.Preempted as e:
        if is_first():
            again = "start again" if argv[0] == "evaluate" and not e.saved else "go on"
            saved = e.saved or KEPT.get(argv[0], "")
            print(f"qstar: stopped by SIGTERM; {saved}; {again} with: qstar {shlex.join(argv)}", file=sys.stderr)
        return preemption.exit_code()
    except KeyboardInterrupt:
        print(f"qstar: interrupted{again}", file=sys.stderr)
        return 130
    except (BrokenPipeError, SystemExit) as e:  # `qstar sample ... | head`; rich makes a SystemExit of it
        if not isinstance(e, BrokenPipeError) and not isinstance(e.__context__, BrokenPipeError):
            raise
        _drop_stdout()
        if again:
            print(f"qstar: stopped, since nobody reads its output any more{again}", file=sys.stderr)
        return 141
    except Exception as e:
        line = machine_fault(e)
        if line is None:
            raise
        if isinstance(e, OSError) and e.filename is None:  # standard output has no file name
            try:
                os.write(sys.stdout.fileno(), b"\n")
            except (OSError, ValueError):
                line = f"standard output cannot be written ({e.strerror}); send it elsewhere"
        _drop_stdout()
        print(f"qstar: {line}{again}", file=sys.stderr)
        return 2


def _drop_stdout() -> None:
    """Lets what is still buffered go nowhere: Python flushes when it ends, which would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Inside the block a full disk in a thread (orbax writes in some) is left to the main thread, which waits for it.

    What such a write was still about to tell its event loop, which is closed by then, is of no use either.
    """
    usual = threading.excepthook, sys.unraisablehook
    threading.excepthook = lambda args: None if machine_fault(args.exc_value) else usual[0](args)
    sys.unraisablehook = lambda args: None if "Event loop is closed" in str(args.exc_value) else usual[1](args)
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = usual


@contextlib.contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """Inside the block a second Ctrl-C ends the process at once, whatever the first one is still being handled by."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, second)
        raise KeyboardInterrupt

    def second(number: int, frame: Any) -> None:
        os.write(2, b"qstar: interrupted again, ends at once; the last checkpoint stays\n")
        os._exit(130)

    old = signal.getsignal(signal.SIGINT)
    if old is signal.default_int_handler:  # somebody's own handler, or none (nohup), stays
        signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if old is signal.default_int_handler and signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, old)


def check_texts(argv: list[str]) -> None:
    """Looks whether the arguments and the current folder are UTF-8 text: paths stand in JSON and on the screen.

    Raises:
      UserError: one is not, or the current folder is gone.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder does not exist any more; change to another one") from None
    for what, text in [("the current folder", here), *(("argument", text) for text in argv)]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what} {text!r}: is not UTF-8 text; rename it or name another path") from None


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
    from qstar import cli

    return getattr(cli, argv[0])(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
