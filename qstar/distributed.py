"""Processes of a run: identity, rendezvous, the start of JAX, and collectives of small host values.

Stages exchange data on disk: the run folder is on a file system that all processes share. Process 0 alone prints and
writes. When a process dies, the others lose its connection and exit.
"""

from __future__ import annotations

import contextlib
import ctypes
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

from etils import epath

from qstar import files
from qstar.errors import Unreachable, UserError, machine_fault, pip_install, seconds_of

JOIN_SECONDS = 300.0  # default of QSTAR_JOIN_SECONDS
FIRST_NOTE, NEXT_NOTE = 5.0, 15.0  # seconds between messages about missing processes
# A process whose peer died waits so long before it exits: its own error may say more and is about to be printed.
# After an error of the peer it waits longer: the same error may be about to end this process with a message of its own.
GRACE, GRACE_OF_ERROR = 3.0, 60.0
VARIABLES = ("QSTAR_COORDINATOR", "QSTAR_NUM_PROCESSES", "QSTAR_PROCESS_ID")
TPU_PORT = 8482  # JAX's own choice on TPU VMs
SIMULATED = "--xla_force_host_platform_device_count"  # of XLA_FLAGS


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Identity of this process in the run."""

    coordinator: str  # host:port of process 0
    count: int
    index: int
    start: str  # the command that starts a missing process, with {index}


# ------------------------------------------------------------------------------------------------- start of JAX


def set_tpu_options() -> None:
    """Switches the TPU compiler's rings of partial products off, if LIBTPU_INIT_ARGS says nothing of them."""
    # In a ring, a gradient's product reads one operand again for every device; plan/README.md has bounds of both.
    given, option = os.environ.get("LIBTPU_INIT_ARGS", ""), "--xla_jf_spmd_threshold_for_windowed_einsum_mib"
    if option not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{option}=1000000 {given}".strip()


def start_jax(device: str = "auto", *, several: bool = False) -> None:
    """Selects the platform and enables the persistent compilation cache. Call it before anything imports jax.

    With `several`, waits for the other processes of the run that the environment describes (`process_info`).

    Raises:
      UserError: the device is not available; another process did not connect.
    """
    platform = {"auto": "", "gpu": "cuda"}.get(device, device)
    if platform:
        os.environ["JAX_PLATFORMS"] = platform
    # tokenizers turns its threads off with a warning when a process that has used them forks workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "qstar" / "jax"))
    # JAX's default of 1 s would leave the many small programs out of the cache.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    set_tpu_options()
    # By device files, not by packages: libtpu is installed on CPU machines, too, for `qstar plan`.
    kinds = ("accel[0-9]*", "vfio/[0-9]*", "nvidia*", "dxg", "kfd")
    accelerators = [f for kind in kinds for f in glob.glob(f"/dev/{kind}")]
    here = process_info(os.environ, device) if several else None
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerators:
        keep_freed_memory()
    import jax

    if here is not None and here.count > 1:
        join(here)
    elif SIMULATED not in os.environ.get("XLA_FLAGS", ""):
        # A CPU program that is dispatched asynchronously frees its temporaries some time after its results are there, and
        # the next step allocates its own before that: up to three steps' at once. (Collectives need it asynchronous.)
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        found = jax.devices()[0].platform
    except (RuntimeError, AssertionError) as e:  # AssertionError, without text, if JAX has no plugin for the platform
        reason = next(iter(str(e).splitlines()), "no plugin for it")
        raise UserError(f"--device={device}: JAX finds none ({reason}); install its extra or use cpu") from None
    # A program that has started JAX already keeps its platform: JAX_PLATFORMS has no effect any more.
    if device not in ("auto", found):
        raise UserError(f"--device={device}: JAX has started on {found} already; name the device first")


def start_plan(simulated: int, gpu: bool = False) -> None:
    """Starts JAX for `qstar plan`: on the CPU with so many `simulated` devices (0: as it is), or on this machine's GPUs.

    Raises:
      UserError: `gpu`, and there is none.
    """
    # They are counted once, when JAX starts, so it has to be the largest number of all slices.
    if simulated and SIMULATED not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {SIMULATED}={simulated}".strip()
        os.environ["PJRT_NPROC"] = "16"  # threads: with too few, a sum over the devices can wait for itself
    if not gpu:
        return start_jax("cpu")
    try:
        start_jax("gpu")
    except UserError:
        raise UserError(
            f"--topology=gpu: JAX finds no GPU here; run it where there is one, after `{pip_install('cuda')}`, or give a"
            " number (h100:8) for simulated devices with a GPU's memory, which are a guide only"
        ) from None


def keep_freed_memory() -> None:
    """Makes glibc's allocator keep freed memory; without glibc nothing changes."""
    # XLA's CPU runtime allocates the temporaries of every call anew. Returned to the system in between, each page
    # faults again: 200,000 faults in a train step of a 20M model, 15% of its time. One arena, or blocks of other
    # threads would not be kept.
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 2**30), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(name, value)


def return_freed_memory() -> None:
    """Makes glibc's allocator return what it kept of freed memory; without glibc nothing changes.

    For the moment before another program than the last: its temporaries, one block, may not fit where those of the last
    one were (another size, or a small array that stayed there), and gigabytes would be held twice.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# ----------------------------------------------------------------------------------- collectives of host values


def is_first() -> bool:
    """Returns whether this process prints and writes: process 0, or the only one."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


def _alone() -> bool:
    jax = sys.modules.get("jax")
    return jax is None or jax.process_count() == 1


def broadcast_bool(value: bool) -> bool:
    """Returns the value of process 0 on all processes (a collective: every process calls it, in the same order)."""
    return value if _alone() else bool(_share(value))


def _share(value: Any) -> Any:
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(np.asarray(value))


def broadcast_from_host0(make: Callable[[], Any]) -> Any:
    """Calls `make` on process 0 alone and returns its result, which must be JSON, on all processes (a collective).

    Raises:
      UserError: `make` raised it, or, in a run of several processes, an OSError; on all processes.
    """
    if _alone():
        return make()
    message, failed = b"", False
    if is_first():
        try:
            message = json.dumps(make()).encode()
        except (UserError, OSError) as e:
            message, failed = (machine_fault(e) or str(e)).encode(), True
    # Two broadcasts: the processes must agree on a shape, so the length goes first. A failure is sent like a result, or
    # the others would wait in the collective for ever.
    length, failed = _share([len(message), failed]).tolist()
    message = _share(bytearray(message if is_first() else bytes(length))).tobytes()
    if failed:
        raise UserError(message.decode())
    return json.loads(message)


def remove(folder: Path) -> None:
    """Deletes a folder on process 0 after all processes have called this."""
    # A barrier: no process still reads the folder.
    broadcast_bool(True)
    if is_first():
        if files.is_remote(folder):
            epath.Path(folder).rmtree(missing_ok=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def exists(path: Path) -> bool:
    """Returns whether process 0 finds the file; the same on all processes."""
    # A slow file system may show the file to some processes later; they would then run different programs.
    return broadcast_bool(path.exists())


# ------------------------------------------------------------------------------------------------------ identity


def process_info(environment: Mapping[str, str] = os.environ, device: str = "auto") -> ProcessInfo | None:
    """Returns the identity of this process, or None for a run of one process.

    Read from QSTAR_COORDINATOR, QSTAR_NUM_PROCESSES and QSTAR_PROCESS_ID if set; from a SLURM step with several tasks; from
    the variables of GKE or the metadata of a TPU VM, with MEGASCALE's for several slices.

    Raises:
      UserError: variables contradict each other.
    """
    # JAX detects these clusters itself, but has no public function that returns what it found, and the message about
    # missing processes needs it.
    e = environment
    if any(e.get(name) for name in VARIABLES):
        return _from_variables(e)
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_NTASKS")
    if all(e.get(name) for name in slurm) and int(e["SLURM_NTASKS"]) > 1:
        # From the job id, so that two jobs on one node differ; in the last 4096 ports, as in JAX's own SLURM detection.
        port = e.get("JAX_COORDINATOR_PORT") or 61440 + int(e["SLURM_JOB_ID"]) % 4096
        coordinator = f"{_first_node(e['SLURM_STEP_NODELIST'])}:{port}"
        how = f"srun --jobid={e['SLURM_JOB_ID']} runs the command once per task; launch/slurm.sh submits it so"
        return ProcessInfo(coordinator, int(e["SLURM_NTASKS"]), int(e["SLURM_PROCID"]), how)
    if device not in ("auto", "tpu") or e.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return None
    return _from_tpu(e)


def _from_variables(e: Mapping[str, str]) -> ProcessInfo:
    if missing := [name for name in VARIABLES if not e.get(name)]:
        raise UserError(f"{missing[0]} is not set, but others of {', '.join(VARIABLES)} are; set all three or none")
    coordinator, count, index = (e[name] for name in VARIABLES)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"QSTAR_COORDINATOR={coordinator} must be host:port of process 0, e.g. 10.0.0.2:8476")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"QSTAR_NUM_PROCESSES={count} must be a whole number of 1 or more")
    if not index.isdecimal() or int(index) >= int(count):
        raise UserError(f"QSTAR_PROCESS_ID={index} must be a whole number from 0 to {int(count) - 1}")
    how = f"QSTAR_COORDINATOR={coordinator} QSTAR_NUM_PROCESSES={count} QSTAR_PROCESS_ID={{index}}"
    return ProcessInfo(coordinator, int(count), int(index), f"the same command with {how}")


def _first_node(nodes: str) -> str:
    """Returns the first host of SLURM's list: node001, node001,b; node[001-015],b; node[001,007-015]."""
    prefix, bracket, rest = nodes.partition("[")
    if "," in prefix or not bracket:
        return nodes.split(",")[0]
    return prefix + rest.replace("]", ",").replace("-", ",").split(",")[0]


def _from_tpu(e: Mapping[str, str]) -> ProcessInfo | None:
    hosts, index = e.get("TPU_WORKER_HOSTNAMES", ""), e.get("TPU_WORKER_ID", "")
    slices = {k: e.get(f"MEGASCALE_{k}", "") for k in ("NUM_SLICES", "SLICE_ID", "COORDINATOR_ADDRESS")}
    if not (hosts and index):
        # Without a device file there is no TPU, and a query of the metadata server may wait for its timeout.
        if e.get("TPU_SKIP_MDS_QUERY") or not glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"):
            return None
        # The new format is a list of hosts, the old one a list of name:id:address.
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
    """Returns an attribute of this virtual machine on Google Cloud, "" elsewhere."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read().decode()
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------- rendezvous

_connections: dict[int, socket.socket] = {}  # process 0 has one to each process, the others one to process 0


def join(here: ProcessInfo) -> None:
    """Waits for all processes, then calls `jax.distributed.initialize`. Call it before JAX uses a device.

    Raises:
      Unreachable: a process did not connect within QSTAR_JOIN_SECONDS; the line names it and the command for it.
    """
    seconds = seconds_of("QSTAR_JOIN_SECONDS", JOIN_SECONDS)
    rendezvous(here, seconds)
    import jax

    jax.distributed.initialize(here.coordinator, here.count, here.index, initialization_timeout=max(60, int(seconds)))
    for index in _connections:
        threading.Thread(target=_watch, args=(here, index), daemon=True, name="qstar-peer").start()


def rendezvous(here: ProcessInfo, seconds: float) -> None:
    """Returns when all processes have called it."""
    # JAX's own rendezvous aborts the process after its timeout and does not say which processes are missing. Here
    # process 0 listens on the coordinator's port, which JAX takes over afterwards; the others send their index and wait
    # for a reply. The connections stay open, so that the end of a process is noticed at once.
    deadline, note = time.monotonic() + seconds, time.monotonic() + FIRST_NOTE
    address, _, port = here.coordinator.rpartition(":")
    try:
        server = socket.create_server(("", int(port)), backlog=max(128, here.count)) if here.index == 0 else None
    except OSError as e:
        line = f"process 0 cannot listen on port {port} ({e.strerror}); end what uses it, or name another"
        raise UserError(line) from None
    others = range(1, here.count) if here.index == 0 else [0]
    while missing := [i for i in others if i not in _connections]:
        names, now = ", ".join(map(str, missing)), time.monotonic()
        if now > deadline:
            what = "did not connect" if server else f"at {here.coordinator} did not answer"
            start = here.start.format(index=names)
            raise Unreachable(f"process {names} of {here.count} {what} within {seconds:g} s; {start}")
        if now > note:
            note = now + NEXT_NOTE
            say(f"process {here.index} of {here.count} waits for process {names} at {here.coordinator}")
        with contextlib.suppress(OSError, ValueError):
            if server:
                server.settimeout(0.5)
                peer = server.accept()[0]
                peer.settimeout(2)
                index = int(peer.recv(16))
                if index in others:  # a process that was restarted while it waited replaces its connection
                    _connections[index] = peer
            else:
                time.sleep(0.2)
                peer = socket.create_connection((address.strip("[]"), int(port)), timeout=2)
                peer.sendall(b"%d" % here.index)
                # 5 s more: process 0 reports which processes are missing before this one gives up.
                peer.settimeout(max(0.1, deadline + 5 - now))
                if peer.recv(2) == b"go":
                    _connections[0] = peer
    for peer in _connections.values():
        peer.settimeout(None)
        # The system probes the other end every half minute: a machine that loses power closes no connection.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    # Closed before the reply: JAX's coordination service binds the same port next, and the others then connect to it.
    if server:
        server.close()
        for peer in _connections.values():
            with contextlib.suppress(OSError):
                peer.sendall(b"go")


def _watch(here: ProcessInfo, index: int) -> None:
    """Ends this process when another one dies without having called `leave`, or has ended with an error."""
    said, what = b"", "died"
    with contextlib.suppress(OSError):
        if (said := _connections[index].recv(3)) == b"bye":
            return
    if said == b"err":
        what = "ended with an error"
        time.sleep(GRACE_OF_ERROR)
    again = "start all of them again, and they go on from the last checkpoint"
    say(f"process {index} of {here.count} has {what}, so process {here.index} ends, too; {again}")
    time.sleep(GRACE)
    os._exit(1)


def leave(well: bool = True) -> None:
    """Tells the other processes that this one ends on its own: well, or with an error, after which they end, too."""
    for peer in _connections.values():
        with contextlib.suppress(OSError):
            peer.sendall(b"bye" if well else b"err")


def say(text: str) -> None:
    """Prints a line on standard error."""
    print(f"qstar: {text}", file=sys.stderr, flush=True)
