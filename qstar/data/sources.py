"""Records (plain dicts) in and out: JSONL, JSON and parquet files, plain or gzipped, local or on gs://, and the hub.

Every complaint names the file and the line (or record) it is about. `pyarrow` and `datasets` are imported
where they are used; most runs need neither.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import pathlib
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from qstar import files
from qstar.errors import QstarWarning, UserError

_HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
# Endings that can only mean "a file", so that data/train.csv is not taken for the hub's data set "train.csv".
_FILE_ENDINGS = {".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".arrow"}
# First bytes of files that are something else than their names say, and what to do about each.
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch the file itself (git lfs pull)",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zXZ": "compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"ARROW1": "an Arrow file; save it as parquet (datasets: to_parquet)",
    b"<": "HTML or XML, perhaps the page of a download that failed; fetch the file itself",
}
BAD_ROWS = 0.01  # share of a task's or corpus' records that may be unusable before reading stops

Place = tuple[str, Any]  # ("train.jsonl:12", the record found there, or the UserError that says why there is none)


def read_records(
    source: str | os.PathLike,
    fields: Sequence[str],
    *,
    split: str | None = None,
    limit: int | None = None,
    parse: Callable[[dict], Any] | None = None,
    bad_rows: float = 0.0,
) -> list[Any]:
    """All records of a source, whole, in file order.

    Args:
        source: a path that ends in .jsonl, .json (an array of objects, or an object per line) or .parquet, the first
            two also with .gz, `~` and `gs://` included; a hub name "owner/name" or "owner/name:config", or a file of
            the hub, "hf://datasets/owner/name/file.parquet", read through `datasets`.
        fields: keys that every record must have with a value other than null; other keys are kept too.
        split: the hub's split, "train" when None. A file is one split and ignores it.
        limit: stop after so many records.
        parse: turns a record into what the caller wants; an error it raises becomes a UserError that says where the
            record stands.
        bad_rows: share of the records that may be unusable. They are left out, with a warning that names them.

    Returns:
        The records, or what `parse` made of them; at least one.

    Raises:
        UserError: missing or unreadable source, unknown ending, no records, or more bad lines, missing fields and
            refusals of `parse` than `bad_rows` allows.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} would read nothing from {source}: give at least 1, or None for all")
    if not 0 <= bad_rows < 1:
        raise UserError(f"bad_rows={bad_rows} must be a share of the records, from 0 to below 1")
    records, faults = [], []
    for place, record in itertools.islice(_open(os.fspath(source), split), limit):
        try:
            records.append(_usable(place, record, fields, parse))
        except UserError as fault:
            if not bad_rows:
                raise
            faults.append(str(fault))
    if faults:
        count = len(records) + len(faults)
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        if len(faults) > bad_rows * count:
            raise UserError(
                f"{shown} ({source}: {len(faults)} of {count} records cannot be used, above bad_rows={bad_rows:g}, the share "
                "that may be left out; mend the file or raise bad_rows)"
            )
        warnings.warn(f"{source}: {len(faults)} of {count} records are left out: {shown}", QstarWarning, stacklevel=2)
    if not records:
        raise UserError(f"{source}: no records in it; at least one is needed")
    return records


def _usable(place: str, record: Any, fields: Sequence[str], parse: Callable[[dict], Any] | None) -> Any:
    """The record, or what `parse` makes of it; a UserError names the place of one that cannot be used."""
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError(f"{place}: a record must be a JSON object, not {type(record).__name__}")
    for field in fields:
        if record.get(field) is None:
            there = ", ".join(map(str, record)) or "none"
            raise UserError(f"{place}: field {field!r} is missing; the record has {there}")
    for field, value in record.items():
        if (text := _surrogate(value)) is not None:
            at = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
            raise UserError(
                f"{place}: field {field!r} has half a surrogate pair ({text[at]!a}, character {at} of its text): no character"
            )
    try:
        return record if parse is None else parse(record)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # a value of another type or shape
        raise UserError(f"{place}: not of the expected form ({type(error).__name__}: {error})") from error


def _surrogate(value: Any) -> str | None:
    """The first text in a JSON value that UTF-8 cannot hold."""
    if isinstance(value, str):
        try:
            return None if value.isascii() or value.encode() else None
        except UnicodeEncodeError:
            return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((text for part in parts if (text := _surrogate(part)) is not None), None)


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The rows of a JSONL file that `write_jsonl` made; an empty file is an empty list.

    Raises:
        UserError: the file is missing or unreadable, differs from its checksum record, or a line is no JSON object
            (named file:line).
    """
    rows = []
    for place, row in _jsonl(_existing(os.fspath(path))):
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row must be a JSON object, not {type(row).__name__}")
        rows.append(row)
    return rows


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict], *, checksum: bool = False) -> None:
    """Writes one JSON object per line, all or nothing: a reader sees the old file or the whole new one.

    The rows go to a temporary file in the same folder (made if missing), which is flushed to the disk and
    renamed. Keys keep their order and text stays readable (no \\u escapes). On gs:// an object appears only
    once it is complete, which gives the same promise. numpy scalars and arrays are written as numbers.

    Args:
        checksum: also write a checksum record, which readers compare (local files only).
    """
    target = epath.Path(os.fspath(path)).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(path):
        target.write_text("".join(map(_line, rows)))
        return
    files.write(pathlib.Path(target), "".join(map(_line, rows)).encode(), checksum=checksum)


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
    if source.startswith("hf://"):
        return _hub_file(source)
    suffixes = pathlib.PurePosixPath(source.lower()).suffixes
    suffix = suffixes[-1] if suffixes else ""
    looks_local = source.startswith(("/", ".", "~")) or "://" in source or suffix in _FILE_ENDINGS
    if not looks_local and not os.path.exists(source):
        if match := _HUB_NAME.fullmatch(source):
            return _hub(source, match["path"], match["config"], split or "train")
        raise UserError(
            f"{source!r} is neither a file nor a hub name: give a path that ends in .jsonl, "
            ".json or .parquet, or owner/name[:config]"
        )
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    path = _existing(source)
    kind = suffix if suffix != ".gz" else "".join(suffixes[-2:-1])
    if kind not in readers or (suffix == ".gz" and kind == ".parquet"):
        raise UserError(
            f"{source}: unknown ending {suffix!r}; readable are {', '.join(readers)}, .jsonl.gz and .json.gz"
        )
    with _reading(path), path.open("rb") as file:
        head = file.read(32)
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is {what}")
    return (_parquet if head.startswith(b"PAR1") else readers[kind])(path)


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turns what a file that cannot be read raises into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip data is damaged ({error}); copy it again") from error


@contextlib.contextmanager
def _plain_bytes(path: epath.Path) -> Iterator[Any]:
    """The file, opened to read its bytes, unpacked where it is gzip, whatever its name is."""
    with _reading(path), path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if packed:
            with gzip.open(file, "rb") as unpacked:
                yield unpacked
        else:
            yield file


def _existing(source: str) -> epath.Path:
    if re.match(r"(https?|ftp)://", source):
        raise UserError(f"{source}: URLs are not read; download the file and name the local copy")
    try:
        path = epath.Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except Exception as error:  # unknown schemes, missing drivers, names the system refuses: each has its own class
        raise UserError(f"{source}: cannot be opened ({_first_line(error)}); name a local file") from error
    if is_folder:
        raise UserError(f"{source}: is a folder; name the file inside it")
    if not exists:
        raise UserError(f"{source}: no such file")
    return path


def _jsonl(path: epath.Path) -> Iterator[Place]:
    """An object per line; an array of objects under this name is read as `_json` reads it.

    Lines end at \\n only: str.splitlines would also cut at U+2028, which JSON strings may hold.
    """
    with _plain_bytes(path) as file:
        if "://" not in os.fspath(path) and files.record_path(pathlib.Path(path)).exists():  # a run wrote it
            files.read(pathlib.Path(path))
        for number, line in enumerate(file, start=1):
            if number == 1 and line.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"["):
                yield from _array(path, line + file.read())
                return
            if line.strip():
                yield _decoded(line, f"{path}:{number}")


def _json(path: epath.Path) -> Iterator[Place]:
    """An array of objects, or one object; an object per line under this name is read as `_jsonl` reads it."""
    with _plain_bytes(path) as file:
        content = file.read()
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _array(path, content)
    place, record = _decoded(content, os.fspath(path))
    return _jsonl(path) if isinstance(record, UserError) else iter([(place, record)])


def _array(path: epath.Path, content: bytes) -> Iterator[Place]:
    rows = files.parse_json(content, os.fspath(path))
    return ((f"{path}: record {number}", row) for number, row in enumerate(rows, start=1))


def _decoded(content: bytes, place: str) -> Place:
    """A line's record, or the UserError of a line that holds none."""
    try:
        return place, files.parse_json(content, place)
    except UserError as fault:
        return place, fault


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

    with _hub_faults(f"{source} (split {split!r})"):
        rows = iter(datasets.load_dataset(path, config, split=split))
    return ((f"{source} ({split}): record {number}", dict(row)) for number, row in enumerate(rows, start=1))


def _hub_file(source: str) -> Iterator[Place]:
    """One file of a repository on the hub: for data sets whose loading script `datasets` no longer runs."""
    import datasets

    kind = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(pathlib.PurePosixPath(source).suffix.lower())
    if kind is None:
        raise UserError(f"{source}: unknown ending; readable are .jsonl, .json, .parquet")
    with _hub_faults(source):
        rows = iter(datasets.load_dataset(kind, data_files=source, split="train"))
    return ((f"{source}: record {number}", dict(row)) for number, row in enumerate(rows, start=1))


@contextlib.contextmanager
def _hub_faults(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # network, permissions, names, splits: each has its own class, none shared
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{what}: the hub gave nothing ({text}); check the name and the network, or name a local file"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
