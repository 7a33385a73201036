"""Whole runs of the configs' smoke modes, each made once per session, and what runs are compared by."""

import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import select
import subprocess
import sys

import numpy as np
from conftest import shared

from qstar.data.sources import read_jsonl
from qstar.runs.stages import MACHINE
from qstar.train import metrics
from qstar.types import Rollout

ROOT = pathlib.Path(__file__).resolve().parents[2]
DRIVER = pathlib.Path(__file__).with_name("driver.py")
_COUNT = itertools.count()


def scratch():
    """The folder of this test session, which all its workers share (conftest.py makes and removes it)."""
    return pathlib.Path(os.environ["QSTAR_TEST_RUNS"])


def fresh(name):
    """A path in it that no other worker has."""
    return scratch() / f"{name}{os.getpid()}-{next(_COUNT)}"


# Their programs are large and run a few times only: compiled with optimisation, the smoke run of fast_quiet_star.py takes
# 237 s instead of 43, that of guided_cot_synth.py 66 instead of 32. Runs that are compared bit for bit have one config.
UNOPTIMISED = ("quiet_star", "fast_quiet_star", "guided_cot")


def environment(config=""):
    """The variables of a process that makes a whole run of a config.

    Most runs repeat their programs some hundred times: they are compiled with the first level of optimisation, which makes a
    run of STaR a third shorter (conftest.py turns it off).
    """
    flags = os.environ["XLA_FLAGS"]
    if not config.startswith(UNOPTIMISED):
        flags = flags.replace("optimization_level=0", "optimization_level=1")
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def qstar(*arguments, timeout=900):
    """`python -m qstar ...` in a process of its own, which stands in a foreign folder."""
    command = [sys.executable, "-m", "qstar", *map(str, arguments)]
    return subprocess.run(
        command, cwd=scratch(), env={**environment(), "COLUMNS": "160"}, capture_output=True, text=True, timeout=timeout
    )


# Copies of the run of a config, as it is at these events (test_damage.py).
COPIES = {
    "star_arithmetic.py:smoke": {
        "base trains": "batch base 110",
        "loop trains": "batch rationalisation/checkpoints/iter_002 20",
    }
}


def copy_of(config, name):
    """The folder that a run of the config left at one of `COPIES`."""
    return finished(config).with_suffix("." + name.replace(" ", "-"))


@functools.cache
def finished(config, *flags):
    """The folder of an uninterrupted `qstar train --config=configs/CONFIG FLAGS`, made by the first worker that asks.

    The driver makes it, so that its `events` are there, too.
    """
    folder = scratch() / ("whole-" + hashlib.sha256(repr((config, flags)).encode()).hexdigest()[:12])
    made = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait
        if not made.exists():
            copies = {} if flags else COPIES.get(config, {})
            copies = {event: str(folder.with_suffix("." + name.replace(" ", "-"))) for name, event in copies.items()}
            job = {"config": config, "flags": list(flags), "workdir": str(folder), "kill": None, "copies": copies}
            codes = drive([job], "whole")
            assert codes == [0], folder.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
            made.touch()
    return folder


def killed(config, plans, flags=()):
    """The folder of a run that was killed at each of the planned events in turn, then left to end.

    Of a plan that is a list the process is killed at the last event, and left by an exception at the others before
    (see driver.py); the run ends where that last one is None.
    """
    folder = fresh("killed")
    job = {"config": config, "flags": list(flags), "workdir": str(folder)}
    if config.startswith("evaluate "):  # a command line instead of a config
        job["command"] = [*config.split(), f"--out={folder}"]
    plans = [plan if isinstance(plan, list) else [plan] for plan in plans]
    plans += [[None]] if plans[-1][-1] is not None else []
    codes = drive([{**job, "drop": drops, "kill": kill} for *drops, kill in plans])
    for (*_, plan), code in zip(plans, codes, strict=True):
        log = folder.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
        assert code == (-9 if plan and not plan.startswith("term ") else 0), (
            f"planned end: {plan or 'none'}, exit code {code}\n{log}"
        )
    return folder


def drive(jobs, kind="resumed"):
    """Runs jobs (see driver.py) and returns their exit codes.

    `kind`: "whole" or "resumed". Their processes have other seeds of Python's hashes, so that what depended on the order of
    a set would differ between a run and one that went on.
    """
    plan = fresh("jobs").with_suffix(".json")
    flags = [environment(job["config"])["XLA_FLAGS"] for job in jobs]
    jobs = [{**job, "xla_flags": own} for job, own in zip(jobs, flags, strict=True)]
    plan.write_text(json.dumps(jobs), encoding="utf-8")
    server = _server(kind)
    print(plan, file=server.stdin, flush=True)
    ended, _, _ = select.select([server.stdout], [], [], 1200 * len(jobs))
    assert ended and server.stdout.readline() == "done\n", server.poll()
    return json.loads(plan.with_suffix(".codes").read_text(encoding="utf-8"))


@functools.cache
def _server(kind):
    """A driver per worker and kind: its imports take some seconds, which its children share. It ends with its input."""
    seed = {"whole": "1", "resumed": "2"}[kind]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, DRIVER], env={**environment(), "PYTHONHASHSEED": seed}, text=True, **pipes)


def events(folder):
    """What the driver's children told about a folder."""
    return folder.with_suffix(".events").read_text(encoding="utf-8").splitlines()


def answers(folder):
    """The bytes of every file of rationales, evaluations and buffers of a run."""
    kinds = ("rationales", "evaluation", "thoughts", "d_gen", "d_ver", "selection", "verifiers/*/*")
    found = (f for kind in kinds for f in folder.glob(f"*/{kind}/*"))
    files = [f for f in found if f.is_file() and f.name != "made_with.json"]
    files += folder.glob("*.jsonl") if not (folder / "metrics.jsonl").exists() else ()  # of `qstar evaluate`
    files += [f for f in folder.glob("*/*/*.json") if f.name in ("evaluation.json", "study.json")]  # of LM-Guided CoT
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def weights(folder):
    """{model of the run: {path of a leaf: bytes}}, read by orbax alone."""
    import orbax.checkpoint as ocp

    out = {}
    for at in sorted(folder.glob("**/model/*/state")):
        leaves = _leaves(ocp.PyTreeCheckpointer().restore(at))
        assert leaves
        out[str(at.relative_to(folder))] = leaves
    return out


def _leaves(node, path=""):
    if not hasattr(node, "items"):
        return {path: (str(node.dtype), node.shape, np.asarray(node).tobytes())}
    return {k: v for name, child in node.items() for k, v in _leaves(child, f"{path}/{name}").items()}


def numbers(folder):
    """The metrics of a run without those that a clock made, sorted."""
    rows = [{k: v for k, v in row.items() if not k.startswith(MACHINE)} for row in metrics.read(folder)]
    return sorted(rows, key=lambda row: (row["arm"], row["iteration"], row["stage"], row["step"]))


def rollouts(folder, arm, n):
    """The attempts of loop n."""
    return [Rollout(**row) for row in read_jsonl(folder / arm / "rationales" / f"iter_{n:03d}.jsonl")]


def arithmetic():
    """The smoke run of configs/star_arithmetic.py."""
    return finished("star_arithmetic.py:smoke")


# The two others are cut down further: what they cost is training rows of some hundred tokens. They draw at a
# temperature, so that a round that is sampled after a kill has to draw what it would have drawn.
SMALLER = (
    "--config.loop.n_iters=1",
    "--config.loop.steps=lin:7:1",
    "--config.train.save_every=3",
    "--config.train.log_every=2",
    "--config.sample.temperature=0.9",
)


def pretrained_config(name, data):
    """The smoke mode of a config that starts from pretrained weights."""
    return f"{name}:smoke,model={shared('weights/stories260k')},data={shared(data)}"


def short_rows(data, most=400, characters=330):
    """A folder with the first short rows of a shared one's files: to encode all of 7,473 rows takes half of a smoke run.

    With at most a token per character, a pair of two solutions fits into the smoke mode's rows whichever is drawn.
    """
    folder = scratch() / data
    folder.mkdir(parents=True, exist_ok=True)
    for source in shared(data).glob("*.jsonl"):
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        part = fresh("rows")
        part.write_text("".join([x for x in lines if len(x) <= characters and x.isascii()][:most]), encoding="utf-8")
        os.replace(part, folder / source.name)
    return folder


def gsm8k():
    """The smoke run of configs/star_gsm8k.py."""
    return finished(pretrained_config("star_gsm8k.py", "data/gsm8k"), *SMALLER)


def quiet_star():
    """The smoke run of configs/quiet_star_tiny.py, two of its arms."""
    return finished(QUIET)


def v_star():
    """The smoke run of configs/v_star_arithmetic.py, one of its arms."""
    return finished(V_STAR)


def v_star_gsm8k():
    """The smoke run of configs/v_star_gsm8k.py."""
    return finished(f"v_star_gsm8k.py:smoke,model={shared('weights/stories260k')},data={short_rows('data/gsm8k')}")


V_STAR = "v_star_arithmetic.py:smoke,arms=v_star"
QUIET = "quiet_star_tiny.py:smoke,arms=quiet_star+same_text"
