"""Goldens of five smoke runs, to show that a restructuring changed no result.

    python tests/goldens.py make GOLDENS.json [--root=CHECKOUT] [--only=NAME] [--keep=FOLDER]    runs them, with the code
                                                                                 of a checkout; keeps the run folders
    python tests/goldens.py compare BEFORE.json AFTER.json                       exit code 1 and a list where they differ

A golden is, per run: a hash of every JSONL and JSON file that holds results, a hash of every checkpoint's parameters (read
by orbax alone) and the metrics without those that a clock made. Keys and file names that were renamed since are hashed
under their new names (`RENAMED`). `make --from=FOLDER` reads run folders that `--keep` left. The files stay outside of the
repository: float sums differ between machines.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = {
    "star": "star_arithmetic.py:smoke",
    "quiet_star": "quiet_star_tiny.py:smoke",
    "v_star": "v_star_arithmetic.py:smoke",
    "guided_cot": "guided_cot_synth.py:smoke",
    "grpo": "grpo_arithmetic.py:smoke",
}
CLOCK = ("seconds", "tokens_per_second", "memory", "mfu", "recompiles", "duration", "time", "rate")
RENAMED: dict[str, str] = {  # keys of metrics and records, and parts of file names: the old one -> today's
    "right": "correct",
    **{
        f"{old}/{kind}": f"{new}/{kind}"
        for old, new in (
            ("right", "thought_accuracy"),
            ("right_greedy", "thought_accuracy_greedy"),
            ("right_swapped", "thought_accuracy_random"),
            ("nll_swapped", "nll_random"),
            ("accuracy_swapped", "accuracy_random"),
        )
        for kind in ("all", "letter", "digit", "mark", "short answer", "hard")
    },
    "study": "analysis",
    "study.json": "analysis.json",
    "studies": "analyses",
    "smuggled": "answer_leak",
    "student_reads": "student_prompt_tokens",
    "answerer_reads": "answerer_prompt_tokens",
    "reward/bare": "reward/bare_answer",
    "look-alike": "wrong chain",
    "answer in untruths": "answer in a false chain",
    "moved": "approx_kl",
    "max_moved": "max_approx_kl",
    "clipped": "clip_fraction",
    **{
        f"d_{d}_{old}": f"d_{d}_{new}"
        for d in ("gen", "ver")
        for old, new in (("right", "correct"), ("wrong", "incorrect"))
    },
    **{
        f"{stage}{side}_drift": f"{stage}{side}_logratio"
        for stage in ("", "dpo_", "rpo_")
        for side in ("chosen", "rejected")
    },
}
LABELS = {k: RENAMED[k] for k in ("look-alike", "answer in untruths")}  # arms, which are also values
OWN = re.compile(r"(^|[/ ])own(?=$|[+_ ])")  # the scorer `own` became `generator`, also within keys: best/own_low, ...
NOT_RESULTS = ("config.json", "environment.json", "resolved.json", "metrics.jsonl")
NOT_FOLDERS = {"checkpoints", "model", ".checksums"}  # the last hold hashes of files under their keys of then


def golden(folder: pathlib.Path) -> dict:
    """Returns the golden of a finished run's folder."""
    files = sorted(p for kind in ("*.jsonl", "*.json") for p in folder.rglob(kind))
    results = [p for p in files if p.name not in NOT_RESULTS and not NOT_FOLDERS & set(p.parts)]
    rows = _records(folder / "metrics.jsonl")
    numbers = [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]
    return {
        "files": {
            _name(p, folder): hashlib.sha256(json.dumps(_records(p), sort_keys=True).encode()).hexdigest()
            for p in results
        },
        "parameters": {_name(p, folder): _parameters(p) for p in sorted(folder.rglob("state")) if p.is_dir()},
        "metrics": sorted(numbers, key=lambda row: json.dumps(row, sort_keys=True)),
    }


def _name(path: pathlib.Path, folder: pathlib.Path) -> str:
    return "/".join(RENAMED.get(part, part) for part in path.relative_to(folder).parts)


def _records(path: pathlib.Path) -> list:
    """Returns the rows of a JSONL file (or the one value of a JSON file) with today's keys."""
    text = path.read_text(encoding="utf-8")
    values = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]

    def rename(value):
        if isinstance(value, dict):
            value = {
                k: OWN.sub(r"\1generator", v) if k == "stage" else v for k, v in value.items() if k != "format_version"
            }
            return {OWN.sub(r"\1generator", RENAMED.get(k, k)): rename(v) for k, v in value.items()}
        if isinstance(value, list):
            return [rename(v) for v in value]
        return LABELS.get(value, value) if isinstance(value, str) else value

    return rename(values)


def _parameters(checkpoint: pathlib.Path) -> str:
    import orbax.checkpoint as ocp

    digest = hashlib.sha256()

    def add(node, path):
        if hasattr(node, "items"):
            for name in sorted(node):
                add(node[name], f"{path}/{name}")
        else:
            array = np.asarray(node)
            digest.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())

    add(ocp.PyTreeCheckpointer().restore(checkpoint), "")
    return digest.hexdigest()


def make(path: str, root: pathlib.Path, only: str, keep: pathlib.Path | None, done: pathlib.Path | None) -> None:
    """Runs the configs with the code of `root` and writes their goldens; the run folders stay in `keep`, if given."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": "16",
    }  # sums are split by it
    goldens = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in RUNS.items():
            if only in ("", name):
                folder = (keep or pathlib.Path(scratch)) / name
                command = ["train", f"--config={root}/configs/{config}", f"--workdir={folder}"]
                if not done:
                    subprocess.run([sys.executable, "-m", "qstar", *command], cwd=scratch, env=environment, check=True,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
                goldens[name] = golden(done / name if done else folder)
    pathlib.Path(path).write_text(json.dumps(goldens, indent=1, sort_keys=True), encoding="utf-8")


def compare(before: str, after: str) -> int:
    """Prints what differs between two files of goldens; returns the exit code."""
    old, new = (json.loads(pathlib.Path(p).read_text(encoding="utf-8")) for p in (before, after))
    different = []
    for run in sorted(old.keys() & new.keys()):
        for part in ("files", "parameters"):
            a, b = old[run][part], new[run][part]
            different += [f"{run}: {name}" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
        if old[run]["metrics"] != new[run]["metrics"]:
            different.append(f"{run}: metrics")
    print("\n".join(different) or f"equal: {', '.join(sorted(old.keys() & new.keys()))}")
    return 1 if different else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("make")
    p.add_argument("path")
    p.add_argument("--root", type=pathlib.Path, default=ROOT)
    p.add_argument("--only", default="", choices=("", *RUNS))
    p.add_argument("--from", dest="done", type=lambda text: pathlib.Path(text).resolve())
    p.add_argument("--keep", type=lambda text: pathlib.Path(text).resolve())
    p = commands.add_parser("compare")
    p.add_argument("before")
    p.add_argument("after")
    a = parser.parse_args()
    sys.exit(
        compare(a.before, a.after) if a.command == "compare" else make(a.path, a.root.resolve(), a.only, a.keep, a.done)
    )
