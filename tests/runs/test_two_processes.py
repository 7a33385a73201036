"""Two processes of four devices each come to what one process of eight comes to, through a whole run.

Opt-in, for it takes minutes: QSTAR_LONG_TESTS=1 python -m pytest tests/runs/test_two_processes.py. (That two processes
train, stop, die and go on, and say what one says, is in every run of the tests: see ../test_processes.py.)
"""

import json
import os
import subprocess
import sys

import pytest

from tests.methods import runs
from tests.test_distributed import free_port, start

pytestmark = pytest.mark.skipif(
    not os.environ.get("QSTAR_LONG_TESTS"), reason="takes minutes: set QSTAR_LONG_TESTS=1 to run it"
)


def same(ours, theirs):
    """Equal, numbers up to the rounding of sums that were added up in another order."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("config", ["star_arithmetic.py:smoke", "quiet_star_tiny.py:smoke,arms=quiet_star"])
def test_two_processes_of_four_devices_equal_one_of_eight(config):
    def train(folder, devices):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        return ["-m", "qstar", "train", f"--config={runs.ROOT}/configs/{config}", f"--workdir={folder}"], flags

    one, two, port = runs.fresh("one"), runs.fresh("two"), free_port()
    command, flags = train(two, 4)
    both = [start(port, i, 2, *command, XLA_FLAGS=flags) for i in (0, 1)]
    said = [child.communicate(timeout=1800) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    command, flags = train(one, 8)
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT), "XLA_FLAGS": flags, "PJRT_NPROC": "16"}
    subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True, timeout=1800)

    def rows_of(folder):  # checksums are of the metrics' clock, too
        found = (path.relative_to(folder) for path in folder.rglob("*.jsonl"))
        return sorted(str(path) for path in found if ".checksums" not in path.parts)

    files = rows_of(one)
    assert files and files == rows_of(two)
    for name in files:
        rows = [[json.loads(line) for line in (folder / name).read_text().splitlines()] for folder in (one, two)]
        rows = [[{k: v for k, v in row.items() if not k.startswith(runs.MACHINE)} for row in some] for some in rows]
        assert same(*rows), name
