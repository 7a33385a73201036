"""Command-line flags and config files: the parser of a command, readers of values, `get_config` files and overrides.

No JAX here: a mistake in a flag is reported before JAX starts.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import qstar.configs
from qstar.data.user_code import importable, load_file, user_errors
from qstar.errors import MAX_TEMPERATURE, SEEDS, UserError, require, unknown, within
from qstar.files import as_path, flatten, local_path, parse_json


class Parser(argparse.ArgumentParser):
    """Parser of `qstar NAME`, with --device unless the command needs none. Raises UserError where argparse would exit."""

    def __init__(self, name: str, summary: str, *, device: bool = True, **options: Any):
        super().__init__(prog=f"qstar {name}", description=summary, allow_abbrev=False, **options)
        if device:
            self.flag(
                "--device", "where to run (default: the best)", default="auto", choices=("auto", "cpu", "gpu", "tpu")
            )

    def flag(self, spec: str, help: str, kind: Any = None, default: Any = None, **more: Any) -> None:
        """Adds a flag "--name METAVAR"; the help of one with a default ends in it, unless it mentions it itself."""
        name, _, metavar = spec.partition(" ")
        if default not in (None, "", []) and "default" not in help and "(0: " not in help:
            help += f" (default: {default})"
        more |= {"metavar": metavar} if metavar else {}
        more |= {"type": kind} if kind else {}
        self.add_argument(name, help=help, default=default, **more)

    def switch(self, name: str, help: str) -> None:
        """Adds a flag without a value."""
        self.add_argument(name, help=help, action="store_true")

    def config(self) -> None:
        """Adds --config and --config.KEY."""
        self.flag("--config FILE[:ARG]", "config file, or a name of `qstar configs`; its argument after a colon")
        self.flag("--config.KEY VALUE", "replaces a value of the config; may be repeated", dest="_")
        self.flag("--task NAME", "replaces the config's task: a name of `qstar evaluate`, or file.py:Class")
        self.flag("--task-options JSON", "of that task", json_object, {})

    def parse_config(self, argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
        """Returns the flags, and the config that --config and --config.KEY make; raises UserError if there is none.

        The namespace also holds the `overrides`, as `read_config` takes them.
        """
        a, rest = self.parse_known_args(argv)
        command = self.prog.removeprefix("qstar ")
        flags = [name for x in self._actions for name in x.option_strings]
        a.overrides = parse_overrides(rest, command, flags)
        require(("name" not in a.task_options, f"{command}: --task-options: name is that of --task; leave it out"))
        if a.task_options and not a.task:
            raise UserError(f"{command}: --task-options are of a --task; set one option as --config.task.KEY=VALUE")
        if a.task:
            a.overrides.insert(0, (_TASK, json.dumps({"name": a.task} | a.task_options)))
        if a.config is None:
            raise UserError(f"{command}: --config=FILE is missing, e.g. --config=star_arithmetic (see qstar configs)")
        return a, read_config(a.config, a.overrides)

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Also refuses empty names and paths, which an unset shell variable leaves (texts may be empty: --prompt='')."""
        found, rest = super().parse_known_args(*args, **options)
        for action in self._actions:
            values = getattr(found, action.dest, None)
            empty = "" in (values if isinstance(values, list) else [values])
            if empty and action.default != "" and action.metavar not in (None, "TEXT", "VALUE"):
                name = action.option_strings[0] if action.option_strings else action.metavar
                self.error(f"{name} is empty; give a value, or leave it out")
        return found, rest

    def error(self, message: str) -> Any:
        raise UserError(f"{self.prog.removeprefix('qstar ')}: {message} (see {self.prog} --help)")


def integer(least: int, most: int = 10**18) -> Callable[[str], int]:
    """Returns a reader of whole numbers between two bounds."""

    def read(text: str) -> int:
        # 30 characters decide: Python refuses to convert more than 4,300 digits.
        if not text.removeprefix("-").isdecimal() or int(text[:30]) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        if int(text[:30]) > most:
            raise argparse.ArgumentTypeError(f"{text!r} is above {most}")
        return int(text)

    return read


def number(fits: Callable[[float], bool], what: str) -> Callable[[str], float]:
    """Returns a reader of finite numbers that fit."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return read


def json_object(text: str) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        value = parse_json(text, f"{text[:80]!r}")
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is a JSON {type(value).__name__}, not an object")
    return value


def folder(flag: str, text: str) -> Path:
    """Returns a folder on a disk or in a bucket (gs://) that a command reads or writes; raises UserError for other URLs."""
    with within(f"{flag}="):
        return as_path(text)


def local_folder(flag: str, text: str) -> Path:
    """Returns a folder on a disk; raises UserError for a URL."""
    require(("://" not in text, f"{flag}={text}: is no folder; name one on a disk, and copy it to a bucket afterwards"))
    return local_path(text)


COUNT, POSITIVE, SEED = integer(0), integer(1), integer(0, SEEDS - 1)
TEMPERATURE = number(lambda x: 0 <= x <= MAX_TEMPERATURE, f"a number from 0 (greedy) to {MAX_TEMPERATURE:.0f}")
SHARE = number(lambda x: 0 < x <= 1, "a number above 0 and up to 1")
MODEL = "model: a folder in the Hugging Face layout, or a hub name owner/name[@revision]"  # help of --model

# ---------------------------------------------------------------------------------------------------- config files

# `ml_collections.config_flags` is not used: it cannot set a key that the file leaves at its default, it parses with
# absl, beside the argparse of all other flags, and its errors name no similar key.
_TASK = "--task"  # among overrides: replaces the section `task`
Override = tuple[str, str | None]  # ("--config.train.lr", "1e-3"); None: no value was given


def parse_overrides(arguments: Sequence[str], command: str = "train", flags: Sequence[str] = ()) -> list[Override]:
    """Splits `--config.a.b=1`, and `--config.a.b 1`. Raises UserError for an argument of another form.

    `command`, `flags`: the command and its flags, for the message.
    """
    out: list[Override] = []
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if re.fullmatch(r"--config\..+", flag):
            out.append((flag, text if equals else None))
        elif out and out[-1][1] is None and not argument.startswith("--"):
            out[-1] = (out[-1][0], argument)
        elif argument.startswith("-"):
            raise unknown(f"{command}: flag {flag}", flag, flags)
        else:
            raise UserError(f"{command}: {argument!r} is no flag; flags are written --name=value")
    return out


def shipped_configs() -> dict[str, Path]:
    """Returns the files of `qstar.configs` that are configs, by name."""
    found = sorted(Path(qstar.configs.__path__[0]).glob("*.py"))
    return {path.stem: path for path in found if path.stem not in ("__init__", "common")}


def read_config(spec: str, overrides: Sequence[Override] = ()) -> ConfigDict:
    """Returns the config of `FILE[:ARGUMENT]` or `NAME[:ARGUMENT]`, locked, with the overrides of the command line.

    A file wins over a shipped config of that name. An override takes the type of the value that it replaces.

    Raises:
      UserError: no such file or name, an error in it (with its line), an override that matches nothing.
    """
    name, _, argument = spec.partition(":")
    path = local_path(name)
    if not path.is_file():
        shipped = shipped_configs()
        if name not in shipped:
            if path.suffix or len(path.parts) > 1:
                raise UserError(f"--config={name}: no such file; name a config file, or one of `qstar configs`")
            raise unknown(f"--config={name}", name, shipped)
        path = shipped[name]
    config = _get_config(path, argument or None)
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={name}: get_config returned a {type(config).__name__}, no ml_collections ConfigDict")
    config.unlock()
    for flag, text in overrides:
        if flag == _TASK:
            _replace_task(config, text or "")
        else:
            _override(config, flag, text)
    return config.lock()


def _replace_task(config: ConfigDict, text: str) -> None:
    task = config.get("task")
    if not isinstance(task, ConfigDict):
        raise UserError(f"{_TASK}: a config of method {config.get('method')!r} has no task; leave it out")
    # The form of prompts belongs to the recipe; all other options are those of the old task.
    config.task = ConfigDict({k: v for k, v in task.items() if k in ("format", "shots")} | json.loads(text))


def value_sources(spec: str, overrides: Sequence[Override]) -> dict[str, str]:
    """Returns the source of each value of `read_config`: "config file", "argument" or "command line", by dotted key."""

    name = spec.partition(":")[0]
    try:
        plain = flatten(read_config(name).to_dict())
    # A config may need its argument: then the file and the argument cannot be told apart.
    except UserError:
        plain = flatten(read_config(spec).to_dict())
    found = flatten(read_config(spec, overrides).to_dict())
    replaced = {flag.removeprefix("--config.") for flag, _ in overrides}
    missing = object()
    kept = {key: plain.get(key, missing) == value for key, value in found.items()}
    given = {k for k in found if k in replaced or _TASK in replaced and k.startswith("task.") and not kept[k]}
    return {k: "command line" if k in given else "config file" if kept[k] else "argument" for k in found}


def _get_config(path: Path, argument: str | None) -> Any:
    # A config may import its neighbours and, where it lies in a folder `configs`, as `configs.NAME`, also in get_config.
    folder = path.resolve().parent
    with importable([str(folder), str(folder.parent)]):
        module = load_file(path, "--config")
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={path}: defines no get_config(arg); `qstar configs copy` makes a file that does")
        with user_errors(f"--config={path}", path.resolve()):
            return module.get_config(argument)


def _override(config: ConfigDict, flag: str, text: str | None) -> None:
    *sections, key = flag.removeprefix("--config.").split(".")
    node, name = config, "config"
    for section in sections:
        if not isinstance(node.get(section), ConfigDict):
            known = [k for k, v in node.items() if isinstance(v, ConfigDict)]
            raise unknown(f"{flag}: section {name}.{section}", section, known)
        node, name = node[section], f"{name}.{section}"
    # A section may get a key that the file leaves at its default (`--config.loop.k=4`): its settings class rejects
    # unknown ones. The top level has no such class.
    if key not in node and node is config:
        raise unknown(flag, key, node)
    old = node.get(key)
    if isinstance(old, ConfigDict):
        raise UserError(f"{flag} is a section; set one of its keys: {', '.join(old) or 'it has none yet'}")
    # `_value` has checked the type already, with the flag's name in its message.
    with node.ignore_type():
        node[key] = _value(flag, text, old)


_SWITCH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _value(flag: str, text: str | None, old: Any) -> Any:
    """Returns the text as a value of the type of `old`; if that is None or missing, as a Python literal."""
    if isinstance(old, bool) and (text is None or text.lower() in _SWITCH):
        return text is None or _SWITCH[text.lower()]
    if text is None:
        raise UserError(f"{flag} has no value; write {flag}=VALUE")
    if isinstance(old, str):
        return text
    if type(old) in (int, float) and text == "None":
        return None  # which some numbers may be; the settings refuse it for the others
    try:
        value = type(old)(text) if type(old) in (int, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last three: {[]: 1}, many brackets
        if old is None:
            return text
        value = None
    if old is not None and not isinstance(value, type(old)):
        raise UserError(f"{flag}={text} must be of type {type(old).__name__}, as {old!r} is")
    return value
