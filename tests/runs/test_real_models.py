"""Runs of all methods on pretrained models: ended by SIGKILL they come to the same end, and their memory is foreseen.

Opt-in, for they take minutes each: QSTAR_LONG_TESTS=1. The runs are those of the configs for two CPU cores, with their
shapes (rows, tokens of a training row, adapters), cut down to a few problems, updates and tokens.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import real_model, shared

from tests.methods import runs

QWEN, SMOL = "qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"
# Config, changes, and the files after whose appearance the run is killed, in turn.
CASES = {
    "star": (
        "star_gsm8k:svamp,model={qwen},data={data}/svamp/SVAMP.json",
        {"loop.problems_per_iter": 16, "arms.rft.problems_per_iter": 16, "sample.max_new_tokens": 96,
         "sample.slots": 16, "evaluate.limit": 8, "train.save_every": 1, "train.log_every": 1},
        ("rft/rationales/*.jsonl", "star/stages/iter_001/training/1", "star/evaluation/iter_001.jsonl"),
    ),
    "v_star": (
        "v_star_mbpp:qwen05,model={qwen},data={data}/mbpp",
        {"loop.problems_per_iter": 6, "loop.n_iters": 1, "loop.steps": "lin:2:0", "sft.steps": "lin:2:0",
         "sample.max_new_tokens": 96, "sample.slots": 16, "evaluate.limit": 4, "select.limit": 4, "select.samples": 4,
         "train.save_every": 1, "dpo.save_every": 1, "orm.save_every": 1},
        ("v_star/stages/*/training/1", "v_star/d_gen/*", "v_star/verifiers/*"),
    ),
    "quiet_star": (
        "quiet_star_text:smollm2,model={smol},data={data}/text/openstax_algebra.jsonl,steps=3",
        {"evaluate.rows": 4, "evaluate.viewer_texts": 1, "train.save_every": 1, "train.log_every": 1,
         "arms.same_compute.steps": 3},
        ("pause/training/1", "random/training/2"),
    ),
    "guided_cot": (
        "guided_cot_hotpotqa:qwen05,small={smol},large={qwen},train={data}/hotpotqa/train_100.json"
        ",test={data}/hotpotqa/dev_sample_500.jsonl",
        {"guided.teacher_questions": 12, "guided.rl_questions": 12, "guided.test_questions": 4, "guided.votes": 2,
         "guided.cot_tokens": 32, "guided.large.slots": 8, "distil_train.save_every": 1, "train.updates": 2,
         "train.save_every": 1, "arms.kd_unfiltered.steps": 3, "arms.kd_filtered.steps": 3},
        ("student_0/teacher/*", "student_0/kd_unfiltered/training/1", "student_0/rl_both/**/1"),
    ),
    "rl": (
        "grpo_gsm8k:qwen05,model={qwen},data={data}/gsm8k",
        {"loop.rounds": 1, "train.updates": 3, "train.prompts": 4, "train.save_every": 1, "train.max_new_tokens": 64,
         "sample.max_new_tokens": 64, "evaluate.limit": 4},
        ("grpo/**/checkpoints/1", "grpo/**/checkpoints/2"),
    ),
}  # fmt: skip


def run(folder, command, until=None):
    """Runs `qstar train COMMAND --workdir=FOLDER`, killed once a file matches `until`; returns its peak memory in bytes."""
    # With the compiler's own options and all cores: without its optimisations, as in the other tests, programs take more
    # memory.
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")}
    environment = {**kept, "PYTHONPATH": str(runs.ROOT), "JAX_PLATFORMS": "cpu"}
    log = folder.with_suffix(".log")
    with log.open("a") as out:
        flags = ["train", *command, f"--workdir={folder}"]
        child = subprocess.Popen([sys.executable, "-m", "qstar", *flags], env=environment, stdout=out, stderr=out)
        while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
            if until and any(folder.glob(until)):
                child.kill()
            time.sleep(0.05)
    code = os.waitstatus_to_exitcode(ended[1])
    assert code == (-9 if until else 0), f"until {until}: exit code {code}\n{log.read_text()[-3000:]}"
    return ended[2].ru_maxrss * 1024


@pytest.mark.skipif(
    not os.environ.get("QSTAR_LONG_TESTS"), reason="trains real models: set QSTAR_LONG_TESTS=1 to run it"
)
@pytest.mark.parametrize("method", CASES)
def test_a_killed_run_of_a_real_model_ends_alike_within_the_estimated_memory(method):
    config, changes, places = CASES[method]
    folders = {"qwen": real_model(QWEN), "smol": real_model(SMOL), "data": shared("data")}
    command = [f"--config={config.format(**folders)}", *(f"--config.{k}={v}" for k, v in changes.items())]
    said = runs.qstar("train", *command, "--dry-run", "--json").stdout
    estimate = json.loads(next(line for line in said.splitlines() if line.startswith("{")))["memory"]["peak"]
    whole, killed = runs.fresh("whole"), runs.fresh("killed")
    peak = run(whole, command)
    print(f"{method}: {estimate / 1e9:.2f} GB estimated, {peak / 1e9:.2f} seen")
    for place in (*places, None):
        run(killed, command, place)
    assert runs.answers(killed) == runs.answers(whole) and runs.answers(whole)
    assert runs.weights(killed) == runs.weights(whole) and runs.weights(whole)
    assert runs.numbers(killed) == runs.numbers(whole)
    assert abs(estimate / peak - 1) < 0.15
