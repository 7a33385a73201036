"""The train steps of all four methods on 8 devices of one process and of two are those of one device."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from qstar.mesh import make_mesh
from tests.multi_device import steps
from tests.test_distributed import free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = re.sub(r"(device_count=)\d+", r"\g<1>4", os.environ["XLA_FLAGS"])  # conftest.py's, for half the devices
CUBE = "data=2,fsdp=2,tensor=2"


@functools.cache
def one(method):
    return steps.two_updates(method, None)


def agree(found, expected):
    """To 1e-5 of the largest entry: parameters after two updates, and the metrics of both."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(
            found[name], x, atol=1e-5 * max(float(np.abs(x).max()), 1e-2), rtol=1e-5, err_msg=name
        )
    assert any(np.abs(x).max() > 0.1 for x in expected.values())


LONG = bool(os.environ.get("QSTAR_LONG_TESTS"))  # one by one, Quiet-STaR too: minutes of compilation
METHODS = ("star", "quiet_star", "dpo", "orm", *steps.GUIDED) if LONG else (steps.QUICK,)


@pytest.mark.skipif(not LONG, reason="compiles for minutes: set QSTAR_LONG_TESTS=1 to run it")
@pytest.mark.parametrize("spec", ["data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,tensor=4"])
@pytest.mark.parametrize("method", METHODS)
def test_two_updates_on_a_mesh_are_those_of_one_device(method, spec):
    agree(steps.two_updates(method, make_mesh(spec, jax.devices()[:8])), one(method))


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory):
    """Both updates of the methods, by two processes of four devices each."""
    out, port = tmp_path_factory.mktemp("two") / "found.npz", free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS}
    environment |= {"QSTAR_COORDINATOR": f"127.0.0.1:{port}", "QSTAR_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", "tests.multi_device.steps", CUBE, str(out), *METHODS]
    pipe = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env={**environment, "QSTAR_PROCESS_ID": str(i)}, **pipe) for i in (0, 1)]
    try:
        said = [child.communicate(timeout=1200)[1] for child in both]
    finally:
        for child in both:
            child.kill()
    assert [child.returncode for child in both] == [0, 0], said
    return dict(np.load(out))


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_updates_of_one_with_as_many_devices_and_of_one_device(method, by_two_processes):
    found = {k: v for k, v in by_two_processes.items() if k.startswith(f"{method}/")}
    agree(found, one(method))
    if LONG:
        agree(found, steps.two_updates(method, make_mesh(CUBE, jax.devices()[:8])))
