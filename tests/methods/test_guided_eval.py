"""Rewards of rationales in LM-Guided CoT, by hand."""

import types

import numpy as np
import pytest

from qstar.errors import UserError
from qstar.methods import guided_eval
from qstar.methods.guided_cot import GuidedConfig
from qstar.methods.guided_hotpotqa import MultiHopEnvironment, MultiHopSettings
from qstar.tasks.aspects import View
from qstar.tasks.base import Problem
from qstar.types import Completion
from tests.methods.stub import FunctionAnswerer
from tests.tasks.test_aspects import CONTEXT, GOOD, QUESTION


def echo(prompts):
    """Answers with the last word before the slot: an answerer that copies."""
    return [p.removesuffix(" Answer:").split()[-1].strip(".") for p in prompts]


def scored(answer, texts, settings, **arm):
    """The environment's output for rationales to one question, the answerer reading no more than the rationale."""
    problem = Problem("1", QUESTION, "missolonghi", meta={"answer": "missolonghi"})
    task = types.SimpleNamespace(
        settings=MultiHopSettings(small="x", large={"path": "y"}, **settings),
        views=lambda problems, texts: [View(QUESTION, CONTEXT, text) for text in texts],
        prompt=lambda problem, style, text="", training=False: f"{text.removesuffix(' in 1824.')} Answer:",
        answerer=FunctionAnswerer(answer),
    )
    environment = MultiHopEnvironment(task, [problem], 0, 1, GuidedConfig(**arm))
    return environment.score(0, [[Completion(text, [], [], [], True) for text in texts]])


def test_scores_are_the_weighted_sum_and_the_reject_bare_answers_takes_the_reward_of_smuggled_answers():
    texts = [GOOD, "Missolonghi", "He died in London after he had written many long letters home."]
    settings = {"aspects": {"factuality": 1.0, "relevance": 3.0, "fluency": 0.0}}
    found = {}
    for guard in (True, False):
        out = scored(echo, texts, settings, accuracy_weight=2.0, aspect_weight=0.5, reject_bare_answers=guard)
        np.testing.assert_allclose(out.parts["bare_answer"], [0, 1, 0])
        expected = (out.parts["aspect/factuality"] + 3 * out.parts["aspect/relevance"]) / 4
        np.testing.assert_allclose(out.parts["aspect"], expected, atol=1e-6)
        np.testing.assert_allclose(out.scores, 2 * out.parts["accuracy"] + 0.5 * expected, atol=1e-6)
        assert out.scores.dtype == np.float32 and "aspect/fluency" not in out.parts
        found[guard] = out.parts["accuracy"].tolist()
    assert found == {True: [1, 0, 0], False: [1, 1, 0]}


def test_an_aspect_reward_alone_never_asks_the_answerer():
    def never(prompts):
        raise AssertionError

    out = scored(never, [GOOD], {}, accuracy_weight=0.0)
    assert out.scores[0] == out.parts["aspect"][0] > 0.5 and out.parts["accuracy"].tolist() == [0]
    assert [guided_eval.task_score("in Cork city", "Cork", m) for m in guided_eval.METRICS] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("wrong, word", [
    (dict(metric="bleu"), "metric"), (dict(aspects={"beauty": 1}), "aspects.beauty"),
    (dict(aspects={"fluency": -1.0}), "a weight below 0"), (dict(aspects={}), "all weights are 0"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_named(wrong, word):
    with pytest.raises(UserError, match=word):
        MultiHopSettings(small="x", large={"path": "y"}, **wrong)
    with pytest.raises(UserError, match="accuracy_weight and aspect_weight are both 0"):
        GuidedConfig(accuracy_weight=0, aspect_weight=0)
