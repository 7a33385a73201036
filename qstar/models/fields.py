"""Declared types and ranges for entries of a JSON object such as config.json, checked before any of them is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qstar.errors import UserError


class Field(NamedTuple):
    """What an entry may hold."""

    holds: Callable[[Any], bool]
    expected: str  # for messages, after "must be"


def number(low: float, high: float, *, integer: bool = False) -> Field:
    """A finite number in [low, high]. A bool, which is an int in Python, is refused."""
    kinds = int if integer else (int, float)

    def holds(value: Any) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high

    return Field(holds, f"a{' whole' * integer} number from {low:.10g} to {high:.10g}")


def numbers(each: Field) -> Field:
    """A list of numbers that is not empty."""
    return Field(
        lambda value: isinstance(value, (list, tuple)) and bool(value) and all(map(each.holds, value)),
        f"a list, each entry {each.expected}",
    )


ID = number(0, 2**31 - 1, integer=True)
IDS = Field(
    lambda value: all(map(ID.holds, value if isinstance(value, list) else [value])),
    "a token id (0 or more), a list of them, or null",
)
FLAG = Field(lambda value: isinstance(value, bool), "true or false")
TEXT = Field(lambda value: isinstance(value, str), "a string")
WIDTH = number(1, 2**24, integer=True)  # of layers, heads, vocabularies
# Of layers: listing the tensors of a larger number takes minutes.
DEPTH = number(1, 10_000, integer=True)
LENGTH = number(1, 2**31 - 1, integer=True)
# 0 and float32's subnormal numbers make NaN of a zero vector.
EPSILON = number(1e-38, 1)


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
        if value is not None and not field.holds(value):
            shown = repr(value)
            raise UserError(f"{where}: {key}={shown[:60]}{'...' * (len(shown) > 60)} must be {field.expected}")
