"""Records (plain dicts) in and out: JSONL, JSON and parquet files, local or on gs://, and the hub.

Every complaint names the file and the line (or record) it is about. `pyarrow` and `datasets` are imported
where they are used; most runs need neither.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from qstar.errors import UserError

_HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
# Endings that can only mean "a file", so that data/train.csv is not taken for the hub's data set "train.csv".
_FILE_ENDINGS = {".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".arrow"}

Place = tuple[str, Any]  # ("train.jsonl:12", the record found there)


def read_records(
    source: str | os.PathLike,
    fields: Sequence[str],
    *,
    split: str | None = None,
    limit: int | None = None,
    parse: Callable[[dict], Any] | None = None,
) -> list[Any]:
    """All records of a source, whole, in file order.

    Args:
        source: a path that ends in .jsonl, .json (one array of objects) or .parquet, `~` and `gs://`
            included; or a hub name "owner/name" or "owner/name:config", read through `datasets`.
        fields: keys that every record must have with a value other than null; other keys are kept too.
        split: the hub's split, "train" when None. A file is one split and ignores it.
        limit: stop after so many records.
        parse: turns a record into what the caller wants; a ValueError it raises becomes a UserError that
            says where the record stands.

    Returns:
        The records, or what `parse` made of them; at least one.

    Raises:
        UserError: missing or unreadable source, unknown ending, a bad line, a missing field, no records.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} would read nothing from {source}: give at least 1, or None for all")
    records = []
    for place, record in itertools.islice(_open(os.fspath(source), split), limit):
        if not isinstance(record, dict):
            raise UserError(f"{place}: a record must be a JSON object, not {type(record).__name__}")
        for field in fields:
            if record.get(field) is None:
                there = ", ".join(record) or "none"
                raise UserError(f"{place}: field {field!r} is missing; the record has {there}")
        try:
            records.append(record if parse is None else parse(record))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
    if not records:
        raise UserError(f"{source}: no records in it; at least one is needed")
    return records


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The rows of a JSONL file that `write_jsonl` made; an empty file is an empty list.

    Raises:
        UserError: the file is missing or unreadable, or a line is not JSON (named file:line).
    """
    return [row for _, row in _jsonl(_existing(os.fspath(path)))]


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Writes one JSON object per line, all or nothing: a reader sees the old file or the whole new one.

    The rows go to a temporary file in the same folder (made if missing), which is flushed to the disk and
    renamed. Keys keep their order and text stays readable (no \\u escapes). On gs:// an object appears only
    once it is complete, which gives the same promise. numpy scalars and arrays are written as numbers.
    """
    target = epath.Path(os.fspath(path)).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(path):
        target.write_text("".join(map(_line, rows)))
        return
    temporary = pathlib.Path(f"{target}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(map(_line, rows))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # also on Ctrl-C: leave no half-written file behind
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _line(row: dict) -> str:
    line = json.dumps(row, ensure_ascii=False, default=_plain)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair: legal in JSON, but only when escaped
        line = json.dumps(row, default=_plain)
    return line + "\n"


def _plain(value: Any) -> Any:
    """numpy scalars and arrays (and jax arrays, without importing jax) as plain Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def _open(source: str, split: str | None) -> Iterator[Place]:
    """Picks the reader: an existing path or anything that looks like one is a file, the rest is the hub."""
    suffix = pathlib.PurePosixPath(source).suffix.lower()
    looks_local = source.startswith(("/", ".", "~")) or "://" in source or suffix in _FILE_ENDINGS
    if not looks_local and not epath.Path(source).exists():
        if match := _HUB_NAME.fullmatch(source):
            return _hub(source, match["path"], match["config"], split or "train")
        raise UserError(
            f"{source!r} is neither a file nor a hub name: give a path that ends in .jsonl, "
            ".json or .parquet, or owner/name[:config]"
        )
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    path = _existing(source)
    if suffix not in readers:
        raise UserError(f"{source}: unknown ending {suffix!r}; readable are {', '.join(readers)}")
    return readers[suffix](path)


def _existing(source: str) -> epath.Path:
    path = epath.Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{source}: is a folder; name the file inside it")
    if not path.exists():
        raise UserError(f"{source}: no such file")
    return path


def _jsonl(path: epath.Path) -> Iterator[Place]:
    """Lines end at \\n only: str.splitlines would also cut at U+2028, which JSON strings may hold."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _decode(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _json(path: epath.Path) -> Iterator[Place]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    rows = _decode(content, os.fspath(path))
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: holds one JSON {type(rows).__name__}, not an array of objects; "
            "rename it to .jsonl if it has one object per line"
        )
    return ((f"{path}: record {number}", row) for number, row in enumerate(rows, start=1))


def _decode(content: bytes, place: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{place}: not JSON ({error.msg} at {where})") from error


def _parquet(path: epath.Path) -> Iterator[Place]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as file:
            rows = parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})") from error
    return ((f"{path}: record {number}", row) for number, row in enumerate(rows, start=1))


def _hub(source: str, path: str, config: str | None, split: str) -> Iterator[Place]:
    import datasets

    try:
        rows = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # network, permissions, names, splits: each has its own class, none shared
        raise UserError(
            f"{source} (split {split!r}): the hub gave nothing ({_first_line(error)}); "
            "check the name and the network, or name a local file"
        ) from error
    return ((f"{source} ({split}): record {number}", dict(row)) for number, row in enumerate(rows, start=1))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
