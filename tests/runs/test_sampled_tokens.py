"""Sampled ids are the ids that are kept, trained on and scored, whatever the tokenizer."""

import dataclasses

import jax
import numpy as np
import pytest

import qstar
from qstar.methods import verifier
from qstar.methods.preference_data import PairSettings, build_pairs, merge_duplicates, sampled_solutions, step_ends
from qstar.methods.v_star_eval import score_rows
from qstar.models.config import preset
from qstar.models.model import Model
from qstar.models.scoring import init
from qstar.runs import rollouts
from qstar.runs.rollouts import SampleSettings, sample_rollouts, to_example
from qstar.tasks.base import Problem, Task
from qstar.types import Rollout
from tests.text.kinds import KINDS, tokenizer

PROMPTS = ["Q: What did Tom see?\nA:", "7 + 5 =", "def f(x):\n", "Q: one\n\nA: "]
PREFIX = "Q: 1 + 1?\nA: 2\n\n"


class Writing(Task):
    """Everything that is written is right."""

    name, stop = "writing", ("k",)

    def prefix(self, hint=False):
        return PREFIX

    def prompt(self, problem, hint=False):
        return f"(a hint) {problem.question}" if hint else problem.question

    def parse(self, completion):
        return completion

    def correct(self, problem, answer):
        return True

    def audit(self, problem, completion):
        return None


@pytest.fixture(params=KINDS)
def model(request):
    """A tiny model with random weights: it writes parts of characters and special tokens, too, and ends at odd ones."""
    text = tokenizer(request.param)
    config = preset("tiny", vocab_size=text.vocab_size, hidden_size=16, num_layers=1, num_heads=2, eos_id=text.eos_id)
    ends = tuple(range(5, text.vocab_size, 17))
    return Model(config.replace(also_eos=ends), init(config, jax.random.key(0)), text)


@pytest.fixture
def attempts(model, tmp_path, monkeypatch):
    """(what the sampler returned, the records), hinted."""
    found, stream = [], rollouts.stream

    def watch(*args, **kwargs):
        for i, j, done in stream(*args, **kwargs):
            found.append((i, j, done))
            yield i, j, done

    monkeypatch.setattr(rollouts, "stream", watch)
    problems = [Problem(str(i), p, "") for i, p in enumerate(PROMPTS)]
    settings = SampleSettings(max_new_tokens=12, temperature=1.0)
    rows = sample_rollouts(
        model, Writing(), problems, settings, k=24, hinted=True, iteration=1, seed=0, folder=tmp_path, stage="s"
    )
    return [done for _, _, done in sorted(found, key=lambda f: f[:2])], rows


def test_sampled_ids_are_trained_and_scored(model, attempts, monkeypatch):
    text, (drawn, rows), scored = model.tokenizer, attempts, []
    monkeypatch.setattr(
        verifier, "logprobs", lambda m, p, c: scored.append((p, c)) or [np.zeros(len(x), np.float32) for x in c]
    )
    score_rows(None, rows, model, {})
    exact, pairs = 0, [(p, c) for p, c in zip(*scored[0])]  # equal ones are scored once
    for done, row in zip(drawn, rows, strict=True):
        head = text.encode(row.prompt, bos=True)
        assert Rollout(**{**dataclasses.asdict(row)}) == row
        example = to_example(text, PROMPTS[int(row.problem_id)], row.completion, row.tokens)  # without the hint
        assert example.prompt == text.encode(PROMPTS[int(row.problem_id)], bos=True)
        assert example.completion == row.tokens and (head, row.tokens) in pairs
        ended = done.tokens[-1:] if done.tokens and done.tokens[-1] in model.stop_ids else []
        body = done.tokens[: len(done.tokens) - len(ended)]
        assert text.decode(row.tokens[:-1], after=head) == row.completion == done.text
        if text.decode(body, after=head) == done.text:  # no stop string within a token
            exact += 1
            assert row.tokens == [*body, *(ended or [text.eos_id])]
        else:
            assert row.tokens[: len(body) - 1] == body[:-1]
    assert exact > len(rows) / 2 and len({row.tokens[-1] for row in rows}) > 3


def test_ids_go_through_buffers_and_pairs(attempts):
    rows = attempts[1]
    half = [dataclasses.replace(r, hinted=False, correct=i % 2 == 0) for i, r in enumerate(rows) if r.problem_id == "0"]
    # Reversed: the first of equal texts with equal labels.
    ids = {(" ".join(r.completion.split()), r.correct): r.tokens for r in reversed(half)}
    solutions = merge_duplicates(sampled_solutions(half))
    assert {s.key[1:]: s.tokens for s in solutions} == ids
    pairs = build_pairs(solutions, PairSettings(), 0)
    assert pairs and all(ids[" ".join(p.chosen.split()), True] == p.chosen_tokens for p in pairs)
    assert all(ids[" ".join(p.rejected.split()), False] == p.rejected_tokens for p in pairs)


def test_records_without_ids_are_encoded(model):
    text = model.tokenizer
    row = Rollout("p", 1, 0, False, "", PROMPTS[0], " a b", "b", "b", True, "kept", "", False, None, -1.0, 3)
    head, tail = text.encode_pair(PROMPTS[0], " a b")
    example = to_example(text, row.prompt, row.completion, row.tokens)
    assert (example.prompt, example.completion) == (head, [*tail, text.eos_id])


def test_steps_end_where_the_sampled_tokens_end(model):
    """An independent reference: the text of the tokens so far, all prefixes, from transformers itself."""
    text, written = model.tokenizer, " x = 1\n  y = 22\nz\n"
    example = to_example(text, PROMPTS[0], written)
    decode = lambda ids: text.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # noqa: E731
    begin = len(decode(example.prompt))
    reach = [len(decode(example.prompt + example.completion[: k + 1])) - begin for k in range(len(example.completion))]
    ends = [next(k for k, n in enumerate(reach) if n >= at) for at in Task().steps(written)[:-1]]
    assert step_ends(Task().steps, text, example, written) == [*ends, len(example.completion) - 1] and len(ends) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_real_completion_are_the_sampled_log_probabilities(kind, request):
    text = tokenizer(kind)
    config = preset("tiny", vocab_size=text.vocab_size, hidden_size=16, num_layers=1, num_heads=2, eos_id=text.eos_id)
    model = Model(config, init(config, jax.random.key(1)), text)
    (found,) = qstar.generate(model, PROMPTS[:1], max_new_tokens=6, n=4, temperature=1.0)
    score = verifier.score(verifier.Verifier(model), PROMPTS[:1] * 4, [c.tokens for c in found])
    assert score == pytest.approx([sum(c.logprobs) for c in found], abs=1e-3)
