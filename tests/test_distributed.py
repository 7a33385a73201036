"""How the processes of a run find each other, and that what they make together is what one makes alone."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from qstar import distributed
from qstar.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
MEET = """
import sys
from qstar.__main__ import main
from qstar import distributed
from qstar.commands import report
report.main = lambda argv: print(distributed.rendezvous(distributed.process_info(), float(argv[0]))) or 0
sys.exit(main(["report", sys.argv[1]]))
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(port, index, count, *command, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QSTAR_COORDINATOR": f"127.0.0.1:{port}", **more}
    environment |= {"QSTAR_NUM_PROCESSES": str(count), "QSTAR_PROCESS_ID": str(index), "PJRT_NPROC": "16"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], env=environment, text=True, **pipes)


SLURM = {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "gpu[007,010-012]"}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.x,a-1.x", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "b-0.x:8080"}


@pytest.mark.parametrize("environment, expected", [
    ({}, None),
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # the batch shell: no step
    ({**SLURM, "SLURM_NTASKS": "1"}, None),
    (SLURM, ("gpu007:61441", 8, 3)),
    ({**SLURM, "SLURM_STEP_NODELIST": "a1,b2"}, ("a1:61441", 8, 3)),
    ({**SLURM, "SLURM_STEP_NODELIST": "n[01-04]", "JAX_COORDINATOR_PORT": "9"}, ("n01:9", 8, 3)),
    (GKE, ("a-0.x:8482", 2, 1)),
    ({**GKE, **SLICES}, ("b-0.x:8482", 4, 3)),
    ({**GKE, "JAX_PLATFORMS": "cpu"}, None),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ({"QSTAR_COORDINATOR": "h:1", "QSTAR_NUM_PROCESSES": "2", "QSTAR_PROCESS_ID": "1", **SLURM}, ("h:1", 2, 1)),
])  # fmt: skip
def test_the_environment_says_where_a_process_stands(environment, expected):
    found = distributed.process_info(environment)
    assert (found and (found.coordinator, found.count, found.index)) == expected


def test_a_tpu_vm_is_asked_for_its_metadata(monkeypatch):
    told = {"worker-network-endpoints": "x:0:10.0.0.4,x:1:10.0.0.5", "agent-worker-number": "1",
            "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
                       "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'"}  # fmt: skip
    monkeypatch.setattr(distributed, "_metadata", lambda key: told.get(key, ""))
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    found = distributed.process_info({})
    assert (found.coordinator, found.count, found.index) == ("10.0.0.9:8482", 4, 3)
    assert distributed.process_info({}, "cpu") is None and distributed.process_info({"TPU_SKIP_MDS_QUERY": "1"}) is None


@pytest.mark.parametrize("values, culprit", [
    (("h:1", "2", ""), "QSTAR_PROCESS_ID is not set"), (("h", "2", "0"), "QSTAR_COORDINATOR=h "),
    (("h:84760", "2", "0"), "QSTAR_COORDINATOR=h:84760 "), (("h:1", "two", "0"), "QSTAR_NUM_PROCESSES=two"), (("h:1", "2", "2"), "QSTAR_PROCESS_ID=2"),
])  # fmt: skip
def test_variables_that_contradict_themselves_are_named(values, culprit):
    with pytest.raises(UserError, match=culprit):
        distributed.process_info(dict(zip(distributed.VARIABLES, values)))


def test_all_go_when_all_are_there_and_the_port_is_free_again():
    port = free_port()
    late = [start(port, i, 3, "-c", MEET, "20") for i in (2, 1)]
    time.sleep(0.3)
    for child in [start(port, 0, 3, "-c", MEET, "20"), *late]:
        assert child.communicate(timeout=30) == ("None\n", "") and child.returncode == 0
    socket.create_server(("", port)).close()


def test_who_is_missing_is_named_with_the_command_that_starts_it():
    port = free_port()
    first, other = (start(port, i, 3, "-c", MEET, "1") for i in (0, 2))
    said = first.communicate(timeout=30)[1]
    assert first.returncode == 1 and len(said.splitlines()) == 1
    assert "process 1 of 3 did not connect within 1 s" in said
    assert f"127.0.0.1:{port} QSTAR_NUM_PROCESSES=3 QSTAR_PROCESS_ID=1" in said
    said = other.communicate(timeout=30)[1]
    assert other.returncode == 1 and "process 0 of 3 at 127.0.0.1" in said


ENDS = """
import sys, threading, time
from qstar import distributed
here = distributed.process_info()
distributed.GRACE_OF_ERROR = distributed.GRACE = 0.1
distributed.rendezvous(here, 20)
if here.index:
    distributed.leave(well=sys.argv[1] == "well")
    sys.exit(2)
distributed._watch(here, 1)
print("goes on")
"""


@pytest.mark.parametrize("how", ["well", "badly"])
def test_a_process_that_ends_with_an_error_ends_the_others(how):
    port = free_port()
    first, other = (start(port, i, 2, "-c", ENDS, how) for i in (0, 1))
    said, other_said = first.communicate(timeout=30), other.communicate(timeout=30)
    assert other.returncode == 2, other_said
    ended = "process 1 of 2 has ended with an error, so process 0 ends, too"
    assert (first.returncode, "goes on" in said[0], ended in said[1]) == (
        (0, True, False) if how == "well" else (1, False, True)
    )


def test_an_oserror_of_process_0_is_one_line_on_all(monkeypatch):
    def fail():
        raise PermissionError(13, "Permission denied", "/runs/lock")

    monkeypatch.setattr(distributed, "_alone", lambda: False)
    monkeypatch.setattr(distributed, "_share", np.asarray)
    with pytest.raises(UserError, match="/runs/lock: Permission denied"):
        distributed.broadcast_from_host0(fail)
    assert distributed.broadcast_from_host0(lambda: {"a": [1]}) == {"a": [1]}


@pytest.mark.parametrize("given", ["5m", "0", "-1", "nan"])
def test_seconds_of_the_environment_are_checked(given, monkeypatch):
    monkeypatch.setenv("QSTAR_JOIN_SECONDS", given)
    with pytest.raises(UserError, match=f"QSTAR_JOIN_SECONDS={given} must be"):
        distributed.join(distributed.ProcessInfo("h:1", 2, 0, ""))


def test_two_processes_say_what_one_says(tmp_path):
    import jax
    from answers import answers
    from thoughts.families import FAMILIES

    import qstar
    from qstar.models import decoder, encdec
    from qstar.models.encdec import EncDecConfig
    from qstar.models.model import Model

    config = EncDecConfig(
        vocab_size=30, hidden_size=16, head_dim=4, intermediate_size=24, num_layers=1, num_decoder_layers=1, num_heads=4
    )
    thinker = FAMILIES["llama"].replace(num_layers=1)
    qstar.save(Model(thinker, decoder.init(thinker, jax.random.key(0))), tmp_path / "decoder")
    qstar.save(Model(config, encdec.init(config, jax.random.key(0))), tmp_path / "encdec")
    folders = [str(tmp_path / "decoder"), str(tmp_path / "encdec")]
    port, flags = free_port(), f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    both = [start(port, i, 2, str(ROOT / "tests/answers.py"), *folders, XLA_FLAGS=flags) for i in (0, 1)]
    alone = answers(*folders)
    said = [child.communicate(timeout=300) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    together = json.loads(said[0][0].splitlines()[-1])  # below what gloo says of its connections
    assert together.keys() == alone.keys() and "tokens" not in said[1][0]
    for what, expected in alone.items():
        for ours, theirs in zip(together[what], expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=what)


LONG = ["-m", "qstar", "train", f"--config={ROOT}/configs/star_arithmetic.py:smoke", "--config.base.steps=30000",
        "--config.base.log_every=10", "--config.base.save_every=10"]  # fmt: skip


@pytest.fixture
def train(tmp_path):
    """Starts the processes of a run; none outlives the test."""
    children = []

    def call(count, command=LONG):
        port = free_port()
        command = *command, f"--workdir={tmp_path}/run"
        children.extend(start(port, i, count, *command, JAX_PLATFORMS="cpu") for i in range(count))
        return children[-count:]

    yield call
    for child in children:
        child.kill()
        child.communicate()


def steps(folder, stage="train"):
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row["step"] for row in rows if row["stage"] == stage]


def until(run, children, rows, stage="train"):
    """Waits until the run has logged so many rows."""
    end = time.monotonic() + 300
    while len(steps(run, stage)) < rows:
        assert time.monotonic() < end and all(c.poll() is None for c in children), [c.communicate() for c in children]
        time.sleep(0.05)


def test_two_processes_train_one_model_stop_and_die_together_and_one_goes_on(train, tmp_path):
    run = tmp_path / "run"
    both = train(2)
    until(run, both, 3)
    both[1].terminate()  # whoever is told, both stop after the same update
    said = [child.communicate(timeout=120) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert "parameters" in said[0][0] and "parameters" not in said[1][0]  # the first alone prints ...
    assert "stopped by SIGTERM; saved after update " in said[0][1] and "stopped by" not in said[1][1]

    both = train(2)
    until(run, both, len(steps(run)) + 3)
    assert steps(run) == list(range(10, 10 * len(steps(run)) + 1, 10))  # ... and writes; and nothing is done twice
    both[1].kill()
    said = both[0].communicate(timeout=60)[1]
    assert both[0].returncode not in (0, 2), said
    assert "process 1 of 2 has died, so process 0 ends, too; start all of them again" in said

    died = steps(run)[-1]
    (alone,) = train(1)  # on half as many devices
    until(run, [alone], len(steps(run)) + 3)
    alone.terminate()
    assert alone.communicate(timeout=120)[0] and alone.returncode == 0
    again = steps(run)[steps(run).index(died) + 1 :]
    assert died - 20 <= again[0] <= died + 10 and again == list(range(again[0], again[-1] + 1, 10))
    assert len(list(run.glob("base/training/*/state"))) in (1, 2)  # the newest, and one in case that it is damaged


RL = ["-m", "qstar", "train", f"--config={ROOT}/configs/grpo_arithmetic.py:smoke", "--config.base.steps=4", "--config.loop.rounds=1",
      "--config.train.updates=3000", "--config.train.log_every=1", "--config.train.save_every=0",
      # Small: what it costs is compilation, in each of four processes.
      "--config.rl.group=2", "--config.train.prompts=4", "--config.train.batch_size=4", "--config.train.max_new_tokens=4",
      "--config.evaluate.limit=8", "--config.model.num_layers=1"]  # fmt: skip


def test_two_processes_of_rl_save_and_stop_together_and_go_on_with_the_very_next_update(train, tmp_path):
    run = tmp_path / "run"
    both = train(2, RL)
    until(run, both, 2, "rl")
    both[1].terminate()
    said = [child.communicate(timeout=120) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    done = steps(run, "rl")
    assert f"stopped by SIGTERM; saved after update {done[-1]};" in said[0][1]
    both = train(2, RL)
    until(run, both, len(done) + 2, "rl")
    again = steps(run, "rl")[len(done) :]  # where it resumes, the last row is written once more
    assert done == list(range(1, len(done) + 1)) and again[:2] == [done[-1], done[-1] + 1]


def test_processes_with_other_folders_are_refused_in_one_line(tmp_path):
    """Each with a folder of its own, as on the local disks of a pod, all end with exit code 2."""
    port, command = free_port(), ["-m", "qstar", "train", f"--config={ROOT}/configs/star_arithmetic.py:smoke"]
    seconds = {"QSTAR_JOIN_SECONDS": "20"}  # to connect, and to find the file
    both = [start(port, i, 2, *command, f"--workdir={tmp_path}/{i}", **seconds) for i in (0, 1)]
    for i, child in enumerate(both):
        lines = [line for line in child.communicate(timeout=200)[1].splitlines() if line.startswith("qstar: ")]
        assert child.returncode == 2
        assert f"--workdir={tmp_path}/{i}: process 1 does not find there what process 0 has written" in lines[-1]
    assert not list(tmp_path.glob("0/.shared-*"))
