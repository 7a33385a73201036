"""Plain Python values as JSON and back, and the messages between the sandbox's processes.

A value arrives in exact built-in types, or as a numbered handle. What its class overrides (an __eq__ that is always
true, a str with a false length) stays in the program's process.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import json
import math
import os
import select
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

MAX_BYTES = 8 << 20  # of one message; a longer one is refused unread
_PLAIN_TYPES: tuple[type, ...] = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
TYPES: dict[str, type] = {t.__name__: t for t in (*_PLAIN_TYPES, type(None))}
# Larger integers travel as hexadecimal, to which Python's limit of 4,300 decimal digits does not apply.
_SMALL = 1 << 62


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """A value as `json` can write it. `keep` numbers an object that is no plain value, or raises TypeError."""
    if value is None or value is True or value is False:
        return value
    # Exact types: a subclass may override anything. JSON has no infinities and no nan.
    kind = type(value)
    if kind is str or (kind is int and -_SMALL < value < _SMALL) or (kind is float and math.isfinite(value)):
        return value
    for cls, to_json in _ENCODERS:
        if isinstance(value, cls):
            return to_json(value, keep)
    if kind is type and value in TYPES.values():
        return ["type", str(value.__name__)]
    # Importing it here would cost every program; without the import no value of numpy can exist.
    if "numpy" in sys.modules:
        return _numpy(value, keep)
    return ["handle", keep(value)]


def _items(cls: type) -> tuple[type, Callable[[Any, Any], list]]:
    iterate: Callable[[Any], Any] = cls.__iter__  # type: ignore[attr-defined]
    return cls, lambda value, keep: [cls.__name__, *(encode(x, keep) for x in iterate(value))]


def _numpy(value: Any, keep: Callable[[Any], int]) -> Any:
    import numpy as np

    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc" and value.dtype.itemsize <= 16:
        if isinstance(value, np.ndarray):
            return ["ndarray", value.dtype.str, list(value.shape), np.ndarray.tobytes(value).hex()]
        item = np.generic.item(value)
        if not isinstance(item, np.generic):  # a long double has no Python number
            return encode(item, keep)
    return ["handle", keep(value)]


def _array(kind: Any, shape: Any, data: Any) -> Any:
    if "numpy" not in sys.modules or not isinstance(kind, str):
        raise TypeError("an array, where there is no numpy")
    import numpy as np

    # The bytes are the program's: in an array of objects they would be pointers.
    if np.dtype(kind).kind not in "biufc":
        raise TypeError("an array of numbers is needed")
    # A copy, since tests may write into it and frombuffer gives a read-only view.
    return np.frombuffer(bytes.fromhex(data), kind).reshape([_integer(n) for n in shape]).copy()


# The methods are those of the built-in class, never a subclass's.
_ENCODERS: tuple[tuple[type, Callable[[Any, Any], Any]], ...] = (
    (str, lambda v, keep: str.__str__(v)),
    (int, lambda v, keep: ["int", int.__format__(v, "x")]),
    (float, lambda v, keep: ["float", float.__repr__(v)]),
    _items(list),
    _items(tuple),
    (dict, lambda v, keep: ["dict", *([encode(k, keep), encode(x, keep)] for k, x in dict.items(v))]),
    _items(set),
    _items(frozenset),
    (complex, lambda v, keep: ["complex", float.__repr__(v.real), float.__repr__(v.imag)]),
    (bytes, lambda v, keep: ["bytes", bytes.hex(v)]),
    (bytearray, lambda v, keep: ["bytearray", bytearray.hex(v)]),
    (range, lambda v, keep: ["range", *(encode(x, keep) for x in (v.start, v.stop, v.step))]),
    _items(collections.deque),
    (fractions.Fraction, lambda v, keep: ["fraction", format(v.numerator, "x"), format(v.denominator, "x")]),
    (decimal.Decimal, lambda v, keep: ["decimal", decimal.Decimal.__str__(v)]),
    *(
        (cls, lambda v, keep, cls=cls: [cls.__name__, cls.isoformat(v)])
        # A datetime is a date, so it comes first.
        for cls in (datetime.datetime, datetime.date, datetime.time)
    ),
    (datetime.timedelta, lambda v, keep: ["timedelta", v.days, v.seconds, v.microseconds]),
)


def decode(data: Any, handle: Callable[[int], Any]) -> Any:
    """The value that `encode` described, or ValueError, TypeError, IndexError, KeyError; `handle`: number -> proxy."""
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise TypeError("an object is no value")
        return data
    tag, *rest = data
    if tag in _CONTAINERS:
        return _CONTAINERS[tag](decode(x, handle) for x in rest)
    if tag == "dict":
        return {decode(k, handle): decode(x, handle) for k, x in rest}
    if tag == "handle":
        (number,) = rest
        return handle(_integer(number))
    if tag == "type":
        (name,) = rest
        return TYPES[name]
    return _SCALARS[tag](*rest)


def _integer(x: Any) -> int:
    if type(x) is not int:
        raise TypeError("a whole number is needed")
    return x


def _no_handle(number: int) -> Any:
    raise TypeError("a plain value is needed")


_CONTAINERS = {c.__name__: c for c in (list, tuple, set, frozenset, collections.deque)}
_SCALARS: dict[str, Callable[..., Any]] = {
    "int": lambda x: int(x, 16),
    "float": lambda x: float(x),
    "complex": lambda re, im: complex(float(re), float(im)),
    "bytes": lambda x: bytes.fromhex(x),
    "bytearray": lambda x: bytearray.fromhex(x),
    "range": lambda *xs: range(*(_integer(decode(x, _no_handle)) for x in xs)),
    "fraction": lambda n, d: fractions.Fraction(int(n, 16), int(d, 16)),
    "decimal": lambda x: decimal.Decimal(x),
    **{cls.__name__: cls.fromisoformat for cls in (datetime.datetime, datetime.date, datetime.time)},
    "timedelta": lambda *xs: datetime.timedelta(*map(_integer, xs)),
    "ndarray": _array,
}


def message(error: BaseException) -> str:
    """The text of an exception, "" if its class raises another one instead."""
    try:
        # The class may be the program's: its __str__ can raise anything, SystemExit included.
        return str(error)[:500]
    except BaseException:
        return ""


def exception(name: Any, text: Any) -> Exception:
    """The built-in exception of that name, which tests may expect; RuntimeError for any other."""
    cls = getattr(builtins, name, None) if isinstance(name, str) else None
    text = str(text)[:500]
    if isinstance(cls, type) and issubclass(cls, Exception):
        try:
            return cls(text)
        except TypeError:  # UnicodeDecodeError wants five arguments
            pass
    return RuntimeError(f"{name}: {text}")


# ------------------------------------------------------------------------------------------------------- messages


class Closed(Exception):
    """The other process has ended."""


class TooLong(Exception):
    """A message above MAX_BYTES."""


def send(fd: int, message: Any) -> None:
    """Writes one message: 4 bytes of length, and JSON."""
    data = json.dumps(message).encode()
    if len(data) > MAX_BYTES:
        raise TooLong(f"{len(data)} bytes")
    rest = memoryview(struct.pack("<I", len(data)) + data)
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except (BrokenPipeError, ConnectionError):
        raise Closed from None


def receive(fd: int, deadline: float | None = None) -> Any:
    """Reads one message. Raises Closed, TooLong, ValueError (no JSON), TimeoutError at `deadline` (time.monotonic)."""
    (size,) = struct.unpack("<I", _read(fd, 4, deadline))
    # The length comes from an untrusted process: it is refused before memory is reserved.
    if size > MAX_BYTES:
        raise TooLong(f"{size} bytes")
    return json.loads(_read(fd, size, deadline))


def _read(fd: int, size: int, deadline: float | None) -> bytes:
    found = bytearray()
    while len(found) < size:
        # One deadline for all parts: sending single bytes gains no time.
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise TimeoutError
        try:
            more = os.read(fd, size - len(found))
        except ConnectionError:
            raise Closed from None
        if not more:
            raise Closed
        found += more
    return bytes(found)
