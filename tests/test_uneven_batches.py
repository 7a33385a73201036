"""Batches whose rows do not divide over the mesh, in several processes: ten updates equal those of one process.

As a program it is one of the processes: QSTAR_COORDINATOR=... python -m tests.test_uneven_batches FOLDER
"""

import os
import pathlib
import sys
import types

import numpy as np
import pytest

from qstar import distributed
from qstar.distributed import start_jax

# Mesh and rows per update. 4 rows do not divide over 8 shards, a tensor axis over both processes gives them one batch
# shard together, and 3 rows do not divide over the processes. (Rows that divide: test_distributed.py.)
CASES = {
    "rows that do not divide over fsdp": ("fsdp=8", 4),
    "a batch shard that spans processes": ("tensor=8", 8),
    "rows that do not divide over the processes": ("data=2,tensor=4", 3),
}
UPDATES = 10


def ten_updates(mesh, rows, folder):
    """{name: array}: loss and gradient norm of each update, parameters after the last; gradients of the first batch, and
    its loss before and after all."""
    import jax

    from qstar import tree
    from qstar.data.loader import batches
    from qstar.mesh import mesh_jit, put_global_batch, shardings, to_host
    from qstar.models import decoder
    from qstar.models.config import ModelConfig
    from qstar.models.model import Model
    from qstar.runs.stages import Stage, TrainSettings, fine_tune, pack_rows
    from qstar.text.packing import Example
    from qstar.train.losses import sft_loss
    from qstar.types import Batch

    sizes = {"vocab_size": 64, "hidden_size": 16, "num_heads": 8, "num_kv_heads": 8, "head_dim": 4}
    config = ModelConfig(**sizes, intermediate_size=24, num_layers=1, max_positions=16, init_std=0.2)
    params = decoder.init(config, jax.random.key(0))
    if mesh is not None:
        params = jax.jit(lambda x: x, out_shardings=shardings(params, decoder.PARAM_AXES, mesh))(params)
    start = Model(config, params, mesh=mesh)
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(1, 64, 2).tolist(), rng.integers(1, 64, 1 + i % 12).tolist()) for i in range(30)]
    settings = TrainSettings(batch_size=rows, lr=1e-2, warmup=0, log_every=1, packed=False, row_length=16)

    first = put_global_batch(Batch(**batches(pack_rows(examples, settings), rows, seed=1)[0]), mesh)
    loss = lambda p, batch: sft_loss({"policy": p}, batch, None, config=config)[0][0]  # noqa: E731
    found = {f"gradient {name}": x for name, x in tree.named_leaves(to_host(mesh_jit(jax.grad(loss))(params, first)))}
    lines = []
    writer = types.SimpleNamespace(write=lambda **row: lines.append(row), flush=lambda: None)
    model, _ = fine_tune(start, examples, Stage(folder, settings, UPDATES, 1, writer))
    found |= {key: np.asarray([line[key] for line in lines]) for key in ("loss", "grad_norm", "tokens")}
    found["first batch"] = np.asarray([mesh_jit(loss)(x, first) for x in (params, model.params)])
    return found | {f"parameter {name}": x for name, x in tree.named_leaves(to_host(model.params))}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes of four devices finds, as {case/name: array}."""
    from tests.test_distributed import free_port, start

    folder, port = tmp_path_factory.mktemp("two"), free_port()
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = ["-m", "tests.test_uneven_batches", str(folder)]
    both = [start(port, index, 2, *command, XLA_FLAGS=flags) for index in (0, 1)]
    try:
        said = [child.communicate(timeout=300)[1] for child in both]
    finally:
        for child in both:
            child.kill()
    assert [child.returncode for child in both] == [0, 0], said
    return [dict(np.load(folder / f"{index}.npz")) for index in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_ten_updates_of_two_processes_are_those_of_one(case, two_processes, tmp_path):
    alone = ten_updates(None, CASES[case][1], tmp_path)
    assert len(alone["loss"]) == UPDATES and alone["first batch"][1] < alone["first batch"][0]
    for found in two_processes:
        for name, expected in alone.items():
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(found[f"{case}/{name}"], expected, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


if __name__ == "__main__":
    start_jax(several=True)
    import jax

    from qstar.mesh import make_mesh

    folder = pathlib.Path(sys.argv[1])
    found = {}
    for case, (spec, rows) in CASES.items():
        mesh = make_mesh(spec)
        found |= {f"{case}/{name}": x for name, x in ten_updates(mesh, rows, folder / case.replace(" ", "_")).items()}
    np.savez(folder / f"{jax.process_index()}.npz", **found)
    distributed.leave()
