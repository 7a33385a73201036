"""`qstar.score`: what a verifier says of solutions, whoever wrote them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qstar
from qstar.errors import UserError
from qstar.methods.verifier import Verifier, VerifierSettings
from qstar.models import decoder
from qstar.models.config import preset
from qstar.models.heads import add_value_head
from qstar.models.model import Model
from qstar.models.scoring import values
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD, Arithmetic
from qstar.text.tokenizer import char_tokenizer

TOKENIZER = char_tokenizer(ALPHABET, pad=PAD, eos=EOS)
PROMPTS = ["3+4=", "5+6=", "12+7="]
TEXTS = [["3+4,C0|,7C0|07|#7", "#8"], ["#11", "5+6,C0|,1C1|11|#11"], ["#19", "#19"]]
STEPS = Arithmetic(pool={1: 5}, seeds={}).steps


def lm(seed):
    config = preset("tiny", hidden_size=16, num_layers=1, num_heads=2, eos_id=TOKENIZER.eos_id)
    return Model(config, decoder.init(config, jax.random.key(seed)), TOKENIZER)


def with_head(kind):
    model = add_value_head(lm(0), kind)
    head = {"kernel": jax.random.normal(jax.random.key(5), (16, 1)), "bias": jnp.array([0.2])}
    return model.replace(params={**model.params, "value": head})


@pytest.fixture(scope="module")
def model():
    return lm(0)


def ids(text):
    return [*TOKENIZER.encode(text), TOKENIZER.eos_id]


def test_log_likelihoods_are_sums_over_the_completion_with_its_eos(model):
    found = qstar.score(model, PROMPTS, TEXTS)
    assert found.shape == (3, 2) and found.dtype == np.float32
    for i, j in np.ndindex(3, 2):
        each = qstar.logprobs(model, [TOKENIZER.encode(PROMPTS[i])], [ids(TEXTS[i][j])])[0]
        assert len(each) == len(TEXTS[i][j]) + 1
        assert found[i, j] == pytest.approx(each.sum(), abs=1e-4)
        mean = qstar.score(Verifier(model, "mean_logp"), [PROMPTS[i]], [TEXTS[i][j]])
        assert mean.shape == (1,) and mean[0] == pytest.approx(each.mean(), abs=1e-5)
    assert found[2, 0] == found[2, 1]  # equal solutions, equal scores


def test_the_log_ratio_is_taken_to_the_reference(model):
    other = lm(1)
    ratio = qstar.score(Verifier(model, "logratio", reference=other), PROMPTS, TEXTS)
    np.testing.assert_allclose(
        ratio, qstar.score(model, PROMPTS, TEXTS) - qstar.score(other, PROMPTS, TEXTS), atol=1e-5
    )
    assert (qstar.score(Verifier(model, "logratio", reference=model), PROMPTS, TEXTS) == 0).all()


def test_token_ids_are_taken_as_they_are(model):
    prompts = [TOKENIZER.encode(p) for p in PROMPTS]
    as_text = qstar.score(model, PROMPTS, [t[0] for t in TEXTS])
    np.testing.assert_allclose(qstar.score(model, prompts, [ids(t[0]) for t in TEXTS]), as_text, atol=1e-5)
    cut = qstar.score(model, prompts, [ids(t[0])[:-1] for t in TEXTS])
    assert (cut > as_text).all()  # without its EOS, one factor less


def test_an_orm_is_read_at_the_last_token_and_a_prm_after_every_step():
    orm, prm = with_head("orm"), with_head("prm")
    prompts = [TOKENIZER.encode(p) for p in PROMPTS]
    odds = values(orm, prompts, [ids(t[0]) for t in TEXTS])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    np.testing.assert_allclose(
        qstar.score(orm, PROMPTS, [t[0] for t in TEXTS]), [sigmoid(x[-1]) for x in odds], atol=1e-5
    )
    text = TEXTS[0][0]
    ends = [i for i, c in enumerate(text) if c == "|"] + [len(text)]  # the marks that close the lines, and EOS
    steps = sigmoid(odds[0][ends])
    for rule, expected in (("prm_min", steps.min()), ("prm_product", steps.prod()), ("", steps.min())):
        found = qstar.score(Verifier(prm, rule, steps=STEPS), PROMPTS[:1], [text])
        assert found[0] == pytest.approx(expected, abs=1e-5)
    lines = qstar.score(Verifier(prm, "prm_min"), ["3+4="], ["#7"])  # no lines: the whole is one step
    assert lines[0] == pytest.approx(sigmoid(values(prm, [TOKENIZER.encode("3+4=")], [ids("#7")])[0][-1]), abs=1e-5)


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda m: qstar.score(Verifier(m, "orm"), PROMPTS, TEXTS), "value head"),
        (lambda m: qstar.score(Verifier(m, "logratio"), PROMPTS, TEXTS), "reference"),
        (lambda m: qstar.score(Verifier(m, "logpp"), PROMPTS, TEXTS), "logp"),
        (lambda m: qstar.score(m, PROMPTS, TEXTS[:2]), "one length"),
        (lambda m: qstar.score(m, PROMPTS, "#7"), "lists"),
        (lambda m: qstar.score(m, PROMPTS, [["#7"], ["#7", "#8"], ["#7"]]), "equally many"),
        (lambda m: qstar.score(m.replace(tokenizer=None), PROMPTS, TEXTS), "tokenizer"),
        (lambda m: values(m, [[3]], [[4]]), "value head"),
        (lambda m: VerifierSettings(beta=0.0), "beta"),
        (lambda m: VerifierSettings(dropout=1.0), "dropout"),
    ],
)
def test_what_makes_no_sense_is_named(model, make, word):
    with pytest.raises(UserError, match=word):
        make(model)
