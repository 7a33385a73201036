"""What a TPU compiler makes of a sharded step, on a machine without a TPU. Skipped where `libtpu` is not installed."""

from __future__ import annotations

import importlib.util

import jax
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


def slice_named(name):
    try:
        return open_topology(name)
    except UserError as e:
        if "another process" not in str(e):
            raise
        pytest.skip(str(e))


@needs_compiler
def test_under_fsdp_a_tpu_reduces_and_scatters_gradients_and_gathers_no_activation():
    topology = slice_named("v5e:2x4")
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


@needs_compiler
def test_decoding_on_a_tpu_writes_a_token_to_its_caches_and_does_not_convert_them():
    topology, options = slice_named("v5e:2x2"), [*SMALL, ("--config.model.dtype", "bfloat16")]
    config, kept = read_config("configs/star_gsm8k.py", options), []
    step = next(p for p in programs(config, topology.devices, Assumed()) if "tokens of" in p.name)
    with compile_settings():
        compile_program(step, topology, kept.append)
    # On a CPU alone the caches are updated as integers.
    assert "bf16[" in kept[0] and "u16[" not in kept[0]


@needs_compiler
@pytest.mark.parametrize("name, devices, places, gib", [("v4:2x2x1", 4, 4, 30.75), ("tpu7x:1x1x1", 2, 1, 94.75)])
def test_a_device_is_what_jax_has_on_the_chip(name, devices, places, gib):
    topology = slice_named(name)
    assert len(topology.devices) == devices and len({tuple(d.coords) for d in topology.devices}) == places
    # The compiler refuses this sum, and says how much memory it grants.
    x = jax.ShapeDtypeStruct((2**36,), "float32", sharding=jax.sharding.SingleDeviceSharding(topology.devices[0]))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"available HBM .{gib}G"):
        jax.jit(lambda x: x + 1).lower(x).compile()
    assert topology.chip.hbm == gib * 2**30


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'qstar-jax\[plan\]'"):
        open_topology("v5e:2x4")
