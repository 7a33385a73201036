"""Mesh specifications, the rules from logical to mesh axes, and the printed table. (Real sharding: multi_device.)"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from qstar import UserError
from qstar.mesh import (
    AXES,
    Rules,
    batch_sharding,
    make_mesh,
    parameter_table,
    put_global_batch,
    replicated,
    shardings,
)


class Device:
    """As much of a device as a mesh looks at."""

    platform, device_kind, process_index = "cpu", "cpu", 0

    def __init__(self, i: int):
        self.id = i


def devices(count):
    return [Device(i) for i in range(count)]


def abstract(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), AXES)


@pytest.mark.parametrize(
    "spec,count,shape",
    [
        ("data=-1", 8, (8, 1, 1)),
        ("", 1, (1, 1, 1)),
        ("data=-1,fsdp=4,tensor=2", 8, (1, 4, 2)),
        ("fsdp=4, tensor=-1", 8, (1, 4, 2)),  # a space is no mistake
        ("tensor=2,data=2,fsdp=2", 8, (2, 2, 2)),  # order is not either
        ("fsdp=-1", 6, (1, 6, 1)),
    ],
)
def test_a_specification_becomes_a_mesh_of_automatic_axes(spec, count, shape):
    mesh = make_mesh(spec, devices(count))
    assert tuple(mesh.shape[a] for a in ("data", "fsdp", "tensor")) == shape and mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert [d.id for d in mesh.devices.ravel()] == list(range(count))  # neighbours share the innermost axis


@pytest.mark.parametrize(
    "spec,message",
    [
        ("model=2", "'model=2' is not one of data=N, fsdp=N, tensor=N"),
        ("data", "'data' is not one of"),
        ("data=0", "'data=0'"),
        ("data=-2", "'data=-2'"),
        ("data=two", "'data=two'"),
        ("data=-1,fsdp=-1", "only one axis can be -1"),
        ("data=4", "needs 4 devices, but there are 8"),
        ("data=-1,fsdp=3", "needs 6 devices, but there are 8"),
        ("data=-1,tensor=16", "needs 16 devices, but there are 8"),
    ],
)
def test_what_makes_no_mesh_is_named(spec, message):
    with pytest.raises(UserError, match=message) as error:
        make_mesh(spec, devices(8))
    assert spec in str(error.value)


def test_rules_split_axes_that_divide_and_leave_the_others_whole():
    rules, mesh = Rules(), abstract(2, 4, 2)
    assert rules.spec(("embed", "heads"), (64, 32), mesh) == P("fsdp", "tensor")
    assert rules.spec(("heads", "embed"), (64, 32), mesh) == P("tensor", "fsdp")
    assert rules.spec(("embed", "mlp"), (3, 64, 32), mesh) == P(None, "fsdp", "tensor")  # stacked layers stay whole
    assert rules.spec(("vocab", "embed"), (31, 32), mesh) == P(None, "fsdp")  # 31 does not divide
    assert rules.spec((None, "embed"), (8, 6), mesh) == P(None, None)
    assert rules.spec(("batch",), (16,), mesh) == P(("data", "fsdp"))
    assert rules.spec(("batch",), (4,), mesh) == P(None)  # divides data, not data x fsdp
    assert rules.spec(("embed", "heads"), (64, 32), abstract(data=8)) == P(None, None)
    assert Rules(heads=("data",)).spec(("heads", "embed"), (4, 64), mesh) == P("data", "fsdp")


def test_two_axes_on_one_mesh_axis_collide():
    with pytest.raises(ValueError, match="tensor.* two axes of .*heads.*vocab"):
        Rules().spec(("heads", "vocab"), (8, 8), abstract(tensor=2))
    assert Rules().spec(("heads", "vocab"), (8, 8), abstract(fsdp=2)) == P(None, None)  # no such axis, no collision
    with pytest.raises(ValueError, match="3 logical axes"):
        Rules().spec(("embed", "heads", "mlp"), (8, 8), abstract())


def test_the_first_pattern_that_matches_a_path_decides_for_moments_too():
    state = {
        "params": {"q": {"kernel": np.zeros((4, 8))}, "scale": np.zeros(4)},
        "mu": {"policy": {"q": {"kernel": np.zeros((4, 8))}}},
        "step": np.int32(0),
    }
    table = ((r"q/kernel$", ("embed", "heads")), (r"kernel", (None, None)))
    where = shardings(state, table, make_mesh("fsdp=4,tensor=2", devices(8)))
    assert where["params"]["q"]["kernel"].spec == where["mu"]["policy"]["q"]["kernel"].spec == P("fsdp", "tensor")
    assert where["params"]["scale"].spec == where["step"].spec == P()


def test_the_table_adds_up():
    params = {
        "embed": {"table": jnp.zeros((32, 16))},
        "norm": {"scale": jnp.zeros(16)},
        "q": {"kernel": jnp.zeros((16, 8), jnp.bfloat16)},
    }
    table = (("table", ("vocab", "embed")), ("kernel", ("embed", "heads")))
    mesh = make_mesh("data=2,fsdp=2,tensor=2", devices(8))
    lines = parameter_table(params, shardings(params, table, mesh)).splitlines()
    assert len(lines) == 5 and lines[0].split() == ["parameter", "shape", "dtype", "sharding", "bytes/device"]
    assert lines[1].split() == ["embed/table", "32x16", "float32", "(tensor,", "fsdp)", f"{32 * 16 * 4 // 4}"]
    assert lines[2].split() == ["norm/scale", "16", "float32", "replicated", f"{16 * 4}"]
    assert lines[3].split() == ["q/kernel", "16x8", "bfloat16", "(fsdp,", "tensor)", f"{16 * 8 * 2 // 4}"]
    assert lines[4] == f"total {32 * 16 + 16 + 16 * 8} parameters, {512 + 64 + 64} bytes per device"


def test_batches_on_one_device_keep_their_values():
    mesh = make_mesh("data=-1", jax.devices()[:1])
    rows = {"x": np.arange(6).reshape(3, 2), "n": np.float32(2.0)}
    out = put_global_batch(rows, mesh)
    assert math.prod(batch_sharding(mesh).shard_shape((3,))) == 3 and replicated(mesh).is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, out, rows)
