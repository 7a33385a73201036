"""Objects of the user's own Python code, loaded by "file.py:name" or "package.module:name", with one-line errors.

Also used for config files. No class here is pickled: a process that needs an object loads it from the same text.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qstar.errors import UserError, unknown
from qstar.files import local_path


def is_spec(text: str) -> bool:
    """Whether a text has the form "file.py:name" or "package.module:name"."""
    place, _, name = text.rpartition(":")
    return bool(place) and name.isidentifier()


def load_object(
    spec: str, what: str, *, fits: Callable[[Any], bool] = callable, form: str = "a function or a class"
) -> Any:
    """Loads an object of the user's code. The same file with the same content is executed once per process.

    Args:
      spec: "file.py:name", relative to the current folder, "~" expanded, with the file's folder importable while it
        loads; or "package.module:name", installed or in the current folder.
      what: the flag or key that gave the text, which begins the messages: "--task", "rl.reward".
      fits: whether the object is of the right kind, which `form` names.

    Raises:
      UserError: no such file, module or name, an exception in the user's code (with file and line), another kind.
    """
    place, _, name = spec.rpartition(":")
    if not is_spec(spec):
        raise UserError(f'{what}={spec}: not of the form "file.py:name" or "package.module:name"')
    module = load_file(place, what) if place.endswith(".py") or os.sep in place else _import(place, spec, what)
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if not n.startswith("_") and _defined_in(module, v)]
        raise unknown(f"{what}={spec}: name {name!r}", name, known)
    found = getattr(module, name)
    if not fits(found):
        raise UserError(f"{what}={spec}: {name} is of type {type(found).__name__}; it must be {form}")
    return found


def load_file(file: str | os.PathLike, what: str) -> ModuleType:
    """Executes a Python file as a module, its folder importable meanwhile; raises UserError as `load_object` does."""
    path = local_path(file).resolve()
    if not path.is_file():
        raise UserError(f"{what}={file}: no such file (in {Path.cwd()})")
    if path.suffix != ".py":
        raise UserError(f"{what}={file}: not a Python file (its name must end in .py)")
    # A name for each path and content: an edited file is executed again, an unchanged one keeps its classes.
    key = hashlib.blake2b(os.fsencode(path) + b"\0" + path.read_bytes(), digest_size=8).hexdigest()
    name = f"qstar_user_{path.stem}_{key}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    # Dataclasses look their module up while the file is executed.
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with importable([str(path.parent)]), user_errors(f"{what}={file}", path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def user_errors(what: str, path: str | os.PathLike | None) -> Iterator[None]:
    """Turns an exception of the user's code into a UserError: `what`, the line in the file `path`, type and text.

    A UserError passes as it is. Use it around calls of loaded functions, too.
    """
    try:
        yield
    except UserError:
        raise
    except SyntaxError as e:
        # The file, or one that it imports.
        own, line = path is not None and e.filename in (None, str(path)), f":{e.lineno}" if e.lineno else ""
        raise UserError(f"{what if own else f'{what}: {e.filename}'}{line}: {e.msg}; mend the file") from None
    # A file may end in sys.exit(), which would end qstar without a word, with the exit code 0.
    except (Exception, SystemExit) as e:  # noqa: BLE001  the user's own code raises anything
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if path and f.filename == str(path)]
        place = f"{what}:{lines[-1]}" if lines else what
        text = " ".join(str(e).split())[:300]
        raise UserError(f"{place}: {type(e).__name__}: {text}; mend the file") from None


def _import(name: str, spec: str, what: str) -> ModuleType:
    # An installed command, unlike `python -m`, cannot import from the current folder. `find_spec` imports a parent package.
    with importable([os.getcwd()]), user_errors(f"{what}={spec}", None):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError as e:
            if e.name and (name == e.name or name.startswith(f"{e.name}.")):
                found = None
            else:
                raise UserError(f"{what}={spec}: {e}; install it") from None
        except (ImportError, ValueError) as e:
            raise UserError(f"{what}={spec}: {e}") from None
        if found is None:
            advice = "install it, start where it can be imported, or name a file, as in tasks.py:MyTask"
            raise UserError(f"{what}={spec}: no module {name!r}; {advice}")
        with user_errors(f"{what}={spec}" if found.origin is None else f"{what}={found.origin}", found.origin):
            return importlib.import_module(name)


@contextlib.contextmanager
def importable(folders: Sequence[str]) -> Iterator[None]:
    """Puts folders in front of `sys.path` for a while."""
    added = [folder for folder in folders if folder not in sys.path]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _defined_in(module: ModuleType, value: Any) -> bool:
    return getattr(value, "__module__", module.__name__) == module.__name__ and not isinstance(value, ModuleType)
