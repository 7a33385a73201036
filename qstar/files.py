"""Atomic, checksummed files, on disks and in buckets (gs://), and JSON parsing with errors that name the place.

A file written here appears whole or not at all. With `checksum=True`, a file of its name in the folder `.checksums` beside
it records its size, number of lines and BLAKE2b hash, which `read` compares. A file without a record (written by an
earlier version) is accepted with one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import fsspec
from etils import epath

from qstar.errors import QstarWarning, UserError, pip_install, require

UNVERIFIED = "some files of this run have no checksums (an earlier version wrote them): they are used unverified"


class Damaged(UserError):
    """A file or checkpoint whose content is not what was written."""


def warn(text: str) -> None:
    """Warns the user, once per text."""
    warnings.warn(text, QstarWarning, stacklevel=2)


def local_path(text: str | os.PathLike) -> Path:
    """A path on a disk with `~` expanded; that of an unknown user stays, where `Path.expanduser` would raise."""
    return Path(os.path.expanduser(text))


def as_path(text: str | os.PathLike) -> Path:
    """The path that a user names: a local one, with `~` expanded, or one in a bucket (gs://bucket/name).

    A path in a bucket has the methods of `pathlib.Path`, but for `glob` with `**`, `rglob` and appending. Raises
    UserError if the library that reaches the bucket is not installed, or the scheme is another.
    """
    name = os.fspath(text)
    if isinstance(text, epath.Path) and is_remote(text):
        return cast(Path, text)  # it was reached before: no question to the server
    if "://" not in name:
        return local_path(name)
    fault = f"{name}: is no folder; name one on a disk, or in a bucket of Google Cloud Storage (gs://bucket/name)"
    require((name.startswith("gs://") and len(name) > len("gs://"), fault))
    # Another process may write into a folder that this one has listed.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        fsspec.filesystem("gcs").exists(name)
    except ImportError as e:
        raise UserError(f"{name}: gs:// needs gcsfs ({pip_install('gcs')}): {e}") from None
    except Exception as e:  # noqa: BLE001  no credentials, no such bucket, no network: each has its own class
        raise UserError(f"{name}: cannot be reached ({' '.join(str(e).split())[:200] or type(e).__name__})") from None
    return cast(Path, epath.Path(name))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is one in a bucket."""
    return "://" in os.fspath(path)


def below(folder: Path) -> Iterator[Path]:
    """All files of a folder and of the folders in it, in the order of their names."""
    if is_remote(folder):
        # One listing for all: asking for each path whether it is a folder would take minutes.
        names = sorted(fsspec.filesystem("gcs").find(str(folder)))
        yield from (cast(Path, epath.Path(f"gs://{name}")) for name in names)
    else:
        yield from sorted(path for path in folder.rglob("*") if path.is_file())


def append(path: Path, content: bytes) -> None:
    """Adds bytes to the end of a file. In a bucket, where objects do not grow, the file is written again."""
    if is_remote(path):
        path.write_bytes((path.read_bytes() if path.exists() else b"") + content)
    else:
        with path.open("ab", buffering=0) as file:
            file.write(content)


def record_path(path: Path) -> Path:
    """The path of a file's checksum record."""
    return path.parent / ".checksums" / path.name


def record_of(content: bytes) -> dict[str, Any]:
    """The checksum record of a content."""
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {"bytes": len(content), "rows": content.count(b"\n"), "blake2b": digest}


def write(path: Path, content: bytes, *, checksum: bool = False, durable: bool = True) -> None:
    """Writes a file atomically: to a temporary name, flushed to the disk, renamed. An object of a bucket is atomic.

    Args: checksum: writes a checksum record, too. durable: whether the disk is asked to write at once.
    """
    if checksum:
        # The record comes first. A process killed between the two leaves a record without a file (which counts as missing)
        # or, where a file is replaced, a record that lists the old content as well as the new.
        records = [record_of(content)]
        if path.exists() and (old := record_of(path.read_bytes())) not in records:
            records.append(old)
        record_path(path).parent.mkdir(exist_ok=True)
        write(record_path(path), (json.dumps(records) + "\n").encode())
    if is_remote(path):
        path.write_bytes(content)
        return
    # Beside the file: `os.replace` is atomic within one file system only. The process id keeps two writers apart.
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # also on Ctrl-C: leave no partial file behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if checksum:
        # A rename is durable once its folder is flushed; not every file system can flush a folder.
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def read(path: Path) -> bytes:
    """The content of a file, compared with its checksum record if it has one.

    Raises:
        Damaged: content and record differ, or the record cannot be read.
    """
    content = path.read_bytes()
    try:
        records = json.loads(record_path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return content
    # A record that cannot be read is damage, too: as a missing one it would let a changed file pass.
    except (OSError, ValueError, RecursionError):
        records = None
    if not isinstance(records, list) or record_of(content) not in records:
        raise Damaged(f"{path}: damaged (it differs from its record in .checksums)")
    return content


def intact(path: Path) -> bool:
    """Whether a file exists as it was written. A damaged one is reported, renamed to NAME.damaged and counts as missing."""
    if not path.exists():
        return False
    try:
        read(path)
    except Damaged as e:
        warn(f"{e}; set aside as {path.name}.damaged and made again")
        path.replace(path.with_name(f"{path.name}.damaged"))
        record_path(path).unlink(missing_ok=True)
        return False
    if not record_path(path).exists():
        warn(UNVERIFIED)
    return True


def verify(folder: Path) -> None:
    """Checks every file below a folder that has a record with `intact`, and reports missing ones."""
    for record in list(below(folder)):
        path = record.parent.parent / record.name
        # train.metrics verifies its own file
        if record.parent.name != ".checksums" or path.name == "metrics.jsonl" or ".tmp-" in path.name:
            continue
        if path.exists():
            intact(path)
        else:
            warn(f"{path}: missing, though it was written; a stage that needs it makes it again")
            record.unlink()


def parse_json(content: bytes | str, place: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: not UTF-8, not JSON, nested too deeply, or a number with too many digits; begins with `place`.
    """
    try:
        return json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except UnicodeDecodeError as e:
        raise UserError(f"{place}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    except json.JSONDecodeError as e:
        where = f"column {e.colno}" if e.lineno == 1 else f"line {e.lineno}, column {e.colno}"
        raise UserError(f"{place}: not JSON ({e.msg} at {where})") from None
    except RecursionError:
        raise UserError(f"{place}: JSON nested too deeply to be read") from None
    except ValueError as e:  # Python refuses to convert integers of more than 4,300 digits
        raise UserError(f"{place}: JSON with a number that cannot be read ({e})") from None


def read_json(path: Path, advice: str = "copy the file again") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: missing, unreadable, or no JSON object; the line gives the place, and `advice` for a broken file.
    """
    try:
        content = read(path)
        value = json.loads(content)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: broken JSON ({e.msg}); {advice}") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError):
        value = parse_json(content, f"{path}")  # its message names these faults
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}; {advice}")
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one, with dotted keys; an empty dict stays a value."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
