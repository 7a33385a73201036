"""Training and sampling on 1, 2 and 8 devices, however they are laid out, are the same computation."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qstar
from qstar import tree
from qstar.mesh import batch_sharding, make_mesh, put_global_batch, shardings
from qstar.models import decoder, flash, vocabulary
from qstar.models.config import ModelConfig
from qstar.models.model import Model
from qstar.text.packing import Example, pack
from qstar.train import losses, optim
from qstar.train.checkpoint import Checkpoints
from qstar.train.loop import fit
from qstar.train.state import create_state, sharded_jit
from qstar.train.step import make_step
from qstar.types import Batch

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=48,
    max_positions=64,
    init_std=0.2,
    tie_embeddings=False,
    eos_id=3,
)
CUBE = "data=2,fsdp=2,tensor=2"
CASES = [
    ("fsdp=2", 2, 4),
    ("data=8", 8, 4),
    ("fsdp=8", 8, 4),
    ("data=2,tensor=4", 8, 1),
    (CUBE, 8, 1),
    (CUBE, 8, 4),
]  # mesh, devices, micro-batches
CLIP = 1.0
TX = optim.adamw(weight_decay=0.1, clip=CLIP, eps=0.1)  # a large eps, or the sign of a tiny gradient decides


def mesh_of(spec, count=8):
    return make_mesh(spec, jax.devices()[:count])


def rows(count: int = 16, seed: int = 0) -> Batch:
    """Unpacked rows with very unequal numbers of tokens to predict."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(0, 64, n).tolist()  # noqa: E731
    return Batch(**pack([Example(ids(3), ids(1 + i * 20 // count)) for i in range(count)], 24, packed=False))


@functools.cache
def alone():
    """Parameters on one device, without a mesh; norms are not 1."""
    params = jax.jit(decoder.init, static_argnums=0)(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    return {"policy": jax.tree.map(lambda p: p + np.float32(0.2) * rng.normal(size=p.shape).astype(np.float32), params)}


@functools.cache
def step_fn(accumulate):
    return make_step(functools.partial(losses.sft_loss, config=CONFIG), TX, accumulate)


def placed(mesh):
    return jax.device_put(alone(), shardings(alone(), decoder.PARAM_AXES, mesh))


@functools.cache
def two_updates(spec, count, accumulate):
    """The state after two updates on a mesh (None: without), the first moments after one, and the metrics."""
    mesh = None if spec is None else mesh_of(spec, count)
    params = alone() if mesh is None else placed(mesh)
    state = create_state(params, TX, seed=0, mesh=mesh, table=decoder.PARAM_AXES)
    metrics = []
    for i in range(2):
        batch = rows(seed=i) if mesh is None else put_global_batch(rows(seed=i), mesh)
        state, m = step_fn(accumulate)(state, batch, np.float32(1e-2))
        metrics.append(jax.device_get(m))  # and wait: simulated devices share few cores
        if i == 0:
            first = jax.device_get({n: x for n, x in tree.named_leaves(state.opt_state) if "/mu/" in n})
    return state, first, metrics


def close(a, b, tolerance):
    for (name, x), y in zip(tree.named_leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=tolerance * float(np.abs(y).max()), err_msg=name)


@pytest.mark.parametrize("spec,count,accumulate", CASES)
def test_loss_gradients_and_updates_are_those_of_one_device(spec, count, accumulate):
    """The first moments after one update are the clipped gradients, times 1 - b1."""
    state, first, metrics = two_updates(spec, count, accumulate)
    expected, expected_first, expected_metrics = two_updates(None, 1, 1)
    close(first, expected_first, 1e-5)
    assert len(first) == len(jax.tree.leaves(alone())) and all(np.abs(x).max() > 1e-4 for x in first.values())
    close(state.params, expected.params, 1e-5)
    for m, e in zip(metrics, expected_metrics):
        assert m.keys() == e.keys()
        for name in e:
            assert float(m[name]) == pytest.approx(float(e[name]), rel=1e-5), name
    assert metrics[0]["tokens"] == rows().mask.sum() and metrics[0]["grad_norm"] > CLIP


@pytest.mark.parametrize("spec,count,accumulate", [case for case in CASES if case[1] == 8])
def test_parameters_and_moments_are_really_sharded_before_and_after_an_update(spec, count, accumulate):
    mesh = mesh_of(spec)
    fresh = create_state(placed(mesh), TX, seed=0, mesh=mesh, table=decoder.PARAM_AXES)
    used, _, _ = two_updates(spec, count, accumulate)
    for state in (fresh, used):
        split = 0
        for name, x in tree.named_leaves(state):
            local = [s.data.size for s in x.addressable_shards]
            assert len(local) == 8 and len(set(local)) == 1, name
            if name.endswith("kernel"):
                ways = math.prod(mesh.shape[a] for a in ("fsdp", "tensor"))
                assert x.size == ways * local[0], name
                split += ways > 1
            if name.endswith("kernel") and "/mu/" in name:
                role = name.split("/mu/")[1]
                assert x.sharding == dict(tree.named_leaves(state.params))[role].sharding, name
        assert split == (0 if spec == "data=8" else 3 * 8)  # parameters and both moments of eight matrices


def test_random_parameters_are_made_in_their_shards_and_are_the_same_numbers():
    mesh = mesh_of(CUBE)
    make = functools.partial(decoder.init, CONFIG)
    params = sharded_jit(make, mesh, decoder.PARAM_AXES)(jax.random.key(4))
    where = shardings(params, decoder.PARAM_AXES, mesh)
    for (name, x), s in zip(tree.named_leaves(params), jax.tree.leaves(where)):
        assert x.sharding == s, name
    close(jax.device_get(params), jax.jit(make)(jax.random.key(4)), 1e-6)


def test_rows_that_do_not_divide_are_kept_whole_and_count_once():
    mesh = mesh_of("data=8")
    batch = put_global_batch(rows(12), mesh)
    assert batch.tokens.sharding.is_fully_replicated
    assert put_global_batch(rows(16), mesh).tokens.sharding == batch_sharding(mesh)
    assert [s.data.shape for s in put_global_batch(rows(16), mesh).tokens.addressable_shards] == [(2, 24)] * 8
    f = jax.jit(lambda p, b: losses.sft_loss(p, b, None, config=CONFIG)[0])
    many = f(placed(mesh), batch)
    one = f(alone(), rows(12))
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_the_vocabulary_loss_in_chunks_is_the_same_on_a_mesh(monkeypatch):
    monkeypatch.setattr(vocabulary, "MIN_CHUNK", 1)
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * 64 * 50)  # 50 tokens at a time
    mesh = mesh_of(CUBE)
    f = lambda params, batch: losses.sft_loss(params, batch, None, config=CONFIG)[0][0]  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(f))(placed(mesh), put_global_batch(rows(), mesh))
    _, first, metrics = two_updates(None, 1, 1)
    assert float(value) == pytest.approx(float(metrics[0]["loss"] * metrics[0]["tokens"]), rel=1e-5)
    factor = 0.1 * CLIP / metrics[0]["grad_norm"] / metrics[0]["tokens"]
    close(jax.tree.map(lambda g: factor * g, jax.tree.leaves(jax.device_get(grads))), list(first.values()), 1e-5)


# ------------------------------------------------------------------------------------------------------- checkpoints


def same(a, b):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    for (name, x), y in zip(tree.named_leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(jax.device_get(raw(x)), jax.device_get(raw(y)), err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    state, _, _ = two_updates(CUBE, 8, 1)
    checkpoints = Checkpoints(folder)
    checkpoints.save(2, state, {"made": "here"})
    checkpoints.close()
    return folder


@pytest.mark.parametrize("spec,count", [("fsdp=8", 8), ("data=2,tensor=4", 8), (None, 1)])
def test_a_checkpoint_of_one_mesh_restores_onto_another_and_onto_one_device(spec, count, saved):
    mesh = None if spec is None else mesh_of(spec, count)
    like = create_state(alone() if mesh is None else placed(mesh), TX, seed=99, mesh=mesh, table=decoder.PARAM_AXES)
    checkpoints = Checkpoints(saved)
    state, record = checkpoints.restore(like)
    checkpoints.close()
    assert record == {"made": "here"}
    same(state, two_updates(CUBE, 8, 1)[0])
    for (name, x), y in zip(tree.named_leaves(state), jax.tree.leaves(like)):
        assert x.sharding == y.sharding, name


def test_a_run_killed_on_a_mesh_goes_on_with_the_same_bits(tmp_path):
    mesh = mesh_of(CUBE)

    def train(steps, folder):
        checkpoints = Checkpoints(folder)
        state = create_state(placed(mesh), TX, seed=0, mesh=mesh, table=decoder.PARAM_AXES)
        *_, at = fit(
            state,
            lambda s: step_fn(1),
            lambda s: rows(seed=s),
            lambda s: 1e-2,
            steps=steps,
            mesh=mesh,
            checkpoints=checkpoints,
            log_every=1,
        )
        checkpoints.close()
        return at.state

    whole = train(3, tmp_path / "whole")
    train(2, tmp_path / "parts")
    same(train(3, tmp_path / "parts"), whole)


# ---------------------------------------------------------------------------------------------------------- sampling


def test_greedy_texts_on_a_mesh_are_those_without_one():
    prompts = [np.random.default_rng(i).integers(0, 64, 1 + 3 * i % 7).tolist() for i in range(11)]
    options = dict(max_new_tokens=12, temperature=0, prefix=[5, 6, 7])
    expected = qstar.generate(Model(CONFIG, alone()["policy"]), prompts, slots=8, **options)
    mesh = mesh_of(CUBE)
    out = qstar.generate(Model(CONFIG, placed(mesh)["policy"], mesh=mesh), prompts, slots=8, **options)
    assert [[c.tokens for c in s] for s in out] == [[c.tokens for c in s] for s in expected]
    for a, b in zip(out, expected):
        np.testing.assert_allclose(a[0].logprobs, b[0].logprobs, atol=1e-4)
    assert len({tuple(c.tokens) for (c,) in out}) > 3


# ---------------------------------------------------------------------------------------------------------- attention


def test_splash_runs_on_each_device_s_rows_and_heads(monkeypatch):
    """On a mesh the kernel stands in a `shard_map`; loss and gradients are those of XLA's attention on one device."""
    seen, splash = set(), flash._splash
    monkeypatch.setattr(flash, "_splash", lambda q, *rest, **how: seen.add(q.shape) or splash(q, *rest, **how))
    batch = Batch(**pack([Example([5] * 3, list(range(1, 20 + i))) for i in range(8)], 128, packed=False))
    params = {**alone()["policy"], "layers": jax.tree.map(lambda p: p[:1], alone()["policy"]["layers"])}
    mesh = mesh_of(CUBE)

    def gradients(attention, params, batch):
        config = CONFIG.replace(num_layers=1, attention=attention)
        f = lambda p: losses.sft_loss({"policy": p}, batch, None, config=config)[0][0]  # noqa: E731
        return jax.device_get(jax.jit(jax.value_and_grad(f))(params))

    there = jax.device_put(params, shardings(params, decoder.PARAM_AXES, mesh))
    value, grads = gradients("splash", there, put_global_batch(batch, mesh))
    expected, expected_grads = gradients("xla", params, batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    close(grads, expected_grads, 1e-5)
    assert seen == {(8 // 4, 128, CONFIG.num_heads // 2, CONFIG.head_dim)}
