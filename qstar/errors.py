"""The one exception that means "the user can mend this", and the checks that raise it."""

from __future__ import annotations

import difflib
import errno
import os
import re
import types
import typing
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave: a file, a config value, a shape.

    The message is one line that names the culprit (file and line, key, or shape) and says what to do about
    it. The command line prints it without a traceback and exits with code 2; everything that is *not* a
    ``UserError`` is a bug of ours and keeps its traceback.
    """

    code = 2  # the exit code


class TrainingFailed(UserError):
    """A training that has learnt nothing, or no longer learns: a line that says why, and exit code 1."""

    code = 1


class QstarWarning(UserWarning):
    """What the user should know although the work goes on; the command line prints it as one line."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is none of the known ones, with the closest of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return UserError(f"{what} is unknown{meant}; there are {', '.join(known) or 'none'}")


def require(*checks: tuple[bool, str]) -> None:
    """Raises a UserError with the message of the first check that does not hold.

    A settings class writes its messages as "lr=-1 must be 0 or more"; who read the value puts its place first.
    """
    for holds, message in checks:
        if not holds:
            raise UserError(message)


SEEDS = 2**64  # a seed is one of so many


def check_seed(what: str, seed: int) -> None:
    """Raises a UserError unless a seed is a whole number of 64 bits."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"{what}={seed} must be a whole number from 0 to {SEEDS - 1} (64 bits)")


def check_type(what: str, value: Any, kind: Any) -> None:
    """Compares a value with a type hint: classes, `X | None`, and the outermost class of `Mapping[int, int]`.

    A whole number passes for a float; True and False do not pass for numbers.

    Raises:
      UserError: `what`, the value and the type that it should have.
    """
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    classes = tuple(typing.get_origin(option) or option for option in options)
    if Any in classes:
        return
    passes = isinstance(value, (*classes, int) if float in classes else classes)
    if isinstance(value, bool) and bool not in classes or isinstance(value, str) and str not in classes:
        passes = False  # a bool is an int and a text is a sequence, but never what is meant
    if not passes:
        names = " or ".join("None" if c is types.NoneType else c.__name__ for c in classes)
        raise UserError(f"{what}={value!r} must be of type {names}")


_FREE = "free some space, or mend the disk or the limit that it names"
_FAULTS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENAMETOOLONG,
)


def machine_fault(error: BaseException | None) -> str | None:
    """Returns a line on a fault of the machine (disk full, quota, read-only, too many open files), None for other errors.

    Looks at the causes of an error, too, and at the text of those of libraries that do not pass the system's error on.
    """
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, OSError) and error.errno in _FAULTS:
            return f"{error.filename or 'a file'}: {os.strerror(error.errno)}; {_FREE}"
        if found := re.search("|".join(os.strerror(n) for n in _FAULTS), str(error)):
            place = re.search(r'"(/[^"]*)"', str(error))
            return f"{place[1] if place else 'a file'}: {found[0]}; {_FREE}"
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None
