"""An update: against torch.optim, accumulated, refused, and compiled once; and the schedules' closed forms."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qstar import UserError
from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.text.packing import Example, pack
from qstar.train import losses, optim
from qstar.train.state import create_state, optimizer_for
from qstar.train.step import make_step, split_micro
from qstar.types import Batch
from tests.train.problem import batch, loss, params, same

TINY = ModelConfig(
    vocab_size=23,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    init_std=0.3,
)


@functools.cache
def tools(**settings):
    accumulate = settings.pop("accumulate", 1)
    tx = optim.adamw(**settings)
    return tx, make_step(loss, tx, accumulate)


def torch_loss(p, b):
    x, mask = torch.tensor(b["x"]), torch.tensor(b["mask"])
    y = (x * p["norm"]["scale"]) @ p["dense"]["kernel"] + p["dense"]["bias"]
    return (mask * ((y - 1) ** 2).sum(-1)).sum() / mask.sum()


@pytest.mark.parametrize("decay,clip", [(0.0, 0.0), (0.1, 0.0), (0.3, 7.7)])
def test_five_updates_are_those_of_torch_adamw_with_clipping(decay, clip):
    tx, step = tools(weight_decay=decay, clip=clip)
    state = create_state(params(), tx, seed=0)
    there = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), params()["policy"])
    leaves = jax.tree.leaves(there)
    opt = torch.optim.AdamW(leaves, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    norms = []
    for i in range(5):
        lr = 0.02 * (i + 1)
        state, metrics = step(state, batch(i), np.float32(lr))
        opt.zero_grad()
        value = torch_loss(there, batch(i))
        value.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(leaves, clip or 1e9).item())
        opt.param_groups[0]["lr"] = lr
        opt.step()
        assert float(metrics["loss"]) == pytest.approx(value.item(), rel=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(norms[-1], rel=1e-4)  # before clipping
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.detach(), atol=1e-5), state.params["policy"], there)
    assert not clip or min(norms) < clip < max(norms)  # it clipped some and not others
    assert int(state.step) == 5


def test_accumulation_gives_the_same_update():
    """Of a real model, over micro-batches that hold very unequal numbers of tokens to predict."""
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, 23, n).tolist()  # noqa: E731
    rows = Batch(**pack([Example(ids(2), ids(1 + i * 10 // 7)) for i in range(8)], 16, packed=False))
    per_micro = split_micro(rows.mask, 4).sum((1, 2))
    assert len(set(per_micro.tolist())) == 4
    tx = optim.adamw(weight_decay=0.1)
    start = {"policy": jax.jit(decoder.init, static_argnums=0)(TINY, jax.random.key(0))}
    out = {}
    for accumulate in (1, 4):
        step = make_step(functools.partial(losses.sft_loss, config=TINY), tx, accumulate)
        out[accumulate] = step(create_state(start, tx, seed=0), rows, np.float32(1e-2))
    (a, metrics_a), (b, metrics_b) = out[1], out[4]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a.params, b.params)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a.params, start)
    assert min(jax.tree.leaves(moved)) > 1e-3
    for name in metrics_a:  # tokens, too: all of the update's, not of one micro-batch
        assert float(metrics_a[name]) == pytest.approx(float(metrics_b[name]), rel=1e-5), name
    assert metrics_b["tokens"] == rows.mask.sum()


def test_weights_may_be_fractions_and_no_weight_is_no_gradient():
    tx, step = tools(clip=0.0)
    small = {**batch(0), "mask": batch(0)["mask"] * 1e-3}
    _, a = step(create_state(params(), tx, seed=0), batch(0), np.float32(0.1))
    _, b = step(create_state(params(), tx, seed=0), small, np.float32(0.1))
    assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-5)
    state, c = step(create_state(params(), tx, seed=0), {**batch(0), "mask": 0 * batch(0)["mask"]}, np.float32(0.1))
    assert c["grad_norm"] == c["loss"] == c["skipped"] == 0
    same(state.params, params())


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_update_that_is_not_finite_changes_nothing_but_the_step(bad, accumulate):
    tx, step = tools(accumulate=accumulate)
    state, metrics = step(create_state(params(), tx, seed=3), batch(0), np.float32(0.1))
    assert metrics["skipped"] == 0
    before = jax.tree.map(jnp.copy, state)
    poisoned = batch(1)
    poisoned["x"][-1, -1, 0] = bad
    state, metrics = step(state, poisoned, np.float32(0.1))
    assert metrics["skipped"] == 1 and state.step == 2
    same(state.replace(step=before.step), before)
    state, metrics = step(state, batch(2), np.float32(0.1))
    assert metrics["skipped"] == 0 and not np.allclose(
        state.params["policy"]["norm"]["scale"], before.params["policy"]["norm"]["scale"]
    )


def test_each_step_and_micro_batch_has_a_key_of_its_own():
    tx = optim.adamw()
    noisy = functools.partial(loss, noise=1.0)
    one, four = make_step(noisy, tx), make_step(noisy, tx, 4)
    row = {k: np.repeat(v[-1:], 8, axis=0) for k, v in batch(0).items()}
    seen = set()
    for step, state in (
        (one, create_state(params(), tx, seed=0)),
        (one, create_state(params(), tx, seed=1)),
        (four, create_state(params(), tx, seed=0)),
    ):
        for _ in range(2):
            state, metrics = step(state, row, np.float32(0.0))  # the parameters stay
            seen.add(float(metrics["loss"]))
    assert len(seen) == 6


def test_learning_rates_do_not_compile_anew_and_the_start_survives_its_donated_copy():
    tx, step = tools(b1=0.8)
    start = params()
    state = create_state(start, tx, seed=0)
    for lr in (0.1, 0.2, 0.0):
        state, _ = step(state, batch(0), np.float32(lr))
    assert step._cache_size() == 1
    same(start, params())


def test_rows_must_divide_into_micro_batches():
    with pytest.raises(ValueError, match="7 rows does not divide into 4"):
        split_micro(jnp.zeros((7, 2)), 4)


def test_moments_are_float32_under_half_precision_parameters():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    tx = optim.adamw(weight_decay=0.1)
    state = create_state(half, tx, seed=0)
    dtypes = [x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(dtypes) == 6 and set(dtypes) == {jnp.dtype("float32")}
    state, metrics = make_step(loss, tx)(state, batch(0), np.float32(0.1))
    assert metrics["skipped"] == 0 and {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}


# --------------------------------------------------------------------------------------------------- what is trained


def test_only_what_matches_the_pattern_trains_and_has_optimiser_memory():
    roles = {**params(), "reference": params(1)["policy"]}
    tx = optimizer_for(optim.adamw(weight_decay=0.1), r"policy/.*kernel$")
    state = create_state(roles, tx, seed=0)
    moments = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert moments == [roles["policy"]["dense"]["kernel"].shape] * 2

    def both(params, batch, rng):  # a gradient for the reference as well
        (a, w), metrics = loss(params, batch, rng)
        (b, _), _ = loss({"policy": params["reference"]}, batch, rng)
        return (a + b, w), metrics

    step = make_step(both, tx)
    for i in range(2):
        state, _ = step(state, batch(i), np.float32(0.1))
    assert jnp.abs(state.params["policy"]["dense"]["kernel"] - roles["policy"]["dense"]["kernel"]).min() > 1e-3
    same(state.params["reference"], roles["reference"])
    same(state.params["policy"]["norm"], roles["policy"]["norm"])
    same(state.params["policy"]["dense"]["bias"], roles["policy"]["dense"]["bias"])


def test_a_pattern_that_nothing_matches_is_refused():
    with pytest.raises(UserError, match=r"matches '\^policy/\.\*\(mixer\)'; the paths begin with dense, norm"):
        create_state(params(), optimizer_for(optim.adamw(), "^policy/.*(mixer)"), seed=0)


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "kind,end", [("constant", 0.0), ("linear", 0.0), ("linear", 0.1), ("cosine", 0.0), ("cosine", 0.2)]
)
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedules_are_their_closed_forms(kind, end, warmup):
    lr, steps = 3e-4, 50
    at = optim.schedule(kind, lr, warmup=warmup, steps=steps, end=end)
    for s in range(steps + 1):
        x = (s - warmup) / (steps - warmup)
        expected = {
            "constant": lr,
            "linear": lr * (1 - x * (1 - end)),
            "cosine": lr * (end + (1 - end) * 0.5 * (1 + np.cos(np.pi * x))),
        }[kind]
        if s < warmup:
            expected = lr * (s + 1) / warmup  # the first update moves already
        assert float(at(s)) == pytest.approx(expected, rel=1e-5, abs=1e-10), s


def test_the_first_loop_of_the_paper_stays_in_its_warmup():
    at = optim.schedule("constant", 1e-6, warmup=100, steps=40)
    assert [float(at(s)) for s in (0, 39, 99, 100, 5000)] == pytest.approx([1e-8, 4e-7, 1e-6, 1e-6, 1e-6])
