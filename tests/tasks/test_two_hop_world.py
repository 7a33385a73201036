"""The two-hop world: its rows by brute force, what is cleaned, what the aspects see."""

from __future__ import annotations

import numpy as np

from qstar.tasks import two_hop_world as H

W = H.draw(np.random.default_rng(0), 400)


def triples(i):
    return {tuple(t) for t in W.facts[i].reshape(7, 3).tolist()}


def follow(i, first, *relations):
    """Where the facts lead from an entity: brute force."""
    for r in relations:
        found = [o for s, q, o in triples(i) if (s, q) == (first, r)]
        assert len(found) == 1
        first = found[0]
    return first


def test_the_answer_and_the_gold_rationale_follow_from_the_facts():
    for i in range(400):
        x, r1, r2 = W.question[i].tolist()
        y = follow(i, x, r1)
        z = follow(i, x, r1, r2)
        assert z == W.answer[i] and W.gold[i].tolist() == [x, r1, y, y, r2, z, H.EOS]
        assert len(triples(i)) == 7 and sum(q == r2 for _, q, _ in triples(i)) == 3
        assert W.gold[i, 0] == W.alike[i, 0] != W.other[i, 0] and len({W.gold[i, 5], W.alike[i, 5], W.other[i, 5]}) == 3
        assert tuple(W.alike[i, [3, 4, 5]].tolist()) in triples(i) and tuple(W.alike[i, :3].tolist()) not in triples(i)
        assert tuple(W.other[i, :3].tolist()) in triples(i) and tuple(W.other[i, 3:6].tolist()) in triples(i)


def test_every_question_is_new_and_facts_stand_in_any_order():
    assert len({tuple(f) for f in W.facts.tolist()}) == 400
    hits = (W.facts.reshape(400, 7, 3) == W.gold[:, None, :3]).all(-1)
    where = hits.argmax(1).tolist()
    assert hits.sum() == 400
    assert set(where) == set(range(7)) and W.facts.min() >= H.FIRST and W.facts.max() < H.VOCAB


def test_rows_have_one_layout_and_losses_are_where_they_should_be():
    rng = np.random.default_rng(1)
    tokens, mask = H.mixed_text(rng, (50, 60, 700, 80))
    assert tokens.shape == mask.shape == (890, H.LENGTH) and tokens.max() < H.VOCAB
    copy, std, cot, ans = np.split(np.arange(890), [50, 110, 810])
    for i in copy:
        facts = {tuple(t) for t in tokens[i, :21].reshape(7, 3).tolist()}
        assert tokens[i, 21] == H.CPY and {tuple(t) for t in tokens[i, 22:].reshape(4, 3).tolist()} <= facts
        assert np.flatnonzero(mask[i]).tolist() == [24, 27, 30, 33]
    assert (tokens[std, 21] == H.STD).all() and (tokens[std, 25:32] == H.PAD).all() and (mask[std].sum(1) == 1).all()
    assert (tokens[cot, 21] == H.COT).all() and (tokens[cot, 31] == H.EOS).all() and (tokens[cot, 32] == H.MARK).all()
    assert (tokens[cot, 33] == tokens[cot, 30]).all() and (mask[cot].sum(1) == 8).all() and not mask[cot, 32].any()
    relation = tokens[cot, 23] - H.FIRST - H.ENTITIES
    facts = tokens[cot, :21].reshape(-1, 7, 3)
    wrong = ~(facts == tokens[cot][:, None, 25:28]).all(-1).any(1)  # the first triple is no fact: the look-alike's
    rates = [wrong[relation == r].mean() for r in range(6)]
    assert np.abs(np.asarray(rates) - H.NOISE).max() < 0.15
    assert (mask[ans].sum(1) == 1).all() and (tokens[ans, 25] == H.PAD).mean() < 0.3


def test_a_cleaned_rationale_holds_no_mark_no_tag_and_nothing_after_its_end():
    raw = np.array([[20, 35, H.MARK, 21, H.EOS, 22, H.ANS], [H.PAD, H.CPY, 9, 9, 9, 9, 9], [H.EOS] * 7])
    assert H.clean(raw).tolist() == [[20, 35, 0, 21, 1, 0, 0], [0, 0, 9, 9, 9, 9, 9], [1, 0, 0, 0, 0, 0, 0]]
    assert (H.clean(W.gold) == W.gold).all()


def test_aspects_are_full_for_gold_and_factuality_is_half_for_a_look_alike():
    for slot, expected in ((W.gold, 1.0), (W.alike, 0.5)):
        means = {k: float(v.mean()) for k, v in H.aspects(W, slot).items()}
        assert means == {"factuality": expected, "relevance": 1, "coherence": 1, "form": 1}
    other = H.aspects(W, W.other)
    assert not other["relevance"].any() and (other["factuality"] == 1).all()
    empty = H.aspects(W, np.zeros_like(W.gold))
    assert not any(x.any() for x in empty.values())
