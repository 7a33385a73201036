"""Process isolation on Linux: Landlock, seccomp, capabilities, resource limits. x86-64 only.

"landlock": nothing can be written and only Python's library can be read. "seccomp", on kernels without Landlock: no file
can be opened, so only modules imported before are available. In both seccomp refuses new processes, programs, sockets,
signals to others (also those that the kernel would send) and access to other processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
packages: list[str] = []  # folders (or files) of the packages that programs may import; `server` fills it
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


class Refused(Exception):
    """The system refuses a step, which the message names."""


def _call(what: str, result: int) -> int:
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(what: str, number: int, *args: object) -> int:
    return _call(what, _libc.syscall(ctypes.c_long(number), *args))


def _prctl(what: str, *args: int) -> None:
    _call(what, _libc.prctl(*(ctypes.c_ulong(a) for a in (*args, 0, 0, 0, 0)[:5])))


def die_with_parent() -> None:
    """SIGKILL when the parent's thread ends."""
    _prctl("PR_SET_PDEATHSIG", 1, signal.SIGKILL)


def adopt_orphans() -> None:
    """Makes grandchildren whose parent ends children of this process."""
    _prctl("PR_SET_CHILD_SUBREAPER", 36, 1)


def hide_memory() -> None:
    """Keeps processes of the same user from reading this one's memory or tracing it."""
    _prctl("PR_SET_DUMPABLE", 4, 0)


def drop_capabilities() -> None:
    """Gives up every capability for good."""
    header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    _syscall("capset", 126, header, none)
    _prctl("PR_SET_NO_NEW_PRIVS", 38, 1)


def limits(memory_bytes: int, cpu_seconds: int) -> None:
    """Lowers the limits of this process; `memory_bytes` is its whole address space."""
    for what, soft, hard in (
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        # A program can ignore SIGXCPU at the soft limit; at the hard one the kernel sends SIGKILL.
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_NPROC, 128, 128),  # threads; new processes are refused anyway
        (resource.RLIMIT_STACK, 8 << 20, 8 << 20),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        # A container's hard limit may be lower already, and cannot be raised.
        top = resource.getrlimit(what)[1]
        if top != resource.RLIM_INFINITY:
            soft, hard = min(soft, top), min(hard, top)
        resource.setrlimit(what, (soft, hard))


def few_arenas() -> None:
    """Makes threads share one heap: each would reserve 64 MiB of address space for its own."""
    with contextlib.suppress(AttributeError):  # not every C library has arenas
        _libc.mallopt(-8, 1)


def library_folders() -> list[str]:
    """Folders a program may read: Python's standard library, the shared libraries, and `packages`."""
    names = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *_LIBRARIES, *packages)
    return [name for name in dict.fromkeys(names) if os.path.isdir(name)]


# -------------------------------------------------------------------------------------------------------- Landlock


def landlock(folders: list[str]) -> None:
    """Restricts this process to reading `folders`; raises Refused if the kernel has no Landlock."""
    abi = _libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if abi < 1:
        raise Refused("the kernel has no Landlock")
    # The number of rights by version: a kernel refuses a ruleset with rights that it does not know.
    everything = (1 << (13, 14, 15, 15, 16)[min(abi, 5) - 1]) - 1
    attributes = struct.pack("<Q", everything)
    ruleset = _syscall("landlock_create_ruleset", 444, attributes, ctypes.c_size_t(8), ctypes.c_uint(0))
    for folder in folders:
        fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("<Qi", 0b1101, fd)  # execute (mapping a library), read a file, list a folder
        _syscall("landlock_add_rule", 445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(fd)
    _prctl("PR_SET_NO_NEW_PRIVS", 38, 1)
    _syscall("landlock_restrict_self", 446, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)


# --------------------------------------------------------------------------------------------------------- seccomp

_LOAD, _AND, _JEQ, _JGE, _JSET, _RET = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
_X86_64 = 0xC000003E
_LAST = 462  # numbers above it are younger than this list: refused as unknown
_DENIED = (
    *(57, 58, 59, 322),  # fork, vfork, execve, execveat
    *(41, 42, 43, 44, 46, 47, 49, 50, 288, 299, 307),  # sockets: made, joined, and file descriptors sent over them
    *(101, 310, 311, 312, 424, 434, 438, 440, 448),  # ptrace, memory of others, kcmp, pidfd_*, process_madvise/mrelease
    *(29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 220, 240, 241, 319, 447),  # shared memory, semaphores, queues, memfd
    *(155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442),  # roots, mounts, namespaces
    *(248, 249, 250, 298, 300, 303, 304, 321, 323, 425, 426, 427),  # keys, perf, fanotify, file handles, bpf, io_uring
    *(103, 109, 112, 133, 135, 154, 159, 163, 164, 167, 168, 169, 170, 171, 172, 173, 175, 176, 179, 180, 227, 246),
    *(259, 305, 313, 320),  # as the line before: sessions, device nodes, clocks, modules, accounting, reboot ...
    *(129, 297, 141, 142, 144, 203, 251, 256, 279, 314),  # queued signals, priorities, other processes' memory policy
)
# Allowed of fcntl and ioctl: descriptors, their flags (but O_ASYNC), locks, pipe sizes; a file's kind and size,
# blocking or not. Others make the kernel send signals to any process: owners of descriptors (F_SETOWN, F_SETOWN_EX,
# F_SETSIG, FIOSETOWN, SIOCSPGRP, FIOASYNC), leases and notices of files, terminals (TIOCSTI, TIOCSPGRP).
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032)
_IOCTL = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_SETFL = 4
_WRITES = (76, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235)
_WRITES_AT = (258, 260, 261, 263, 264, 265, 266, 268, 280, 316, 452)


def seccomp_filter(pid: int, isolation: str) -> bytes:
    """The filter program: the numbers above, and calls that are allowed with certain arguments only.

    `pid` is the process itself, which it may signal. It can change no file, and with "seccomp" open none: pipes and
    memory of its user's other processes are files, too.
    """
    deny, allow, unknown = _op(_RET, _EPERM), _op(_RET, _ALLOW), _op(_RET, _ENOSYS)

    def argument(i: int) -> bytes:
        return _op(_LOAD, 16 + 8 * i)  # the low half: all flags and numbers below fit into it

    def listed(numbers: Iterable[int]) -> bytes:
        return b"".join(_op(_JEQ, n, 0, 1) + allow for n in numbers)

    own = _op(_JEQ, pid, 0, 1) + allow + deny
    no_async = argument(2) + _op(_JSET, fcntl.FASYNC, 0, 1) + deny + allow
    blocks: dict[int, bytes] = {
        56: argument(0) + _op(_JSET, 0x10000, 0, 1) + allow + deny,  # clone: threads only
        435: unknown,  # clone3: glibc then falls back to clone, whose flags can be read
        16: argument(1) + listed(_IOCTL) + deny,
        72: argument(1) + listed(f for f in _FCNTL if f != _SETFL) + _op(_JEQ, _SETFL, 1, 0) + deny + no_async,
        53: argument(1) + _op(_AND, 0xF) + _op(_JEQ, 1, 0, 1) + allow + deny,  # socketpair: streams, for asyncio
        157: argument(0) + _op(_JEQ, 1, 0, 1) + deny + allow,  # prctl: all but PR_SET_PDEATHSIG
        302: argument(0) + _op(_JEQ, 0, 0, 1) + allow + own,  # prlimit64: of itself
        **dict.fromkeys((62, 200, 234), argument(0) + own),  # kill, tkill, tgkill: itself
    }
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0x400000  # __O_TMPFILE
    reading = deny if isolation == "seccomp" else allow
    blocks |= {nr: argument(i) + _op(_JSET, writing, 0, 1) + deny + reading for nr, i in ((2, 1), (257, 2))}
    blocks[437] = unknown  # openat2 hides its flags behind a pointer
    blocks |= dict.fromkeys((*_WRITES, *_WRITES_AT), deny)
    # Calls through another architecture (32 bits) have other numbers, for which the list is wrong: kill.
    code = _op(_LOAD, 4) + _op(_JEQ, _X86_64, 1, 0) + _op(_RET, _KILL) + _op(_LOAD, 0)
    # Also the numbers of x32, which reach the same calls.
    code += _op(_JGE, _LAST + 1, 0, 1) + unknown
    for nr, block in (blocks | dict.fromkeys(_DENIED, deny)).items():
        code += _op(_JEQ, nr, 0, len(block) // 8) + block
    return code + allow


def _op(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, k)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def seccomp(code: bytes) -> None:
    """Installs a filter in this process and its future threads."""
    _prctl("PR_SET_NO_NEW_PRIVS", 38, 1)
    program = _Program(len(code) // 8, code)
    _call("seccomp", _libc.prctl(ctypes.c_int(22), ctypes.c_ulong(2), ctypes.byref(program), 0, 0))


def supported() -> str | None:
    """Why this machine cannot run programs safely, or None."""
    # Not by `platform`, which would cache the host's name.
    machine = os.uname().machine if hasattr(os, "uname") else "another processor"
    if sys.platform != "linux" or machine != "x86_64":
        return f"needs Linux on x86-64, this is {sys.platform} on {machine}"
    return None
