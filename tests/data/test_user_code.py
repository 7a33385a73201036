"""Objects of the user's own code: what is found, and the one line for each thing that is not."""

from __future__ import annotations

import sys

import pytest

from qstar.data.user_code import load_file, load_object, user_errors
from qstar.errors import UserError

CODE = """\
from __future__ import annotations
import math
from dataclasses import dataclass
from helper_beside_it import HALF

SIZE = 3

@dataclass
class Reward:
    weight: float = HALF

def score(prompts):
    return [math.sqrt(p) for p in prompts]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "helper_beside_it.py").write_text("HALF = 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(("qstar_user_", "helper_", "pack_of_mine"))]:
        del sys.modules[name]


def test_a_file_is_executed_once_until_it_changes_and_its_folder_is_importable_only_then(folder):
    before = list(sys.path)
    reward = load_object("mine.py:Reward", "--x")
    assert reward().weight == 0.5 and sys.path == before
    assert load_object("~/mine.py:Reward", "--x") is reward is load_object(f"{folder}/mine.py:Reward", "--x")
    assert reward.__module__ in sys.modules
    (folder / "mine.py").write_text(CODE.replace("HALF\n\ndef", "2 * HALF\n\ndef"))
    assert load_object("mine.py:Reward", "--x")().weight == 1.0


def test_a_module_of_an_installed_package_or_of_the_current_folder(folder):
    (folder / "pack_of_mine").mkdir()
    (folder / "pack_of_mine" / "tasks.py").write_text("def f(): return 1\n")
    assert load_object("json:dumps", "--x")([1]) == "[1]"
    assert load_object("pack_of_mine.tasks:f", "--x")() == 1


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mine.py", '--x=mine.py: not of the form "file.py:name" or "package.module:name"'),
        ("theirs.py:f", "--x=theirs.py: no such file"),
        ("sub/mine:f", "--x=sub/mine: no such file"),
        ("mine.py:scores", "name 'scores' is unknown (did you mean score?); there are HALF, SIZE, Reward, score"),
        ("mine.py:SIZE", "--x=mine.py:SIZE: SIZE is of type int; it must be a function or a class"),
        ("no_such.module:f", "--x=no_such.module:f: no module 'no_such.module'; install it"),
        ("json.no_such:f", "no module 'json.no_such'"),
    ],
)
def test_one_line_for_what_is_not_there(folder, spec, message):
    with pytest.raises(UserError) as e:
        load_object(spec, "--x")
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "code, message",
    [
        ("x = 1\ny = {}['k']\n", "--x=bad.py:2: KeyError: 'k'; mend the file"),
        ("x = 1\n\nimport no_such_thing\n", "--x=bad.py:3: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("import sys\nsys.exit()\n", "--x=bad.py:2: SystemExit: ; mend the file"),
        ("x = (\n", "--x=bad.py:1: '(' was never closed; mend the file"),
        ("import bad_helper\n", "bad_helper.py:2: invalid syntax; mend the file"),
    ],
)
def test_an_exception_in_the_users_file_names_its_line(folder, code, message):
    (folder / "bad.py").write_text(code)
    (folder / "bad_helper.py").write_text("\nx x\n")
    with pytest.raises(UserError) as e:
        load_object("bad.py:f", "--x")
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not [n for n in sys.modules if n.startswith("qstar_user_bad")]


def test_an_exception_in_a_module_names_its_file_and_line(folder):
    (folder / "pack_of_mine").mkdir()
    (folder / "pack_of_mine" / "worse.py").write_text("\n1 / 0\n")
    with pytest.raises(UserError, match=r"pack_of_mine.worse\.py:2: ZeroDivisionError: division by zero"):
        load_object("pack_of_mine.worse:f", "--x")


def test_an_exception_in_a_package_around_a_module_is_one_line(folder):
    (folder / "pack_of_mine").mkdir()
    (folder / "pack_of_mine" / "__init__.py").write_text("{}['k']\n")
    with pytest.raises(UserError, match=r"^--x=pack_of_mine\.mod:f: KeyError: 'k'; mend the file$"):
        load_object("pack_of_mine.mod:f", "--x")


def test_a_file_with_a_null_byte_has_no_line_number(folder):
    (folder / "bad.py").write_bytes(b"x = 1\0\n")
    with pytest.raises(
        UserError, match="^--x=bad.py: [^:]*null bytes; mend the file$|^--x=bad.py: ValueError: .*null"
    ) as e:
        load_object("bad.py:f", "--x")
    assert "None" not in str(e.value)
    with (
        pytest.raises(UserError, match="^--x=bad.py: source code string; mend the file$"),
        user_errors("--x=bad.py", "bad.py"),
    ):
        raise SyntaxError("source code string")


def test_a_file_in_the_home_of_nobody_is_not_there(folder):
    with pytest.raises(UserError, match="^--x=~nobody_here/x.py: no such file"):
        load_object("~nobody_here/x.py:f", "--x")


def test_calls_of_a_loaded_function_name_the_line_too(folder):
    score = load_object("mine.py:score", "rl.reward")
    with pytest.raises(UserError, match=r"^rl.reward=mine.py:13: ValueError"):
        with user_errors("rl.reward=mine.py", load_file("mine.py", "rl.reward").__file__):
            score([-1.0])
