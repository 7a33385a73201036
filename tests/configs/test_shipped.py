"""Configs by name: those that ship, `qstar configs`, and a user's own file that lies anywhere."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from qstar.__main__ import main
from qstar.errors import UserError
from qstar.flags import read_config, shipped_configs

ROOT = pathlib.Path(__file__).resolve().parents[2]
OWN = """from qstar.configs import common, star_arithmetic
from neighbour import NAME

def get_config(arg=None):
    config = star_arithmetic.get_config(arg)
    config.name = NAME
    return config
"""


def call(capsys, *argv, code=0):
    assert main([str(a) for a in argv]) == code
    return "".join(capsys.readouterr())


def test_all_files_of_the_folder_ship_but_the_shared_ones():
    files = {p.stem for p in (ROOT / "configs").glob("*.py")} - {"common", "__init__"}
    assert set(shipped_configs()) == files


def test_a_name_finds_the_shipped_config_with_its_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config("star_gsm8k:seed=3").to_dict() == read_config(f"{ROOT}/configs/star_gsm8k.py:seed=3").to_dict()


def test_a_file_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "star_gsm8k").mkdir()  # a folder is no config
    assert read_config("star_gsm8k").name == "star_gsm8k"
    (tmp_path / "star_gsm8k.py").write_text(OWN)
    (tmp_path / "neighbour.py").write_text("NAME = 'mine'")
    assert read_config("star_gsm8k.py").name == "mine" and read_config("star_gsm8k").name == "star_gsm8k"


def test_an_unknown_name_is_answered_with_the_nearest_and_a_path_is_not(capsys):
    said = call(capsys, "train", "--config=star_gsm", code=2)
    assert "did you mean star_gsm8k?" in said and "v_star_mbpp" in said
    said = call(capsys, "train", "--config=conf/star_gsm.py", code=2)
    assert "no such file" in said and "v_star_mbpp" not in said


def test_a_config_anywhere_imports_shipped_ones_and_its_neighbours(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "neighbour.py").write_text("NAME = 'mine'")
    sys.modules.pop("neighbour", None)
    before = list(sys.path)
    config = read_config(f"{tmp_path}/own.py:smoke")
    assert config.name == "mine" and config.base.steps == 150 and sys.path == before


@pytest.mark.parametrize("command", ["train", "plan"])
def test_an_unknown_flag_is_answered_by_the_flags_of_its_command(command, capsys):
    more = ["--topology=cpu:1"] if command == "plan" else []
    said = call(capsys, command, "--config=star_gsm8k", *more, "--colour=1", code=2)
    assert said.startswith(f"qstar: {command}: flag --colour is unknown")
    assert ("--hbm" in said) == (command == "plan") and ("--workdir" in said) == (command == "train")


def test_the_list_has_a_line_and_the_arguments_of_each(capsys):
    said = call(capsys, "configs")
    for name, path in shipped_configs().items():
        assert f"\n{name}\n    {path.read_text().splitlines()[0][3:]}\n    Arguments: " in "\n" + said, name


def test_show_prints_the_file(capsys):
    assert call(capsys, "configs", "show", "star_gsm8k") == (ROOT / "configs/star_gsm8k.py").read_text()


def test_a_copy_runs_where_it_lies_and_is_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(capsys, "configs", "copy", "grpo_arithmetic")
    assert read_config("grpo_arithmetic.py").to_dict() == read_config("grpo_arithmetic").to_dict()
    (tmp_path / "grpo_arithmetic.py").write_text("mine")
    said = call(capsys, "configs", "copy", "grpo_arithmetic", tmp_path, code=2)
    assert "exists" in said and (tmp_path / "grpo_arithmetic.py").read_text() == "mine"


@pytest.mark.parametrize(
    "argv, culprit",
    [
        (["show"], "needs a name"),
        (["copy", "star_gsm"], "did you mean star_gsm8k?"),
        (["copy", "star_gsm8k", "x.txt"], "x.txt"),
        (["copy", "star_gsm8k", "nowhere/x.py"], "nowhere/x.py cannot be written"),
        (["list", "star_gsm8k"], "list takes no name"),
        (["shw"], "shw"),
    ],
)
def test_a_mistake_is_one_line(argv, culprit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = call(capsys, "configs", *argv, code=2)
    assert culprit in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_config_without_get_config_is_named(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="empty.py: defines no get_config"):
        read_config(f"{tmp_path}/empty.py")


def test_a_wheel_of_what_the_image_copies_has_configs_and_rows_and_runs_elsewhere(tmp_path):
    """Built from the files that launch/Dockerfile copies, installed into a folder, run from another one."""
    source, target, away = (tmp_path / name for name in ("source", "target", "away"))
    for folder in (source, away):
        folder.mkdir()
    for names in re.findall(r"^COPY (.*) \S+$", (ROOT / "launch/Dockerfile").read_text(), re.MULTILINE):
        for name in names.split():
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    quiet = {"check": True, "capture_output": True, "text": True, "cwd": away}
    made = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    subprocess.run([*pip, *made], **quiet)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], **quiet)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    call = [sys.executable, "-m", "qstar"]
    listed = subprocess.run([*call, "configs"], env=environment, **quiet).stdout
    assert set(re.findall(r"^(\w+)$", listed, re.MULTILINE)) == set(shipped_configs())
    assert not (target / "configs").exists() and len(list((target / "qstar/data/rows").glob("*.jsonl"))) == 4
    (away / "own.py").write_text(OWN.replace("from neighbour import NAME", "NAME = 'mine'"))
    shown = subprocess.run([*call, "train", "--config=own.py:smoke", "--print-config"], env=environment, **quiet).stdout
    assert "config.name = 'mine'" in shown
