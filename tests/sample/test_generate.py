"""Sampling against the slow, obvious loop: the whole text through `qstar.logits` for every single token."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qstar
from qstar import UserError
from qstar.models import decoder, scoring
from qstar.models.config import ModelConfig
from qstar.models.model import Model
from qstar.sample import batching
from qstar.sample import prompts as prompt_module
from qstar.sample import sampler as S
from qstar.sample.logits import SamplingParams
from qstar.sample.prompts import SamplingOptions, encode_prompts
from tests.sample.test_logits import warped

NEW = 24  # longer than one look for stop strings, and than the window below
V = 41
init = jax.jit(decoder.init, static_argnums=0)
BASE = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=64,
    init_std=0.3,
    tie_embeddings=False,
)
CONFIGS = {
    "gqa": BASE,
    "window": BASE.replace(sliding_window=6, num_kv_heads=1, num_layers=1),
    "mixed": BASE.replace(
        num_layers=3,
        sliding_window=6,
        windowed=(True, False, True),
        window_theta=100.0,
        rotated=(True, True, False),
        norm_place="post",
        qk_norm_wide=True,
        attn_softcap=5.0,
        final_softcap=9.0,
    ),
    "learned": BASE.replace(
        num_layers=1,
        position="learned",
        norm="layer",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        num_kv_heads=4,
        activation="gelu_tanh",
        tie_embeddings=True,
    ),
}
PROMPTS = [np.random.default_rng(i).integers(0, V, n).tolist() for i, n in enumerate([9, 1, 14, 3, 12, 8, 5, 2, 16])]


def slow_greedy(model: Model, prompts, new=NEW, eos=None) -> list[list[int]]:
    """Completions token by token, each from a forward pass over everything before it."""
    length = max(map(len, prompts)) + new
    rows, done = [list(p) for p in prompts], [False] * len(prompts)
    for _ in range(new):
        tokens, mask = np.zeros((2, len(rows), length), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, 1
        logits = np.asarray(qstar.logits(model, tokens, mask))
        for i, row in enumerate(rows):
            if not done[i]:
                row.append(int(logits[i, len(row) - 1].argmax()))
                done[i] = row[-1] == eos
    return [row[len(p) :] for row, p in zip(rows, prompts)]


@functools.cache
def made(name: str) -> tuple[Model, tuple]:
    """A random model whose EOS ends some of the greedy completions below, and these completions."""
    params = init(CONFIGS[name], jax.random.key(len(name)))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), params)
    model = Model(CONFIGS[name], params)
    free = slow_greedy(model, PROMPTS)
    enders = {t: sum(t in row[1:-1] for row in free) for row in free for t in row}
    eos = max(enders, key=lambda t: (min(enders[t], len(free) - 3), -t))
    model = model.replace(config=model.config.replace(eos_id=eos))
    return model, tuple(slow_greedy(model, PROMPTS, eos=eos))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    return made(request.param)


def tokens_of(out):
    return [[c.tokens for c in samples] for samples in out]


# ------------------------------------------------------------------------------------------------------------ greedy


def test_greedy_in_few_slots_is_the_slow_loop(case):
    """Nine prompts of many lengths, two samples each, in four slots: slots are refilled while others go on."""
    model, expected = case
    ended = [row[-1] == model.config.eos_id for row in expected]
    assert any(ended) and not all(ended) and len({len(row) for row in expected}) > 2  # rows stop independently
    out = qstar.generate(model, PROMPTS, max_new_tokens=NEW, temperature=0, n=2, slots=4)
    for i, (samples, row) in enumerate(zip(out, expected)):
        assert len(samples) == 2
        for c in samples:
            assert c.tokens == row and c.text is None, i
            assert c.stopped == ended[i] and (len(row) == NEW or c.stopped)
            assert c.tokens.count(model.config.eos_id) == c.stopped  # the EOS is among the tokens
            assert len(c.logprobs) == len(c.sample_logprobs) == len(row)
            assert c.sample_logprobs == [0.0] * len(row)


def test_each_of_several_eos_ids_ends_a_row():
    model, expected = made("window")
    eos = model.config.eos_id
    unused = next(t for t in range(V) if all(t not in row for row in expected))
    both = model.replace(config=model.config.replace(eos_id=unused, also_eos=(eos,)))
    assert both.stop_ids == (unused, eos)
    out = qstar.generate(both, PROMPTS, max_new_tokens=NEW, temperature=0, slots=4)
    assert tokens_of(out) == [[row] for row in expected]


def test_a_prompt_alone_gives_what_it_gives_in_a_mixed_batch(case):
    model, expected = case
    for i in (1, 8) if model.config.num_kv_heads == 2 else (8,):  # the shortest in a bucket of its own, and the longest
        ((out,),) = tokens_of(qstar.generate(model, [PROMPTS[i]], max_new_tokens=NEW, temperature=0, slots=4))
        assert out == expected[i]


def test_a_shared_prefix_is_the_same_as_prompts_that_begin_with_it(case):
    model, _ = case
    prefix = PROMPTS[2][:11]
    expected = slow_greedy(model, [prefix + p for p in PROMPTS], eos=model.config.eos_id)
    out = qstar.generate(model, PROMPTS, prefix=prefix, max_new_tokens=NEW, temperature=0, slots=4)
    assert tokens_of(out) == [[row] for row in expected]


def test_what_many_prompts_begin_with_is_run_once_although_no_prefix_is_named(monkeypatch):
    model, _ = made("gqa")
    prefix, run = PROMPTS[2][:11], []
    monkeypatch.setattr(prompt_module, "LEAST_SHARED", 11)
    before = batching._prefill_prefix
    monkeypatch.setattr(batching, "_prefill_prefix", lambda *args: run.append(args[-1]) or before(*args))
    expected = slow_greedy(model, [prefix + p for p in PROMPTS], eos=model.config.eos_id)
    out = qstar.generate(model, [prefix + p for p in PROMPTS], max_new_tokens=NEW, temperature=0, slots=4)
    assert tokens_of(out) == [[row] for row in expected] and run == [prefix]
    qstar.generate(model, [prefix + PROMPTS[0]], max_new_tokens=1, temperature=0, slots=4)  # nothing to share
    qstar.generate(model, PROMPTS, max_new_tokens=1, temperature=0, slots=4)
    assert run[1:] == [[], []]


def test_buckets_of_lengths_do_not_change_the_answer(monkeypatch):
    model, expected = made("gqa")
    monkeypatch.setattr(batching, "MAX_SLOTS", 4)  # so that a few rows fill a bucket of their own
    assert len(batching._buckets([len(p) for p in PROMPTS], 1)) > 1
    out = qstar.generate(model, PROMPTS, max_new_tokens=NEW, temperature=0, slots=4)
    assert tokens_of(out) == [[row] for row in expected]


def test_one_long_prompt_does_not_pad_the_short_ones():
    assert batching._buckets([10, 3764, 12, 40], 4) == [(48, [0, 2, 3]), (4096, [1])]
    assert batching._buckets([5, 7, 200, 210], 1) == [(8, [0, 1]), (256, [2, 3])]


def test_the_last_rows_of_a_batch_are_decoded_in_fewer_slots(monkeypatch):
    """16 slots, then 4, then 1: the tokens stay those of the slow loop."""
    model, expected = made("gqa")
    monkeypatch.setattr(batching, "LEAST_SLOTS", 1)
    slots, decode = [], S.decode
    monkeypatch.setattr(
        S, "decode", lambda params, sampler, *args: slots.append(sampler.slots) or decode(params, sampler, *args)
    )
    out = qstar.generate(model, PROMPTS, max_new_tokens=NEW, temperature=0, slots=16)
    assert tokens_of(out) == [[row] for row in expected]
    assert slots == sorted(slots, reverse=True) and set(slots) >= {16, 4}


def test_one_token():
    model, expected = made("gqa")
    out = qstar.generate(model, iter(PROMPTS), max_new_tokens=1, temperature=0, slots=4)
    assert tokens_of(out) == [[row[:1]] for row in expected]
    assert [c.stopped for (c,) in out] == [row[0] == model.config.eos_id for row in expected]


def test_nan_is_no_distribution():
    model, _ = made("gqa")
    broken = model.replace(params=jax.tree.map(lambda p: p * np.nan, model.params))
    with pytest.raises(UserError, match="logits are NaN .* --dtype=float32"):
        qstar.generate(broken, PROMPTS, max_new_tokens=1, temperature=0, slots=4)


def test_no_prompts_no_completions():
    assert qstar.generate(made("gqa")[0], [], max_new_tokens=3) == []


# ---------------------------------------------------------------------------------------------------------- sampling

SAMPLING = dict(max_new_tokens=NEW, temperature=0.8, top_k=20, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def sampled(case):
    return case[0], qstar.generate(case[0], PROMPTS, n=3, slots=4, **SAMPLING)


def test_every_token_is_the_one_its_random_number_points_at(sampled):
    """The uniform number of token t is drawn from (seed, prompt, sample, t); the distribution is transformers'."""
    model, out = sampled
    for i, samples in enumerate(out[:4]):
        for j, c in enumerate(samples):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SAMPLING["seed"]), i), j)
            row = np.asarray([PROMPTS[i] + c.tokens + [0] * (40 - len(PROMPTS[i]) - len(c.tokens))])
            logits = np.asarray(qstar.logits(model, row))[0, len(PROMPTS[i]) - 1 :]
            for t, token in enumerate(c.tokens):
                u = float(jax.random.uniform(jax.random.fold_in(key, t)))
                probs = warped(logits[t], 0.8, 20, 0.9)
                edges = np.concatenate([[0], np.cumsum(probs)])
                assert edges[token] - 1e-4 <= u <= edges[token + 1] + 1e-4, (i, j, t)
                assert c.sample_logprobs[t] == pytest.approx(np.log(probs[token]), abs=1e-3)


def test_reported_logprobs_are_those_a_trainer_computes(sampled):
    model, out = sampled
    pairs = [(PROMPTS[i], c) for i, samples in enumerate(out) for c in samples]
    scores = qstar.logprobs(model, [p for p, _ in pairs], [c.tokens for _, c in pairs])
    for (_, c), score in zip(pairs, scores):
        np.testing.assert_allclose(c.logprobs, score, atol=1e-4)
        assert (np.array(c.sample_logprobs) <= 0).all()


def test_samples_differ_and_draws_depend_on_nothing_but_seed_prompt_and_sample(sampled):
    model, out = sampled
    assert all(len({tuple(c.tokens) for c in samples}) > 1 for samples in out)
    generate = functools.partial(qstar.generate, model, **SAMPLING)
    assert tokens_of(generate(PROMPTS, n=3, slots=4)) == tokens_of(out)
    assert tokens_of(generate(PROMPTS[:3], n=2, slots=4)) == [row[:2] for row in tokens_of(out)[:3]]
    other = qstar.generate(model, PROMPTS, n=3, slots=4, **{**SAMPLING, "seed": 6})
    assert all(a != b for a, b in zip(tokens_of(other), tokens_of(out)))
    if model.config.position == "learned":  # compiles; for one of the models
        assert tokens_of(generate(PROMPTS, n=3, slots=16)) == tokens_of(out)  # two prompts, three samples per refill


def test_settings_prompts_and_seeds_do_not_compile_anew():
    model, _ = made("gqa")
    generate = functools.partial(qstar.generate, model, max_new_tokens=NEW, slots=4)
    generate(PROMPTS)
    before = S.decode._cache_size(), S.insert_requests._cache_size(), S.prepare._cache_size()
    for settings in (dict(temperature=0), dict(temperature=0.3, top_k=4), dict(top_p=0.5, seed=9)):
        generate(PROMPTS, **settings)
    generate(PROMPTS[::-1] + PROMPTS[:2])
    assert (S.decode._cache_size(), S.insert_requests._cache_size(), S.prepare._cache_size()) == before


def test_logits_of_all_positions_never_exist():
    config, sampler = BASE, S.Sampler(BASE, (3,), slots=8, prompt_length=16, max_new=NEW, vocab_limit=V)
    params = init(config, jax.random.key(0))
    params, state = S.prepare(params, config), S.empty_state(sampler)
    prefix = S.prefill_prefix(params, config, jnp.zeros(8, jnp.int32), jnp.int32(3))
    ints = functools.partial(np.zeros, dtype=np.int32)
    fill = S.PrefillBatch(ints((2, 16)), ints(2), ints(4), ints(4), ints((4, 2)))

    def run(state):
        state = S.insert_requests(params, sampler, prefix, state, fill, jax.random.key(0), SamplingParams.make())
        return S.decode(
            params, sampler, prefix, state, SamplingParams.make(), np.zeros(8, bool), np.int32(0), np.int32(9)
        )

    shapes = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            shapes.update(v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape"))
            for sub in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    walk(getattr(sub, "jaxpr", sub))

    walk(jax.make_jaxpr(run)(state).jaxpr)
    rows_by_vocab = {s for s in shapes if V in s}
    assert (8, V) in rows_by_vocab and (4, V) in rows_by_vocab  # the walk saw the draws
    assert all(np.prod(s) <= max(8, config.hidden_size) * V for s in rows_by_vocab), rows_by_vocab


# --------------------------------------------------------------------------------------------- text and stop strings

STORIES = [
    "Once upon a time",
    "The cat",
    "Lily and Tom went to the",
    "One day, a little boy",
    "She",
    "Tom had a red ball.",
]


@pytest.fixture(scope="module")
def stories(shared):
    return qstar.load(shared("weights/stories260k"))


@pytest.fixture(scope="module")
def told(stories):
    return qstar.generate(stories, STORIES, max_new_tokens=40, temperature=0, slots=2)


def test_stories_are_those_of_the_slow_loop(stories, told):
    ids = stories.tokenizer.encode_batch(STORIES, bos=True)
    expected = slow_greedy(stories, ids, new=40, eos=stories.tokenizer.eos_id)
    assert tokens_of(told) == [[row] for row in expected]
    decode = stories.tokenizer.decode
    assert [c.text for (c,) in told] == [decode(row, after=p) for row, p in zip(expected, ids)]


def test_a_text_prefix_is_the_same_as_texts_that_begin_with_it(stories):
    prefix = "Once there was a dog. "
    out = qstar.generate(stories, STORIES, prefix=prefix, max_new_tokens=40, temperature=0, slots=2)
    ids = stories.tokenizer.encode_batch([prefix + p for p in STORIES], bos=True)
    assert tokens_of(out) == [[row] for row in slow_greedy(stories, ids, new=40, eos=stories.tokenizer.eos_id)]


@pytest.mark.parametrize("stop", [(".",), ("nd", " to", "zzz"), ("ed",)], ids=str)
def test_stop_strings_cut_exactly_and_leave_the_other_rows_alone(stories, told, stop, monkeypatch):
    """In two slots, so that a slot whose row a stop string ended is given to the next prompt."""
    out = qstar.generate(stories, STORIES, max_new_tokens=40, temperature=0, slots=2, stop=stop)
    decode, cuts = functools.partial(stories.tokenizer.decode, after=stories.tokenizer.encode("a")), 0
    for (c,), (full,) in zip(out, told):
        ends = [full.text.find(s) for s in stop if s in full.text]
        cuts += bool(ends)
        assert c.text == (full.text[: min(ends)] if ends else full.text)
        assert c.stopped == (bool(ends) or full.stopped)
        kept = len(c.tokens)
        assert c.tokens == full.tokens[:kept] and len(c.sample_logprobs) == kept
        assert c.logprobs == pytest.approx(full.logprobs[:kept], abs=1e-4)
        assert decode(c.tokens).startswith(c.text)  # all of the text,
        assert not ends or not c.text or not decode(c.tokens[:-1]).startswith(c.text)  # and not a token more
    assert cuts >= 3
    if len(stop) == 1:  # one string is one stop string, not its characters
        assert out == qstar.generate(stories, STORIES, max_new_tokens=40, temperature=0, slots=2, stop=stop[0])
        monkeypatch.setattr(batching, "LEAST_SLOTS", 2)
        fewer = qstar.generate(stories, STORIES, max_new_tokens=40, temperature=0, slots=8, stop=stop)
        assert tokens_of(fewer) == tokens_of(out)


def recital(stories, text: str, ids: list[int]) -> Model:
    """A model with the tokenizer of `stories` that recites `ids` by heart, whatever its one-token prompt is."""
    room = 64
    config = ModelConfig(
        vocab_size=stories.tokenizer.vocab_size,
        hidden_size=room,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        max_positions=room,
        position="learned",
        tie_embeddings=False,
    )
    params = jax.tree.map(jnp.zeros_like, init(config, jax.random.key(0)))
    kernel = np.zeros((room, config.vocab_size), np.float32)
    kernel[np.arange(room), np.resize(ids, room)] = 10
    params["final_norm"]["scale"] = jnp.ones(room)
    params["positions"]["table"], params["head"]["kernel"] = jnp.eye(room), jnp.asarray(kernel)
    assert stories.tokenizer.decode(ids, after=[5]).startswith(text)
    return Model(config, params, stories.tokenizer)


def test_a_character_of_several_tokens_in_front_of_a_stop_string_stays_whole(stories):
    text = "ab \U0001f600\u00e9 END cd"  # bytes are tokens here
    ids = stories.tokenizer.encode_continuation(text)
    assert len(ids) > len(text)
    model = recital(stories, text, ids)
    ((c,),) = qstar.generate(model, [[5]], max_new_tokens=40, temperature=0, stop=("END",))
    assert c.text == text[: text.index("END")] and c.stopped
    assert stories.tokenizer.decode(c.tokens, after=[5]).startswith(c.text)
    ((c,),) = qstar.generate(model, [[5]], max_new_tokens=40, temperature=0, stop=("a",))
    assert (c.text, c.tokens, c.stopped) == ("", [], True)


@pytest.mark.parametrize("stop", [["</s>"], ["<s>", "cd"]], ids=str)
def test_a_stop_string_that_is_a_special_token_stops_by_its_id(stories, stop):
    ids = stories.tokenizer.encode_continuation("ab")
    model = recital(stories, "ab", [*ids, stories.tokenizer.special_id(stop[0]), *ids, *ids])
    ((c,),) = qstar.generate(model, [[5]], max_new_tokens=40, temperature=0, stop=stop)
    end = [] if stop[0] == "<s>" else [stories.tokenizer.eos_id]  # EOS stays, as without stop strings
    assert (c.text, c.stopped, c.tokens, len(c.logprobs)) == ("ab", True, ids + end, len(ids + end))


def test_text_behind_ids_goes_on_with_their_text(stories):
    tok, ask = stories.tokenizer, SamplingOptions(max_new_tokens=1)
    head, tail = tok.encode_pair("Once upon", " a time")

    def rows(prompts, prefix):
        shared, rest = encode_prompts(stories, prompts, dataclasses.replace(ask, prefix=prefix))
        return [shared + row for row in rest]

    assert rows([" a time", tail], head) == rows([" a time", tail], "Once upon") == [head + tail] * 2
    # A token may span a prefix and a text, whatever the other prompts are.
    assert rows(["ce upon", tail], "On")[0] == tok.encode("Once upon", bos=True) != [*tok.encode("On", bos=True), *tail]
    assert scoring._encode_pair(stories, 0, head, " a time", 0) == (head, tail)
    assert rows(["Once"], [tok.bos_id]) == [tok.encode("Once", bos=True)]
    with pytest.raises(UserError, match="completion 0 must be text or a list of token ids, not None"):
        qstar.logprobs(stories, ["a"], [None])


def test_options_that_are_none_or_large_are_the_default():
    none = SamplingOptions(max_new_tokens=1, stop=None, prefix=None, slots=None, top_k=3_000_000_000)
    assert (none.stop, none.prefix) == ((), "") and none.sampling_params().top_k == 2**31 - 1


def test_ids_beyond_the_tokenizer_are_never_drawn(stories):
    """A vocabulary padded to a round number: the padding has no text."""
    config = BASE.replace(vocab_size=stories.tokenizer.vocab_size + 64, num_layers=1)
    params = init(config, jax.random.key(0))
    params["head"]["kernel"] = params["head"]["kernel"].at[:, -64:].multiply(50)
    out = qstar.generate(
        Model(config, params, stories.tokenizer), STORIES, max_new_tokens=NEW, temperature=5.0, slots=8, n=4
    )
    assert max(t for samples in out for c in samples for t in c.tokens) < stories.tokenizer.vocab_size
    assert min(x for samples in out for c in samples for x in c.sample_logprobs) > -50


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "prompts,settings,message",
    [
        (["text"], {}, "no tokenizer"),
        ([[1]], dict(prefix="text"), "no tokenizer"),
        ([[1]], dict(stop=["."]), "stop strings need a tokenizer"),
        ("text", {}, "put the text in"),
        ([[1], []], {}, "prompt 1 is empty"),
        (
            [[1], [2] * 50],
            dict(max_new_tokens=15),
            "prompt 1: 50 prompt tokens . max_new_tokens=15 = 65 exceed the model.s context of 64 tokens",
        ),
        ([[1], [2] * 40], dict(max_new_tokens=15, prefix=[3] * 10), "prompt 1: 50 prompt tokens"),
        ([[1], [2, V, 3]], {}, f"prompt 1: token id {V} .* {V}"),
        ([[1, -7]], {}, "prompt 0: token id -7"),
        ([[1], [2]], dict(prefix=[V + 3]), f"token id {V + 3}"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0"),
        ([[1]], dict(temperature=-0.1), "temperature=-0.1"),
        ([[1]], dict(temperature=float("nan")), "temperature=nan"),
        ([[1]], dict(top_k=-1), "top_k=-1"),
        ([[1]], dict(top_p=0.0), "top_p=0"),
        ([[1]], dict(top_p=1.1), "top_p=1.1"),
        ([[1]], dict(n=0), "n=0"),
        ([[1]], dict(stop=[""]), "empty string"),
        ([[1]], dict(stop=(5,)), r"stop=\(5,\) must be a text or a list of texts"),
        ([[1]], dict(stop=5), "stop=5 must be a text"),
        ([[1]], dict(prefix=[1.5]), r"prefix must be text or a list of token ids, not \[1.5\]"),
        ([[1]], dict(slots=-1), "slots=-1 must be"),
        ([[1]], dict(slots="4"), "slots='4' must be"),
        ([[1]], dict(seed=None), "seed=None must be"),
        ([[1]], dict(seed=1.5), "seed=1.5 must be"),
        ([[1]], dict(n=1.5), "n=1.5 must be"),
        ([[1]], dict(n=10**18), "n=1000000000000000000 must be"),
        ([[1]], dict(temperature=1e39), r"temperature=1e\+39 must be"),
        ([1, 403], {}, "prompt 0 must be text, messages or a list of token ids, not 1"),
        ([[1], None], {}, "prompt 1 must be .*, not None"),
        ([["a", "b"]], {}, "prompt 0 must be"),
        ([b"abc"], {}, "prompt 0 must be .*, not b'abc'"),
        ([[1.7, 3.2]], {}, r"prompt 0 must be .*, not \[1.7, 3.2\]"),
        (None, {}, "prompts is a list of texts"),
    ],
)
def test_mistakes_are_named_on_one_line(prompts, settings, message):
    model = Model(BASE, {})
    with pytest.raises(UserError, match=message) as error:
        qstar.generate(model, prompts, **{"max_new_tokens": 4, **settings})
    assert "\n" not in str(error.value)
