"""Loading onto a mesh: every device reads its own part, and the model is the same."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

import qstar
from qstar import tree
from qstar.mesh import Rules, make_mesh, parameter_table, shardings
from qstar.models import decoder, hf
from qstar.models.presets import published
from tests.models.oracle import CASES, random_tokens, torch_logits, torch_model

MESHES = ["fsdp=4,tensor=2", "data=2,tensor=4", "fsdp=8", "tensor=8"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")

    def get(case: str):
        if not (root / case).exists():
            torch_model(case).save_pretrained(root / case, max_shard_size="20KB")
        return root / case

    return get


@pytest.mark.parametrize("case", CASES)
def test_every_device_reads_its_part_and_no_more(case, folders, monkeypatch):
    mesh = make_mesh(MESHES[len(case) % 4])
    whole = qstar.load(folders(case))
    reads: dict[str, int] = {}
    limits: dict[str, int] = {}
    read_part = hf.read_part

    def spy(weights, row, shape, bounds, dtype):
        part = read_part(weights, row, shape, bounds, dtype)
        reads[row.path] = reads.get(row.path, 0) + part.size
        limits[row.path] = max(limits.get(row.path, 0), part.size)
        return part

    monkeypatch.setattr(hf, "read_part", spy)
    model = qstar.load(folders(case), mesh=mesh)
    where = shardings(whole.params, decoder.PARAM_AXES, mesh)
    for (name, x), (_, y), (_, s) in zip(*map(tree.named_leaves, (model.params, whole.params, where))):
        assert x.sharding == s and x.committed and x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert reads[name] == y.size and limits[name] == math.prod(s.shard_shape(y.shape)), name
    assert sum(any(s.spec) for _, s in tree.named_leaves(where)) >= len(where["layers"]) // 2  # it really is sharded


@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("case", ["qwen3 biased", "gpt2"])
def test_logits_and_logprobs_on_a_mesh_are_those_of_transformers(spec, case, folders):
    model, tokens = qstar.load(folders(case), mesh=make_mesh(spec)), random_tokens(8, 16)
    expected = torch_logits(torch_model(case), tokens)
    for rows in (8, 3):  # 3 rows divide over no mesh
        np.testing.assert_allclose(qstar.logits(model, tokens[:rows]), expected[:rows], atol=1e-4)
    alone = qstar.load(folders(case))
    args = list(tokens[:, :10]), list(tokens[:, 10:])
    for a, b in zip(qstar.logprobs(model, *args), qstar.logprobs(alone, *args)):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_sharded_model_is_exported_like_a_whole_one(folders, tmp_path):
    for case in ("gpt2", "qwen3"):
        model = qstar.load(folders(case), mesh=make_mesh("fsdp=4,tensor=2"))
        qstar.save(model, tmp_path / case)
        again = qstar.load(tmp_path / case)
        jax.tree.map(np.testing.assert_array_equal, again.params, qstar.load(folders(case)).params)


def test_gptj_6b_spreads_evenly_over_a_mesh_without_being_made():
    """A 6B model over 8 devices: every matrix split, no axis of any parameter split twice."""
    config, mesh = published("gpt-j-6b")[0], make_mesh("fsdp=4,tensor=2")
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    where = shardings(shapes, decoder.PARAM_AXES, mesh, Rules())
    for (name, leaf), (_, s) in zip(tree.named_leaves(shapes), tree.named_leaves(where)):
        if name.endswith(("kernel", "table")):
            assert math.prod(s.shard_shape(leaf.shape)) * 8 == leaf.size, name
    assert "6,05" in parameter_table(shapes, where).splitlines()[-1]
