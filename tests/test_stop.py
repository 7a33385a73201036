"""SIGTERM, where no model trains: what the signal does to a process, in time."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = """
import contextlib, multiprocessing, signal, sys, time
from qstar import stop
with stop.listening(), stop.held() if sys.argv[1] != "free" else contextlib.nullcontext():
    if sys.argv[1] == "pool":
        for _ in range(100):  # the signal comes at all moments of a child's birth
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,))
            worker.start()
            worker.terminate()
            worker.join()
            assert worker.exitcode == -signal.SIGTERM and not stop.asked()
    print("ready", flush=True)
    while not stop.asked():
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
    assert "Stopped" in child.communicate(timeout=20)[1] and child.returncode == 1


def test_the_second_signal_ends_at_once(start):
    child = start("slow")
    child.terminate()
    assert child.stdout.readline() == "asked\n"
    child.terminate()
    began = time.monotonic()
    assert "told again" in child.communicate(timeout=20)[1] and child.returncode == 143
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
