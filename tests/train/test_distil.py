"""Distillation losses against numpy, and a student that learns from its teacher in every way."""

from __future__ import annotations

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar import preemption
from qstar.errors import UserError
from qstar.methods import distillation as D
from qstar.models import scoring
from qstar.models.config import preset
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model
from qstar.models.scoring import logits
from qstar.runs.stages import Stage
from qstar.text.tokenizer import char_tokenizer
from qstar.train import distil
from qstar.train.distil import DistilSettings
from qstar.train.metrics import Writer
from tests.train.problem import same

RNG = np.random.default_rng(0)
P, Q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in RNG.normal(size=(2, 5, 7)))


def kl(a, b):
    return (a * (np.log(a) - np.log(b))).sum(-1)


def test_divergences_equal_their_definitions_and_jsd_ends_in_both_kls():
    found = functools.partial(distil.divergence, jnp.log(P), jnp.log(Q))
    np.testing.assert_allclose(found("forward_kl"), kl(P, Q), atol=1e-6)
    np.testing.assert_allclose(found("reverse_kl"), kl(Q, P), atol=1e-6)
    for beta in (0.1, 0.5, 0.9):
        m = beta * P + (1 - beta) * Q
        np.testing.assert_allclose(found("jsd", beta), beta * kl(P, m) + (1 - beta) * kl(Q, m), atol=1e-6)
    np.testing.assert_allclose(found("jsd", 0.0), kl(P, Q), atol=1e-6)
    np.testing.assert_allclose(found("jsd", 1.0), kl(Q, P), atol=1e-6)


def test_ids_that_cannot_be_drawn_add_nothing():
    mass = [np.concatenate([np.log(x), np.full((5, 2), -1e30)], axis=1).astype(np.float32) for x in (P, Q)]
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        plain = distil.divergence(jnp.log(P), jnp.log(Q), kind)
        np.testing.assert_allclose(distil.divergence(*map(jnp.asarray, mass), kind), plain, atol=1e-5)


DECODER = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, vocab_size=9, eos_id=1)
TEACHER = EncDecConfig(vocab_size=9, hidden_size=16, num_layers=1, num_decoder_layers=1, num_heads=2, head_dim=8,
                       intermediate_size=16)  # fmt: skip


@functools.cache
def model(config, seed=0):
    return Model(config, jax.jit(functools.partial(scoring.init, config))(jax.random.key(seed)))


ROWS = [D.Pair((2, 3, 4), (5, 6, 1), (7, 2)), D.Pair((4, 2), (8, 1), (3, 3, 3, 3)), D.Pair((5,), (2, 2, 2, 2), (4,))]


@pytest.mark.parametrize("kind", distil.KINDS)
def test_the_loss_is_that_of_single_rows_by_hand(kind):
    """Student a decoder, teacher an encoder-decoder with prompts of its own; temperature, mixture, padding and all."""
    s = DistilSettings(kind=kind, temperature=2.0, soft_share=0.7, beta=0.3)
    student, teacher = model(DECODER), model(TEACHER, 1)
    batch = D.make_batch(DECODER, TEACHER, ROWS, (4, 4), 5)
    params = {"policy": student.params, "teacher": teacher.params}
    static = dict(config=DECODER, teacher=TEACHER, settings=s, limit=8)
    loss = functools.partial(distil.distil_loss, **static)
    (total, weight), metrics = jax.jit(loss)(params, batch, None)

    def spread(rows, temperature):
        x = np.asarray(rows)[:, :8] / temperature
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    nll = soft = 0.0
    for r in ROWS[::2]:  # the second holds an id without text: infinite under `hard`
        n, out = len(r.prompt), list(r.response)
        mine = logits(student, [[*r.prompt, *out[:-1]]])[0, n - 1 :]
        theirs = logits(teacher, [[0, *out[:-1]]], encoder_tokens=[list(r.teacher_prompt)])[0]
        q = spread(mine, 1.0)
        nll -= np.log(q[np.arange(len(out)), out]).sum()
        p, q = spread(theirs, 2.0), spread(mine, 2.0)
        m = 0.3 * p + 0.7 * q
        by = {"hard": 0, "forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m)}
        soft += np.sum(by[kind])
    rest = jax.tree.map(lambda x: x[::2], batch)
    (total, weight), metrics = loss(params, rest, None)
    expected = nll if kind == "hard" else 0.7 * 4 * soft + 0.3 * nll
    assert float(weight) == 7 and float(total) == pytest.approx(expected, rel=1e-4)
    assert ("divergence" in metrics) == (kind != "hard")


@pytest.mark.parametrize("settings", [DistilSettings(), DistilSettings(kind="forward_kl"), DistilSettings(kind="reverse_kl"),
                                      DistilSettings(kind="jsd", on_policy=0.5)], ids=lambda s: s.kind)  # fmt: skip
def test_a_student_learns_from_its_teacher(settings, tmp_path):
    """The teacher prefers one token after every prompt; the student comes to prefer it, on whosever text."""
    config = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, vocab_size=9, eos_id=1)
    teacher = model(config, 5)
    teacher = teacher.replace(params=jax.tree.map(lambda x: 3 * x, teacher.params))
    prompts = [(2, a) for a in range(2, 9)]
    best = [int(np.argmax(logits(teacher, [list(p)])[0, -1])) for p in prompts]
    rows = [D.Pair(p, (b,)) for p, b in zip(prompts, best)]
    train = D.DistilTrain(batch_size=7, lr=2e-2, warmup=0, max_new_tokens=1, log_every=30, save_every=25)
    writer = Writer(tmp_path)
    stage = Stage(tmp_path / "x", train, 60, 0, writer, {"arm": "x"})
    student, summary = D.distil(model(config), rows, settings, stage, teacher)
    writer.close()
    found = [int(np.argmax(logits(student, [list(p)])[0, -1])) for p in prompts]
    assert sum(a == b for a, b in zip(found, best)) >= 6 and summary["steps"] == 60


def test_sigterm_saves_the_update_at_hand_and_the_next_one_is_the_very_next(tmp_path, monkeypatch):
    """Also where the student writes the text; and another call in the same folder is refused."""
    settings, made, batch = DistilSettings(kind="jsd", on_policy=0.5), [], D.make_batch
    config = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, vocab_size=9, eos_id=1)
    train = D.DistilTrain(batch_size=7, lr=2e-2, warmup=0, max_new_tokens=1, log_every=3)
    rows = [D.Pair((2, a), (a,)) for a in range(2, 9)]

    def call(name, rows=rows, steps=8):
        stage = Stage(tmp_path / name, train, steps, 0, Writer(tmp_path))
        return D.distil(model(config), rows, settings, stage, model(config, 5))

    def lesson(*args):
        made.append(0)
        if len(made) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(*args)

    whole, summary = call("whole")
    monkeypatch.setattr(D, "make_batch", lesson)
    with preemption.listening(), pytest.raises(preemption.Preempted, match="saved after update 5"):
        call("told")
    (record,) = (tmp_path / "told/training").glob("*/record/metadata")
    assert "policy" in record.read_text() and "teacher" not in record.read_text()  # it does not train: no copy is saved
    again, resumed = call("told")
    assert len(made) == 8 and resumed == summary
    same(again.params, whole.params)
    for wrong, key in ((dict(rows=rows[1:]), "data_hash"), (dict(steps=9), "steps=8, now it is 9")):
        with pytest.raises(UserError, match=f"told: was made with {key}"):
            call("told", **wrong)


def test_adapters_are_refused():
    with pytest.raises(UserError, match="lora_rank=4: distillation trains all of a model"):
        D.DistilTrain(lora_rank=4)


def test_mistakes_are_named(tmp_path):
    for wrong, word in (
        (dict(kind="soft"), "kind='soft'"),
        (dict(on_policy=0.5), "on_policy"),
        (dict(beta=2.0), "beta"),
    ):
        with pytest.raises(UserError, match=word):
            DistilSettings(**wrong)
    stage = Stage(tmp_path, D.DistilTrain(max_new_tokens=4), 1, 0, None)
    call = functools.partial(D.distil, model(DECODER), stage=stage)
    with pytest.raises(UserError, match="no rows"):
        call([], DistilSettings())
    with pytest.raises(UserError, match="longest response has 5"):
        call([D.Pair((1,), (2,) * 5)], DistilSettings())
    with pytest.raises(UserError, match="teacher"):
        call(ROWS, DistilSettings(kind="jsd"))
    with pytest.raises(UserError, match="make 5 tokens, but the student's context is 4"):
        few = model(DECODER.replace(max_positions=4))
        D.distil(few, [D.Pair((1,), (2,))], DistilSettings(kind="jsd", on_policy=0.5), stage, few)
    # As many ids, of other texts: the divergence would compare unlike things.
    start, teacher = (
        model(DECODER).replace(tokenizer=char_tokenizer(text, pad="_", eos=".")) for text in ("ab_.", "ba_.")
    )
    with pytest.raises(UserError, match="different tokenizers"):
        D.distil(start, [D.Pair((1,), (2,))], DistilSettings(kind="jsd"), stage, teacher)
