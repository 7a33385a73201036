"""LM-Guided CoT on two-hop questions: its training text, its rewards, and mistakes in its config."""

import numpy as np
import pytest

from configs.guided_cot_synth import get_config
from qstar.errors import UserError
from qstar.methods import guided_cot
from qstar.methods.guided_two_hop import TwoHop, TwoHopEnvironment, TwoHopSettings
from qstar.tasks import two_hop_world
from qstar.types import Completion
from tests.methods.stub import Silent


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
    task = TwoHop(TwoHopSettings(), 0)
    task.answers_with = lambda tasks, slot: slot[:, 5]  # an answerer that copies
    for guard, paid in ((True, 0), (False, 1)):
        arm = guided_cot.GuidedConfig(aspect_weight=0.0, reject_bare_answers=guard)
        environment = TwoHopEnvironment(task, w, 0, 2, 3, arm)
        asked = environment.sample(0)
        honest, smuggler = (
            asked.gold.tolist(),
            [[two_hop_world.FIRST] * 2 + [g[5]] * 4 + [two_hop_world.EOS] for g in asked.gold.tolist()],
        )
        rows = [[Completion("", t, [0.0] * 7, [0.0] * 7, True) for t in pair] for pair in zip(honest, smuggler)]
        found = environment.score(0, rows)
        assert found.parts["bare_answer"].tolist() == [0, 1] * 3 and found.scores.tolist() == [1, paid] * 3


def test_an_arm_to_analyze_that_is_not_there_is_named(tmp_path):
    config = get_config("smoke")
    config.analyzed_arms = ["kd_filterd"]
    with pytest.raises(UserError, match="analyzed_arms: 'kd_filterd'"):
        guided_cot.GuidedContext.make(config, tmp_path / "x", Silent())
