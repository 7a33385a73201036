"""DPO and Iterative RPO against PyTorch's formulas, pair by pair; packing and accumulation change nothing."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest
import torch

from qstar.models import decoder, vocabulary
from qstar.models.config import preset
from qstar.text.packing import Example, pack, pack_groups
from qstar.train import losses
from qstar.train.preference import dpo_loss, pair_logprobs
from qstar.train.state import create_state
from qstar.train.step import make_step
from qstar.types import Batch, Preference
from tests.train.problem import assert_same_gradients

CONFIG = preset("tiny", hidden_size=16, num_layers=1, num_heads=2)
RNG = np.random.default_rng(0)


def ids(n):
    return RNG.integers(2, 20, n).tolist()


PAIRS = []
for p, a, b in [(3, 4, 6), (2, 5, 1), (4, 2, 2), (1, 7, 3), (3, 1, 8), (5, 3, 4)]:
    prompt = ids(p)
    PAIRS.append((Example(prompt, ids(a)), Example(prompt, ids(b))))
REFERENCE = RNG.normal(-8, 2, (len(PAIRS), 2)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    made = decoder.init(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: x * 1.5, made)


def preference(packed, reference=REFERENCE, length=40):
    rows, chosen = pack_groups(PAIRS, length, packed=packed)
    present = (chosen >= 0)[..., None]
    values = np.where(present, reference[chosen], 0.0).astype(np.float32)
    return Preference(Batch(**rows), values, present[..., 0].astype(np.float32))


@jax.jit
def all_logits(params):
    """Every completion in a row of its own: per pair two arrays [tokens, V]."""
    rows = Batch(**pack([e for pair in PAIRS for e in pair], 12, packed=False))
    logits = decoder.unembed(params, CONFIG, losses.hidden_states(params, CONFIG, rows))
    flat = [z[len(e.prompt) - 1 : len(e) - 1] for z, e in zip(logits, (e for pair in PAIRS for e in pair))]
    return list(zip(flat[::2], flat[1::2]))


def torch_loss(all_logits, beta, alpha, reference=REFERENCE):
    """The paper's loss of the pairs, summed, from the logits of every completion."""
    total = 0.0
    for i, (pair, logits) in enumerate(zip(PAIRS, all_logits)):
        sums = [torch.log_softmax(z, -1)[range(len(e.completion)), e.completion].sum() for e, z in zip(pair, logits)]
        ratios = [s - float(r) for s, r in zip(sums, reference[i])]
        total = total - torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1]))
        total = total - alpha * sums[0] / len(pair[0].completion)
    return total


@functools.cache
def value_and_grad(beta, alpha):
    def total(params, batch):
        (value, weight), metrics = dpo_loss({"policy": params}, batch, None, config=CONFIG, beta=beta, alpha=alpha)
        return value, (weight, metrics)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def expected(params, beta, alpha):
    """PyTorch's value, and its gradient by the logits carried on to the parameters by JAX's vector-Jacobian product."""
    made, back = jax.vjp(all_logits, params)
    leaves = [[torch.tensor(np.array(z, np.float64), requires_grad=True) for z in pair] for pair in made]
    value = torch_loss(leaves, beta, alpha)
    value.backward()
    (grads,) = back([tuple(np.asarray(z.grad, np.float32) for z in pair) for pair in leaves])
    return value.item(), grads


@pytest.mark.parametrize("beta, alpha", [(0.1, 0.0), (0.5, 1.0)])
def test_value_and_gradients_are_those_of_torch(params, beta, alpha):
    value, grads = expected(params, beta, alpha)
    for packed in (False, True):
        batch = preference(packed)
        assert batch.rows.tokens.shape[0] == (len(PAIRS) if not packed else 3)
        (ours, (weight, metrics)), ours_grads = value_and_grad(beta, alpha)(params, batch)
        assert weight == len(PAIRS) and float(ours) == pytest.approx(value, rel=1e-5)
        assert_same_gradients(ours_grads, grads)
        assert float(metrics["tokens"][0]) == sum(len(e.completion) for pair in PAIRS for e in pair)


def test_at_the_reference_the_loss_is_log_2_and_log_ratios_are_0(params):
    mine = np.array(
        [
            [float(jax.nn.log_softmax(z)[np.arange(len(z)), e.completion].sum()) for z, e in zip(both, pair)]
            for both, pair in zip(all_logits(params), PAIRS)
        ],
        np.float32,
    )
    (value, (weight, metrics)), _ = value_and_grad(0.1, 0.0)(params, preference(True, mine))
    assert float(value / weight) == pytest.approx(np.log(2), abs=1e-5)
    for name in ("margin", "chosen_logratio", "rejected_logratio"):
        assert float(metrics[name][0]) == pytest.approx(0, abs=1e-4)

    @jax.jit
    def at_itself(params):  # to the last bit, where the same program makes both
        batch = preference(True)
        reference, _ = pair_logprobs(params, CONFIG, batch.rows, batch.weight.shape[1])
        return dpo_loss({"policy": params}, batch.replace(reference=reference), None, config=CONFIG)[0]

    value, weight = at_itself(params)
    assert value / weight == np.float32(np.log(2))
    chosen = float(metrics["chosen_logprob"][0])
    assert chosen == pytest.approx(mine[:, 0].sum(), rel=1e-5)


def test_accumulated_micro_batches_make_the_same_update(params):
    batch = preference(False)
    loss = functools.partial(dpo_loss, config=CONFIG, beta=0.3)
    after = []
    for accumulate in (1, 3):
        tx = optax.identity()
        state = create_state({"policy": params}, tx, seed=0)
        state, metrics = make_step(loss, tx, accumulate)(state, batch, np.float32(0.1))
        after.append((state.params, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *(a[0] for a in after))
    for name in after[0][1]:
        assert float(after[0][1][name]) == pytest.approx(float(after[1][1][name]), abs=1e-5), name


def test_an_update_parts_the_pairs(params):
    """A few steps make every margin positive: what was chosen becomes likelier than what was not."""
    batch, tx = preference(True), optax.scale_by_adam()
    step = make_step(functools.partial(dpo_loss, config=CONFIG, beta=0.1), tx)
    state = create_state({"policy": params}, tx, seed=0)
    for _ in range(30):
        state, metrics = step(state, batch, np.float32(3e-3))
    assert metrics["accuracy"] == 1 and metrics["margin"] > 0.5 and metrics["loss"] < 0.5
    assert metrics["chosen_logratio"] > metrics["rejected_logratio"]


def test_token_logprobs_do_not_depend_on_chunks(monkeypatch):
    rng = np.random.default_rng(1)
    hidden, kernel = rng.normal(size=(37, 8)).astype(np.float32), rng.normal(size=(8, 11)).astype(np.float32)
    bias, targets = rng.normal(size=11).astype(np.float32), rng.integers(0, 11, 37)
    weights = rng.normal(size=37).astype(np.float32)
    f = jax.value_and_grad(
        lambda h, k, b: (vocabulary.token_logprobs(h, (k, b), targets).logprobs * weights).sum(), argnums=(0, 1, 2)
    )
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, kernel, bias)]
    value = (torch.log_softmax(leaves[0] @ leaves[1] + leaves[2], -1)[range(37), targets] * torch.tensor(weights)).sum()
    value.backward()
    for chunk in (None, 5):
        if chunk:
            monkeypatch.setattr(vocabulary, "MIN_CHUNK", 1)
            monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * 11 * chunk)
        ours, grads = f(hidden, kernel, bias)
        assert float(ours) == pytest.approx(value.item(), rel=1e-5)
        for a, b in zip(grads, leaves):
            np.testing.assert_allclose(a, b.grad, atol=1e-5)
