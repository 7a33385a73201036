"""T5, steps of RL and of distillation on 8 devices, however they are laid out, are the same computation as on one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qstar import tree
from qstar.mesh import make_mesh, put_global_batch, shardings
from qstar.models import heads, scoring
from qstar.models.config import preset
from qstar.models.decoder import PARAM_AXES
from qstar.models.encdec import EncDecConfig
from qstar.train import distil, optim, rl
from qstar.train.distil import DistilSettings, Lesson
from qstar.train.rl import Experience, RLSettings
from qstar.train.state import create_state
from qstar.train.step import make_step
from tests.methods.test_reinforce import RL as RL_OF_NEXT
from tests.methods.test_reinforce import start, train
from tests.methods.test_reinforce_lora import SETTINGS

V, B, P, R = 64, 8, 6, 5
T5 = EncDecConfig(vocab_size=V, hidden_size=32, num_layers=1, num_decoder_layers=1, num_heads=4, head_dim=8,
                  intermediate_size=48)  # fmt: skip
LLAMA = preset("tiny", hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=4, intermediate_size=48, vocab_size=V)
CUBE = "data=2,fsdp=2,tensor=2"
CASES = [("RL", "data=8"), ("RL", CUBE), ("distillation", "fsdp=8"), ("distillation", CUBE)]
TX = optim.adamw(clip=1.0, eps=0.1)  # a large eps, or the sign of a tiny gradient decides
RL = RLSettings(estimator="ppo", group=2, kl_in="ratio_k3", kl_weight=0.3, entropy_weight=0.1)


@functools.cache
def parameters(config):
    params = jax.jit(scoring.init, static_argnums=0)(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + np.float32(0.2) * rng.normal(size=p.shape).astype(np.float32), params)


def rows(config):
    rng = np.random.default_rng(1)
    prompt = scoring.pad_prompts(config, [rng.integers(2, V, 1 + i % P).tolist() for i in range(B)], P)
    mask = (np.arange(R) < 1 + np.arange(B)[:, None] % R).astype(np.float32)
    return *prompt, rng.integers(2, V - 2, (B, R)).astype(np.int32), mask


def experience():
    rng = np.random.default_rng(2)
    prompt, real, response, mask = rows(T5)
    noise = lambda: rng.normal(size=(B, R)).astype(np.float32) * mask  # noqa: E731
    old = -4 + noise()
    weight = np.full(B, 0.3, np.float32)
    return Experience(prompt, real, response, mask, old, old + noise(), noise(), noise(), noise(), weight)


@functools.cache
def case(name):
    """(parameters, batch, loss) of a training step: PPO with a critic, or T5 taught by a decoder."""
    if name == "RL":
        loss = functools.partial(rl.rl_loss, config=T5, settings=RL, limit=V - 2)
        value = jax.tree.map(lambda x: x + np.float32(0.1), heads.init_critic(32, jax.random.key(3)))
        return {"policy": parameters(T5), "value": value}, experience(), loss
    prompt, real, response, mask = rows(T5)
    settings = DistilSettings(kind="jsd", soft_share=0.5)
    loss = functools.partial(distil.distil_loss, config=T5, teacher=LLAMA, settings=settings, limit=V - 2)
    taught = rows(LLAMA)[:2]
    return {"policy": parameters(T5), "teacher": parameters(LLAMA)}, Lesson(prompt, real, response, mask, *taught), loss


@functools.cache
def updated(name, spec):
    """The parameters after an update, the first moments (the clipped gradients), and the metrics."""
    params, batch, loss = case(name)
    mesh = None if spec is None else make_mesh(spec)
    if mesh is not None:
        params, batch = jax.device_put(params, shardings(params, PARAM_AXES, mesh)), put_global_batch(batch, mesh)
    state = create_state(params, TX, seed=0, mesh=mesh, table=PARAM_AXES)
    state, metrics = make_step(loss, TX)(state, batch, np.float32(1e-2))
    moments = {n: x for n, x in tree.named_leaves(state.opt_state) if "/mu/" in n}
    return jax.device_get((state.params, moments, metrics))


def close(a, b):
    for (name, x), y in zip(tree.named_leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1e-3, float(np.abs(y).max())), err_msg=name)


@pytest.mark.parametrize("name, spec", CASES)
def test_loss_gradients_and_updates_are_those_of_one_device(name, spec):
    params, moments, metrics = updated(name, spec)
    expected, expected_moments, expected_metrics = updated(name, None)
    close(moments, expected_moments)
    close(params, expected)
    assert max(np.abs(x).max() for x in moments.values()) > 1e-3 and metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        assert float(metrics[key]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), key


def test_an_encoder_decoder_is_really_split():
    placed = jax.device_put(parameters(T5), shardings(parameters(T5), PARAM_AXES, make_mesh(CUBE)))
    kernels = {n: x for n, x in tree.named_leaves(placed) if n.endswith("kernel")}
    assert len(kernels) > 10 and all(x.size == 4 * x.addressable_shards[0].data.size for x in kernels.values())


def test_an_update_of_adapters_is_that_of_one_device(tmp_path):
    """Responses, rewards and the step: the base is an argument beside the state, and keeps its shards."""
    settings = dataclasses.replace(SETTINGS, updates=1)
    expected, _ = train(tmp_path / "one", RLSettings(estimator="grpo", **RL_OF_NEXT), settings)
    mesh, model = make_mesh("data=2,fsdp=4"), start()
    placed = jax.device_put(model.params, shardings(model.params, PARAM_AXES, mesh))
    sharded = model.replace(mesh=mesh, params=placed)
    found, _ = train(tmp_path / "eight", RLSettings(estimator="grpo", **RL_OF_NEXT), settings, sharded)
    close(jax.device_get(found.params), jax.device_get(expected.params))
