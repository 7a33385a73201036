"""Runs of several processes: identity, rendezvous, health, and what process 0 alone does.

Stages meet on disk: the run folder is on a file system that all processes share. Process 0 alone prints and writes.
Whether a file exists is what process 0 finds (`broadcast_bool`), since a slow file system would send processes different
ways. When a process dies, the others, which wait for it in a collective, learn of it through their sockets and exit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import shutil
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qstar.errors import UserError

SECONDS = 300  # to wait for the others, unless QSTAR_JOIN_SECONDS says otherwise
SAY_AFTER = 5.0
GRACE = (
    3.0  # seconds between the news that a process has died and the end of this one, whose own error may be on its way
)
VARIABLES = ("QSTAR_COORDINATOR", "QSTAR_NUM_PROCESSES", "QSTAR_PROCESS_ID")
TPU_PORT = 8482  # JAX's own choice on TPU VMs


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """This process among those of the run."""

    coordinator: str  # host:port of process 0
    count: int
    index: int
    start: str  # how the others are started, for who forgot


def is_first() -> bool:
    """Whether this process prints and writes: process 0, or the only one."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


def broadcast_bool(value: bool) -> bool:
    """Returns the first process's value, in all of them (a collective: every process calls it, in the same order)."""
    jax = sys.modules.get("jax")
    if jax is None or jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def broadcast_from_host0(make: Callable[[], Any]) -> Any:
    """Returns what `make` returns in process 0, which alone calls it, on all processes (a collective, see `broadcast_bool`).

    For what may differ from process to process, or should be asked for once: a file, a server. The value must be JSON.

    Raises:
      UserError: `make` raised it; in all processes.
    """
    jax = sys.modules.get("jax")
    if jax is None or jax.process_count() == 1:
        return make()
    import numpy as np
    from jax.experimental import multihost_utils

    message, fault = b"", False
    if is_first():
        try:
            message = json.dumps(make()).encode()
        except UserError as e:
            message, fault = str(e).encode(), True
    share = multihost_utils.broadcast_one_to_all
    length, fault = (int(x) for x in share(np.asarray([len(message), fault])))
    message = share(np.frombuffer(message if is_first() else bytes(length), np.uint8)).tobytes().decode()
    if fault:
        raise UserError(message)
    return json.loads(message)


def remove(folder: Path) -> None:
    """Deletes a folder, in one process, when all have done with it."""
    broadcast_bool(True)
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)


def exists(path: Path) -> bool:
    """Whether a file of the run is there, as the first process sees it; the same in all of them."""
    return broadcast_bool(path.exists())


def process_info(environment: Mapping[str, str] = os.environ, device: str = "auto") -> ProcessInfo | None:
    """Returns this process's place, or None for a run of one process.

    QSTAR_COORDINATOR, QSTAR_NUM_PROCESSES and QSTAR_PROCESS_ID, if they are set; a step of SLURM with several tasks; the
    workers of a TPU slice (GKE's variables, or the metadata of a TPU VM), of several slices with MEGASCALE's.

    Raises:
      UserError: variables that contradict themselves.
    """
    e = environment
    if any(e.get(name) for name in VARIABLES):
        return _named(e)
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_NTASKS")
    if all(e.get(name) for name in slurm) and int(e["SLURM_NTASKS"]) > 1:
        port = e.get("JAX_COORDINATOR_PORT") or 61440 + int(e["SLURM_JOB_ID"]) % 4096
        nodes = e["SLURM_STEP_NODELIST"]
        coordinator = f"{_first_node(nodes)}:{port}"
        how = f"srun --jobid={e['SLURM_JOB_ID']} runs the command once per task; launch/slurm.sh submits it so"
        return ProcessInfo(coordinator, int(e["SLURM_NTASKS"]), int(e["SLURM_PROCID"]), how)
    if device not in ("auto", "tpu") or e.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return None
    return _of_tpu(e)


def _named(e: Mapping[str, str]) -> ProcessInfo:
    missing = [name for name in VARIABLES if not e.get(name)]
    if missing:
        raise UserError(f"{missing[0]} is not set, but others of {', '.join(VARIABLES)} are; set all three or none")
    coordinator, count, index = (e[name] for name in VARIABLES)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"QSTAR_COORDINATOR={coordinator} must be host:port of process 0, e.g. 10.0.0.2:8476")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"QSTAR_NUM_PROCESSES={count} must be a whole number of 1 or more")
    if not index.isdecimal() or int(index) >= int(count):
        raise UserError(f"QSTAR_PROCESS_ID={index} must be a whole number from 0 to {int(count) - 1}")
    how = (
        f"the same command with QSTAR_COORDINATOR={coordinator} QSTAR_NUM_PROCESSES={count} QSTAR_PROCESS_ID={{index}}"
    )
    return ProcessInfo(coordinator, int(count), int(index), how)


def _first_node(nodes: str) -> str:
    """The first host of SLURM's list: node001, node001,b; node[001-015],b; node[001,007-015]."""
    prefix, bracket, rest = nodes.partition("[")
    if "," in prefix or not bracket:
        return nodes.split(",")[0]
    return prefix + rest.replace("]", ",").replace("-", ",").split(",")[0]


def _of_tpu(e: Mapping[str, str]) -> ProcessInfo | None:
    hosts, index = e.get("TPU_WORKER_HOSTNAMES", ""), e.get("TPU_WORKER_ID", "")
    slices = {k: e.get(f"MEGASCALE_{k}", "") for k in ("NUM_SLICES", "SLICE_ID", "COORDINATOR_ADDRESS")}
    if not (hosts and index):
        if e.get("TPU_SKIP_MDS_QUERY") or not glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"):
            return None
        # In the new format a list of hosts, in the old one of name:id:address.
        hosts = ",".join(w.split(":")[-1] for w in _metadata("worker-network-endpoints").split(","))
        index = _metadata("agent-worker-number")
        if not (hosts and index):
            return None
        lines = [line.partition(":") for line in _metadata("tpu-env").splitlines()]
        values = {key.strip(): value.strip().strip("'") for key, _, value in lines}
        slices = {k: v or values.get(f"MEGASCALE_{k}", "") for k, v in slices.items()}
    workers = hosts.split(",")
    count = len(workers) * int(slices["NUM_SLICES"] or 1)
    if count == 1:
        return None
    host = (slices["COORDINATOR_ADDRESS"] or workers[0]).split(":")[0]
    coordinator = f"{host}:{e.get('JAX_COORDINATOR_PORT') or TPU_PORT}"
    how = "launch/tpu_pod.sh runs the command on all workers (gcloud compute tpus tpu-vm ssh --worker=all)"
    return ProcessInfo(coordinator, count, int(slices["SLICE_ID"] or 0) * len(workers) + int(index), how)


def _metadata(key: str) -> str:
    """An attribute of this virtual machine on Google Cloud; "" where there is none."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read().decode()
    except OSError:
        return ""


def join(here: ProcessInfo) -> None:
    """Waits until all processes are there, and makes them one JAX. Called before JAX touches a device.

    Raises:
      UserError: somebody did not come in time; the line names who and the command that starts them.
    """
    seconds = float(os.environ.get("QSTAR_JOIN_SECONDS") or SECONDS)
    _rendezvous(here, seconds)
    import jax

    jax.distributed.initialize(here.coordinator, here.count, here.index, initialization_timeout=max(60, int(seconds)))
    for index, line in _Lines.open.items():
        threading.Thread(target=_watch, args=(here, index, line), daemon=True, name="qstar-peer").start()


class _Lines:
    open: dict[int, socket.socket] = {}  # process -> connection: process 0 has one to each, the others one to it


def _watch(here: ProcessInfo, index: int, line: socket.socket) -> None:
    """Waits for a process to say that it is done (`leave`); ends this one if it dies instead."""
    message = b""
    with contextlib.suppress(OSError):
        message = line.recv(3)
    if message == b"bye":
        return
    _say(
        f"process {index} of {here.count} has died, so process {here.index} ends, too; "
        "start all of them again, and they go on from the last checkpoint"
    )
    time.sleep(GRACE)
    os._exit(1)


def leave() -> None:
    """Says that this process has come to its end by itself, with whatever exit code."""
    for line in _Lines.open.values():
        with contextlib.suppress(OSError):
            line.sendall(b"bye")


def _rendezvous(here: ProcessInfo, seconds: float) -> None:
    """Returns when all processes have called it. JAX's own rendezvous cannot say who is missing, and aborts.

    Process 0 listens on the coordinator's port, which JAX takes over afterwards; the others send their number and wait
    for the word to go. Their connections stay, to tell when one of them dies.
    """
    deadline = time.monotonic() + seconds
    if here.index == 0:
        _gather(here, deadline, seconds)
    else:
        _report(here, deadline, seconds)


def _say(text: str) -> None:
    print(f"qstar: {text}", file=sys.stderr, flush=True)


def _gather(here: ProcessInfo, deadline: float, seconds: float) -> None:
    port = int(here.coordinator.rpartition(":")[2])
    try:
        server = socket.create_server(("", port), backlog=max(128, here.count))
    except OSError as e:
        raise UserError(
            f"process 0 cannot listen on port {port} ({e.strerror}); end what uses it, or name another"
        ) from None
    connected: dict[int, socket.socket] = {}
    last_message = time.monotonic() - 15 + SAY_AFTER
    with server, contextlib.ExitStack() as open_ones:
        while len(connected) < here.count - 1:
            missing = ", ".join(str(i) for i in range(1, here.count) if i not in connected)
            now = time.monotonic()
            if now > deadline:
                raise UserError(
                    f"process {missing} of {here.count} did not come within {seconds:g} s; on each worker: "
                    + here.start.format(index=missing)
                )
            if now - last_message >= 15:
                last_message = now
                _say(f"process 0 of {here.count} waits for process {missing} at {here.coordinator}")
            server.settimeout(0.5)
            with contextlib.suppress(OSError, ValueError):
                other, _ = server.accept()
                open_ones.enter_context(other)
                other.settimeout(2)
                index = int(other.recv(16))
                if 0 < index < here.count:
                    connected[index] = other  # one that was restarted while it waited has come again
        for index, other in connected.items():
            with contextlib.suppress(OSError):
                other.sendall(b"go")
                other.settimeout(None)
            _Lines.open[index] = _alive(other)
        open_ones.pop_all()


def _alive(line: socket.socket) -> socket.socket:
    """Has the system ask every half minute whether the other end is there: a machine without power says nothing."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line


def _report(here: ProcessInfo, deadline: float, seconds: float) -> None:
    host, _, port = here.coordinator.rpartition(":")
    began = time.monotonic()
    last_message = False
    while True:
        with contextlib.suppress(OSError):
            first = socket.create_connection((host.strip("[]"), int(port)), timeout=2)
            with contextlib.ExitStack() as until_go:
                until_go.enter_context(first)
                first.sendall(b"%d" % here.index)
                first.settimeout(max(0.1, deadline + 5 - time.monotonic()))  # the first one's message comes first
                if first.recv(2) == b"go":
                    until_go.pop_all()
                    first.settimeout(None)
                    _Lines.open[0] = _alive(first)
                    return
        now = time.monotonic()
        if now > deadline:
            raise UserError(
                f"process {here.index} of {here.count} waited {seconds:g} s for process 0 at {here.coordinator}; "
                + here.start.format(index=0)
            )
        if not last_message and now - began > SAY_AFTER:
            last_message = True
            _say(f"process {here.index} of {here.count} waits for process 0 at {here.coordinator}")
        time.sleep(0.2)
