"""Records (plain dicts) in and out: JSONL, JSON, parquet and CSV files, or folders, local or on gs://, and the hub.

JSON is parsed here, since `datasets` refuses rows that differ in type. Every error names the file and line (or record).
"""

from __future__ import annotations

import functools
import gzip
import io
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
from qstar.data.layouts import READABLE, Fault, Place, in_object, kind, numbered, shards
from qstar.errors import QstarWarning, UserError, unknown

BAD_ROWS = 0.01  # default share of a task's or corpus' records that may be unusable before reading stops
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
# Endings of files only, so that data/train.txt is not taken for the hub's data set "train.txt".
_FILE_ENDINGS = {*READABLE, ".txt", ".gz", ".zst", ".zip", ".arrow"}
_BUILT_IN = "built-in:"  # in front of the name of a file in `rows`: a few rows for smoke runs
# First bytes of files whose content differs from their names, and what to do about each.
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch the file itself (git lfs pull)",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zXZ": "compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"ARROW1": "an Arrow file; save it as parquet (datasets: to_parquet)",
    b"<": "HTML or XML, perhaps the page of a download that failed; fetch the file itself",
}


def read_records(
    source: str | os.PathLike,
    fields: Sequence[str],
    *,
    split: str | None = None,
    limit: int | None = None,
    parse: Callable[[dict], Any] | None = None,
    bad_rows: float = 0.0,
    texts: bool = False,
) -> list[Any]:
    """All records of a source, in file order.

    A JSON file holds a list of records, or an object: one record; ``{"train": [..], "test": [..]}``; any object with
    one list of records, as ``{"data": [..]}`` and ``{"rows": [{"row": {..}}]}``; or columns, ``{"question": [..]}``. Of
    a folder and those in it, all files are read in the order of their paths; they have one ending. If files or folders
    are named after splits (train-00000-of-00002.parquet, test/algebra/1.json), those of `split` alone are read.

    Args:
        source: a path, local or gs://, of a folder or a file (.jsonl, .ndjson, .json, .parquet, .csv, .tsv, also with
            .gz); a hub name "owner/name[:config]" or "hf://datasets/owner/name/file.parquet"; or "built-in:gsm8k", a
            few rows that come with qstar.
        fields: keys that every record must have with a value other than null; other keys are kept too.
        split: the split ("train" when None), "all", or a part, "train[:700]", "train[80%:]"; of a source without splits
            only the brackets count: its records of that range.
        parse: converts a record; an error it raises becomes a UserError that names the record's place.
        bad_rows: share of the records that may be unusable. They are left out, with a warning that names them.
        texts: keep the cells of CSV files as texts; else columns of whole numbers become numbers.

    Raises:
        UserError: missing or unreadable source, no records, or more unusable ones than `bad_rows` allows.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} would read nothing from {source}: give at least 1, or None for all")
    if not 0 <= bad_rows < 1:
        raise UserError(f"bad_rows={bad_rows} must be a share of the records, from 0 to below 1")

    def read(place: str, record: Any) -> Any:
        return _checked(place, _object(place, record), fields, parse)

    def fault(place: str, record: Any) -> str:
        try:
            read(place, record)
        except UserError as error:
            return str(error)
        return ""

    records, faults = [], []
    for place, record in itertools.islice(_part(os.fspath(source), split, fault, texts), limit):
        try:
            records.append(read(place, record))
        except UserError as error:
            if not bad_rows:
                raise
            faults.append(str(error))
    # A few bad records in a large file are usual; more mean that it is another file than the task expects.
    if faults:
        count = len(records) + len(faults)
        if not records and count > 1:
            raise UserError(f"{faults[0]} (and none of the {count} records of {source} can be used)")
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        if len(faults) > bad_rows * count:
            above = f"above bad_rows={bad_rows:g}, the share that may be left out; correct the file or raise bad_rows"
            raise UserError(f"{shown} ({source}: {len(faults)} of {count} records cannot be used, {above})")
        warnings.warn(f"{source}: {len(faults)} of {count} records are left out: {shown}", QstarWarning, stacklevel=2)
    if not records:
        raise UserError(f"{source}: no records in it; at least one is needed")
    return records


def _part(source: str, split: str | None, fault: Fault, texts: bool) -> Iterable[Place]:
    rows = _open(source, split, fault, texts)
    range_ = re.search(r"\[(-?\d+%?)?:(-?\d+%?)?\]$", split or "")
    if split and "[" in split and not range_:
        raise UserError(f"{source}: split {split!r} is not of the form train[10:20] or train[:80%]")
    # `datasets` takes the ranges of the hub's splits itself.
    if not range_ or is_hub_name(source):
        return rows
    kept = list(rows)
    start, end = (
        None if not e else len(kept) * int(e[:-1]) // 100 if e.endswith("%") else int(e) for e in range_.groups()
    )
    return kept[start:end]


def _object(place: str, record: Any) -> dict:
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError(f"{place}: a record must be a JSON object, not {type(record).__name__}")
    return record


def _checked(place: str, record: dict, fields: Sequence[str], parse: Callable[[dict], Any] | None) -> Any:
    for field in fields:
        if record.get(field) is None:
            raise UserError(f"{place}: {missing(record, field)}; the record has {keys_of(record)}")
    for field, value in record.items():
        # JSON may hold half a surrogate pair, which no tokenizer accepts: better here than in the middle of a run.
        if (text := _not_utf8(value)) is not None:
            at = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
            what = f"half a surrogate pair ({text[at]!a}, character {at} of its text): no character"
            raise UserError(f"{place}: field {field!r} has {what}")
    try:
        return record if parse is None else parse(record)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    # A value of another type or shape raises anything, above all in a parser of the user's own.
    except Exception as error:
        raise UserError(f"{place}: not of the expected form ({type(error).__name__}: {error})") from error


def missing(record: dict, *names: str) -> str:
    """Says that a field, which may have one of several names, is missing or null."""
    return f"field {'|'.join(names)!r} is missing" + ": it is null" * any(name in record for name in names)


def keys_of(record: dict) -> str:
    """The first ten keys of a record, for messages."""
    return ", ".join([*map(str, itertools.islice(record, 10)), *(["..."] if len(record) > 10 else [])]) or "none"


def text_field(record: dict, name: str) -> str:
    """A field of a record that has to be text; else a ValueError that names it."""
    if not isinstance(record[name], str):
        raise ValueError(f"field {name!r} is of type {type(record[name]).__name__}, not text")
    return record[name]


def _not_utf8(value: Any) -> str | None:
    # A list that grows instead of a recursion: JSON may be nested deeper than Python calls.
    waiting = [value]
    for part in waiting:
        if isinstance(part, str):
            try:
                part.isascii() or part.encode()
            except UnicodeEncodeError:
                return part
        elif isinstance(part, dict | list):
            waiting.extend(part.values() if isinstance(part, dict) else part)
    return None


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The rows of a JSONL file, none for an empty one. A missing or damaged file or line is a UserError."""
    return [_object(place, row) for place, row in _open(os.fspath(path), None)]


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict], *, checksum: bool = False) -> None:
    """Writes one JSON object per line, atomically; `checksum` adds a checksum record (`files.write`)."""
    target = files.as_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write(target, "".join(map(_line, rows)).encode(), checksum=checksum)


def _line(row: dict) -> str:
    def plain(value: Any) -> Any:
        # Arrays become numbers, those of jax too, without importing it.
        if hasattr(value, "tolist"):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")

    line = json.dumps(row, ensure_ascii=False, default=plain)
    try:
        line.encode()
    # Half a surrogate pair is legal in JSON, but only when escaped.
    except UnicodeEncodeError:
        line = json.dumps(row, default=plain)
    return line + "\n"


# ---------------------------------------------------------------------------------------------------------- readers


def _open(source: str, split: str | None, fault: Fault | None = None, texts: bool = False) -> Iterator[Place]:
    if source.startswith(_BUILT_IN):
        names = {path.stem: str(path) for path in sorted(pathlib.Path(__file__).with_name("rows").glob("*.jsonl"))}
        name = source.removeprefix(_BUILT_IN)
        if name not in names:
            raise unknown(source, name, names)
        source = names[name]
    if source.startswith("hf://"):
        # One file of a repository: for data sets whose loading script `datasets` no longer runs.
        if (suffix := pathlib.PurePosixPath(source.lower()).suffix) not in (".parquet", ".json", ".jsonl"):
            raise UserError(f"{source}: unknown ending; readable are .jsonl, .json, .parquet")
        return _hub(source, source, suffix[1:].replace("jsonl", "json"), data_files=source, split="train")
    if is_hub_name(source):
        if match := _HUB_NAME.fullmatch(source):
            split = split or "train"
            place = match["path"], match["config"]
            return _hub(f"{source} (split {split!r})", f"{source} ({split})", *place, split=split)
        advice = f"give a folder or a path that ends in {', '.join(READABLE)}, or owner/name[:config]"
        raise UserError(f"{source!r} is neither a file nor a hub name: {advice}")
    path, name = _existing(source), (split or "train").partition("[")[0]
    read = functools.partial(_file, split=name, fault=fault, texts=texts)
    return itertools.chain.from_iterable(map(read, shards(path, name))) if path.is_dir() else read(path)


def _file(path: epath.Path, split: str, fault: Fault | None, texts: bool) -> Iterator[Place]:
    if (ending := kind(path)) not in READABLE:
        raise UserError(f"{path}: unknown ending {path.suffix!r}; readable are {', '.join(READABLE)}, also with .gz")
    content = _content(path)
    for magic, what in _FOREIGN.items():
        if content.startswith(magic):
            raise UserError(f"{path}: is {what}")
    # The content outweighs the name: a parquet file may be called anything.
    if content.startswith(b"PAR1") or ending in (".parquet", ".csv", ".tsv"):
        return _arrow(path, content, "parquet" if content.startswith(b"PAR1") else ending[1:], texts)
    return _json(path, content, split, None if ending in (".jsonl", ".ndjson") else fault)


def check_source(source: str) -> None:
    """Raises UserError for a local file that is not there; reads nothing, and does not ask the hub."""
    if not source.startswith((_BUILT_IN, "hf://")) and not is_hub_name(source):
        _existing(source)


def is_hub_name(source: str) -> bool:
    """Whether a source is looked for on the hub: it is no path, and no file has that name."""
    suffix = pathlib.PurePosixPath(source.lower()).suffix
    looks_local = source.startswith(("/", ".", "~")) or "://" in source or suffix in _FILE_ENDINGS
    return not looks_local and not os.path.exists(source)


def _existing(source: str) -> epath.Path:
    if re.match(r"(https?|ftp)://", source):
        raise UserError(f"{source}: URLs are not read; download the file and name the local copy")
    try:
        path = epath.Path(source).expanduser()
        exists = path.exists()
    # Unknown schemes, missing drivers and names that the system refuses raise classes of their own.
    except Exception as error:
        raise UserError(f"{source}: cannot be opened ({_first_line(error)}); name a local file") from error
    if not exists:
        raise UserError(f"{source}: no such file")
    return path


def _content(path: epath.Path) -> bytes:
    try:
        content = files.read(path)
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip data is damaged ({error}); copy it again") from error


def _json(path: epath.Path, content: bytes, split: str, fault: Fault | None) -> Iterator[Place]:
    name = os.fspath(path)
    # Spreadsheets and Windows editors put a byte-order mark in front.
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return numbered(name, files.parse_json(content, name))
    if fault and not isinstance(value := _parsed(content, name), UserError):
        return in_object(name, value, split, fault) if isinstance(value, dict) else iter([(name, value)])
    # Lines end at \n only: str.splitlines would also cut at U+2028, which JSON strings may hold.
    places = ((f"{name}:{number}", line) for number, line in enumerate(content.split(b"\n"), start=1))
    return ((place, _parsed(line, place)) for place, line in places if line.strip())


def _parsed(content: bytes, place: str) -> Any:
    try:
        return files.parse_json(content, place)
    except UserError as fault:
        return fault


def _arrow(path: epath.Path, content: bytes, kind: str, texts: bool) -> Iterator[Place]:
    # pyarrow comes with `datasets`, which itself would copy the file into its cache.
    import pyarrow
    from pyarrow import parquet

    file, delimiter = io.BytesIO(content), "\t" if kind == "tsv" else ","
    try:
        table = parquet.read_table(file) if kind == "parquet" else _csv_table(file, delimiter, texts)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable {kind} file ({_first_line(error)})") from error
    # In a record the last one would win. Spreadsheets leave several heads blank; those columns have no use.
    if twice := [name for name in table.column_names if name and table.column_names.count(name) > 1]:
        raise UserError(f"{path}: several columns are named {twice[0]!r}; give each another name")
    return numbered(os.fspath(path), table.to_pylist())


def _csv_table(file: io.BytesIO, delimiter: str, as_texts: bool) -> Any:
    import pyarrow
    from pyarrow import compute, csv

    # Only a blank cell may be null: NA and nan are words.
    options: dict[str, Any] = {"parse_options": csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)}
    typed = csv.read_csv(file, **options, convert_options=csv.ConvertOptions(null_values=[""]))
    kinds = dict.fromkeys(typed.column_names, pyarrow.string())
    as_text = csv.ConvertOptions(column_types=kinds, strings_can_be_null=True, null_values=[""])
    file.seek(0)
    texts = csv.read_csv(file, **options, convert_options=as_text).columns

    def kept(column: Any, text: Any) -> bool:
        if as_texts:
            return False
        kind = column.type
        if pyarrow.types.is_integer(kind):
            return compute.all(compute.equal(column.cast("string"), text)).as_py() is not False
        return pyarrow.types.is_string(kind) or pyarrow.types.is_null(kind)

    # Every cell stays as it was written: 007 is not 7, 2.50 not 2.5, true not yes. Tasks read numbers from text.
    columns = [column if kept(column, text) else text for column, text in zip(typed.columns, texts)]
    return pyarrow.table(columns, names=typed.column_names)


def _hub(what: str, name: str, *arguments: Any, **options: Any) -> Iterator[Place]:
    # The import takes seconds, and most runs read local files.
    import datasets

    try:
        rows = iter(datasets.load_dataset(*arguments, **options))
    # Network, permissions, names, splits: the classes of their errors share no base.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        advice = "check the name and the network, or name a local file"
        raise UserError(f"{what}: the hub returned nothing ({text}); {advice}") from error
    return numbered(name, map(dict, rows))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
