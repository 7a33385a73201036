"""The command line: qstar train | sample | evaluate | export | plan | bench | report."""

from __future__ import annotations

import sys

from qstar.errors import UserError

COMMANDS = ("train", "sample", "evaluate", "export", "bench", "report")


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, or 2 for a user's mistake (one line on standard error)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(argv)
    except UserError as e:
        print(f"qstar: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qstar: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def dispatch(argv: list[str]) -> int:
    """Finds the command and hands over its arguments."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip() + "\n\n  qstar COMMAND --help tells each one's options.")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    from qstar import commands

    return getattr(commands, argv[0])(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
