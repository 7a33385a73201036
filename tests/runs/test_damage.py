"""Damaged run folders: whatever file is hit, and however, a run ends with the same results or names the damage.

Eight random damages by default; QSTAR_LONG_TESTS=1 makes it 200, over three methods.
"""

import os
import random
import shutil
import warnings

import pytest
from conftest import shared  # noqa: F401  sets the environment before JAX is imported

from qstar.train import metrics
from tests.methods import runs

LONG = bool(os.environ.get("QSTAR_LONG_TESTS"))
ARITHMETIC = "star_arithmetic.py:smoke"
# name -> (config, flags, where the run was killed; None: it ended)
FOLDERS = {
    "ended": (ARITHMETIC, None),
    "base trains": (ARITHMETIC, "batch base 110"),
    "loop trains": (ARITHMETIC, "batch rationalisation/checkpoints/iter_002 20"),
}
if LONG:
    FOLDERS["v_star"] = (runs.V_STAR, None)
    FOLDERS["quiet_star"] = (runs.QUIET, None)
COUNT = 200 if LONG else 8


@pytest.fixture(scope="module")
def folders():
    """Whole runs by config, and the folders to damage."""
    whole = {ARITHMETIC: runs.arithmetic()}
    if LONG:
        whole |= {FOLDERS["v_star"][0]: runs.v_star(), FOLDERS["quiet_star"][0]: runs.quiet_star()}
    made = {}
    for name, (config, event) in FOLDERS.items():
        made[name] = whole[config]
        if event:
            made[name] = runs.fresh("part")
            job = {"config": config, "workdir": str(made[name]), "kill": event}
            assert runs.drive([job]) == [-9]
    return whole, made


def delete(path, rng):
    path.unlink()


def empty(path, rng):
    path.write_bytes(b"")


def truncate(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def stray(path, rng):
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    path.write_bytes(content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:])


def cut_rows(path, rng):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for i, line in enumerate(lines) if i != rng.randrange(len(lines))))


def results(folder, whole):
    """What a run is about: its answers, models and metrics."""
    for path in folder.rglob("damaged-*"):
        shutil.rmtree(path)
    for path in whole.rglob("_sharding"):  # runs.weights needs these files, which qstar does not
        if (target := folder / path.relative_to(whole)).parent.exists() and folder != whole:
            shutil.copy(path, target)
    weights = runs.weights(folder)
    answers = {k: v for k, v in runs.answers(folder).items() if not k.endswith(".damaged")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics.read(folder)
        return answers, weights, runs.numbers(folder), (folder / "config.json").read_bytes()


def damaged(number, folders, tmp_path):
    """Damages a copy of a folder; returns the command's config, the folder, and what was done."""
    rng = random.Random(number)
    order = [
        name for name, (_, event) in FOLDERS.items() for _ in range(1 if event else 3)
    ]  # training again takes long
    name = order[number % len(order)]
    folder = tmp_path / "run"
    shutil.copytree(folders[1][name], folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    kinds = {}  # so that the many files of checkpoints do not drown the others
    for p in files:
        kinds.setdefault((p.suffix, p.parent.name if "state" in p.parts else p.name), []).append(p)
    path = rng.choice(kinds[rng.choice(sorted(kinds))])
    how = rng.choice([delete, empty, truncate, flip, flip, stray, cut_rows])
    how(path, rng)
    return FOLDERS[name][0], folder, f"{name}: {how.__name__} {path.relative_to(folder)}", path


@pytest.mark.parametrize("number", range(COUNT))
def test_damage_is_named_or_without_effect(number, folders, tmp_path):
    config, folder, what, path = damaged(number, folders, tmp_path)
    (code,) = runs.drive([{"config": config, "workdir": str(folder)}])  # with the programs of the whole run
    error = folder.with_suffix(".log").read_text(encoding="utf-8")
    assert "Traceback" not in error, what
    named = [line for line in error.splitlines() if line.startswith("qstar: ")]
    if code:
        assert code == 2 and len(named) == 1, (what, error)
        return
    whole = folders[0][config]
    if results(folder, whole) != results(whole, whole):
        assert named and any(n in named[0] for n in (path.name, "checkpoint", "checksums")), f"SILENT: {what}\n{error}"
