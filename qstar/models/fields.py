"""Declared types and ranges for entries of a JSON object such as config.json, checked before any of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qstar.errors import UserError


class Number(NamedTuple):
    """A finite number in [low, high]; True and False are no numbers."""

    low: float
    high: float
    integer: bool = False

    def fault(self, value: Any) -> str:
        """Returns what the value should be, or nothing where it is that."""
        kinds = int if self.integer else (int, float)
        good = isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high
        return "" if good else f"a{' whole' * self.integer} number from {self.low:.10g} to {self.high:.10g}"


class Numbers(NamedTuple):
    """A list of numbers."""

    each: Number

    def fault(self, value: Any) -> str:
        """See `Number.fault`."""
        good = isinstance(value, (list, tuple)) and value and not any(map(self.each.fault, value))
        return "" if good else f"a list, each entry {self.each.fault(None)}"


class Ids(NamedTuple):
    """A token id or a list of them."""

    def fault(self, value: Any) -> str:
        """See `Number.fault`."""
        good = not any(map(ID.fault, value if isinstance(value, list) else [value]))
        return "" if good else "a token id (0 or more), a list of them, or null"


class Flag(NamedTuple):
    """true or false."""

    def fault(self, value: Any) -> str:
        """See `Number.fault`."""
        return "" if isinstance(value, bool) else "true or false"


class Text(NamedTuple):
    """A string."""

    def fault(self, value: Any) -> str:
        """See `Number.fault`."""
        return "" if isinstance(value, str) else "a string"


Field = Number | Numbers | Ids | Flag | Text
ID = Number(0, 2**31 - 1, integer=True)
WIDTH = Number(1, 2**24, integer=True)  # of layers, heads, vocabularies
DEPTH = Number(
    1, 10_000, integer=True
)  # layers: the list of tensors that a larger number asks for takes minutes to make
LENGTH = Number(1, 2**31 - 1, integer=True)
EPSILON = Number(1e-38, 1, integer=False)  # 0 makes NaN of a zero vector, and so do float32's subnormal numbers


def check(raw: Mapping[str, Any], where: str, required: Mapping[str, Field], optional: Mapping[str, Field]) -> None:
    """Compares the entries of an object with their declarations; an optional entry may be null.

    Raises:
      UserError: a missing key, or a value of another type or outside its range; the line names both.
    """
    for key in required:
        if raw.get(key) is None:
            raise UserError(f"{where}: key {key!r} is missing")
    for key, field in {**required, **optional}.items():
        value = raw.get(key)
        if value is not None and (fault := field.fault(value)):
            shown = repr(value)
            raise UserError(f"{where}: {key}={shown[:60]}{'...' * (len(shown) > 60)} must be {fault}")
