"""Thinking, its loss and its gradients on 8 devices, however they are laid out, are those of one."""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qstar
from qstar import tree
from qstar.mesh import make_mesh, mesh_jit, put_global_batch, shardings
from qstar.models import decoder, prefix_attention, prefix_kernel
from qstar.models.config import ModelConfig
from qstar.models.model import Model
from qstar.models.thought_config import ThoughtConfig
from qstar.plan import hlo
from qstar.thoughts import loss as thought_loss
from qstar.thoughts import measure
from qstar.thoughts.layout import text_batch
from qstar.thoughts.replay import replay

MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"]
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=64,
    init_std=0.2,
    tie_embeddings=False,
    thoughts=ThoughtConfig(thought_tokens=2, talk_tokens=2, forbidden_ids=(0,)),
)
TOKENS = np.random.default_rng(0).integers(1, 64, (8, 9)).astype(np.int32)
MASK = (np.arange(9) < np.asarray([9, 9, 4, 9, 7, 9, 9, 2])[:, None]).astype(np.int32)
THOUGHTS = np.random.default_rng(1).integers(1, 64, (2, 16, 9)).astype(np.int32)


@functools.cache
def alone(config=CONFIG):
    params = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + np.float32(0.2) * rng.normal(size=p.shape).astype(np.float32), params)


def placed(spec):
    mesh = make_mesh(spec, jax.devices()[:8])
    return jax.device_put(alone(), shardings(alone(), decoder.PARAM_AXES, mesh)), mesh


@jax.jit
def step(params, batch):
    def mean(params):
        (value, weight), metrics = thought_loss.loss({"policy": params}, batch, jax.random.key(0), config=CONFIG)
        return value / weight, metrics

    return jax.value_and_grad(mean, has_aux=True)(params)


replayed = jax.jit(replay, static_argnums=1)


@functools.cache
def expected():
    batch = text_batch(TOKENS, MASK)
    return jax.device_get((step(alone(), batch), replayed(alone(), CONFIG, TOKENS, MASK, THOUGHTS)))


@pytest.mark.parametrize("spec", MESHES)
def test_sampled_thoughts_loss_and_gradients_are_those_of_one_device(spec):
    params, mesh = placed(spec)
    (value, metrics), grads = jax.device_get(
        step(params, put_global_batch(jax.device_get(text_batch(TOKENS, MASK)), mesh))
    )
    (there, there_metrics), there_grads = expected()[0]
    np.testing.assert_allclose(value, there, rtol=1e-5)
    for k, (total, _) in metrics.items():
        np.testing.assert_allclose(total, there_metrics[k][0], rtol=1e-4, atol=1e-4, err_msg=k)
    for (name, x), y in zip(tree.named_leaves(grads), jax.tree.leaves(there_grads)):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(np.abs(y).max()), err_msg=name)


@pytest.mark.parametrize("spec", MESHES)
def test_a_replay_is_that_of_one_device(spec):
    params, mesh = placed(spec)
    out = jax.device_get(replayed(params, CONFIG, *put_global_batch((TOKENS, MASK), mesh), THOUGHTS))
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected()[1])):
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)


# Three prompts do not divide over four shards of rows.
def test_text_with_thoughts_is_that_of_one_device():
    params, mesh = placed(MESHES[-1])
    prompts = [row[: 3 + i % 4].tolist() for i, row in enumerate(TOKENS[:3])]
    options = dict(max_new_tokens=3, temperature=0.0, thoughts=True, seed=2)
    there = qstar.generate(Model(CONFIG, alone()), prompts, **options)
    here = qstar.generate(Model(CONFIG, params, mesh=mesh), prompts, **options)
    assert [c[0].tokens for c in here] == [c[0].tokens for c in there]
    assert [c[0].thoughts for c in here] == [c[0].thoughts for c in there]


# One text, whose 31 predicting positions are the only axis to split. Sizes at which products, not masks, are the cost.
ALONE = CONFIG.replace(hidden_size=64, num_heads=8, num_kv_heads=8, intermediate_size=128, vocab_size=96)
TEXT = text_batch(np.random.default_rng(2).integers(1, 96, (1, 32)).astype(np.int32), np.ones((1, 32)))
LONG = bool(os.environ.get("QSTAR_LONG_TESTS"))
ALL = [*MESHES, "tensor=8", "fsdp=4,tensor=2", "data=4,fsdp=2"] if LONG else [MESHES[-1]]


def update(params, batch):
    def mean(params):
        (value, weight), metrics = thought_loss.loss({"policy": params}, batch, jax.random.key(0), config=ALONE)
        return value / weight, metrics

    return jax.value_and_grad(mean, has_aux=True)(params)


def evaluated(params, batch):
    return measure.score(params, ALONE, batch, jax.random.key(0))


@functools.cache
def of_one_text(f, spec):
    """FLOPs per device, and results."""
    params = alone(ALONE)
    batch = jax.device_get(TEXT)
    if spec:
        mesh = make_mesh(spec, jax.devices()[:8])
        params, batch = (
            jax.device_put(params, shardings(params, decoder.PARAM_AXES, mesh)),
            put_global_batch(batch, mesh),
        )
    compiled = mesh_jit(f).lower(params, batch).compile()
    return hlo.Program(compiled.as_text()).costs().flops, jax.device_get(compiled(params, batch))


@pytest.mark.parametrize("spec", ALL)
def test_one_text_is_split_over_all_devices_and_equals_one_device(spec):
    flops, ((value, metrics), grads) = of_one_text(update, spec)
    all_flops, ((there, there_metrics), there_grads) = of_one_text(update, "")
    assert flops <= 1.15 * all_flops / 8
    np.testing.assert_allclose(value, there, rtol=1e-5)
    for k, (total, count) in metrics.items():
        np.testing.assert_allclose(total, there_metrics[k][0], rtol=1e-5, atol=1e-5 * float(count), err_msg=k)
    for (name, x), y in zip(tree.named_leaves(grads), jax.tree.leaves(there_grads)):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(np.abs(y).max()), err_msg=name)


@pytest.mark.parametrize("spec", ALL)
def test_thoughts_of_one_held_out_text_are_split_and_come_back_in_order(spec):
    flops, found = of_one_text(evaluated, spec)
    all_flops, there = of_one_text(evaluated, "")
    assert flops <= 1.15 * all_flops / 8
    for name, x, y in zip(found._fields, found, there):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(np.abs(y).max()), err_msg=name)


# Texts over the devices, or the threads of every text; and heads. Interpreted: there is no TPU.
@pytest.mark.parametrize("spec, texts", [("fsdp=8", 8), ("fsdp=8", 2), ("fsdp=4,tensor=2", 4), ("data=2,tensor=4", 3)])
def test_the_tpu_kernel_on_a_mesh_computes_what_tiles_on_one_device_do(spec, texts, monkeypatch):
    keys = jax.random.split(jax.random.key(0), 6)
    q = jax.random.normal(keys[0], (texts, 2, 8, 3, 4, 16))
    k, v = (jax.random.normal(x, (texts, 2, 40, 16)) for x in keys[1:3])
    ends = jnp.sort(jax.random.randint(keys[3], (texts, 8), 1, 41), axis=1)
    ranges = jnp.broadcast_to(jnp.stack([ends // 3, ends], axis=-1)[:, :, None], (texts, 8, 3, 2))
    slopes = jax.random.normal(keys[4], q.shape), jax.random.normal(keys[5], q.shape[:-1])
    static = {"scale": 0.25, "cap": None, "exact": "highest"}

    def both(forward, backward, *args):
        found = forward(*args, **static)
        return found, backward(*args, *found, *slopes, **static)

    there = both(prefix_attention._forward, prefix_attention._backward, q, k, v, ranges)
    mesh = make_mesh(spec, jax.devices()[:8])
    with jax.set_mesh(mesh):
        args = put_global_batch(jax.device_get((q, k, v, ranges)), mesh)
        run = jax.jit(functools.partial(both, prefix_kernel.forward, prefix_kernel.backward))
        here = jax.device_get(run(*args))
    for x, y in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
