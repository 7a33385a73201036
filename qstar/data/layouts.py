"""Records inside a source: the files of a folder, and the lists of a JSON object."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from qstar.errors import UserError

READABLE = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".ndjson")  # endings, each also with .gz behind it
ALL = "all"  # the split of all records, as in `datasets`
_SPLITS = {
    name: names[0]
    for names in (("train", "training"), ("validation", "valid", "val", "dev"), ("test", "testing"))
    for name in names
}

Place = tuple[str, Any]  # ("train.jsonl:12", the record found there, or the UserError that says why there is none)
Fault = Callable[[str, Any], str]  # why the value at a place is no record; "" if it is one


def kind(path: str | os.PathLike) -> str:
    """The ending of a file's name, without .gz."""
    return pathlib.PurePosixPath(os.fspath(path).lower().removesuffix(".gz")).suffix


def numbered(name: str, rows: Iterable[Any]) -> Iterator[Place]:
    """The records of a list with their places."""
    return ((f"{name}: record {number}", row) for number, row in enumerate(rows, start=1))


def shards(folder: epath.Path, split: str) -> list[epath.Path]:
    """The files of a split in a folder, sorted. `datasets` tells splits by the names of files and folders."""
    # The import takes seconds.
    from datasets.data_files import get_data_patterns, resolve_pattern

    # Escaped, since it becomes a part of patterns: "run[1]" would read the folder run1.
    name, card = glob.escape(os.fspath(folder)), folder / "README.md"
    text = card.read_bytes().decode(errors="replace") if card.is_file() else ""
    if len(configs := re.findall(r"^- config_name: *(\S+)", text, re.MULTILINE)) > 1:
        raise UserError(f"{folder}: holds the data sets {', '.join(configs)}; name the folder or the file of one")
    try:
        splits = {str(key): patterns for key, patterns in get_data_patterns(name).items()}
    except FileNotFoundError:  # it is empty
        splits = {split: []}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error})") from error
    if [*splits.values()] == [["**"]]:  # no name tells of a split
        splits = {split: ["**"]}
    if split not in (*splits, ALL):
        raise UserError(f"{folder}: by their names its files are of {', '.join(splits)}, none of split {split!r}")
    found: set[str] = set()
    for pattern in itertools.chain(*splits.values()) if split == ALL else splits[split]:
        with contextlib.suppress(FileNotFoundError):  # raised where one of several patterns fits no file
            found.update(resolve_pattern(pattern, name, allowed_extensions=[*READABLE, ".arrow"]))
    if not found:
        raise UserError(f"{folder}: is a folder; name the file inside it (none there ends in {', '.join(READABLE)})")
    if len(kinds := sorted(set(map(kind, found)))) > 1:
        raise UserError(f"{folder}: holds files of several kinds ({', '.join(kinds)}); name one of them")
    return [epath.Path(path) for path in sorted(found)]


def in_object(place: str, value: dict, split: str, fault: Fault) -> Iterator[Place]:
    """The records of a JSON object: its columns, itself, or those of its split or of the one list that has some."""
    if columns := _columns(value):
        return numbered(place, columns)
    lists = {key: [*map(_row, rows)] for key, rows in value.items() if _all_of(dict, rows)}
    part = value.get(split)
    # A record may have lists of objects, too: the choices of a question, messages.
    if not (lists or isinstance(part, list | dict)) or not (why := fault(place, value)):
        return iter([(place, value)])
    if isinstance(part, dict):
        return in_object(f"{place}: {split}", part, split, fault)
    if isinstance(part, list):
        return numbered(f"{place}: {split}", map(_row, part))
    filled = [key for key, rows in lists.items() if not all(fault("", row) for row in rows)]
    # The only list may be of another split: training data must not be taken for a test, nor the other way round.
    other = [key for key in filled if split and key in _SPLITS and _SPLITS[key] != _SPLITS.get(split)]
    if (len(filled) > 1 or other) and split != ALL:
        forms = "an object with one list of records, with one for each split, or with columns of one length"
        raise UserError(f"{place}: has records in {', '.join(filled)}, none is split {split!r}; accepted is {forms}")
    if filled:
        return itertools.chain.from_iterable(numbered(f"{place}: {key}", lists[key]) for key in filled)
    key, rows = next(iter(lists.items()))
    return iter([(place, UserError(f"{why} (and of {key}, {fault('record 1', rows[0])})"))])


def _columns(value: dict) -> list[dict] | None:
    # pandas writes a column as an object with the keys 0, 1, ...
    cells = [[*c.values()] if isinstance(c, dict) and [*c] == [*map(str, range(len(c)))] else c for c in value.values()]
    is_table = _all_of(list, cells) and len(set(map(len, cells))) == 1
    # Where all are lists of objects, they are splits.
    if not is_table or all(_all_of(dict, column) for column in cells):
        return None
    return [dict(zip(value, row)) for row in zip(*cells)]


def _row(record: dict) -> dict:
    # The hub's viewer: {"row_idx": 0, "row": {...}, "truncated_cells": []}
    return record["row"] if isinstance(record, dict) and isinstance(record.get("row"), dict) else record


def _all_of(type_: type, values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, type_) for value in values)
