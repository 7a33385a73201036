"""What is set up before JAX starts."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = """
import resource, sys
from qstar.distributed import start_jax
if sys.argv[1] == "keep":
    start_jax("cpu")
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jnp.cumsum(x)[::-1].max())
x = jnp.ones(8_000_000)
now = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [now()]
for _ in range(25):
    f(x).block_until_ready()
    counts.append(now())
print(sorted(b - a for a, b in zip(counts[10:], counts[11:]))[7])  # the median call: some find their blocks taken
"""


def faults(how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


DISPATCH = """
import sys
from qstar.distributed import start_jax
start_jax("cpu")
import jax, jax.numpy as jnp
f = jax.jit(lambda x: x @ x)
x = jnp.ones((2000, 2000))
f(x).block_until_ready()
print(f(x).is_ready(), jax.device_count())
"""


HOLES = """
from qstar.distributed import return_freed_memory, start_jax
start_jax("cpu")
import numpy as np
from qstar.plan.host import resident
freed, kept = np.ones(50_000_000), np.ones(1_000_000)
del freed
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is set up")
def test_memory_that_was_freed_below_what_is_in_use_goes_back_to_the_system():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 350_000_000


@pytest.mark.parametrize("flags,expected", [("", "True 1"), ("--xla_force_host_platform_device_count=2", "False 2")])
def test_a_program_on_one_cpu_device_has_freed_its_temporaries_when_its_call_returns(flags, expected):
    """It runs in the calling thread; with simulated devices it does not, which collectives between them need."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PJRT_NPROC": "2"}
    done = subprocess.run([sys.executable, "-c", DISPATCH], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is set up")
def test_calls_of_a_compiled_function_do_not_fault_their_memory_in_again():
    assert faults("keep") * 4 < faults("leave")
