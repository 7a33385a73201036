"""The supervised loss: its value and all its gradients against PyTorch, chunk by chunk and at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import qstar
from qstar.models import vocabulary
from qstar.text.packing import Example, pack
from qstar.train import losses
from qstar.types import Batch
from tests.models.oracle import V, random_tokens, torch_model

N, E = 37, 8


@pytest.fixture(params=["at once", "in chunks"])
def chunks(request, monkeypatch):
    if request.param == "in chunks":
        monkeypatch.setattr(vocabulary, "MIN_CHUNK", 1)
        monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * V * 5)  # 5 tokens at a time: 37 do not divide
    return request.param


def arrays():
    rng = np.random.default_rng(0)
    weights = rng.random(N).astype(np.float32) * (rng.random(N) < 0.6)
    floats = [rng.normal(size=s).astype(np.float32) for s in ((N, E), (E, V), (V,))]
    return *floats, rng.integers(0, V, N).astype(np.int32), weights


def torch_nll(hidden, kernel, bias, targets, weights, z_loss, cap):
    logits = hidden @ kernel
    logits = (cap * torch.tanh(logits / cap) if cap else logits) + (0 if bias is None else bias)
    logz = torch.logsumexp(logits, -1)
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(targets, dtype=torch.long), reduction="none")
    hits = (logits.argmax(-1).numpy() == targets) * weights
    return (torch.tensor(weights) * (nll + z_loss * logz**2)).sum(), hits.sum()


@pytest.mark.parametrize("z_loss, cap", [(0.0, None), (1e-2, None), (1e-2, 1.5)])
@pytest.mark.parametrize("biased", [True, False])
def test_token_nll_and_its_gradients_are_those_of_torch(chunks, z_loss, cap, biased):
    hidden, kernel, bias, targets, weights = arrays()
    inputs = (hidden, kernel, bias) if biased else (hidden, kernel)

    def loss(*xs):
        nll, hits, _ = losses.token_nll(xs[0], (*(*xs[1:], None)[:2], cap), targets, weights, z_loss)
        return 1.7 * nll + 3.0, (nll, hits)  # a cotangent that is not 1

    grads, (nll, hits) = jax.jit(jax.grad(loss, argnums=tuple(range(len(inputs))), has_aux=True))(*inputs)
    # Without a gradient.
    *plain, _ = losses.token_nll(inputs[0], (*(*inputs[1:], None)[:2], cap), targets, weights, z_loss)
    theirs_grad = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    expected, expected_hits = torch_nll(*theirs_grad, *([] if biased else [None]), targets, weights, z_loss, cap)
    (1.7 * expected).backward()
    for value, hit in ((nll, hits), plain):
        assert float(value) == pytest.approx(expected.item(), rel=1e-5)
        assert float(hit) == pytest.approx(expected_hits, rel=1e-5)
    for g, x in zip(grads, theirs_grad):
        np.testing.assert_allclose(g, x.grad, atol=2e-5)


def test_tokens_without_weight_weigh_nothing_and_none_at_all_gives_zero(chunks):
    hidden, kernel, bias, targets, weights = arrays()
    hidden[weights == 0] += 100.0
    changed = np.where(weights == 0, (targets + 1) % V, targets)
    f = jax.grad(lambda h, t, w: losses.token_nll(h, (kernel, bias), t, w)[0])
    np.testing.assert_allclose(f(hidden, targets, weights), f(hidden, changed, weights), atol=1e-7)
    assert (np.asarray(f(hidden, targets, weights))[weights == 0] == 0).all()
    nll, hits, _ = losses.token_nll(hidden, (kernel, bias), targets, 0 * weights)
    assert nll == 0 and hits == 0 and (f(hidden, targets, 0 * weights) == 0).all()


def test_half_precision_keeps_a_float32_sum_and_the_dtypes_of_its_inputs():
    hidden, kernel, bias, targets, weights = arrays()
    low = jnp.asarray(hidden, jnp.bfloat16)
    nll, grads = jax.value_and_grad(lambda h, k: losses.token_nll(h, (k, bias), targets, weights)[0], argnums=(0, 1))(
        low, jnp.asarray(kernel)
    )
    expected, _ = torch_nll(*map(torch.tensor, (hidden, kernel, bias)), targets, weights, 0.0, None)
    assert nll.dtype == jnp.float32 and [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    assert float(nll) == pytest.approx(expected.item(), rel=0.01)


# --------------------------------------------------------------------------------------------------- a whole model

EXAMPLES = [
    Example(random_tokens(p, seed=i).tolist(), random_tokens(c, seed=i + 50).tolist())
    for i, (p, c) in enumerate([(4, 3), (1, 6), (7, 1), (3, 2)])
]


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral window"])
def models(request, tmp_path_factory):
    theirs = torch_model(request.param)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, qstar.load(folder), folder


@functools.cache
def value_and_grad(config):
    def total(params, batch):
        (nll, weight), metrics = losses.sft_loss({"policy": params}, batch, None, config=config)
        return nll, (weight, metrics)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def test_the_loss_of_packed_rows_is_that_of_their_completions_one_by_one(models):
    """Documents apart, completions (their last token, the EOS, too) and no prompt: every gradient is PyTorch's."""
    theirs, ours, folder = models
    theirs.zero_grad()
    total, hits, count = 0.0, 0, 0
    for e in EXAMPLES:
        ids = torch.tensor([e.prompt + e.completion])
        logits = theirs(ids).logits[0, len(e.prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(e.completion), reduction="sum")
        hits, count = (
            hits + (logits.argmax(-1) == torch.tensor(e.completion)).sum().item(),
            count + len(e.completion),
        )
    total.backward()

    rows = pack(EXAMPLES, 16)
    assert rows["tokens"].shape == (2, 16) and (rows["segment_ids"] == 0).any()
    (nll, (weight, metrics)), grads = value_and_grad(ours.config)(ours.params, Batch(**rows))
    assert float(nll) == pytest.approx(total.item(), rel=1e-5) and weight == count
    assert [float(x) for x in metrics["loss"]] == pytest.approx([total.item(), count], rel=1e-5)
    assert [float(x) for x in metrics["accuracy"]] == [hits, count] and metrics["tokens"][0] == count

    qstar.save(ours.replace(params=grads), folder / "grads")  # gradients under the names of PyTorch's parameters
    exported = load_file(folder / "grads" / "model.safetensors")
    for name, p in theirs.named_parameters():
        name = name if name in exported else name.removeprefix("transformer.")
        np.testing.assert_allclose(exported[name], p.grad, atol=1e-4 * float(p.grad.abs().max()) + 1e-5, err_msg=name)


def test_padding_does_not_matter(models):
    _, ours, _ = models
    rows = pack(EXAMPLES, 16)
    other = {**rows, "tokens": np.where(rows["segment_ids"] == 0, 7, rows["tokens"])}
    f = value_and_grad(ours.config)
    (a, _), ga = f(ours.params, Batch(**rows))
    (b, _), gb = f(ours.params, Batch(**other))
    assert a == b
    jax.tree.map(np.testing.assert_array_equal, ga, gb)


# ------------------------------------------------------------------------------------- tokens without a weight


def scattered(tokens, live, seed=0):
    """States [2, tokens / 2, 8], a kernel, a bias, targets and weights, `live` of which are not 0."""
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden, kernel = jax.random.normal(keys[0], (2, tokens // 2, 8)), jax.random.normal(keys[1], (8, 50))
    weights = jnp.zeros(tokens).at[jax.random.permutation(keys[2], tokens)[:live]].set(0.5)
    targets = jax.random.randint(keys[3], (2, tokens // 2), 0, 50)
    return hidden, kernel, jax.random.normal(keys[4], (50,)), targets, weights.reshape(2, -1)


@pytest.mark.parametrize("tokens, live", [(1024, 128), (1022, 300), (600, 0), (600, 600), (20, 3)])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_skipped_tokens_change_no_sum_and_no_gradient(tokens, live, cap):
    hidden, kernel, bias, targets, weights = scattered(tokens, live)

    def plain(hidden, kernel, bias):
        logits = hidden @ kernel
        logits = (logits if cap is None else cap * jnp.tanh(logits / cap)) + bias
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        z = jax.nn.logsumexp(logits, axis=-1)
        return jnp.sum(weights * (0.1 * z**2 - logp)), jnp.sum(weights * (jnp.argmax(logits, -1) == targets))

    def ours(hidden, kernel, bias):
        return losses.token_nll(hidden, vocabulary.Head(kernel, bias, cap), targets, weights, 0.1, skip=True)[:2]

    found, wanted = (jax.value_and_grad(f, (0, 1, 2), has_aux=True)(hidden, kernel, bias) for f in (ours, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, wanted)


def test_logits_of_tokens_without_a_weight_are_not_computed():
    """128 of 512 tokens count, one of the four chunks: what the others hold, not even NaN, reaches no result."""
    hidden, kernel, _, targets, weights = scattered(512, 128)
    hidden = jnp.where(weights[..., None] > 0, hidden, jnp.nan)

    def nll(hidden, kernel, skip):
        return losses.token_nll(hidden, vocabulary.Head(kernel), targets, weights, skip=skip)[0]

    for f in (
        nll,
        lambda h, k, skip: (
            -jnp.sum(
                jnp.where(
                    weights > 0,
                    vocabulary.token_logprobs(h, vocabulary.Head(k), targets, read=weights if skip else None).logprobs,
                    0,
                )
            )
        ),
    ):
        found = jax.value_and_grad(f, (0, 1))(hidden, kernel, True)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
        assert not bool(jnp.isfinite(jax.grad(f, 1)(hidden, kernel, False)).all())


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("count, live", [(700, 0), (700, 70), (700, 300), (700, 700), (512, 200)])
def test_scores_of_the_tokens_that_are_read_are_those_of_all(count, live, entropy):
    """Their gradients, too."""
    hidden, kernel, bias, targets, read = scattered(count, live)

    def scores(hidden, kernel, r):
        found = vocabulary.token_logprobs(hidden, vocabulary.Head(kernel, bias), targets, read=r, entropy=entropy)
        found = [jnp.where(read > 0, x, 0) for x in found if x is not None]
        return found[0].sum() + found[-1].sum(), found

    every, some = (jax.value_and_grad(scores, (0, 1), has_aux=True)(hidden, kernel, r) for r in (None, read))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), every, some)
