"""What users call: logits and logprobs against transformers, padding, mistakes, and no needless recompilation."""

from __future__ import annotations

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import qstar
from qstar.errors import UserError
from qstar.models import decoder, vocabulary
from qstar.models import scoring as M
from qstar.models.config import preset
from tests.models.oracle import V, random_tokens, torch_logits, torch_model


@pytest.fixture(scope="module")
def stories(shared):
    folder = shared("weights/stories260k")
    return types.SimpleNamespace(
        model=qstar.load(folder), torch=transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    )


@pytest.fixture(scope="module", params=["mistral window", "gpt2", "gptj"])
def pair(request, tmp_path_factory):
    """A windowed, a learned-position and a parallel model: padding goes wrong in a way of its own in each."""
    reference, folder = torch_model(request.param), tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    return types.SimpleNamespace(torch=reference, model=qstar.load(folder))


def torch_logprobs(reference, prompt, completion) -> np.ndarray:
    """Of one pair, unbatched and unpadded."""
    scores = torch.log_softmax(torch.tensor(torch_logits(reference, [[*prompt, *completion]])[0]), dim=-1)
    return np.array([scores[len(prompt) - 1 + i, t] for i, t in enumerate(completion)], np.float32)


def test_importing_qstar_imports_no_jax_until_a_name_needs_it():
    code = (
        "import sys, qstar; assert 'jax' not in sys.modules; qstar.UserError; qstar.__version__; dir(qstar); "
        "assert 'jax' not in sys.modules; qstar.load; assert 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qstar.nonsense
    assert {"load", "save", "Model", "logits", "logprobs", "generate", "Completion", "UserError"} <= set(dir(qstar))


def test_stories260k_has_the_logits_of_transformers(stories):
    tokens = np.concatenate([np.ones((3, 1), np.int32), np.random.default_rng(0).integers(3, 512, (3, 47))], axis=1)
    np.testing.assert_allclose(qstar.logits(stories.model, tokens), torch_logits(stories.torch, tokens), atol=1e-4)


def test_greedy_continuation_of_stories260k_equals_that_of_transformers(stories):
    """A slow, obvious loop: the whole text again for every token."""
    length, row = 48, [1]
    while len(row) < length:
        tokens = np.array([row + [0] * (length - len(row))])
        mask = np.array([[1] * len(row) + [0] * (length - len(row))])
        row.append(int(qstar.logits(stories.model, tokens, mask)[0, len(row) - 1].argmax()))
    theirs = stories.torch.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=length - 1)
    assert row == theirs[0].tolist()
    assert stories.model.tokenizer.decode(row).strip().startswith("Once upon a time")


def test_padding_on_either_side_leaves_the_real_rows_alone(pair):
    short = random_tokens(7)
    alone = torch_logits(pair.torch, short[None])[0]
    for left, right in ((0, 6), (6, 0), (2, 4)):
        for filler in (0, V - 1):
            row = np.pad(short, (left, right), constant_values=filler)
            mask = np.pad(np.ones(7, np.int32), (left, right))
            padded = qstar.logits(pair.model, [row, random_tokens(13, seed=1)], [mask, np.ones(13)])
            np.testing.assert_allclose(padded[0, left : left + 7], alone, atol=1e-4)
            assert np.isfinite(padded).all()


def test_logprobs_are_those_of_each_pair_alone(pair):
    pairs = [
        (random_tokens(p, seed=i), random_tokens(c, seed=100 + i))
        for i, (p, c) in enumerate([(1, 1), (5, 3), (2, 40), (12, 0), (9, 7), (1, 63), (50, 1), (4, 12)])
    ]
    ours = qstar.logprobs(pair.model, *zip(*pairs))
    assert [x.dtype for x in ours] == [np.float32] * len(pairs)
    for got, (prompt, completion) in zip(ours, pairs):
        assert got.shape == completion.shape
        np.testing.assert_allclose(got, torch_logprobs(pair.torch, prompt, completion), atol=1e-4)


def test_logprobs_in_small_blocks_and_chunks_are_the_same(stories, monkeypatch):
    prompts, completions = [random_tokens(4, seed=i) for i in range(5)], [random_tokens(9, seed=i) for i in range(5)]
    expected = qstar.logprobs(stories.model, prompts, completions)
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * 4 * 512)
    monkeypatch.setattr(vocabulary, "MIN_CHUNK", 1)
    monkeypatch.setattr(M, "CHUNK_TOKENS", 32)  # two rows of the shortest bucket
    M.next_logprobs.clear_cache()
    shapes = []
    logits = vocabulary.head_logits
    monkeypatch.setattr(vocabulary, "head_logits", lambda h, *head: shapes.append(h.shape[:-1]) or logits(h, *head))
    for a, b in zip(qstar.logprobs(stories.model, prompts, completions), expected):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert set(shapes) == {(4,)}  # at most 4 positions' logits at once
    M.next_logprobs.clear_cache()


def test_text_is_scored_like_its_tokens(stories):
    prompt, completion = "Once upon a time", ", there was a little girl"
    ids = stories.model.tokenizer.encode(prompt + completion, bos=True)
    cut = len(stories.model.tokenizer.encode(prompt, bos=True))
    (text,) = qstar.logprobs(stories.model, [prompt], [completion])
    np.testing.assert_allclose(text, torch_logprobs(stories.torch, ids[:cut], ids[cut:]), atol=1e-4)
    assert text.sum() > -10  # a likely sentence: no spurious space at the seam
    mixed = qstar.logprobs(stories.model, [prompt, ids[:cut]], [ids[cut:], completion])
    np.testing.assert_allclose(mixed[0], text, atol=1e-5)
    assert len(mixed[1]) >= len(text)  # after ids, a text is encoded by itself


def test_repeated_calls_do_not_recompile(stories):
    tokens = random_tokens(2, 9)
    qstar.logits(stories.model, tokens)
    qstar.logprobs(stories.model, [[1, 2]] * 3, [[3, 4]] * 3)
    before = M._logits._cache_size(), M.next_logprobs._cache_size()
    for n in (3, 4):  # rows are filled up to a power of two, lengths to a bucket
        qstar.logits(stories.model, tokens + n)
        qstar.logprobs(stories.model, [[1, 2, 3]] * n, [[3, 4, n]] * n)
    assert (M._logits._cache_size(), M.next_logprobs._cache_size()) == before


def test_float32_means_float32_on_every_device(pair):
    """Without an explicit precision a TPU multiplies in bfloat16 and a GPU in TF32, which a CPU test cannot see."""
    tokens = jnp.zeros((2, 16), jnp.int32)
    for score, more in ((M._logits, ()), (M.next_logprobs, (tokens, False))):
        text = score.lower(pair.model.params, pair.model.config, tokens, tokens, *more).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert len(products) >= 7 and all("HIGHEST, HIGHEST" in line for line in products), products


def test_mistakes_are_named(stories):
    nameless = stories.model.replace(tokenizer=None)
    long = [1] * 513
    for call, says in [
        (lambda: qstar.logprobs(nameless, ["a"], [[1]]), "no tokenizer"),
        (lambda: qstar.logprobs(nameless, [[1]], ["a"]), "no tokenizer"),
        (lambda: qstar.logprobs(nameless, "a", ["a"]), "are lists"),
        (lambda: qstar.logprobs(nameless, [[1]], []), "1 prompts but 0 completions"),
        (lambda: qstar.logprobs(nameless, [[1], []], [[1], [1]]), "prompt 1 is empty"),
        (lambda: qstar.logprobs(nameless, [[1], long[:510]], [[1], [1] * 4]), "prompt 1 has 514 .*max_positions.*512"),
        (lambda: qstar.logits(nameless, [long]), "prompt 0 has 513 tokens.*max_positions.*512"),
        (lambda: qstar.logprobs(nameless, [[1]], [[512]]), "token id 512 is outside"),
        (lambda: qstar.logits(nameless, [[1, -1]]), "token id -1 is outside"),
        (lambda: qstar.logits(nameless, [[1, 2], [3]]), "rectangle"),
        (lambda: qstar.logits(nameless, [[2**40]]), "token id 1099511627776 is outside"),
        (lambda: qstar.logits(nameless, [[1.7]]), r"whole numbers, and these are float64: \[1.7\]"),
        (lambda: qstar.logits(nameless, [[]]), "T at least 1"),
        (lambda: qstar.logits(nameless, [1, 2]), r"must both have shape \[B, T\]"),
        (lambda: qstar.logits(nameless, [[1, 2]], [[1]]), r"tokens \(1, 2\) and mask \(1, 1\)"),
    ]:
        with pytest.raises(UserError, match=says) as e:
            call()
        assert "\n" not in str(e.value)


def test_padding_does_not_count_towards_the_context(stories):
    tokens, mask = np.ones((1, 600), np.int32), np.zeros((1, 600), np.int32)
    mask[0, 80:592] = 1
    assert np.isfinite(qstar.logits(stories.model, tokens, mask)).all()
    assert len(qstar.logprobs(stories.model, [[1] * 500], [[1] * 12])[0]) == 12  # exactly the context


def test_no_pairs_give_no_scores(stories):
    assert qstar.logprobs(stories.model, [], []) == []


def test_models_print_shortly_and_are_replaced_not_changed():
    config = preset("tiny", hidden_size=16, num_layers=1, num_heads=2)
    model = qstar.Model(config, jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0)))
    assert len(repr(model)) < 150 and "tiny" in repr(model)
    assert model.replace(mesh=None).params is model.params
    with pytest.raises(AttributeError):
        model.config = None  # type: ignore[misc]
    out = qstar.logits(model, jnp.zeros((2, 3), jnp.int32))
    assert out.shape == (2, 3, 20) and out.dtype == jnp.float32
