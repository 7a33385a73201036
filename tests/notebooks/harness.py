"""Execution of notebooks in the test's own process, which saves a kernel and a second start of JAX each."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import nbformat

from qstar.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


def shell(line: str) -> None:
    """A line `!qstar ...`."""
    program, *arguments = shlex.split(line)
    assert program == "qstar" and main(arguments) == 0, line


def execute(name: str, monkeypatch: Any, **variables: str) -> tuple[str, list[Any]]:
    """Runs the code cells in order with these environment variables: (printed text, values that cells end with)."""
    monkeypatch.chdir(NOTEBOOKS)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    names: dict[str, Any] = {"__name__": "__main__", "_shell": shell}
    printed, shown = io.StringIO(), []
    for cell in nbformat.read(NOTEBOOKS / name, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        # IPython fills {name} in a line of the shell.
        source = re.sub(r"^( *)!(.*)$", lambda m: f"{m[1]}_shell(f{m[2]!r})", cell.source, flags=re.MULTILINE)
        body = ast.parse(source).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(body, []), name, "exec"), names)
            value = eval(compile(ast.Expression(last.value), name, "eval"), names) if last else None
        shown += [value] if value is not None else []
    return printed.getvalue(), shown


def figures(shown: list[Any]) -> int:
    """Charts among the values."""
    return sum('class="charts palette"' in getattr(value, "_repr_html_", str)() for value in shown)
