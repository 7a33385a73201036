"""What a TPU compiler makes of a sharded step, on a machine without a TPU. Skipped where `libtpu` is not installed."""

from __future__ import annotations

import importlib.util

import pytest

from qstar.errors import UserError
from qstar.flags import read_config
from qstar.plan import hlo
from qstar.plan.cases import programs
from qstar.plan.program import compile_program
from qstar.plan.run import compile_settings
from qstar.plan.steps import Assumed
from qstar.plan.topology import open_topology
from tests.plan.collectives import collectives

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'qstar-jax[plan]'"
)
SMALL = [("--config.model.path", ""), ("--config.model.preset", "llama_20m"), ("--config.train.row_length", "128")]


@needs_compiler
def test_under_fsdp_a_tpu_reduces_and_scatters_gradients_and_gathers_no_activation():
    try:
        topology = open_topology("v5e:2x4")
    except UserError as e:
        if "another process" not in str(e):
            raise
        pytest.skip(str(e))
    config, kept = read_config("configs/star_gsm8k.py", SMALL), []
    step = next(p for p in programs(config, topology.devices, Assumed()) if p.name == "fine-tuning")
    with compile_settings():
        plan = compile_program(step, topology, kept.append)
    assert plan.fits
    sent = {kind: c["bytes"] for kind, c in plan.collectives.items()}
    assert sent["all-reduce"] < 0.01 * sent["reduce-scatter"]  # norms and scalars: no matrix's gradient
    for i, _, kind in collectives(hlo.Program(kept[0])):
        if kind == "all-gather":
            assert all(a.shape[:2] != (8, 128) for a in i.arrays), i  # rows and tokens of all chips
    whole = 8 * plan.parts["parameters"]  # gathered in float32 at most thrice: forward, computed again, backward
    assert sent["all-gather"] < 3 * whole


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'qstar-jax\[plan\]'"):
        open_topology("v5e:2x4")
