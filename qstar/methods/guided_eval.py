"""LM-Guided CoT, beyond accuracy: votes, whether the best-rated rationales are the most useful ones, and what leaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qstar.sample.vote import majority
from qstar.tasks import two_hop_world


def choices(right: np.ndarray, quality: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, float]:
    """What choosing one of n sampled rationales per question brings: percent right, by whom.

    Args:
      right: [questions, n] whether the answerer is right with it. quality: name -> [questions, n], ratings that never see
        the answer. The best-rated is chosen; ties are broken by lot.

    Returns:
      "random" (the mean), "oracle" (any is right), per rating "best/NAME" and "correlation/NAME": the mean over questions of
      the correlation between rating and being right, where both vary; "varied/NAME" is the share of such questions.
    """
    right = np.asarray(right, float)
    lot = np.random.default_rng(seed).random(right.shape)
    out = {"random": 100.0 * float(right.mean()), "oracle": 100.0 * float(right.max(axis=1).mean())}
    for name, rated in quality.items():
        rated = np.asarray(rated, float)
        best = np.lexsort((lot, rated), axis=1)[:, -1]
        out[f"best/{name}"] = 100.0 * float(np.take_along_axis(right, best[:, None], axis=1).mean())
        a, b = rated - rated.mean(axis=1, keepdims=True), right - right.mean(axis=1, keepdims=True)
        spread = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
        varied = spread > 1e-9
        each = (a * b).sum(axis=1)[varied] / spread[varied]
        out[f"correlation/{name}"] = float(each.mean()) if varied.any() else 0.0
        out[f"varied/{name}"] = 100.0 * float(varied.mean())
    return out


def votes(answers: np.ndarray, logprobs: np.ndarray, gold: np.ndarray) -> float:
    """Percent right by the vote of n answers per question, [questions, n]; ties by summed log-probability."""
    rows = zip(answers.tolist(), logprobs.tolist())
    chosen = [majority([str(a) for a in row], p) for row, p in rows]
    return 100.0 * float(np.mean([c == str(g) for c, g in zip(chosen, gold.tolist())]))


def studied(world: Any, student: Any) -> dict[str, float]:
    """What else there is to say of a student in the two-hop world `guided_synth.Synth`; costs a few times its evaluation."""
    s, w = world.settings, world.test
    sampled = world.rationales(student, w, two_hop_world.RAT, n=s.votes, temperature=0.7, seed=world.seed)
    answered = [world.answers(world.large, w, two_hop_world.ANS, sampled[:, j]) for j in range(s.votes)]
    said, logp = (np.stack(x, axis=1) for x in zip(*answered))
    out = {
        "self_consistency": votes(said, logp, w.answer),
        "sampled": 100.0 * float(np.mean(said == w.answer[:, None])),
    }
    few = w.take(np.arange(min(500, len(w.answer))))
    many = world.rationales(student, few, two_hop_world.RAT, n=s.choose, temperature=1.0, seed=world.seed + 1)
    columns = range(s.choose)
    right = np.stack([world.guided(few, many[:, j]) == few.answer for j in columns], axis=1)
    rated = {
        name: np.stack(
            [np.mean(list(two_hop_world.aspects(few, many[:, j], weak=weak).values()), axis=0) for j in columns], axis=1
        )
        for name, weak in (("strict", False), ("weak", True))
    }
    return out | {f"choice/{k}": v for k, v in choices(right, rated).items()} | leaks(world, student)


def leaks(world: Any, student: Any) -> dict[str, float]:
    """Percent right with parts of the greedy rationale: what the answerer takes from it."""
    w = world.test
    slot = world.rationales(student, w, two_hop_world.RAT)[:, 0]
    right = lambda rationale: 100.0 * float(np.mean(world.guided(w, rationale) == w.answer))  # noqa: E731
    first, unsaid, last = slot.copy(), slot.copy(), np.full_like(slot, two_hop_world.PAD)
    first[:, 3:], unsaid[:, 5:] = two_hop_world.PAD, two_hop_world.PAD
    last[:, 5:] = slot[:, 5:]
    moved = w._replace(facts=np.roll(w.facts, 1, axis=0))
    away = 100.0 * float(np.mean(world.guided(moved, slot) == w.answer))
    return {"leak/first hop only": right(first), "leak/without the answer": right(unsaid),
            "leak/the answer alone": right(last), "leak/in another context": away}  # fmt: skip


def smuggled_gold(world: Any) -> dict[str, np.ndarray]:
    """Arms that a smuggler could at best be: the right answer in a rationale that says nothing else, or nothing that is true.

    Returns:
      Whether each test question is answered right, bool [test], with the answer alone, and with the answer at the end of a
      chain made of a distractor's words. What such a rationale is paid by a reward without a guard.
    """
    w = world.test
    alone = np.full_like(w.gold, two_hop_world.PAD)
    alone[:, 5:] = w.gold[:, 5:]
    untrue = w.other.copy()
    untrue[:, 5] = w.answer
    untrue[:, 2:4] = w.alike[:, [5, 5]]  # the look-alike's end in the place of the bridge: neither triple is a fact
    return {
        name: world.guided(w, slot) == w.answer
        for name, slot in (("answer alone", alone), ("answer in untruths", untrue))
    }
