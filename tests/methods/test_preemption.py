"""Ended at many random places, by SIGTERM and SIGKILL in turn, a run comes to the same end, bit for bit.

Opt-in, for it takes many minutes: QSTAR_LONG_TESTS=1 python -m pytest tests/methods/test_preemption.py. Another
QSTAR_LONG_SEED draws other places. (A few chosen places of each kind are in every run of the tests: see test_resume.py.)
"""

import collections
import os
import random
import re

import pytest

from tests.methods import runs

pytestmark = pytest.mark.skipif(
    not os.environ.get("QSTAR_LONG_TESTS"), reason="takes many minutes: set QSTAR_LONG_TESTS=1 to run it"
)
POINTS = 20
CONFIGS = {
    "star": "star_arithmetic.py:smoke",
    "v_star": runs.V_STAR,
    "quiet_star": "quiet_star_tiny.py:smoke,arms=quiet_star",
}


def places(told, seed):
    """Draws events of an undisturbed run, in its order, with the signal that each brings.

    Of two events of one training stage the second is at least two updates later: told to end, a run saves, and what it has
    saved is not done again.
    """
    counts = collections.Counter(told)
    once = [e for e in told if counts[e] == 1 and ("/" in e or e.startswith("batch ")) and not e.startswith("saved ")]
    draw = random.Random(seed)
    chosen: list[int] = []
    for i in draw.sample(range(len(once)), len(once)):
        there, step = update(once[i])
        if len(chosen) < POINTS and all(there != update(once[j])[0] or abs(step - update(once[j])[1]) >= 2 for j in chosen):
            chosen.append(i)
    return [draw.choice(("", "term ")) + once[i] for i in sorted(chosen)]


def update(event):
    """The training stage and the update that an event is about; (event, 0) outside of training.

    What Quiet-STaR measures after an update belongs to it.
    """
    kind, place, *step = event.split()
    measured = re.fullmatch(r"(.+)/(?:thoughts|evaluation)/step_(\d+)\.jsonl?", place)
    if measured:
        place, *step = measured.groups()
    return (place.removesuffix("/training"), int(step[0])) if step else (event, 0)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_run_ended_at_random_places_comes_to_the_same_end(method):
    config = CONFIGS[method]
    whole = runs.killed(config, [None])
    plans = places(runs.events(whole), int(os.environ.get("QSTAR_LONG_SEED", "0")))
    print(*plans, sep="\n")
    resumed = runs.killed(config, plans)
    assert len(plans) == POINTS
    assert runs.answers(resumed) == runs.answers(whole)
    assert runs.weights(resumed) == runs.weights(whole) and runs.weights(whole)
    assert runs.numbers(resumed) == runs.numbers(whole)
