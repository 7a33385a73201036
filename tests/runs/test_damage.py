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
# name -> config; the run ended, or is as it was at an event of `runs.COPIES`
FOLDERS = {"ended": ARITHMETIC, "base trains": ARITHMETIC, "loop trains": ARITHMETIC}
if LONG:
    FOLDERS |= {"v_star": runs.V_STAR, "quiet_star": runs.QUIET}
COUNT = 200 if LONG else 8


@pytest.fixture(scope="module")
def damages(tmp_path_factory):
    """Every damage, and the run that went on in its folder: (config, folder, what was done, the file, exit code)."""
    made = [damaged(number, tmp_path_factory.mktemp("damage") / "run") for number in range(COUNT)]
    # With the programs of the whole run, one process after the other.
    codes = runs.drive([{"config": config, "workdir": str(folder)} for config, folder, _, _ in made])
    return [(*each, code) for each, code in zip(made, codes, strict=True)]


@pytest.fixture(scope="module")
def whole():
    """The results of undisturbed runs by config."""
    return {config: results(runs.finished(config), runs.finished(config)) for config in set(FOLDERS.values())}


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


def damaged(number, folder):
    """Damages a copy of a run; returns the command's config, the folder, what was done, and the file."""
    rng = random.Random(number)
    # Training again takes long.
    order = [name for name in FOLDERS for _ in range(1 if name in runs.COPIES[ARITHMETIC] else 3)]
    name = order[number % len(order)]
    config = FOLDERS[name]
    shutil.copytree(runs.copy_of(config, name) if name in runs.COPIES[ARITHMETIC] else runs.finished(config), folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    kinds = {}  # so that the many files of checkpoints do not drown the others
    for p in files:
        kinds.setdefault((p.suffix, p.parent.name if "state" in p.parts else p.name), []).append(p)
    path = rng.choice(kinds[rng.choice(sorted(kinds))])
    how = rng.choice([delete, empty, truncate, flip, flip, stray, cut_rows])
    how(path, rng)
    return config, folder, f"{name}: {how.__name__} {path.relative_to(folder)}", path


@pytest.mark.parametrize("number", range(COUNT))
def test_damage_is_named_or_without_effect(number, damages, whole):
    config, folder, what, path, code = damages[number]
    error = folder.with_suffix(".log").read_text(encoding="utf-8")
    assert "Traceback" not in error, what
    named = [line for line in error.splitlines() if line.startswith("qstar: ")]
    if code:
        assert code == 2 and len(named) == 1, (what, error)
        return
    if results(folder, runs.finished(config)) != whole[config]:
        assert named and any(n in named[0] for n in (path.name, "checkpoint", "checksums")), f"SILENT: {what}\n{error}"
