"""Access to run folders without JAX: the config with its format version, the lock, and the process that holds it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Any

from qstar import files
from qstar.errors import UserError
from qstar.files import read_json

# Of keys and files in a run folder. 1 had no such number; 2 renamed keys of metrics and records (see CHANGELOG.md).
FORMAT_VERSION = 2


def read_run_config(workdir: Path, flag: str = "--workdir") -> dict[str, Any]:
    """Returns the config of a run folder; raises UserError if it has the format of another version of qstar."""
    config = read_json(workdir / "config.json")
    found = config.pop("format_version", 1)
    if found != FORMAT_VERSION:
        version = f"format_version {found!r}, and this version of qstar reads {FORMAT_VERSION}"
        where = f"{flag}={workdir}" if flag else workdir
        raise UserError(f"{where}: the run folder has {version}; name another folder, or use that version")
    return config


# Folder -> the open lock file (None in a bucket): POSIX releases a lock when its file is closed, so a collected object
# would give it up.
_locks: dict[Path, Any] = {}


def lock(workdir: Path, flag: str = "--workdir") -> None:
    """Locks a run folder for this process, making it if necessary.

    The lock is POSIX's, on WORKDIR/.lock, and ends with the process. In buckets and on file systems without locks the
    process that the file names holds it as long as it runs on this host; the lock of a process of another host, which
    cannot be checked, is taken over with a warning. Raises UserError if another process has it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if workdir.resolve() in _locks:
        return
    path = workdir / ".lock"
    # Not "w", which would erase the holder's line before the lock is acquired.
    file = None if files.is_remote(path) else path.open("a+b", buffering=0)
    holder = (path.read_bytes() if path.exists() else b"").decode("utf-8", "replace")
    pid, host, begun, *_ = [*holder.split(), "", "", ""]
    own = [str(os.getpid()), socket.gethostname(), _begun(os.getpid())]
    taken = f"{flag}={workdir}: process {pid} on {host} is running in it; wait for it, end it, or name another folder"
    is_free = True
    try:
        if file is None:
            raise OSError("a bucket has no locks")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        is_free = False
    except OSError:
        is_free = not begun or [pid, host, begun] == own or host != own[1] or begun != _begun(pid)
        if pid and host != own[1]:
            files.warn(f"{flag}={workdir}: takes over the lock of process {pid} on {host}; make sure that it has ended")
    if not is_free:
        if file is not None:
            file.close()
        raise UserError(taken)
    line = " ".join(own).encode() + b"\n"
    if file is None:
        path.write_bytes(line)
    else:
        file.truncate(0)
        file.write(line)
    _locks[workdir.resolve()] = file


def unlock(workdir: Path) -> None:
    """Releases a run folder, if this process has locked it."""
    if workdir.resolve() in _locks:
        file = _locks.pop(workdir.resolve())
        if file is None:
            (workdir / ".lock").unlink(missing_ok=True)
        else:
            file.close()


def is_locked(workdir: Path) -> bool:
    """Whether this process has locked a run folder."""
    return workdir.resolve() in _locks


def is_running(workdir: Path) -> bool:
    """Whether a process holds the lock of a run folder (on file systems without locks, and in buckets: one of this host).

    Takes no lock and writes nothing.
    """
    # Closing a file of the lock releases this process' own lock: it is not opened where this process has it.
    if is_locked(workdir):
        return True
    try:
        file = (workdir / ".lock").open("rb")
    except OSError:
        return False
    with file:
        try:
            # An object of a bucket has no descriptor, which is an OSError, too.
            found = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_RDLCK, 0, 0, 0, 0))
            return struct.unpack("hhqqi", found)[0] != fcntl.F_UNLCK
        except OSError:
            # A file system without locks: the process that the file names, if it is of this host.
            pid, host, begun, *_ = [*file.read().decode("utf-8", "replace").split(), "", "", ""]
            return host == socket.gethostname() and bool(begun) and begun == _begun(pid)


def _begun(pid: Any) -> str:
    """The start of a process of this host in clock ticks; "" if there is none."""
    # Ids are used again; id and start together are not. The name in parentheses may hold spaces: split behind it.
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
