"""Command-line flags: the parser of a command, and readers that refuse values which make no sense."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qstar.errors import UserError
from qstar.files import parse_json


class Parser(argparse.ArgumentParser):
    """Raises a UserError where argparse would end the process."""

    def parse_known_args(self, *args: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
        """Refuses names and paths that are empty, as an unset shell variable makes them (texts may be: --prompt='')."""
        found, rest = super().parse_known_args(*args, **options)
        for action in self._actions:
            values = getattr(found, action.dest, None)
            empty = "" in (values if isinstance(values, list) else [values])
            if empty and action.default != "" and action.metavar not in (None, "TEXT", "VALUE"):
                self.error(f"{(action.option_strings or [action.metavar])[0]} is empty; give a value, or leave it out")
        return found, rest

    def error(self, message: str) -> None:
        raise UserError(f"{self.prog.removeprefix('qstar ')}: {message} (see {self.prog} --help)")


def command_parser(name: str, summary: str, *, device: bool = True, **options: Any) -> Parser:
    """Returns the parser of `qstar NAME`, with --device unless it needs none."""
    parser = Parser(prog=f"qstar {name}", description=summary, allow_abbrev=False, **options)
    if device:
        devices = ("auto", "cpu", "gpu", "tpu")
        parser.add_argument("--device", choices=devices, default="auto", help="where to run (default: the best)")
    return parser


def whole_number(least: int, most: int = 10**18) -> Callable[[str], int]:
    """Reads a whole number between two bounds."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text[:30]) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        if int(text[:30]) > most:
            raise argparse.ArgumentTypeError(f"{text!r} is above {most}")
        return int(text)

    return read


def number(fits: Callable[[float], bool], what: str) -> Callable[[str], float]:
    """Reads a finite number that fits."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return read


TEMPERATURE = number(lambda x: x >= 0, "a number of 0 (greedy) or more")
SHARE = number(lambda x: 0 < x <= 1, "a number above 0 and up to 1")


def json_object(text: str) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        value = parse_json(text, f"{text[:80]!r}")
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is a JSON {type(value).__name__}, not an object")
    return value


def local_folder(flag: str, text: str) -> Path:
    """Returns a folder that a command writes; in a bucket there is no renaming, locking or appending, which runs rest on."""
    if "://" in text:
        raise UserError(
            f"{flag}={text}: is no folder; name one on a disk that all processes see (a bucket can be mounted with gcsfuse), "
            "and copy it when the run has ended"
        )
    return Path(text).expanduser()
