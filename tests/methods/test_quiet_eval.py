"""The official zero-shot metric equals its definition, spelt out on full logits of every position, problem by problem."""

import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared

from qstar.commands import evaluate as evaluate_command
from qstar.data.sources import read_jsonl, write_jsonl
from qstar.errors import UserError
from qstar.methods import quiet_eval as q
from qstar.methods.quiet_measure import compare_arms
from qstar.models import decoder
from qstar.models.model import Model, save
from qstar.models.thought_config import ThoughtConfig
from qstar.tasks import make_task
from qstar.text.tokenizer import char_tokenizer, load_tokenizer
from qstar.thoughts.replay import replay
from qstar.train.stats import bootstrap_ci
from qstar.types import Completion
from tests.text import kinds
from tests.thoughts.families import LLAMA, think

ALPHABET = "~^" + "".join(map(chr, range(32, 94))) + "_`abcdefghijklmnopqrstuvwxyz\n"
QUESTIONS = [  # texts of two lengths, so that little compiles
    ("What is 1 + 1 then?", "2"),
    ("How many are 7 x 6", "42"),
    ("So 999 + 1 is?", "1,000"),
    ("What is 5 less 8?", "-3"),
]


@functools.cache
def thinker(max_positions=96):
    """A random model that thinks, in characters; its mixing head is open."""
    thoughts = ThoughtConfig(thought_tokens=2, talk_tokens=2, thoughts_per_position=2, forbidden_ids=(0, 1))
    config = LLAMA.replace(
        vocab_size=len(ALPHABET), max_positions=max_positions, thoughts=thoughts, family="llama", eos_id=1
    )
    tree = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
    keys = jax.tree.unflatten(
        jax.tree.structure(tree), list(jax.random.split(jax.random.key(1), len(jax.tree.leaves(tree))))
    )
    tree = jax.tree.map(lambda p, k: p + 0.15 * jax.random.normal(k, p.shape), tree, keys)
    return Model(config, tree, char_tokenizer(ALPHABET, pad="~", eos="^"))


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    write_jsonl(path, [{"question": a, "answer": f"so\n#### {b}"} for a, b in QUESTIONS])
    return make_task("gsm8k", train=str(path), test=str(path))


@pytest.fixture(scope="module")
def quiz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "quiz.jsonl"
    choices = [{"label": label, "text": f"the {label.lower()}"} for label in "ABCDE"]
    rows = [{"question": {"stem": f"Which {n}?", "choices": choices}, "answerKey": key} for n, key in enumerate("CEA")]
    write_jsonl(path, [{"id": str(n), **row} for n, row in enumerate(rows)])
    return make_task("commonsense_qa", train=str(path), test=str(path))


@functools.partial(jax.jit, static_argnums=1)
def everywhere(params, config, tokens, mask):
    """All logits [N, V] of one text, without thoughts and after greedy ones at every position."""
    thoughts = think(params, config, tokens, mask, jax.random.key(9), passes=1, temperature=0.0).tokens
    full = replay(params, config, tokens, mask, thoughts)
    return full.base_logits[0], full.talk_mixed_logits[0, 0]


def by_hand(model, text, answer, symbols):
    """(expected, exact) with greedy thoughts and without, from all logits of one unpadded text that thinks everywhere."""
    ids = model.tokenizer.encode(text + answer)
    tokens, mask = jnp.asarray([ids]), jnp.ones((1, len(ids)), jnp.int32)
    config = model.config.replace(thoughts=model.config.thoughts.replace(talk_tokens=1))
    base, mixed = everywhere(model.params, config, tokens, mask)
    allowed = [ALPHABET.index(s) for s in symbols]
    out = []
    for logits in (mixed, base):
        probability, exact = 1.0, True
        for j in range(len(text) - 1, len(ids) - 1):
            if ids[j + 1] in allowed:
                p = np.exp(np.asarray(logits[j], np.float64) - float(jnp.max(logits[j])))
                probability *= p[ids[j + 1]] / p[allowed].sum()
                exact &= max(allowed, key=lambda i: p[i]) == ids[j + 1]
        out.append((probability, float(exact)))
    return out


@pytest.mark.parametrize("name", ["sums", "quiz"])
def test_expected_and_exact_equal_their_definition(request, name):
    task, model = request.getfixturevalue(name), thinker()
    found = q.expected_accuracy(model, task, temperature=0.0, batch_size=3)
    wanted = []
    for p in task.problems("test"):
        if name == "sums":
            text, answer, symbols = f"Q: {p.question}\nA:", f" {p.meta['written']}\n", "0123456789\n"
        else:
            lines = "".join(f"({k}) the {k.lower()}\n" for k in "ABCDE")
            text, answer, symbols = f"Q: {p.question}\n{lines}A:", f" {p.gold.upper()}\n", "ABCDE\n"
        wanted.append(by_hand(model, text, answer, symbols))
    for k, suffix in enumerate(("", "_base")):
        expected, exact = ([w[k][i] for w in wanted] for i in (0, 1))
        np.testing.assert_allclose(found[f"expected{suffix}"], np.mean(expected), rtol=1e-4)
        bounds = [found[f"expected{suffix}_{end}"] for end in ("low", "high")]
        np.testing.assert_allclose(bounds, bootstrap_ci(expected), rtol=1e-4)
        assert found[f"exact{suffix}"] == np.mean(exact)
    assert found["problems"] == len(wanted) and found["expected"] != found["expected_base"]


def test_exact_is_one_where_the_likeliest_symbols_are_the_answer():
    """The answer that greedy decoding among the symbols writes is exactly matched, and only that one."""
    found = q.AnswerLogits(
        base=jnp.asarray([[[3.0, 1.0], [0.0, 2.0]], [[3.0, 1.0], [2.0, 0.0]]]),
        mixed=jnp.zeros((2, 0, 2, 2)),
        weight=jnp.zeros((2, 0, 2)),
    )
    right = np.asarray([[0, 1], [0, 1]])
    assert q.score_answers(found, right, np.ones((2, 2)))["exact_base"].tolist() == [1.0, 0.0]
    assert q.score_answers(found, right, np.asarray([[1, 1], [1, 0]]))["exact_base"].tolist() == [1.0, 1.0]


def test_several_thoughts_are_averaged_as_whole_answers():
    p = jnp.log(jnp.asarray([[[[0.9, 0.1], [0.5, 0.5]], [[0.1, 0.9], [0.2, 0.8]]]]))  # [B=1, P=2, M=2, A=2]
    found = q.AnswerLogits(p[:, 0], p, jnp.asarray([[[0.5, 0.1], [0.3, 0.9]]]))
    scores = q.score_answers(found, np.zeros((1, 2), int), np.ones((1, 2)))
    np.testing.assert_allclose(scores["expected"], [(0.9 * 0.5 + 0.1 * 0.2) / 2], rtol=1e-6)
    np.testing.assert_allclose(scores["weight"], [0.45], rtol=1e-6)


def test_without_thoughts_only_the_base_is_measured(sums):
    model = thinker()
    off, on = (q.expected_accuracy(model, sums, thoughts=t, temperature=0.0, batch_size=3) for t in (False, True))
    assert {k: on[k] for k in off} == pytest.approx(off, rel=1e-5) and "expected" not in off
    mute = model.replace(params={k: v for k, v in model.params.items() if k not in ("thoughts", "mixing")})
    with pytest.raises(UserError, match="cannot think"):
        q.expected_accuracy(mute, sums)


def test_sampled_thoughts_depend_on_the_seed_alone(sums):
    runs = [q.expected_accuracy(thinker(), sums, passes=2, seed=s, batch_size=4)["expected"] for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_no_logits_of_the_vocabulary_are_computed():
    """The largest array of the compiled program is far below [B, N, V]: the vocabulary product is of chosen columns."""
    model = thinker()
    config = q.thinking_config(model, True)
    tokens = jnp.zeros((2, 64), jnp.int32)
    positions = jnp.zeros((2, 4), jnp.int32)
    args = (tokens, tokens + 1, positions, jnp.arange(11), jax.random.key(0), jnp.float32(1.0))
    text = str(jax.make_jaxpr(lambda p: q.answer_logits(p, config, *args, passes=1))(model.params))
    V = len(ALPHABET)
    assert f"64,{V}]" not in text and f"128,{V}]" not in text


def test_gsm8k_rows(tmp_path):
    rows = [r for r in read_jsonl(shared("data/gsm8k/test.jsonl")) if set(r["question"]) <= set(ALPHABET)]
    rows = [r for r in rows if len(r["question"]) < 120][:1]
    write_jsonl(tmp_path / "test.jsonl", rows)
    task = make_task("gsm8k", train=str(tmp_path / "test.jsonl"), test=str(tmp_path / "test.jsonl"))
    model = thinker(256)
    found = q.expected_accuracy(model, task, temperature=0.0, batch_size=1)
    wanted = [
        by_hand(model, f"Q: {r['question']}\nA:", r["answer"].split("####")[-1] + "\n", "0123456789\n") for r in rows
    ]
    np.testing.assert_allclose(found["expected"], np.mean([w[0][0] for w in wanted]), rtol=1e-4)
    np.testing.assert_allclose(found["expected_base"], np.mean([w[1][0] for w in wanted]), rtol=1e-4)


@pytest.mark.parametrize("kind", ["characters", "gpt2", "smollm2-135m-instruct", "gemma-3-270m"])
def test_every_symbol_of_an_answer_has_an_id(kind):
    """Of byte-level vocabularies too, where two ends of a line are one token."""
    tokenizer = kinds.tokenizer(kind)
    ids = q.symbol_ids(tokenizer, tuple("1234567890\n"))
    assert ids["\n"] == tokenizer.encode("7\n")[-1] and len(set(ids.values())) == 11


def test_mistrals_symbols_are_those_of_the_official_code():
    tokenizer = load_tokenizer(shared("data/tokenizers/mistral_v1"))
    digits = q.symbol_ids(tokenizer, tuple("1234567890\n"))
    assert list(digits.values()) == [28740, 28750, 28770, 28781, 28782, 28784, 28787, 28783, 28774, 28734, 13]
    assert list(q.symbol_ids(tokenizer, ("A", "B", "C", "D", "E", "\n")).values()) == [330, 365, 334, 384, 413, 13]
    model = thinker().replace(tokenizer=tokenizer)
    text = q.ZeroShot("Q: Two?\nA:", " 1,072\n", tuple("0123456789\n"))
    row = q.tokenize(model, None, text, digits)
    assert [row.tokens[p + 1] for p in row.positions] == [28740, 28734, 28787, 28750, 13]  # the comma is passed over


def test_a_tokenizer_that_joins_digits_is_refused(sums, tmp_path):
    for source, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(shared(f"data/tokenizers/gpt2/{source}"), tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    model = thinker().replace(tokenizer=load_tokenizer(tmp_path))
    with pytest.raises(UserError, match="symbol by symbol"):
        q.expected_accuracy(model, sums)


def test_a_text_that_is_too_long_is_named(sums):
    with pytest.raises(UserError, match=r"problem gsm8k-test-0000\d: its \d+ tokens exceed the model's context of 24"):
        q.expected_accuracy(thinker(24), sums)


def test_tasks_without_short_answers_are_refused():
    with pytest.raises(UserError, match="arithmetic has no zero-shot text"):
        q.expected_accuracy(thinker(), make_task("arithmetic"), limit=2)
    with pytest.raises(UserError, match="arithmetic has no step-by-step prompt"):
        q.zero_shot_cot(thinker(), make_task("arithmetic"), limit=2)


def test_chain_of_thought_asks_twice_and_takes_the_first_whole_number(sums, monkeypatch):
    """Two of three chains say 42 (once with a comma behind): the vote is right, one sample is right in 2 of 3 cases."""
    seen = []

    def scripted(model, prompts, *, n=1, thoughts, **rest):
        seen.append((list(prompts), n, thoughts, rest))
        if n > 1:
            return [[Completion(f" chain {k}", [], [], [], True) for k in range(n)] for _ in prompts]
        texts = [(" 42, sir", " about 41", " is 42.0")[int(p.split("chain ")[1][0])] for p in prompts]
        return [[Completion(t, [], [], [], True)] for t in texts]

    monkeypatch.setattr(q, "generate", scripted)
    found = q.zero_shot_cot(thinker(), sums, samples=3, limit=2, max_new_tokens=20)
    assert seen[0][0][1] == "Q: How many are 7 x 6\nA: Let's think step by step." and seen[0][3]["stop"] == ("Q:",)
    assert seen[1][0][3] == seen[0][0][1] + " chain 0\nTherefore, the answer (arabic numerals) is"
    assert [bool(s[2]) for s in seen] == [False, False, True, True] and seen[0][1] == 3
    assert found["pass@1"] == pytest.approx((0 + 2 / 3) / 2) == found["pass@1_base"]
    assert found["majority@2"] == pytest.approx((0 + (1 + 0.5 + 0.5) / 3) / 2)


def test_the_command_prints_both_numbers(sums, tmp_path, capsys):
    model = thinker(128)
    save(model, tmp_path / "model")
    path = tmp_path / "sums.jsonl"
    write_jsonl(path, [{"question": a, "answer": f"so\n#### {b}"} for a, b in QUESTIONS])
    options = json.dumps({"train": str(path), "test": str(path)})
    flags = [f"--model={tmp_path / 'model'}", "--task=gsm8k", f"--task-options={options}", "--json", "--device=cpu"]
    evaluate_command.main([*flags, "--metric=expected", "--thought-temperature=0"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == pytest.approx(q.expected_accuracy(model, sums, temperature=0.0), rel=1e-5)
    evaluate_command.main([*flags, "--metric=cot", "--samples=2", "--max-new-tokens=4", "--limit=2", "--thoughts=on"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"majority@2", "majority@2_base", "pass@1", "pass@1_base"} <= found.keys()
    with pytest.raises(
        UserError, match="--out does not go with --metric=expected, only with --harness or --metric=answers"
    ):
        evaluate_command.main([*flags, "--metric=expected", "--out=x"])


def test_arms_are_compared_on_the_same_tokens_row_by_row(tmp_path):
    rng, n = np.random.default_rng(0), 40
    counts = rng.integers(0, 9, n)
    counts[0] = 0  # a row without tokens of the kind is no observation
    with_thoughts, without, plain = (np.where(counts > 0, rng.random(n) + x, 0.0) for x in (1.0, 1.4, 1.2))
    rows = {"count": counts.tolist(), "nll": with_thoughts.tolist(), "nll_base": without.tolist()}
    found = {
        "quiet_star": {"nll_greedy/all": 1.0, "rows": {"all": rows}},
        "same_text": {"rows": {"all": {"count": counts.tolist(), "nll": plain.tolist()}}},
        "generated": {},
    }
    ctx = types.SimpleNamespace(workdir=tmp_path, table=lambda title, rows: None)
    compare_arms(ctx, found)
    table = {row["second"]: row for row in read_jsonl(tmp_path / "comparison.jsonl")}
    assert table.keys() == {"same_text", "quiet_star, without thoughts"}
    for name, other in (("same_text", plain), ("quiet_star, without thoughts", without)):
        row = table[name]
        assert row["difference"] == pytest.approx((with_thoughts - other).sum() / counts.sum())
        assert row["low"] < row["difference"] < row["high"] < 0  # drawn .2 and .4 apart, in some 200 tokens
