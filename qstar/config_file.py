"""Config files of `qstar train`: `get_config` of a Python file, and values from the command line. No jax."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qstar.errors import UserError, unknown

Override = tuple[str, str | None]  # ("--config.train.lr", "1e-3"); None: there was no value


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Splits `--config.a.b=1`, and `--config.a.b 1`.

    Raises:
      UserError: an argument that is nothing of this kind.
    """
    out: list[Override] = []
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if re.fullmatch(r"--config\..+", flag):
            out.append((flag, text if equals else None))
        elif out and out[-1][1] is None and not argument.startswith("--"):
            out[-1] = (out[-1][0], argument)
        elif argument.startswith("-"):
            raise unknown(f"train: flag {flag}", flag, ("--config", "--workdir", "--device", "--config.KEY"))
        else:
            raise UserError(f"train: {argument!r} is no flag; flags are written --name=value")
    return out


def read_config(spec: str, overrides: Sequence[Override] = ()) -> ConfigDict:
    """Returns the config of `FILE[:ARGUMENT]`, locked, with the overrides of the command line.

    A flag takes the type of the value that it replaces. It may add a key to a section (`--config.loop.k=4` where
    the file leaves k at its default): whoever reads the section knows which keys there are.

    Raises:
      UserError: no such file, an error in it (with its line), a flag that fits nothing.
    """
    name, _, argument = spec.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"--config={name}: no such file; give a config file, e.g. configs/star_arithmetic.py")
    config = _get_config(path, argument or None)
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"--config={name}: get_config returned a {kind}; it must return an ml_collections ConfigDict")
    config.unlock()
    for flag, text in overrides:
        _override(config, flag, text)
    return config.lock()


def _get_config(path: Path, argument: str | None) -> Any:
    """Runs the file. Whatever it raises is the file's fault and becomes one line with the place."""
    root = str(path.resolve().parent.parent)  # so that a config can import configs.common
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location("qstar_config", path)
    if spec is None:
        raise UserError(f"--config={path}: not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={path}: defines no get_config(arg); see configs/star_arithmetic.py")
        return module.get_config(argument)
    except UserError:
        raise
    except SyntaxError as e:
        raise UserError(f"--config={e.filename}:{e.lineno}: {e.msg}; mend the file") from None
    except Exception as e:  # noqa: BLE001  the user's own code raises what it likes
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if Path(f.filename) == path]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        text = " ".join(str(e).split())[:300]
        raise UserError(f"--config={place}: {type(e).__name__}: {text}; mend the file") from None


def _override(config: ConfigDict, flag: str, text: str | None) -> None:
    """Sets one value of the config, which must have the section it is in."""
    *sections, key = flag.removeprefix("--config.").split(".")
    place, where = config, "config"
    for section in sections:
        if not isinstance(place.get(section), ConfigDict):
            there = [k for k, v in place.items() if isinstance(v, ConfigDict)]
            raise unknown(f"{flag}: section {where}.{section}", section, there)
        place, where = place[section], f"{where}.{section}"
    if key not in place and place is config:
        raise unknown(flag, key, place)
    old = place.get(key)
    if isinstance(old, ConfigDict):
        raise UserError(f"{flag} is a section; set one of its keys: {', '.join(old) or 'it has none yet'}")
    with place.ignore_type():
        place[key] = _value(flag, text, old)


_SWITCH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _value(flag: str, text: str | None, old: Any) -> Any:
    """The text as a value of the type of `old`; where that is None, or there is none, as Python would read it."""
    if isinstance(old, bool) and (text is None or text.lower() in _SWITCH):
        return text is None or _SWITCH[text.lower()]
    if text is None:
        raise UserError(f"{flag} has no value; write {flag}=VALUE")
    if isinstance(old, str):
        return text
    try:
        if type(old) in (int, float):
            return type(old)(text)
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if old is None:
            return text
        raise UserError(f"{flag}={text} must be of type {type(old).__name__}, as {old!r} is") from None
    if old is not None and not isinstance(value, type(old)):
        raise UserError(f"{flag}={text} must be of type {type(old).__name__}, as {old!r} is")
    return value
