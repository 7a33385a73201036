"""`UserError`, the exception for mistakes that the user can correct, and the checks that raise it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar, Self

# What pip installs. On PyPI, `qstar` is another project.
DISTRIBUTION = "qstar-jax"


def pip_install(extra: str) -> str:
    """Returns the command that installs an extra of setup.py, for messages."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


class UserError(Exception):
    """A mistake in what the user gave: a file, a config value, a shape.

    The message is one line with the place (file and line, key, or shape) and the remedy. The command line prints it
    without a traceback and exits with code 2; any other exception is a bug of qstar and keeps its traceback.
    """

    code = 2  # the exit code


class TrainingFailed(UserError):
    """A training that does not learn: one line with the reason, and exit code 1."""

    code = 1


class Unreachable(UserError):
    """Another process or the storage did not answer: one line, and exit code 1, after which launchers try again."""

    code = 1


class QstarWarning(UserWarning):
    """What the user should know although the work goes on; the command line prints it as one line."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is none of the known ones, with the closest of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return UserError(f"{what} is unknown{meant}; there are {', '.join(known) or 'none'}")


def require(*checks: tuple[object, str]) -> None:
    """Raises a UserError with the message of the first check that does not hold.

    A settings class writes its messages as "lr=-1 must be 0 or more"; who read the value puts its place first.
    """
    for holds, message in checks:
        if not holds:
            raise UserError(message)


@contextlib.contextmanager
def within(place: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Puts `place`, a key of a config, in front of the message of a UserError that is raised in the `with` block."""
    try:
        yield
    except kind as e:
        raise type(e)(f"{place}{e}") from None


@dataclasses.dataclass(frozen=True)
class _Range:
    """The values that a field of a settings class may have."""

    ge: float | None
    gt: float | None
    le: float | None
    lt: float | None
    choices: Collection[Any]
    note: str

    def fault(self, value: Any, kind: str) -> str:
        """Returns what the value must be, "" if it is in the range. `kind`: the field's annotation."""
        if value is None and "None" in kind:
            return ""
        if self.choices:
            return "" if value in self.choices else f"is not one of {', '.join(filter(None, map(str, self.choices)))}"
        # bool is a subclass of int: without the second test, True would pass as 1.
        typed = not kind.startswith("int") or (isinstance(value, numbers.Integral) and not isinstance(value, bool))
        # Every comparison is False for NaN, so that NaN is refused; infinity only passes where `le` names it.
        holds = isinstance(value, numbers.Real) and (value < math.inf or self.le == math.inf)
        holds = holds and (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        holds = holds and (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)
        if typed and holds:
            return ""
        low, high = self.gt if self.ge is None else self.ge, self.lt if self.le is None else self.le
        if low is not None and high is not None and high < math.inf:
            text = f"in {'(' if self.ge is None else '['}{low}, {high}{')' if self.le is None else ']'}"
        elif self.ge == 0:
            text = "0 or more"
        else:
            bounds = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
            text = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound not in (None, math.inf))
        text = text if typed else f"a whole number {'of ' if self.ge is not None else ''}{text}"
        return f"must be {text}{f' ({self.note})' if self.note else ''}{', or None' if 'None' in kind else ''}"


def bounded(
    default: Any = dataclasses.MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Collection[Any] = (),
    note: str = "",
) -> Any:
    """Returns a dataclass field of a `Settings` class with the range of its values.

    A number must be >= ge, > gt, <= le and < lt; NaN is refused always, infinity unless `le` is infinity. With `choices`
    the value must be one of them. None passes where the annotation allows it.

    Args:
      note: ends the message, in parentheses: what a special value means, or the unit.
    """
    return dataclasses.field(default=default, metadata={"range": _Range(ge, gt, le, lt, choices, note)})


class Settings:
    """Base class of dataclasses of settings, whose fields are checked against their ranges (`bounded`).

    A subclass with conditions over several fields adds them in `__post_init__`, after `super().__post_init__()`.
    """

    WHERE: ClassVar[str] = ""  # in front of the messages, e.g. "model config: "

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with other values, checked like the first."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def __post_init__(self) -> None:
        """Raises UserError "field=value must be ..." for the first field outside of its range."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            # A subclass that gives a field another default keeps its range.
            declared = (vars(c).get("__dataclass_fields__", {}).get(f.name) for c in type(self).__mro__)
            rule = next((d.metadata["range"] for d in declared if d and "range" in d.metadata), None)
            value = getattr(self, f.name)
            if rule and (fault := rule.fault(value, str(f.type))):
                raise UserError(f"{self.WHERE}{f.name}={value!r} {fault}")


MAX_TEMPERATURE = 1e6  # all tokens are equally likely long before; float32 would end at 3e38
SEEDS = 2**64  # a seed is one of so many


def check_seed(what: str, seed: int) -> None:
    """Raises a UserError unless a seed is a whole number of 64 bits."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise UserError(f"{what}={seed} must be a whole number from 0 to {SEEDS - 1} (64 bits)")


def seconds_of(variable: str, default: float) -> float:
    """Returns the seconds that an environment variable gives, or the default.

    Raises:
      UserError: they are no number above 0.
    """
    given = os.environ.get(variable) or str(default)
    if not given.replace(".", "", 1).isdecimal() or not float(given) > 0:
        raise UserError(f"{variable}={given} must be a number of seconds above 0")
    return float(given)


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


_FREE = "free some space, or mend the disk, limit or permission that it names"
_FAULTS = [int(getattr(errno, f"E{n}")) for n in "NOSPC DQUOT FBIG ROFS IO MFILE NFILE NAMETOOLONG ACCES PERM".split()]


def machine_fault(error: BaseException | None) -> str | None:
    """Returns a line on a fault of the machine (full or read-only disk, too many open files), None for other errors."""
    # The causes, too: libraries wrap the system's error, or pass on only its text. 20 ends a cycle of causes.
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, OSError) and error.errno in _FAULTS:
            return f"{error.filename or 'a file'}: {os.strerror(error.errno)}; {_FREE}"
        if found := re.search("|".join(os.strerror(n) for n in _FAULTS), str(error)):
            place = re.search(r'"(/[^"]*)"', str(error))
            return f"{place[1] if place else 'a file'}: {found[0]}; {_FREE}"
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None
