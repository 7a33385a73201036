"""`qstar configs`: the configs that ship with qstar: list, show, copy."""

from __future__ import annotations

import ast
from pathlib import Path

from qstar.errors import UserError, require, unknown
from qstar.files import local_path
from qstar.flags import Parser, shipped_configs


def main(argv: list[str]) -> int:
    """qstar configs [list | show NAME | copy NAME [FILE]]"""
    p = Parser("configs", "Lists, shows and copies the configs that ship with qstar.", device=False)
    p.add_argument("what", nargs="?", default="list", choices=("list", "show", "copy"))
    p.add_argument("name", nargs="?", metavar="NAME", help="a config's name, as --config takes it")
    p.add_argument("file", nargs="?", metavar="FILE", help="of copy (default: NAME.py); may be a folder")
    a = p.parse_args(argv)
    shipped = shipped_configs()
    if a.what == "list":
        require((a.name is None, f"configs: list takes no name; `qstar configs show {a.name}` prints one"))
        print("\n".join(line for path in shipped.values() for line in _lines(path)))
        print("\n--config=NAME or NAME:ARGUMENT,ARGUMENT runs one; copy NAME makes a file of your own to change")
        return 0
    require((a.name is not None, f"configs: {a.what} needs a name; `qstar configs` lists them"))
    if a.name not in shipped:
        raise unknown(f"config {a.name!r}", a.name, shipped)
    text = shipped[a.name].read_text(encoding="utf-8")
    if a.what == "show":
        require((a.file is None, "configs: show takes a name alone; copy NAME FILE writes a file"))
        print(text, end="")
        return 0
    target = local_path(a.file or f"{a.name}.py")
    target = target / f"{a.name}.py" if target.is_dir() else target
    require((target.suffix == ".py", f"configs: {target}: a config is a Python file; let the name end in .py"))
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as e:
        fault = "exists and is not replaced" if isinstance(e, FileExistsError) else f"cannot be written ({e.strerror})"
        raise UserError(f"configs: {target} {fault}; name another file") from None
    print(f"{target}: run it with `qstar train --config={target}`")
    return 0


def _lines(path: Path) -> list[str]:
    """Returns the name, the first line of the docstring and the arguments of a config, which is not run."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    functions = {f.name: ast.get_docstring(f) for f in module.body if isinstance(f, ast.FunctionDef)}
    first = (ast.get_docstring(module) or "").partition("\n")[0]
    return [path.stem, f"    {first}", f"    {' '.join((functions.get('get_config') or '').split())}"]
