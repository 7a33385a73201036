"""The rewards of LM-Guided CoT on two-hop questions."""

import numpy as np

from qstar.methods import guided_cot
from qstar.methods.guided_two_hop import TwoHop, TwoHopEnvironment, TwoHopSettings
from qstar.tasks import two_hop_world
from qstar.types import Completion


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
        environment = TwoHopEnvironment(task, w, 0, 3, arm)
        asked = environment.sample(0)
        honest, smuggler = (
            asked.gold.tolist(),
            [[two_hop_world.FIRST] * 2 + [g[5]] * 4 + [two_hop_world.EOS] for g in asked.gold.tolist()],
        )
        rows = [[Completion("", t, [0.0] * 7, [0.0] * 7, True) for t in pair] for pair in zip(honest, smuggler)]
        found = environment.score(0, rows)
        assert found.parts["bare_answer"].tolist() == [0, 1] * 3 and found.scores.tolist() == [1, paid] * 3
