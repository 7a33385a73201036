"""Run folders: files that are made once, the lock, the fingerprints of config and training data, the environment.

Stages pass their results on through files, each of which appears whole or not at all, so that a killed run continues.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from qstar import distributed, files, preemption
from qstar.data.sources import read_jsonl, write_jsonl
from qstar.errors import UserError, seconds_of
from qstar.files import read_json
from qstar.mesh import to_host
from qstar.runs.access import FORMAT_VERSION, is_locked, lock, read_run_config, unlock
from qstar.types import Params

# Config entries that may differ between a run and its resumption: they change what is shown, not what is computed.
FREE_KEYS = ("log",)
SEEN_SECONDS = 60.0  # a file of process 0 reaches the others through a network's caches within this time
_BEGAN: dict[str, float] = {}  # run folder -> when this process opened it


def cached_jsonl(path: Path, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the rows of a JSONL file, which is made and written first if it is not there or damaged.

    The file appears whole or not at all, so that it is its own done-marker; its checksum record reveals later damage.
    """
    if intact(path):
        return read_jsonl(path)
    rows = make()
    if distributed.is_first():
        write_jsonl(path, rows, checksum=True)
    # A barrier: no other process goes on to what may read the file before it is there.
    distributed.broadcast_bool(True)
    # The stage is on disk: nothing is lost if the run ends here.
    preemption.check()
    return rows


def once_json(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Like `cached_jsonl`, for one JSON object."""
    if intact(path):
        return read_json(path)
    value = make()
    write_json(path, value)
    distributed.broadcast_bool(True)
    return value


def intact(path: Path) -> bool:
    """Whether a file is there as it was written, by the first process' check; the same in all processes."""
    return distributed.broadcast_bool(distributed.is_first() and files.intact(path))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, with its checksum record (process 0 only)."""
    if distributed.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, (json.dumps(value, indent=1) + "\n").encode(), checksum=True)


class ChecksPassed(Exception):
    """The end of a dry run, raised by `open_run` in place of writing: the run is faultless as far as is known before it."""

    def __init__(self, resolved: dict[str, Any]):
        super().__init__()
        self.resolved = resolved  # the settings, as `open_run` gets them
        self.context: Any = None  # the `RunContext`, where there is one


checks_only = contextvars.ContextVar("checks_only", default=False)  # whether this is a dry run


def open_run(
    workdir: Path, config: dict[str, Any], flag: str = "--workdir", resolved: dict[str, Any] | None = None
) -> None:
    """Starts a run in `workdir`, or continues the run of the same config that is there.

    `resolved`: settings with all their defaults and presets, for resolved.json. Raises UserError: see `check_run`; or
    the folder cannot be written.
    """
    check_run(workdir, config, flag)
    if checks_only.get():
        raise ChecksPassed(resolved or {})
    # A barrier: a folder that process 0 has begun to write would look like another run to a slower process.
    distributed.broadcast_bool(True)
    _BEGAN[str(workdir)] = time.monotonic()
    try:
        distributed.broadcast_from_host0(lambda: lock(workdir, flag))
        check_shared(workdir, flag)
        distributed.broadcast_from_host0(lambda: files.verify(workdir))
        if not (workdir / "config.json").exists():
            write_json(workdir / "config.json", {"format_version": FORMAT_VERSION, **config})
        if resolved and not (workdir / "resolved.json").exists():
            write_json(workdir / "resolved.json", _as_json(resolved))
        old = workdir / "environment.json"
        before = read_json(old) if files.intact(old) else {}
        write_json(old, environment(before))
        distributed.broadcast_bool(True)
    except OSError as e:
        raise UserError(f"{flag}={workdir}: cannot be written ({e.strerror}); name another folder") from None


def check_shared(workdir: Path, flag: str = "--workdir") -> None:
    """Raises UserError on all processes if one of them does not find what process 0 writes into `workdir`."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    def leave_a_file() -> str:
        # Under a name that no process has looked for yet: file systems of a network remember what they did not find.
        files.write(workdir / (name := f".shared-{secrets.token_hex(8)}"), b"")
        return name

    path = workdir / distributed.broadcast_from_host0(leave_a_file)
    deadline = time.monotonic() + min(SEEN_SECONDS, seconds_of("QSTAR_JOIN_SECONDS", SEEN_SECONDS))
    while not (found := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.asarray(found)).reshape(-1)).tolist()
    if distributed.is_first():
        path.unlink()
    if blind:
        names = ", ".join(map(str, blind))
        raise UserError(
            f"{flag}={workdir}: process {names} does not find there what process 0 has written; give all processes the "
            "same folder, on a disk that they share or in a bucket (gs://)"
        )


@contextlib.contextmanager
def ending(workdir: Path) -> Iterator[None]:
    """Notes how the block ended in the run folder, and releases the folder."""
    outcome = "interrupted"  # by a signal, which is no Exception
    try:
        yield
        outcome = "done"
    except Exception:
        outcome = "failed"
        raise
    finally:
        end_run(workdir, outcome)
        unlock(workdir)


def end_run(workdir: Path, outcome: str = "done") -> None:
    """Adds to environment.json when this process ended, its seconds and the outcome: "done", "interrupted" or "failed".

    Does nothing if this process opened no run here.
    """
    # On a full disk the error that ended the run is the one to report.
    now = time.monotonic()
    with contextlib.suppress(OSError):
        note(workdir, ended=_now(), outcome=outcome, more_seconds=now - _BEGAN.pop(str(workdir), now))


def note(workdir: Path, more_seconds: float = 0.0, **values: Any) -> None:
    """Adds values to the environment.json of a run that this process has opened."""
    path = workdir / "environment.json"
    if is_locked(workdir) and files.intact(path):
        there = read_json(path)
        seconds = round(there.get("seconds", 0.0) + more_seconds, 1)
        write_json(path, there | values | {"seconds": seconds})


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(v) for v in value]
    # JSON has no infinity (of `max_epochs`, for example): it becomes text.
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if isinstance(value, (bool, int, float, str, type(None))) and finite else str(value)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def check_run(workdir: Path, config: dict[str, Any], flag: str = "--workdir") -> None:
    """Checks that a run of this config can start or continue in `workdir`; writes nothing.

    Raises UserError if the folder holds a run of another config (the first key that differs is named) or format, or
    something that is no run, or is a file. The message begins with the command line's `flag`.
    """
    there = workdir / "config.json"
    try:
        # In a bucket a folder is there once it has a file, and nothing above it can be one.
        above = () if files.is_remote(workdir) else workdir.absolute().parents
        nearest = next((p for p in (workdir, *above) if p.exists()), None)
        if nearest is not None and not nearest.is_dir():
            raise UserError(f"{flag}={workdir}: {nearest} is a file; name another folder")
        names = sorted(p.name for p in workdir.iterdir()) if nearest == workdir else []
        # The lock, and a config that a killed process was writing, are no run yet.
        strangers = [name for name in names if not name.startswith((".", "config.json.tmp"))]
        if strangers and not there.exists():
            raise UserError(f"{flag}={workdir}: holds {strangers[0]} but no run of qstar; name an empty or a new one")
        if strangers:
            # Through JSON, as the file has been: tuples become lists.
            _check_same(read_run_config(workdir, flag), json.loads(json.dumps(config)), f"{flag}={workdir}")
    except files.Damaged as e:
        advice = "restore it from a copy, or name another folder"
        raise UserError(f"{e}; without it the run cannot go on: {advice}") from None
    except OSError as e:
        raise UserError(f"{flag}={workdir}: cannot be read ({e.strerror}); name another folder") from None


def _check_same(old: dict[str, Any], new: dict[str, Any], where: str, prefix: str = "", what: str = "config.") -> None:
    for key in sorted(set(old) | set(new)):
        if not prefix and key in FREE_KEYS:
            continue
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            _check_same(a, b, where, f"{prefix}{key}.", what)
        elif a != b:
            raise UserError(
                f"{where}: was made with {what}{prefix}{key}={a!r}, now it is {b!r}; "
                "name another folder, or use the same settings to go on with what is there"
            )


def check_made_with(folder: Path, made_with: dict[str, Any]) -> None:
    """Keeps what a stage's result depends on in FOLDER/made_with.json; raises UserError if that has other entries."""
    path = folder / "made_with.json"
    if distributed.exists(folder / "summary.json") and not distributed.exists(path):
        return  # nothing to compare with; the parameters are compared when they are restored
    made_with = json.loads(json.dumps(made_with))
    old = once_json(path, lambda: made_with)
    # Sums of floats differ between machines. The sum may be near 0, so that its tolerance is a share of the norm.
    key = "start_norm_and_sum"
    near = 1e-3 * np.nan_to_num(made_with[key][0])
    if np.allclose(old.get(key, [0, 0]), made_with[key], rtol=1e-3, atol=near, equal_nan=True):
        old = {**old, key: made_with[key]}
    _check_same(old, made_with, str(folder), what="")


def norm_and_sum(params: Params) -> list[float]:
    """Returns norm and sum of all parameters: a fingerprint to compare with a tolerance."""
    # A hash of bits would differ between machines and shardings.
    return [float(x) for x in _moments(params)]


def fingerprint(params: Params) -> str:
    """Returns a hash of up to 16 values along each axis of every array, by which models of one name are told apart."""
    # Values as they are stored: the same bits on all machines and shardings, and another after the smallest update.
    some = jax.tree.map(lambda x: x[tuple(slice(None, None, max(1, -(-n // 16))) for n in x.shape)], params)
    return data_hash(map(np.asarray, jax.tree.leaves(to_host(some))))


@jax.jit
def _moments(params: Params) -> tuple[jax.Array, jax.Array]:
    leaves = [x.astype(np.float32) for x in jax.tree.leaves(params)]
    return optax.global_norm(leaves), sum(x.sum() for x in leaves)


def data_hash(parts: Iterable[Any]) -> str:
    """Returns a hash of training data: rows of token ids, texts, or arrays by name."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = (part.dtype.str, part.shape, hashlib.sha256(np.ascontiguousarray(part).data).hexdigest())
        digest.update(repr(part).encode() + b"\n")
    return digest.hexdigest()[:16]


def environment(before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the record of how a run was made: dates, host, versions, devices, revision, command.

    `before`: the record of earlier processes of the run. Its start stays, and the seconds of all processes add up.
    """
    import flax
    import jaxlib

    from qstar import __version__

    devices, before = jax.devices(), before or {}
    program = Path(sys.argv[0]).name
    return {
        "command": shlex.join(["qstar" if program == "__main__.py" else program, *sys.argv[1:]]),
        "started": before.get("started") or _now(),
        "ended": None,
        "seconds": before.get("seconds") or 0.0,
        "starts": (before.get("starts") or 0) + 1,
        "host": socket.gethostname(),
        "qstar": __version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
    }


def _revision() -> str | None:
    git, here = ["git", "describe", "--always", "--dirty"], Path(__file__).resolve().parent
    try:
        return subprocess.check_output(git, cwd=here, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None  # installed without its repository


def stable_seed(*parts: Any) -> int:
    """Returns a 31-bit seed that depends on the parts alone, in every process and Python version."""
    # Not `hash`, which is salted per process for strings. 31 bits fit into int32.
    return zlib.crc32("/".join(map(str, parts)).encode()) & 0x7FFFFFFF
