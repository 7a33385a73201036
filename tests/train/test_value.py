"""ORM and PRM against PyTorch's binary cross-entropy; the head in training, in scoring and in the files is one head."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import qstar
from qstar.methods.preference_data import Solution, graded_arrays
from qstar.models import decoder
from qstar.models.config import preset
from qstar.models.heads import add_value_head
from qstar.models.model import Model
from qstar.models.scoring import values
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.tokenizer import char_tokenizer
from qstar.train import losses
from qstar.train.preference import value_loss
from qstar.types import Batch, Graded
from tests.train.problem import assert_same_gradients

TOKENIZER = char_tokenizer(ALPHABET, pad=PAD, eos=EOS)
TEXTS = [("3+4=", "3+4,C0|,7C0|07|#7", True), ("5+6=", "5+6,C0|,0C1|10|#10", False), ("2+2=", "#4", True)]
SOLUTIONS = [Solution(p, p, c, right, True, False, "model", 1) for p, c, right in TEXTS]
STEPS = [([6, 11, 14, 17], [1, 1, 1, 1]), ([6, 11, 14, 18], [1, 0, 0, 0]), ([2], [1])]


@pytest.fixture(scope="module")
def model():
    config = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, eos_id=TOKENIZER.eos_id)
    plain = Model(config, decoder.init(config, jax.random.key(0)), TOKENIZER)
    made = add_value_head(plain, "orm")
    rng = np.random.default_rng(0)
    head = {"kernel": jnp.asarray(rng.normal(size=(16, 1)), jnp.float32), "bias": jnp.array([0.3])}
    return made.replace(params={**made.params, "value": head})


def graded(packed, steps=None, solutions=SOLUTIONS):
    arrays = graded_arrays(solutions, TOKENIZER, 50, packed, steps)
    extra = {k: arrays.pop(k) for k in ("labels", "weight")}
    return Graded(Batch(**arrays), **extra)


@jax.jit
def apart(params):
    """Logits of the vocabulary and of the head [3, 24], every solution in a row of its own."""
    config = preset("tiny", hidden_size=16, num_layers=1, num_heads=2)
    arrays = graded_arrays(SOLUTIONS, TOKENIZER, 24, False)
    rows = Batch(**{k: arrays[k] for k in ("tokens", "mask", "segment_ids", "positions")})
    hidden = losses.hidden_states(params, config, rows)
    return decoder.unembed(params, config, hidden), hidden @ params["value"]["kernel"][:, 0] + params["value"]["bias"]


def torch_value(vocab, head, steps, lm_weight):
    """The scored tokens times [mean of their cross-entropy + lm_weight (mean nll of right solutions' tokens)]."""
    total, counted, nll, learnt = 0.0, 0, 0.0, 0
    for i, s in enumerate(SOLUTIONS):
        ids = [*TOKENIZER.encode(s.completion), TOKENIZER.eos_id]
        ends, labels = (range(len(ids)), [float(s.correct)] * len(ids)) if steps is None else steps[i]
        at = [4 + e for e in ends]
        labels = torch.tensor(labels, dtype=torch.float64)
        bce = torch.nn.functional.binary_cross_entropy_with_logits(head[i, at], labels, reduction="sum")
        total, counted = total + bce, counted + len(at)
        if s.correct:
            mine = torch.nn.functional.cross_entropy(vocab[i, 3 : 3 + len(ids)], torch.tensor(ids), reduction="sum")
            nll, learnt = nll + mine, learnt + len(ids)
    return total + counted * lm_weight * nll / learnt, counted


@pytest.mark.parametrize("steps", [None, STEPS], ids=["orm", "prm"])
def test_value_and_gradients_are_those_of_torch(model, steps):
    made, back = jax.vjp(apart, model.params)
    leaves = [torch.tensor(np.array(x, np.float64), requires_grad=True) for x in made]
    expected, counted = torch_value(*leaves, steps, 0.7)
    expected.backward()
    (expected_grads,) = back(tuple(np.asarray(x.grad, np.float32) for x in leaves))

    def total(params, batch):
        (value, weight), metrics = value_loss({"policy": params}, batch, None, config=model.config, lm_weight=0.7)
        return value, (weight, metrics)

    f = jax.jit(jax.value_and_grad(total, has_aux=True))
    for packed in (False, True):
        batch = graded(packed, steps)
        assert len(batch.labels) == (2 if packed else 3)
        (value, (weight, metrics)), grads = f(model.params, batch)
        assert weight == counted and float(value) == pytest.approx(expected.item(), rel=1e-5)
        assert_same_gradients(grads, expected_grads)
        assert float(metrics["lm_nll"][1]) == 18 + 3  # the tokens of the two right solutions


def test_the_likelihoods_weight_does_not_depend_on_the_tokens_per_judged_step(model):
    """Twice as many tokens between the scored ones: cross-entropy and lm_weight * NLL stay in the same proportion."""
    for step in (1, 2, 8, 16):
        tokens = np.full((1, 33), 5, np.int32)
        ones = np.r_[0, np.ones(32)][None].astype(np.float32)
        scored = ones * (np.arange(33) % step == 0)
        rows = Batch(tokens, ones, np.ones_like(tokens), np.arange(33, dtype=np.int32)[None])
        (total, weight), found = value_loss(
            {"policy": model.params}, Graded(rows, ones, scored), None, config=model.config, lm_weight=0.5
        )
        bce, nll = (found[k][0] / found[k][1] for k in ("bce", "lm_nll"))
        assert weight == scored.sum() == 32 // step
        assert float(total / weight) == pytest.approx(float(bce + 0.5 * nll), rel=1e-5)


def test_micro_batches_with_few_right_solutions_add_up_to_the_whole(model):
    """All right solutions in one of three micro-batches: the same sums and gradients as of the whole batch."""
    whole = graded(False, STEPS)
    whole = whole.replace(lm_scale=np.full(3, whole.weight.sum() / whole.rows.mask.sum(), np.float32))

    @jax.jit
    def grad(batch):
        return jax.grad(lambda p: value_loss({"policy": p}, batch, None, config=model.config, lm_weight=0.5)[0][0])(
            model.params
        )

    parts = [grad(jax.tree.map(lambda x, i=i: x[i : i + 1], whole)) for i in range(3)]
    assert_same_gradients(functools.reduce(functools.partial(jax.tree.map, jnp.add), parts), grad(whole))
    alone = graded(False, STEPS)  # without a count over all data it is the batch's own
    assert_same_gradients(grad(alone), grad(whole))


def test_dropout_is_on_in_training_and_keeps_the_mean(model):
    batch = graded(True)
    f = functools.partial(value_loss, {"policy": model.params}, batch, config=model.config, lm_weight=0.0)
    plain = f(jax.random.key(0), dropout=0.0)[0][0]
    draws = [float(f(jax.random.key(i), dropout=0.5)[0][0]) for i in range(3)]
    assert len(set(draws)) == 3 and plain not in draws


def test_scoring_reads_the_head_where_training_asks_it(model):
    """`values` after every token equals the logits of the rows that are trained on."""
    _, head = apart(model.params)
    prompts = [TOKENIZER.encode(p) for p, _, _ in TEXTS]
    completions = [[*TOKENIZER.encode(c), TOKENIZER.eos_id] for _, c, _ in TEXTS]
    for i, found in enumerate(values(model, prompts, completions)):
        np.testing.assert_allclose(found, head[i, 4 : 4 + len(completions[i])], atol=1e-5)


def test_a_fresh_head_says_one_half_and_leaves_the_language_model_alone(model):
    fresh = add_value_head(model.replace(config=model.config.replace(value_head="")), "prm")
    assert (values(fresh, [[3, 4]], [[5, 6]])[0] == 0).all()
    np.testing.assert_array_equal(qstar.logits(fresh, [[3, 4, 5]]), qstar.logits(model, [[3, 4, 5]]))


def test_the_head_is_saved_and_loaded_with_the_model(model, tmp_path):
    qstar.save(model, tmp_path / "orm")
    assert load_file(tmp_path / "orm" / "model.safetensors")["score.weight"].shape == (1, 16)
    back = qstar.load(tmp_path / "orm")
    assert back.config.value_head == "orm"
    prompts, completions = [p for p, _, _ in TEXTS], [c for _, c, _ in TEXTS]
    np.testing.assert_array_equal(qstar.score(back, prompts, completions), qstar.score(model, prompts, completions))
    from_folder = qstar.score(str(tmp_path / "orm"), prompts, completions)
    np.testing.assert_array_equal(from_folder, qstar.score(model, prompts, completions))
