"""Ended at many random places, by SIGTERM and SIGKILL, a run comes to the same end, bit for bit.

SIGTERM is honoured by every loop: one moment in each by default, ten with QSTAR_LONG_TESTS=1. The chains of SIGTERM and
SIGKILL through whole runs are opt-in, for they take many minutes; another QSTAR_LONG_SEED draws other places. (A few chosen
places of each kind, and SIGTERM in STaR, V-STaR, Quiet-STaR and RL, are in every run of the tests: see test_resume.py,
methods/test_quiet_star.py and ../test_distributed.py.)
"""

import collections
import functools
import json
import os
import random
import re

import pytest
from conftest import shared

from tests.methods import runs

LONG = bool(os.environ.get("QSTAR_LONG_TESTS"))
SEED = int(os.environ.get("QSTAR_LONG_SEED", "0"))
POINTS = 20
MOMENTS = 10 if LONG else 1
CONFIGS = {
    "star": "star_arithmetic.py:smoke",
    "v_star": runs.V_STAR,
    "quiet_star": runs.QUIET,
    "guided_cot": "guided_cot_synth.py:smoke",
    "rl": "grpo_arithmetic.py:smoke",
}
LOOPS = {  # the run, and the events of the loop in it
    "STaR": ("star", "(no_)?rationalisation/(checkpoints|stages/iter)"),
    "Quiet-STaR": ("quiet_star", "quiet_star"),
    "V-STaR": ("v_star", "v_star/(checkpoints|stages/iter)"),
    "verifier": ("v_star", "v_star/(verifiers|selection)"),
    "distillation": ("guided_cot", "student_0/(teacher|kd_unfiltered)"),
    "RL": ("rl", "grpo/checkpoints"),
    "RL with a frozen reader": ("guided_cot", "student_0/rl_both"),
    "base": ("rl", "base"),
    "evaluation": ("evaluate", "(greedy|samples)_"),
}


def command(name):
    """A config of the driver's, or the command line of an evaluation."""
    if name != "evaluate":
        return CONFIGS[name]
    options = json.dumps({"test": f"{runs.short_rows('data/gsm8k')}/test.jsonl"}, separators=(",", ":"))
    flags = f"--task=gsm8k --task-options={options} --limit=16 --samples=16 --max-new-tokens=24 --json"
    return f"evaluate --model={shared('weights/stories260k')} {flags}"


@functools.cache
def undisturbed(name):
    # Those that other tests compare with, too, are made once.
    return runs.killed(command(name), [None]) if name == "evaluate" else runs.finished(command(name))


CHAINED = ["star", "v_star", "quiet_star", "rl"]  # by default their SIGTERMs are part of other tests


@pytest.mark.parametrize("name", [*(CHAINED if LONG else []), "guided_cot", "evaluate"])
def test_sigterm_at_random_moments_saves_exits_0_and_goes_on(name):
    """The signal comes up to half a second after random events of each loop of a run; no update is made twice."""
    whole = undisturbed(name)
    told = runs.events(whole)
    loops = {loop: pattern for loop, (run, pattern) in LOOPS.items() if run == name}
    at = {}
    for loop, pattern in loops.items():
        draw = random.Random(f"{SEED} {loop}")
        mine = [
            i for i, e in enumerate(told) if re.match(f"(batch|begin|done|saving) {pattern}", e) and told.count(e) == 1
        ]
        assert mine, loop
        at |= {i: draw.choice((0, 0.02, 0.1, 0.5)) * draw.random() for i in draw.sample(mine, min(MOMENTS, len(mine)))}
    # One chain through all loops: each further chain would make the whole run once more.
    moments = [f"later {seconds:.3f} {told[i]}" for i, seconds in sorted(at.items())]
    print(*moments, sep="\n")
    resumed = runs.killed(command(name), [[*moments, None]])
    log = resumed.with_suffix(".log").read_text(encoding="utf-8")
    stops = re.findall(r"qstar: stopped by SIGTERM; (.*); go on with: qstar ", log)
    assert "Traceback" not in log and len(loops) <= len(stops) <= len(moments), log[-3000:]
    updates = [e for e in runs.events(resumed) if e.startswith("batch ")]
    assert len(updates) == len(set(updates))
    assert runs.answers(resumed) == runs.answers(whole) and runs.answers(whole)
    assert runs.weights(resumed) == runs.weights(whole)
    assert runs.numbers(resumed) == runs.numbers(whole)


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
        if len(chosen) < POINTS and all(
            there != update(once[j])[0] or abs(step - update(once[j])[1]) >= 2 for j in chosen
        ):
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


@pytest.mark.skipif(not LONG, reason="takes many minutes: set QSTAR_LONG_TESTS=1 to run it")
@pytest.mark.parametrize("method", CONFIGS)
def test_a_run_ended_at_random_places_comes_to_the_same_end(method):
    config = CONFIGS[method]
    whole = runs.killed(config, [None])
    plans = places(runs.events(whole), SEED)
    print(*plans, sep="\n")
    resumed = runs.killed(config, plans)
    assert len(plans) == POINTS
    assert runs.answers(resumed) == runs.answers(whole)
    assert runs.weights(resumed) == runs.weights(whole) and runs.weights(whole)
    assert runs.numbers(resumed) == runs.numbers(whole)
