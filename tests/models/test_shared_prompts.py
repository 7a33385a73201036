"""Completions of one prompt are scored in one row, each as if it were alone."""

import numpy as np
import pytest
import torch

import qstar
from qstar.models import decoder, heads
from qstar.models import scoring as M
from tests.models.oracle import random_tokens, torch_logits, torch_model

CALLS = M.next_logprobs, M.next_scores, M._values


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Lengths of the rows that the decoder is traced for; programs of other tests are not reused."""
    lengths, forward = [], decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *a: lengths.append(a[2].shape[0]) or forward(*a))
    for call in CALLS:
        call.clear_cache()
    yield lengths
    for call in CALLS:
        call.clear_cache()


@pytest.fixture(scope="module", params=["mistral window", "gpt2", "gptj", "gemma3"])
def pair(request, tmp_path_factory):
    """A window, learned positions, parallel blocks, a window in some layers only."""
    reference, folder = torch_model(request.param), tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    return reference, qstar.load(folder)


def alone(reference, prompt, completion):
    """Log-probabilities of the completion's tokens, and whether each is the most probable one, by transformers."""
    logits = torch.tensor(torch_logits(reference, [[*prompt, *completion][:-1]])[0])[len(prompt) - 1 :]
    chosen = torch.log_softmax(logits, dim=-1)[torch.arange(len(completion)), torch.tensor(completion).long()]
    return chosen.numpy(), logits.argmax(dim=-1).numpy() == np.asarray(completion)


def test_completions_of_one_prompt_are_scored_as_by_transformers(pair, rows):
    reference, model = pair
    # 24 tokens behind 40 fill the context of 64.
    pairs = [(random_tokens(p), random_tokens(n, seed=10 + n)) for n in (3, 24, 1, 8, 17, 2) for p in (1, 2, 40)]
    pairs += [(random_tokens(3, seed=1), [9])]
    last = random_tokens(40), random_tokens(25, seed=3)  # of 25 the last is predicted, not read
    scores = M.token_scores(model, *zip(*pairs, last))
    assert max(rows) > 64  # several in one row
    for got, (head, tail) in zip(scores, [*pairs, last]):
        expected, best = alone(reference, head, tail)
        np.testing.assert_allclose(got.logprobs, expected, rtol=2e-5, atol=1e-4)
        assert got.hits.tolist() == best.tolist()
    for got, (head, tail) in zip(qstar.logprobs(model, *zip(*pairs)), pairs):
        np.testing.assert_allclose(got, alone(reference, head, tail)[0], rtol=2e-5, atol=1e-4)


def test_an_empty_completion_among_others_has_no_scores(pair):
    _, model = pair
    prompt = random_tokens(5)
    found = qstar.logprobs(model, [prompt] * 3, [[], [4, 5], []])
    assert [len(x) for x in found] == [0, 2, 0]


def test_values_behind_a_shared_prompt_are_those_of_each_solution_alone(pair):
    _, model = pair
    judge = heads.add_value_head(model, "orm")
    kernel = np.random.default_rng(0).normal(size=judge.params["value"]["kernel"].shape).astype(np.float32)
    judge = judge.replace(params={**judge.params, "value": {**judge.params["value"], "kernel": kernel}})
    prompt, solutions = random_tokens(9), [random_tokens(n, seed=n) for n in (4, 1, 12)]
    together = M.values(judge, [prompt] * 3, solutions)
    for got, solution in zip(together, solutions):
        (expected,) = M.values(judge, [prompt], [solution])
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_prompt_is_read_once_for_as_many_completions_as_a_row_holds(pair, rows):
    _, model = pair
    prompt = random_tokens(30)
    qstar.logprobs(model, [prompt] * 64, [random_tokens(4, seed=n) for n in range(64)])
    # 29 tokens and 5 for each completion: rows of 256 and 128 hold what were 64 rows of 64.
    assert rows == [128, 256]
    assert [len(row) for row in M._rows([(prompt.tolist(), [1] * 4)] * 64)] == [45, 19]


def test_rows_do_not_grow_beyond_the_limit_of_their_masks():
    pairs = [([1] * n, [2] * 100) for n in (100, 900, 2000) for _ in range(9)]
    sizes = [len(pairs[row[0]][0]) - 1 + 101 * len(row) for row in M._rows(pairs)]
    assert max(s for row, s in zip(M._rows(pairs), sizes) if len(row) > 1) <= M.SHARED_TOKENS
    assert [len(row) for row in M._rows(pairs)] == [9, *[1] * 18]
