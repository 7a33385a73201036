"""What is said of LM-Guided CoT beyond accuracy: votes, choices among several rationales, leaks, smuggling."""

from __future__ import annotations

import numpy as np
import pytest

from configs.guided_cot_synth import get_config
from qstar.errors import UserError
from qstar.methods import guided_cot, guided_eval
from qstar.methods.guided_two_hop import Reward, Synth, SynthEnvironment, SynthSettings
from qstar.tasks import two_hop_world
from qstar.types import Completion
from tests.methods.stub import Silent


def test_choices_by_hand():
    right = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    rated = np.array([[0.9, 0.1, 0.2, 0.3], [0.9, 0.5, 0.5, 0.8], [0.1, 0.2, 0.3, 0.4]])
    found = guided_eval.choices(right, {"x": rated})
    assert found["random"] == pytest.approx(100 * 7 / 12) and found["oracle"] == 100
    assert found["best/x"] == pytest.approx(200 / 3)  # the second question's best-rated one is wrong
    assert found["varied/x"] == pytest.approx(200 / 3)  # the third is right with any
    by_hand = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(rated[:2], right[:2])])
    assert found["correlation/x"] == pytest.approx(by_hand)
    same = guided_eval.choices(np.tile([1, 0], (4000, 1)), {"x": np.zeros((4000, 2))})
    assert same["best/x"] == pytest.approx(50, abs=3) and same["correlation/x"] == 0  # ties are broken by lot


def test_votes_and_their_ties():
    said, logp = np.array([[5, 6, 6], [7, 8, 9]]), np.array([[0.0, -9, -9], [-3, -1, -2]])
    assert guided_eval.votes(said, logp, np.array([6, 8])) == 100
    assert guided_eval.votes(said, logp, np.array([5, 7])) == 0


def test_chains_told_backwards_are_as_true_and_the_rows_without_them_are_as_before():
    w = two_hop_world.draw(np.random.default_rng(0), 50)
    back = two_hop_world.backwards(w.gold)
    assert (
        np.all(back[:, 2] == w.answer)
        and np.all(back[:, 5] == w.gold[:, 2])
        and np.all(back[:, 6] == two_hop_world.EOS)
    )
    assert np.all(two_hop_world.aspects(w, back)["factuality"] == 1)
    mix = (2, 2, 400, 200)
    tokens, _ = two_hop_world.mixed_text(np.random.default_rng(1), mix, (0.4,) * 6, two_ways=True)
    cot = tokens[tokens[:, two_hop_world.FACTS] == two_hop_world.COT]
    slot, question = (
        cot[:, two_hop_world.QUESTION : two_hop_world.QUESTION + 7],
        cot[:, two_hop_world.FACTS + 1 : two_hop_world.QUESTION],
    )
    backward, wrong = slot[:, 3] == question[:, 0], (slot[:, 0] == question[:, 0]) & (cot[:, -1] == slot[:, 5])
    assert np.all(cot[backward, -1] == slot[backward, 2]) and np.all(backward ^ wrong)
    assert 0.22 < backward.mean() < 0.38


def test_smuggled_answers_are_found_and_earn_nothing_while_the_guard_is_on():
    w = two_hop_world.draw(np.random.default_rng(0), 6)
    alone = np.full_like(w.gold, two_hop_world.PAD)
    alone[:, 5:] = w.gold[:, 5:]
    assert not two_hop_world.bare(w, w.gold, w.answer).any() and two_hop_world.bare(w, alone, w.answer).all()
    assert not two_hop_world.bare(w, alone, w.answer + 1).any()  # it was not what led to this answer
    world = Synth(SynthSettings(), 0)
    world.guided = lambda worlds, slot: slot[:, 5]  # an answerer that copies
    for guard, paid in ((True, 0), (False, 1)):
        environment = SynthEnvironment(world, w, 0, 2, 3, Reward(aspect=0.0, guard=guard))
        asked = w.take(environment._rows(0))
        honest, smuggler = (
            asked.gold.tolist(),
            [[two_hop_world.FIRST] * 2 + [g[5]] * 4 + [two_hop_world.EOS] for g in asked.gold.tolist()],
        )
        rows = [[Completion("", t, [0.0] * 7, [0.0] * 7, True) for t in pair] for pair in zip(honest, smuggler)]
        found = environment.score(0, rows)
        assert found.parts["bare"].tolist() == [0, 1] * 3 and found.scores.tolist() == [1, paid] * 3


def test_an_arm_to_study_that_is_not_there_is_named(tmp_path):
    config = get_config("smoke")
    config.studied = ["kd_filterd"]
    with pytest.raises(UserError, match="studied: 'kd_filterd'"):
        guided_cot.GuidedContext.make(config, tmp_path / "x", Silent())
