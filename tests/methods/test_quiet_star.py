"""Quiet-STaR runs: resumption, the arms and what distinguishes them, and the measurements, each against slow ways."""

import functools
import json
import types

import jax
import numpy as np
import pytest

from qstar.data.corpus import TextCorpus, full_rows
from qstar.errors import UserError
from qstar.methods import quiet_data, quiet_measure, quiet_star
from qstar.models import decoder, heads
from qstar.models.config import preset
from qstar.models.model import Model
from qstar.models.thought_config import ThoughtConfig
from qstar.tasks.fold_digits import Folds
from qstar.thoughts import distil, measure, replay
from qstar.train.losses import sft_loss
from qstar.train.metrics import read
from tests.methods import runs

CHAIN = [
    [
        "batch base 30",  # while the base trains
        "saved base/model 60",  # trained, but not marked as such
        "term batch quiet_star 2",  # saved after that update
        "batch quiet_star 7",  # past the first checkpoint and the first measurement
    ],
    [
        "replace quiet_star/evaluation/step_000012.json",  # measured, but not written
        "saving same_text/training 5",
    ],
]


def test_a_run_killed_or_left_at_six_points_ends_with_the_same_bits():
    one, other = runs.quiet_star(), runs.killed(runs.QUIET, CHAIN)
    log = other.with_suffix(".log").read_text(encoding="utf-8")
    assert "qstar: stopped by SIGTERM; saved after update 3; go on with: qstar train" in log and "Traceback" not in log
    assert [runs.events(other).count(f"batch quiet_star {step}") for step in range(6)] == [1, 1, 1, 1, 1, 2]
    assert runs.numbers(one) == runs.numbers(other)
    assert runs.answers(one) == runs.answers(other) and len(runs.answers(one)) >= 6
    assert runs.weights(one) == runs.weights(other) and len(runs.weights(one)) == 3


def test_the_checkpoint_keeps_vectors_and_mixing_head():
    leaves = next(v for k, v in runs.weights(runs.quiet_star()).items() if k.startswith("quiet_star/"))
    names = " ".join(leaves)
    assert "/thoughts/start" in names and "/mixing/out/kernel" in names


def test_arms_come_after_those_they_need():
    parents = {"a": "c", "b": "base", "c": "b"}
    assert list(quiet_star.in_order(parents, lambda parent: [parent])) == ["b", "c", "a"]
    with pytest.raises(UserError, match="arms.a: 'z'"):
        quiet_star.in_order({"a": "z"}, lambda parent: [parent])


CONFIG = preset("tiny", hidden_size=32, num_layers=2, num_heads=2, vocab_size=24, max_positions=64).replace(
    thoughts=ThoughtConfig(thought_tokens=3, talk_tokens=2, thoughts_per_position=2, forbidden_ids=(23,))
)


replayed = jax.jit(replay.replay, static_argnums=1)


def model_params(seed=0):
    params = decoder.init(CONFIG, jax.random.key(seed))
    params = heads.attach_thoughts(params, CONFIG, jax.random.key(1), 21)
    params["mixing"]["out"]["kernel"] += 0.3  # so that thoughts matter
    return params


def a_batch(size=3):
    rows = Folds(documents=2).rows(0, size, 5)
    return jax.tree.map(np.asarray, quiet_star.Batch(*rows[:4]))


def test_scores_are_those_of_the_full_replay():
    params, batch = model_params(), a_batch()
    score = jax.jit(functools.partial(measure.score, passes=2, temperature=1.0), static_argnums=1)
    found = score(params, CONFIG, batch, jax.random.key(3))
    thoughts = np.asarray(found.thoughts)  # [B, P, M, S]
    B, P, M, S = thoughts.shape
    full = np.zeros((S, B * P, M + 1), np.int32)
    full[:, :, :M] = thoughts.reshape(B * P, M, S).transpose(2, 0, 1)
    slow = replayed(params, CONFIG, batch.tokens, batch.mask, full)
    np.testing.assert_allclose(found.nll.reshape(B * P, M), slow.talk_nll_s[0], atol=1e-4)
    np.testing.assert_allclose(found.base_nll, np.asarray(slow.base_nll)[::P], atol=1e-4)
    np.testing.assert_allclose(found.weight.reshape(B * P, M), slow.talk_mix_weight[0][:, :M], atol=1e-5)
    np.testing.assert_allclose(found.reward.reshape(B * P, M), slow.reward, atol=1e-4)
    first = np.argmax(slow.talk_mixed_logits[0][:, :M], -1) == np.repeat(batch.tokens[:, 1:], P, axis=0)
    assert np.array_equal(found.hit.reshape(B * P, M), first)
    assert not np.any(thoughts == 23)


def test_pause_and_random_thoughts_reinforce_nothing():
    params, batch = {"policy": model_params()}, a_batch()
    loss = jax.jit(quiet_star.control_loss, static_argnames=("config", "thought_source"))
    silent = CONFIG.replace(thoughts=CONFIG.thoughts.replace(policy_weight=100.0))
    for source in ("pause", "random"):
        again, _ = loss(params, batch, jax.random.key(0), config=silent, thought_source=source)
        first, _ = loss(params, batch, jax.random.key(0), config=CONFIG, thought_source=source)
        assert float(first[0]) == float(again[0])
    half = CONFIG.replace(thoughts=CONFIG.thoughts.replace(think_fraction=0.5))
    fewer, _ = loss(params, batch, jax.random.key(0), config=half, thought_source="random")
    assert np.isfinite(fewer[0]) and float(fewer[0]) != float(first[0])  # fewer positions think
    own = measure.random_thoughts(jax.random.key(0), CONFIG, (1000,))
    assert set(np.unique(own)) == set(range(23))  # all but padding


def test_the_students_loss_is_likelihood_and_divergence_from_the_mean_of_the_teachers_predictions():
    batch, config = a_batch(2), CONFIG.replace(thoughts=None)
    student = decoder.init(CONFIG, jax.random.key(9))
    params = {"policy": student, "teacher": model_params()}
    key = jax.random.key(4)
    loss = functools.partial(distil.student_loss, batch=batch, rng=key, config=config, teacher=CONFIG, weight=2.0)
    (total, weight), metrics = jax.jit(loss)(params)
    nll, _ = sft_loss({"policy": student}, batch, None, config=config)
    from qstar.thoughts import forward, layout, rollout

    @jax.jit
    def think(tree):
        positions = layout.all_positions(batch, predicting=True)
        return rollout.sample(tree, CONFIG, batch, forward.read(tree, CONFIG, batch), positions, key)[0]

    own = np.asarray(think(params["teacher"]))  # [S, B, P, M]
    S, B, P, M = own.shape
    full = np.zeros((S, B * P, M + 1), np.int32)
    full[:, :, :M] = own.reshape(S, B * P, M)
    logits = replayed(params["teacher"], CONFIG, batch.tokens, batch.mask, full).talk_mixed_logits[0][:, :M]
    p = np.asarray(jax.nn.softmax(logits)).reshape(B, P, M, -1).mean(1)
    q = replayed(
        {**student, **{k: params["teacher"][k] for k in ("thoughts", "mixing")}}, CONFIG, batch.tokens, batch.mask, full
    )
    q = np.asarray(jax.nn.log_softmax(q.base_logits))[::P][:, :M]
    divergence = np.sum(p * (np.log(p) - q))
    np.testing.assert_allclose(total, nll[0] + 2.0 * divergence, rtol=1e-4)
    assert float(weight) == B * M
    grads = jax.jit(jax.grad(lambda t: loss({**params, "teacher": t})[0][0]))(params["teacher"])
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))


def test_a_thought_is_right_if_it_holds_the_steps_as_far_as_it_reaches():
    expected = np.array([[[1, 2, 3, -1], [-1, -1, -1, -1]]])
    thoughts = np.array([[[[1, 2, 3, 9, 9], [1, 2, 3, 4, 5]], [[1, 2, 4, 9, 9], [0, 0, 0, 0, 0]]]])
    assert quiet_data.holds_steps(thoughts, expected).tolist() == [[[True, False], [False, False]]]
    assert quiet_data.holds_steps(thoughts[..., :2], expected).tolist() == [[[True, False], [True, False]]]


def test_means_by_kind_of_token():
    where = np.array([[0, 1, -1, -2], [1, 1, -2, 0]])
    x = np.arange(8.0).reshape(2, 4)
    found = quiet_measure.means_by_kind(["a", "b"], where, {"x": x})
    assert found == {"x/all": np.mean([0, 1, 2, 4, 5, 7]), "x/a": 3.5, "x/b": np.mean([1, 4, 5])}


def test_an_interval_of_tokens_in_rows_of_unequal_length_holds_its_point():
    where = np.where(np.arange(40) < np.array([2, 3, 4, 36, 38, 40] * 20)[:, None], 0, -2)
    easier = np.array([0.2, 0.3, 0.25, 0.8, 0.7, 0.75] * 20)[:, None]  # in the long rows
    x = (np.random.default_rng(0).random(where.shape) < easier).astype(float)
    found = quiet_measure.means_by_kind(["a"], where, {"accuracy": x}, intervals=("accuracy",))
    for kind in ("all", "a"):
        assert found[f"accuracy_low/{kind}"] < found[f"accuracy/{kind}"] < found[f"accuracy_high/{kind}"]


def test_intervals_resample_documents():
    """Rows repeated within their documents add nothing: the interval is that of one row per document, not narrower."""
    x = np.random.default_rng(0).random((12, 5))
    where = np.zeros((12, 5), int)
    once = quiet_measure.means_by_kind(["a"], where, {"x": x}, ("x",))
    many = [np.repeat(a, 20, axis=0) for a in (where, x)]
    documents = np.repeat(np.arange(12), 20)
    found = quiet_measure.means_by_kind(["a"], many[0], {"x": many[1]}, ("x",), documents)
    assert found == pytest.approx(once)
    by_row = quiet_measure.means_by_kind(["a"], many[0], {"x": many[1]}, ("x",))
    assert by_row["x_high/a"] - by_row["x_low/a"] < 0.4 * (once["x_high/a"] - once["x_low/a"])


def test_metrics_of_the_smoke_run_have_every_control():
    rows = [r for r in read(runs.quiet_star()) if r["stage"] == "evaluation" and r["arm"] == "quiet_star"]
    assert [r["step"] for r in rows] == [6, 12]
    for key in ("nll", "nll_base", "nll_greedy", "nll_random", "accuracy", "weight", "thought_accuracy"):
        assert f"{key}/hard" in rows[-1] and f"{key}/all" in rows[-1]
    assert sum(rows[-1]["weight_histogram"]["counts"]) == 40 * 8


def test_text_is_bucketed_by_how_hard_it_is_for_the_base(tmp_path):
    """The base is scored before any arm trains: one that has learnt nothing finds every token equally hard."""
    from rich.console import Console

    import qstar
    from configs.quiet_star_text import get_config
    from qstar.methods.quiet_data import QuietContext
    from qstar.runs import base_model
    from qstar.text.tokenizer import char_tokenizer

    letters = "abcdefghijklmnop"
    char_tokenizer(letters + "$.\n", pad=".", eos="$").save(tmp_path / "tokenizer")
    lines = [json.dumps({"text": (letters * 9)[i : i + 40]}) for i in range(100)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    config = get_config(f"model={tmp_path / 'tokenizer'},data={tmp_path / 'text.jsonl'},scratch")
    config.data.length, config.base.steps = 24, 0
    config.model.update(hidden_size=16, num_layers=1, num_heads=2)
    config.evaluate.update(rows=16, batch_size=16, every=20)
    config.train.update(batch_size=16, lr=1e-2, warmup=0, log_every=15)  # evaluations do not fall on these logs
    config.arms = {"plain": {"steps": 40, "thought_source": "none"}}
    quiet_star.run(config, tmp_path / "run", Console(quiet=True))
    nll = np.array([json.loads(x)["nll"] for x in (tmp_path / "run/base/difficulty.jsonl").read_text().splitlines()])
    study = QuietContext.make(config, tmp_path / "run", Console(quiet=True))
    base, tokens = base_model.loaded_or_random(study, study.corpus.tokenizer), study.corpus.test_rows(16).tokens
    logp = jax.nn.log_softmax(qstar.logits(base, tokens)[:, :-1])
    np.testing.assert_allclose(nll, -np.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0], atol=1e-3)
    assert nll.min() > 2.0
    rows = [r for r in read(tmp_path / "run") if r["stage"] == "evaluation"]
    assert [r["step"] for r in rows] == [20, 40]
    assert all(
        "rows" not in r for r in rows
    )  # sums of every row, which comparisons of arms need, are in the file alone
    for r in rows:  # all are hard for the base, however much the arm has learnt
        assert r["nll_base/hard (> 2 nats)"] == r["nll_base/all"] < 2.0


def test_patience_without_evaluations_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.arms.a.patience=3 counts evaluations, and there are none"):
        small_run(tmp_path, {"a": {"patience": 3, "evaluate_every": 0}})


def test_rows_are_padded_on_the_right():
    rows = full_rows(np.zeros((2, 4), int), np.array([2, 4]))
    assert rows.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and rows.segment_ids.sum() == 6
    assert json.dumps(rows.positions[0].tolist()) == "[0, 1, 2, 3]"


def test_a_student_of_packed_documents_learns_the_same_tokens_from_the_text_and_from_the_teacher():
    """A mask that does mark a document's first token changes nothing: sums, divisor, gradients."""
    batch, config = a_batch(2), CONFIG.replace(thoughts=None)
    segments = 1 + (np.arange(batch.tokens.shape[1]) >= 10) * np.ones_like(batch.tokens)
    positions = np.where(segments == 1, np.arange(batch.tokens.shape[1]), np.arange(batch.tokens.shape[1]) - 10)
    marked = batch.replace(segment_ids=segments.astype(np.int32), positions=positions.astype(np.int32))
    clean = marked.replace(mask=marked.mask * (positions > 0))
    params = {"policy": decoder.init(CONFIG, jax.random.key(9)), "teacher": model_params()}
    loss = jax.jit(functools.partial(distil.student_loss, config=config, teacher=CONFIG, weight=2.0))
    (total, count), metrics = loss(params, marked, jax.random.key(4))
    assert float(count) == float(metrics["divergence"][1]) == clean.mask[:, 1:].sum() == 2 * (batch.tokens.shape[1] - 2)
    assert float(total) == float(loss(params, clean, jax.random.key(4))[0][0])


def small_run(tmp_path, arms, **changes):
    """A run of the tiny config's smoke without base training; returns its metrics rows."""
    from rich.console import Console

    from configs.quiet_star_tiny import get_config

    config = get_config("smoke,arms=quiet_star")
    config.base.steps = 0
    config.model.update(hidden_size=16, num_layers=1)
    config.train.update(batch_size=4, log_every=1)
    config.evaluate.update(rows=8, batch_size=8, every=0)
    config.thoughts.update(changes)
    config.arms = {name: {"steps": 2, "evaluate_every": 2, **arm} for name, arm in arms.items()}
    quiet_star.run(config, tmp_path, Console(quiet=True))
    return read(tmp_path)


@pytest.mark.parametrize("ids", [(), (21,)])
def test_pause_tokens_need_an_id_that_no_text_holds(tmp_path, ids):
    """No padding token (GPT-2), or one that ends documents: refused before anything is written."""
    eos = Folds().tokenizer.eos_id
    with pytest.raises(
        UserError, match="config.arms.pause.thought_source='pause' needs an id .* config.thoughts.forbidden_ids"
    ):
        small_run(tmp_path / "run", {"pause": {"thought_source": "pause"}}, forbidden_ids=ids and (eos,))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ids, says", [
    ((-1,), r"forbidden_ids=\(-1,\) must be token ids"), (("a",), "must be token ids"), ((True,), "must be token ids"),
    ((0, 99), r"config.arms.x: forbidden_ids holds 99, and the vocabulary ends with the id 23; correct config.thoughts"),
])  # fmt: skip
def test_forbidden_ids_are_ids_of_the_vocabulary(tmp_path, ids, says):
    with pytest.raises(UserError, match=says):
        small_run(tmp_path / "run", {"x": {}}, forbidden_ids=ids)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, option, value, kind", [
    ("fold_digits", "documents", "3", "int"), ("fold_digits", "worked", "a", "float"), ("text", "length", "128", "int"),
    ("text", "limit", 1.5, "int"), ("text", "source", 5, "str"), ("text", "tokenizer", 5, "str"),
])  # fmt: skip
def test_options_of_the_text_have_their_types(tmp_path, monkeypatch, name, option, value, kind):
    monkeypatch.setattr(quiet_data, "load_tokenizer", lambda folder: Folds().tokenizer)
    given = {"source": "rows.jsonl", "tokenizer": str(tmp_path)} if name == "text" else {}
    with pytest.raises(UserError, match=rf"^config.data.{option}={value!r} must be of type {kind}"):
        quiet_data.make_corpus({"name": name, **given, option: value}, "")


def test_the_word_with_id_0_is_not_taken_for_padding():
    tokenizer = Folds().tokenizer
    assert quiet_data.thought_config({}, False, Folds()).forbidden_ids == (tokenizer.pad_id,)
    corpus = Folds()
    corpus.tokenizer = types.SimpleNamespace(pad_id=0, hf=types.SimpleNamespace(pad_token_id=None))
    assert quiet_data.thought_config({}, False, corpus).forbidden_ids == ()


class Context:
    """What `quiet_measure.EarlyStopping` needs of a context."""

    def __init__(self, folder):
        self.workdir = folder

    def say(self, text):
        pass


@pytest.mark.parametrize("resumed", [(), (20,), (10, 20), (30,)])
def test_patience_remembers_over_a_resume_and_keeps_the_best_model(tmp_path, monkeypatch, resumed):
    """NLL 1.1, 1.0, 1.2, 1.3 after 10, 20, 30, 40 steps with patience 2: it stops at 40 and step 20 is kept."""
    nll = {10: 1.1, 20: 1.0, 30: 1.2, 40: 1.3}
    monkeypatch.setattr(quiet_measure, "measure", lambda *_: {"nll/all": 0.0})  # what is reported does not decide
    monkeypatch.setattr(quiet_measure, "stopping_nll", lambda ctx, model, source: nll[int(model.params["x"][0])])
    like = Model(CONFIG, {})

    def watch():
        return quiet_measure.EarlyStopping(Context(tmp_path), "arm", like, "none", 10, 2)

    one, ends = watch(), []
    for step in range(1, 50):
        if step in resumed:  # a new process begins where the last checkpoint was, and is shown that step again
            one = watch()
            one(step - step % 10, {"x": np.full(2, step, np.float32)})
        ends.append(one(step, {"x": np.full(2, step, np.float32)}))
        if ends[-1]:
            break
    assert step == 40 and not any(ends[:-1])
    params, summary = watch().choose({"x": np.full(2, 40, np.float32)}, {"steps": 40})
    assert summary == {"steps": 40, "best_step": 20} and params["x"].tolist() == [20, 20]


def test_text_that_stops_a_training_is_not_the_text_that_is_reported(tmp_path):
    lines = [json.dumps({"text": f"{i}" * 9}) for i in range(600)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    corpus = TextCorpus(tmp_path / "text.jsonl", Folds().tokenizer, length=24)
    before = corpus.test_rows(40)
    corpus.hold_out_stopping()
    reported, stopping = ({tuple(row) for row in rows(40).tokens} for rows in (corpus.test_rows, corpus.stopping_rows))
    assert reported and stopping and not reported & stopping
    assert not np.array_equal(before.tokens, corpus.test_rows(40).tokens)
    folds = Folds()
    assert not np.array_equal(folds.test_rows(40).tokens, folds.stopping_rows(40).tokens)
