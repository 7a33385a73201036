"""The server: a process started by `qstar.tasks.sandbox` that confines itself and then forks one judge per job.

    python -S -s -P server.py JOBS VERDICTS STRENGTH [PLACE ...]

JOBS and VERDICTS are inherited pipes; each PLACE is the folder, or the only file, of a package that programs may
import. The server never reads a job, since every program inherits its memory.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import codec  # noqa: E402
import isolate  # noqa: E402
import judge  # noqa: E402

# Imported once here, so that programs start fast.
_PRELOADED = """abc array bisect calendar cmath collections contextlib copy csv dataclasses datetime decimal enum fractions
functools hashlib heapq io itertools json math numbers operator queue random re statistics string struct textwrap threading
time typing unicodedata""".split()

# Also these where programs cannot open a file, and so cannot import anything else.
_LIBRARY = """ast asyncio base64 binascii codecs concurrent.futures difflib doctest encodings.ascii encodings.idna
encodings.latin_1 encodings.utf_16 glob graphlib hmac html inspect ipaddress keyword logging pathlib platform
pprint secrets select shutil signal subprocess tempfile textwrap timeit tokenize traceback types unittest
urllib.parse uuid weakref zlib""".split()


def _import(names: list[str]) -> None:
    # A small build of Python may lack one.
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _import_packages(places: list[str]) -> None:
    for place in places:
        parent, name = os.path.split(place)
        sys.path.append(parent)
        module = importlib.import_module(name.partition(".")[0])
        # Submodules that are imported at first use, which is too late once no file can be opened.
        for attribute in dir(module):
            with contextlib.suppress(Exception):
                getattr(module, attribute)
        sys.path.remove(parent)
        isolate.packages += [place, f"{place}.libs"]  # wheels keep shared libraries beside the package


def _confine(strength: str) -> str:
    if why := isolate.supported():
        raise isolate.Refused(why)
    isolate.adopt_orphans()
    # Tried in a child: the server itself has to stay unconfined, since it forks all others.
    found = "seccomp" if strength == "seccomp" or not _works(lambda: isolate.landlock([])) else "landlock"
    if strength not in ("auto", found):
        raise isolate.Refused("the kernel has no Landlock")
    if not _works(lambda: isolate.seccomp(isolate.seccomp_filter(os.getpid(), "seccomp"))):
        raise isolate.Refused("seccomp filters are not allowed here")
    return found


def _works(step: Callable[[], None]) -> bool:
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(isolate.Refused, OSError):
            step()
            status = 0
        os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _all_ended() -> bool:
    # The judge's orphans died with it, but not at once: the next program must not find them.
    deadline = time.monotonic() + 5
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] or time.monotonic() < deadline:
            time.sleep(0.001)
        return False
    return True


def main(jobs: int, verdicts: int, strength: str, places: list[str]) -> int:
    """Serves until the pipe of jobs is closed; returns the exit status."""
    # Warnings about the tests' code would appear in the user's terminal.
    warnings.simplefilter("ignore")
    _import(_PRELOADED)
    sys.path.pop(0)
    try:
        _import_packages(places)
    except Exception as error:
        codec.send(verdicts, {"refused": f"a package that programs may import cannot be: {error}"})
        return 1
    # Before confinement, as there may be no /proc afterwards.
    baseline = _address_space()
    try:
        isolation = _confine(strength)
    except (isolate.Refused, OSError) as error:
        codec.send(verdicts, {"refused": str(error)})
        return 1
    if isolation == "seccomp":
        _import(_LIBRARY)
        baseline = _address_space()
    # Hides its pipes, too. The judge's and the program's process inherit that.
    isolate.hide_memory()
    codec.send(verdicts, {"ready": isolation})
    gc.collect()
    # Judges and programs are forks of this process: a collection in them would copy its pages.
    gc.freeze()
    while True:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = judge.run(jobs, verdicts, baseline, isolation)
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # A server with a process that cannot be ended ends itself; the parent starts a clean one.
        if not _all_ended() or code == judge.NO_JOB:
            return code
        codec.send(verdicts, {"end": code})


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
