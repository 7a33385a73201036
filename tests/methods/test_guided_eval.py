"""Rewards of rationales, best-of-n selection and self-consistency in LM-Guided CoT, by hand."""

import numpy as np
import pytest

from qstar.errors import UserError
from qstar.methods import answerer as A
from qstar.methods import guided_eval
from qstar.tasks.aspects import View, chosen
from tests.tasks.test_aspects import CONTEXT, GOOD, QUESTION


def test_best_of_n_by_hand():
    correct = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    ratings = np.array([[0.9, 0.1, 0.2, 0.3], [0.9, 0.5, 0.5, 0.8], [0.1, 0.2, 0.3, 0.4]])
    found = guided_eval.best_of_n(correct, {"x": ratings})
    assert found["random"] == pytest.approx(100 * 7 / 12) and found["oracle"] == 100
    assert found["best/x"] == pytest.approx(200 / 3)  # the second question's best-ratings one is wrong
    assert found["varied/x"] == pytest.approx(200 / 3)  # the third is correct with any
    by_hand = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(ratings[:2], correct[:2])])
    assert found["correlation/x"] == pytest.approx(by_hand)
    same = guided_eval.best_of_n(np.tile([1, 0], (4000, 1)), {"x": np.zeros((4000, 2))})
    assert same["best/x"] == pytest.approx(50, abs=3) and same["correlation/x"] == 0  # ties are broken by lot


def test_votes_and_their_ties():
    said, logp = np.array([[5, 6, 6], [7, 8, 9]]), np.array([[0.0, -9, -9], [-3, -1, -2]])
    assert guided_eval.vote_accuracy(said, logp, np.array([6, 8])) == 100
    assert guided_eval.vote_accuracy(said, logp, np.array([5, 7])) == 0


def echo(prompts):
    """Answers with the last word before the slot: an answerer that copies."""
    return [p.removesuffix(" Answer:").split()[-1].strip(".") for p in prompts]


def test_scores_are_the_weighted_sum_and_the_reject_bare_answers_takes_the_reward_of_smuggled_answers():
    texts = [GOOD, "Missolonghi", "He died in London after he had written many long letters home."]
    views = [View(QUESTION, CONTEXT, t) for t in texts]
    prompts = [f"{t.removesuffix(' in 1824.')} Answer:" for t in texts]
    weights = {"factuality": 1.0, "relevance": 3.0, "fluency": 0.0}
    golds, found = ["missolonghi"] * 3, {}
    for reject_bare_answers in (True, False):
        s = guided_eval.RewardSettings(
            accuracy=2.0, aspect=0.5, aspects=weights, reject_bare_answers=reject_bare_answers
        )
        scored, answers = guided_eval.rationale_scores(s, views, prompts, golds, A.FunctionAnswerer(echo))
        assert [a.text for a in answers] == ["Missolonghi", "Missolonghi", "home"]
        np.testing.assert_allclose(scored.parts["bare_answer"], [0, 1, 0])
        expected = (scored.parts["aspect/factuality"] + 3 * scored.parts["aspect/relevance"]) / 4
        np.testing.assert_allclose(scored.parts["aspect"], expected, atol=1e-6)
        np.testing.assert_allclose(scored.scores, 2 * scored.parts["accuracy"] + 0.5 * expected, atol=1e-6)
        assert scored.scores.dtype == np.float32 and "aspect/fluency" not in scored.parts
        found[reject_bare_answers] = scored.parts["accuracy"].tolist()
    assert found == {True: [1, 0, 0], False: [1, 1, 0]}


def test_an_aspect_reward_alone_never_asks_the_answerer():
    def never(prompts):
        raise AssertionError

    s = guided_eval.RewardSettings(accuracy=0.0)
    scored, answers = guided_eval.rationale_scores(
        s, [View(QUESTION, CONTEXT, GOOD)], ["p"], ["x"], A.FunctionAnswerer(never)
    )
    assert answers == [] and scored.scores[0] == scored.parts["aspect"][0] > 0.5
    assert [guided_eval.task_score("in Cork city", "Cork", m) for m in guided_eval.METRICS] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("wrong, word", [
    (dict(metric="bleu"), "metric"), (dict(accuracy=0, aspect=0), "nothing to reward"),
    (dict(aspects={"beauty": 1}), "beauty"), (dict(aspects={}), "all weights are 0"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_named(wrong, word):
    with pytest.raises(UserError, match=word):
        guided_eval.RewardSettings(**wrong)
    assert chosen({"fluency": 0.0}) == {}
