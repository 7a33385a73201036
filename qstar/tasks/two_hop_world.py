"""Two-hop questions over seven generated facts, fresh for every question: a task in which a rationale helps.

    y2 r2 z2 . x r1 y . y r3 w ...          seven facts `subject relation object`, shuffled
    x r1 r2 ?                               the answer is z: x r1 y, y r2 z
    x r1 y y r2 z                           the rationale

Beside the gold chain the facts hold a look-alike from the same subject (x r' y2, y2 r2 z2), one with the same relations
from another subject (x3 r1 y3, y3 r2 z3) and a distractor (y r3 w): three facts have the question's second relation.
One token per word. A row is 34 tokens: facts (21), TAG x r1 r2 (4), the rationale's slot (7), the mark A, the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange

from qstar.errors import require

PAD, EOS, MARK, STD, COT, RAT, ANS, CPY = range(8)
ENTITIES, RELATIONS = 24, 6
FIRST = 8  # the first entity; relations follow the entities
VOCAB = FIRST + ENTITIES + RELATIONS
FACTS, SLOT, QUESTION = 21, 7, 25  # tokens of the facts, of the slot, and where the slot begins
LENGTH = QUESTION + SLOT + 2
# Rate of a wrong first hop in the teacher's training text, by the question's first relation. For two of six it is above
# 1/2: there greedy rationales are wrong and filtered samples are not, which shows the effect of the filter.
NOISE = (0.05, 0.10, 0.15, 0.30, 0.65, 0.70)


class Worlds(NamedTuple):
    """B questions with their facts. All int32."""

    facts: np.ndarray  # [B, 21]
    question: np.ndarray  # [B, 3]: x r1 r2
    gold: np.ndarray  # [B, 7]: x r1 y y r2 z EOS
    alike: np.ndarray  # [B, 7]: the chain after a wrong first hop, x r1 y2 y2 r2 z2 EOS
    other: np.ndarray  # [B, 7]: the other subject's chain
    answer: np.ndarray  # [B]: z

    def take(self, rows: np.ndarray) -> Worlds:
        return Worlds(*(x[rows] for x in self))


def draw(rng: np.random.Generator, count: int) -> Worlds:
    """`count` new questions."""
    require((count >= 1, f"hops: {count} questions; draw at least 1"))
    # argsort of random numbers is a permutation of each row, so that a question's entities are distinct.
    e = FIRST + np.argsort(rng.random((count, ENTITIES)), axis=1)[:, :10]
    x, y, z, y2, z2, x3, y3, z3, w, _ = e.T
    r = FIRST + ENTITIES + np.argsort(rng.random((count, RELATIONS)), axis=1)[:, :4]
    r1, r2, r1b, r3 = r.T
    triples = [(x, r1, y), (y, r2, z), (x, r1b, y2), (y2, r2, z2), (x3, r1, y3), (y3, r2, z3), (y, r3, w)]
    facts = np.stack([np.stack(t, axis=1) for t in triples], axis=1)  # [B, 7, 3]
    order = np.argsort(rng.random((count, 7)), axis=1)
    facts = rearrange(np.take_along_axis(facts, order[..., None], axis=1), "b facts words -> b (facts words)")
    end = np.full(count, EOS)

    def chain(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.stack([a, r1, b, b, r2, c, end], axis=1).astype(np.int32)

    question = np.stack([x, r1, r2], axis=1)
    chains = chain(x, y, z), chain(x, y2, z2), chain(x3, y3, z3)
    return Worlds(facts.astype(np.int32), question.astype(np.int32), *chains, z.astype(np.int32))


def rows(worlds: Worlds, tag: int, slot: np.ndarray | None = None, answer: np.ndarray | None = None) -> np.ndarray:
    """Rows [B, 34] int32; no slot: padding; no answer: the gold one."""
    B = len(worlds.answer)
    slot = np.full((B, SLOT), PAD) if slot is None else slot
    answer = worlds.answer if answer is None else answer
    parts = [worlds.facts, np.full((B, 1), tag), worlds.question, slot, np.full((B, 1), MARK), answer[:, None]]
    return np.concatenate(parts, axis=1).astype(np.int32)


def copies(rng: np.random.Generator, worlds: Worlds) -> tuple[np.ndarray, np.ndarray]:
    """Rows [B, 34] that restate four of the facts without a question, and loss masks of the four objects."""
    B = len(worlds.answer)
    picked = np.argsort(rng.random((B, 7)), axis=1)[:, :4]
    facts = rearrange(worlds.facts, "b (facts words) -> b facts words", words=3)
    stated = rearrange(np.take_along_axis(facts, picked[..., None], axis=1), "b facts words -> b (facts words)")
    tokens = np.concatenate([worlds.facts, np.full((B, 1), CPY), stated], axis=1)
    mask = np.zeros((B, LENGTH), np.float32)
    # Only objects: which fact comes next is random, and its object follows from the facts.
    mask[:, FACTS + 3 :: 3] = 1.0
    return tokens.astype(np.int32), mask


def words(ids: Sequence[int]) -> str:
    """Ids as text: entities are capitals, relations r1 to r6, padding is left out."""
    names = {EOS: ".", MARK: "=", STD: "STD", COT: "COT", RAT: "RAT", ANS: "ANS", CPY: "CPY"}
    names |= {FIRST + i: chr(ord("A") + i) for i in range(ENTITIES)}
    names |= {FIRST + ENTITIES + i: f"r{i + 1}" for i in range(RELATIONS)}
    return " ".join(names[int(t)] for t in ids if int(t) != PAD)


def clean(rationale: np.ndarray) -> np.ndarray:
    """Rationales [B, 7] for the answerer: padding after EOS, and no marks or tags."""
    ended = np.cumsum(rationale == EOS, axis=1) - (rationale == EOS) > 0
    # Marks and tags belong to the prompt: a rationale must not write a slot of its own.
    return np.where(ended | (rationale < FIRST) & (rationale != EOS), PAD, rationale).astype(np.int32)


# ------------------------------------------------------------------------------------------------------- training text


def mixed_text(
    rng: np.random.Generator, shares: tuple[int, int, int, int], noise: Sequence[float] = NOISE
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and loss masks of the large model's training text; `shares` counts the rows of each kind.

    Copying, standard prompts, chains of thought (with the look-alike first hop at the rates of `noise`, by the first
    relation), answering beside a rationale.
    """
    copy, std, cot, ans = shares
    parts = [copies(rng, draw(rng, copy))] if copy else []
    last = np.zeros(LENGTH, np.float32)
    last[-1] = 1.0
    if std:
        tokens = rows(draw(rng, std), STD)
        parts.append((tokens, np.broadcast_to(last, tokens.shape)))
    if cot:
        w = draw(rng, cot)
        wrong = rng.random(cot) < np.asarray(noise)[w.question[:, 1] - FIRST - ENTITIES]
        slot = np.where(wrong[:, None], w.alike, w.gold)
        tokens = rows(w, COT, slot, np.where(wrong, w.alike[:, 5], w.answer))
        # Without the mark, which is the same in every row.
        mask = np.broadcast_to((np.arange(LENGTH) >= QUESTION) & (np.arange(LENGTH) != QUESTION + SLOT), tokens.shape)
        parts.append((tokens, mask.astype(np.float32)))
    if ans:
        w, kind = draw(rng, ans), rng.random(ans)
        wrong = np.where((rng.random(ans) < 0.5)[:, None], w.alike, w.other)
        # 55% gold, 25% a wrong chain, 10% of another question, 10% none, always with the true answer: the model learns
        # neither to ignore rationales nor to copy them.
        upto = [kind[:, None] < share for share in (0.55, 0.8, 0.9)]
        slot = np.select(upto, [w.gold, wrong, np.roll(w.gold, 1, axis=0)], PAD)
        tokens = rows(w, ANS, slot)
        parts.append((tokens, np.broadcast_to(last, tokens.shape)))
    tokens, masks = zip(*parts)
    return np.concatenate(tokens), np.concatenate(masks).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- aspects


def aspects(worlds: Worlds, rationale: np.ndarray) -> dict[str, np.ndarray]:
    """Four measures [B] in [0, 1] of cleaned rationales [B, 7], which use the facts but not the answer.

    factuality: share of the two triples that are facts. relevance: begins with the question's entity. coherence: the
    second triple begins where the first ends. form: six words, EOS.
    """
    r = rationale
    facts = rearrange(worlds.facts, "b (facts words) -> b facts 1 words", words=3)
    stated = rearrange(r[:, :6], "b (triples words) -> b 1 triples words", words=3)
    known = np.all(facts == stated, axis=-1).any(axis=1)  # [B, 2]
    form = (r[:, 6] == EOS) & np.all(r[:, :6] >= FIRST, axis=1)
    found = (known.mean(axis=1), r[:, 0] == worlds.question[:, 0], (r[:, 3] == r[:, 2]) & (r[:, 3] >= FIRST), form)
    return {n: x.astype(np.float32) for n, x in zip(("factuality", "relevance", "coherence", "form"), found)}


def bare(worlds: Worlds, rationale: np.ndarray, said: np.ndarray) -> np.ndarray:
    """bool [B]: rationales [B, 7] that name the answer given with them [B] and state no fact."""
    return np.any(rationale == said[:, None], axis=1) & (aspects(worlds, rationale)["factuality"] == 0)
