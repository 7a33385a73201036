"""SIGTERM, where no model trains: what the signal does to a process, in time."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from qstar import __main__

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = """
import contextlib, multiprocessing, signal, sys, time
from qstar import preemption
with preemption.listening(), preemption.defer() if sys.argv[1] != "free" else contextlib.nullcontext():
    if sys.argv[1] == "pool":
        for _ in range(100):  # the signal comes at all moments of a child's birth
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,))
            worker.start()
            worker.terminate()
            worker.join()
            assert worker.exitcode == -signal.SIGTERM and not preemption.should_stop()
    print("ready", flush=True)
    while not preemption.should_stop():
        time.sleep(0.01)
    print("asked", flush=True)
    if sys.argv[1] == "slow":
        time.sleep(30)
"""


@pytest.fixture
def start():
    children = []

    def call(how, **more):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
        command = [sys.executable, "-c", PROGRAM, how]
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        children.append(child)
        while child.stdout.readline() != "ready\n":
            assert child.poll() is None
        return child

    yield call
    for child in children:
        child.kill()
        child.communicate()


def test_who_holds_it_is_asked_and_ends_in_peace(start):
    child = start("hold")
    child.terminate()
    assert child.communicate(timeout=20) == ("asked\n", "") and child.returncode == 0


def test_who_does_not_hold_it_is_interrupted(start):
    child = start("free")
    child.terminate()
    assert "Preempted" in child.communicate(timeout=20)[1] and child.returncode == 1


def test_the_second_signal_ends_at_once(start):
    child = start("slow")
    child.terminate()
    assert child.stdout.readline() == "asked\n"
    child.terminate()
    began = time.monotonic()
    assert "second SIGTERM" in child.communicate(timeout=20)[1] and child.returncode == 143
    assert time.monotonic() - began < 5


def test_the_time_for_saving_is_bounded(start):
    child = start("slow", QSTAR_STOP_SECONDS="0.2")
    child.terminate()
    assert "not done after 0.2 s" in child.communicate(timeout=20)[1] and child.returncode == 143


def test_a_forked_worker_that_is_ended_does_not_end_the_run(start):
    child = start("pool")
    time.sleep(0.1)
    assert child.poll() is None
    child.terminate()
    assert child.communicate(timeout=20)[0] == "asked\n" and child.returncode == 0


END = """
import atexit, os, signal, sys
from qstar import __main__, preemption
class Late:
    def __del__(self):
        os.write(1, b"the interpreter was taken down\\n")
__main__.late = Late()
atexit.register(print, "bye")
def told():
    os.kill(os.getpid(), signal.SIGTERM)
def dispatch(argv):
    if argv[1] == "run":
        told()  # while the table is printed, the report written
    return 0
def leave(well):
    if argv[1] == "leave":
        told()
argv = sys.argv[:] = ["qstar", sys.argv[2], sys.argv[1]]
argv = argv[1:]
__main__.dispatch, __main__.leave = dispatch, leave
atexit.register(lambda: argv[1] == "exit" and told())
__main__.main()
"""


@pytest.mark.parametrize("when", ["never", "run", "leave", "exit"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_signal_in_the_last_second_does_not_make_a_failure_of_the_run(command, when):
    """Nor does the end of the interpreter, which XLA's threads have crashed in: the process ends before it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", END, when, command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "bye\n"), done
    said = {"train": "what its stages have finished is saved; go on with: qstar train run",
            "evaluate": "nothing is kept without --out; start again with: qstar evaluate run"}[command]  # fmt: skip
    assert done.stderr == (f"qstar: stopped by SIGTERM; {said}\n" if when == "run" else "")


def test_a_time_for_saving_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("QSTAR_STOP_SECONDS", "4m")
    assert __main__.main(["train", "--config=star_arithmetic:smoke"]) == 2
    assert capsys.readouterr().err == "qstar: QSTAR_STOP_SECONDS=4m must be a number of seconds above 0\n"
