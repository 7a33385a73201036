"""Full disks, closed pipes, signals, two runs in one folder: one line, and the run can go on."""

import asyncio
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from qstar.__main__ import _quiet_threads, check_texts
from qstar.errors import UserError, machine_fault
from tests.methods import runs

CONFIG = f"--config={runs.ROOT}/configs/star_arithmetic.py:smoke"


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-m", "qstar", *map(str, arguments)], env=environment, text=True, **pipes)


def one_line(process, words):
    error = process.communicate(timeout=300)[1]
    assert error.count("\n") == 1 and error.startswith("qstar: ") and words in error, error


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path):
    """Stands for a full disk, too, whose error takes the same way (through orbax' threads)."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    process = start("train", CONFIG, f"--workdir={tmp_path}/run", stdout=subprocess.DEVNULL, preexec_fn=limit)
    one_line(process, "File too large")
    assert process.returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_an_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        process = start("--help", stdout=full)
        one_line(process, "standard output cannot be written")
    assert process.returncode == 2


def test_a_closed_pipe_ends_the_training_with_a_line(tmp_path):
    read, write = os.pipe()
    os.close(read)
    process = start("train", CONFIG, f"--workdir={tmp_path}/run", stdout=write)
    os.close(write)
    one_line(process, "the same command goes on from here")
    assert process.returncode == 141


def test_a_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_is_not(tmp_path):
    folder = tmp_path / "run"
    first = start("train", CONFIG, f"--workdir={folder}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (folder / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.1)
        first.send_signal(signal.SIGSTOP)
        second = start("train", CONFIG, f"--workdir={folder}")
        one_line(second, f"process {first.pid} on")
        assert second.returncode == 2
    finally:
        first.kill()
        first.wait()
    # Gone on from there as soon as it writes a further row.
    rows = (folder / "metrics.jsonl").read_bytes()
    third = start("train", CONFIG, f"--workdir={folder}", stdout=subprocess.DEVNULL)
    try:
        while (folder / "metrics.jsonl").read_bytes() == rows:
            assert third.poll() is None, third.communicate()[1]
            time.sleep(0.1)
    finally:
        third.kill()
        third.wait()


def test_a_second_interrupt_ends_at_once(tmp_path):
    """The first one is being handled by something that takes its time."""
    code = (
        "import signal, sys, time, qstar.__main__ as m\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "def busy(argv):\n"
        "    try:\n        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n        print('cleaning', flush=True); time.sleep(60)\n"
        "m.dispatch = busy\nsys.exit(m.main(['report', 'x']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdout=-1, stderr=-1)
    for word in ("ready", "cleaning"):
        assert process.stdout.readline().strip() == word
        process.send_signal(signal.SIGINT)
    one_line(process, "interrupted again")
    assert process.returncode == 130


def test_paths_that_are_not_utf8_are_one_line():
    with pytest.raises(UserError, match="not UTF-8 text"):
        check_texts(["train", "--workdir=runs/\udcff"])


def test_faults_of_the_machine_are_found_in_causes_and_texts():
    try:
        try:
            raise OSError(28, os.strerror(28), "/x/y")
        except OSError as e:
            raise RuntimeError("cannot save") from e
    except RuntimeError as e:
        assert machine_fault(e).startswith("/x/y: No space left on device")
    assert "No space left" in machine_fault(
        ValueError('Error writing "/a/b": No space left on device [os_error_code=28]')
    )
    # An unreadable folder: `Path.is_file` of Python 3.11 raises for what lies in it.
    assert machine_fault(PermissionError(13, os.strerror(13), "/x/y.py")).startswith("/x/y.py: Permission denied; ")
    assert machine_fault(PermissionError(1, os.strerror(1), "/x")).startswith("/x: Operation not permitted; ")
    assert machine_fault(KeyError("x")) is None and machine_fault(json.JSONDecodeError("x", "", 0)) is None


@pytest.mark.parametrize("file, printed", [("/x/orbax/serialization.py", False), ("/x/own.py", True)])
def test_reads_that_orbax_leaves_behind_print_no_traceback(file, printed, capfd):
    """Of several reads of a damaged checkpoint that fail, one is raised; the others end in the garbage collector."""
    source = "async def read():\n    try:\n        await asyncio.sleep(0)\n    finally:\n        raise ValueError('damaged')\n"
    names = {"asyncio": asyncio}
    exec(compile(source, file, "exec"), names)
    # pytest has a hook of its own, which makes a warning of it.
    usual, sys.unraisablehook = sys.unraisablehook, sys.__unraisablehook__
    try:
        with _quiet_threads():
            reading = names["read"]()
            reading.send(None)
            del reading
            gc.collect()
    finally:
        sys.unraisablehook = usual
    assert ("damaged" in capfd.readouterr().err) == printed
