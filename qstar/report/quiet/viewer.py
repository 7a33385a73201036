"""The thought viewer: texts with their thoughts, packed into the page block by block, drawn by the page's script."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qstar.report.markup import Safe, tag
from qstar.report.pieces import note, section
from qstar.report.quiet import frames
from qstar.report.quiet.run import QuietArm, QuietRun
from qstar.report.quiet.texts import Extreme, Text, class_gains, extremes, read_texts

PAGE_BYTES = 6_000_000  # of packed thoughts in a page, all arms and steps together
MOST_TEXTS = 400  # of one arm and step
FEW = 20  # texts that tell how many will fit
LEAST_SCALE = 0.1  # nats at full colour, at least: where thoughts bring nothing, nothing is painted


@dataclass(frozen=True)
class Block:
    """The texts of one arm and step."""

    arm: QuietArm
    step: int
    texts: list[Text]


def read_blocks(run: QuietRun) -> list[Block]:
    """All thoughts of a run, by arm and step. Reads their files."""
    return [Block(arm, step, read_texts(path)) for arm in run.arms for step, path in arm.thoughts.items()]


def viewer_section(run: QuietRun, blocks: Sequence[Block]) -> Safe | None:
    """The viewer, or None for a run without thoughts."""
    blocks = [block for block in blocks if block.texts]
    if not blocks:
        return None
    budget = PAGE_BYTES // len(blocks)
    packed = [pack(block, budget) for block in blocks]
    main = frames.main_arm(run)
    opens = [number for number, block in enumerate(blocks) if block.arm is main] or [len(blocks) - 1]
    index = {
        "scale": scale(blocks),
        "opens": opens[-1],
        "blocks": [
            {"arm": block.arm.label, "step": block.step, "total": len(block.texts), "shown": shown}
            for block, (_, shown) in zip(blocks, packed)
        ],
    }
    written = json.dumps(index, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return section(
        "thoughts",
        "Read the thoughts",
        note(
            "Every token is coloured by the gain that the thoughts before it brought: how many nats of surprise they took "
            "off it, averaged over its thoughts. Point at a token, tap it, or walk with the arrow keys to read what was "
            "thought just before it."
        ),
        tag("div", id="viewer"),
        tag("noscript", note("The viewer needs JavaScript; everything else on the page does not.")),
        tag("script", Safe(written), type="application/json", id="thought-index"),
        *(
            tag("script", Safe(text), type="text/plain", id=f"thoughts-{number}")
            for number, (text, _) in enumerate(packed)
        ),
    )


def scale(blocks: Sequence[Block]) -> float:
    """Nats at full colour, one for all blocks so that steps can be compared: the 99th percentile of |gain|."""
    gains = sorted(abs(g) for block in blocks for text in block.texts for g in text.gains if g is not None)
    return round(max(LEAST_SCALE, gains[int(0.99 * (len(gains) - 1))] if gains else 0.0), 2)


def pack(block: Block, budget: int) -> tuple[str, int]:
    """A block as text for the page (gzip of JSON, base64), and how many of its texts are in it.

    Texts are left out from the end until it fits in `budget` bytes; those with the extreme tokens always stay.
    """
    ends = extremes(block.texts)
    needed = {e.text for side in ends for e in side}
    count = min(len(block.texts), MOST_TEXTS)
    few = _packed(block, range(min(count, FEW)), ((), ()))  # packing all only to see that they do not fit takes long
    count = min(count, int(1.1 * FEW * budget / len(few)))
    while True:
        kept = sorted({*range(count), *needed})
        text = _packed(block, kept, ends)
        if len(text) <= budget or not count:
            return text, len(kept)
        count = min(count - 1, int(count * 0.97 * budget / len(text)))


def _packed(block: Block, kept: Sequence[int], ends: Sequence[Sequence[Extreme]]) -> str:
    written = json.dumps(_content(block, kept, ends), ensure_ascii=False, separators=(",", ":"))
    data = gzip.compress(written.encode("utf-8", "replace"), 6, mtime=0)  # no time: one run, one page
    return base64.b64encode(data).decode("ascii")


def _content(block: Block, kept: Sequence[int], ends: Sequence[Sequence[Extreme]]) -> dict[str, Any]:
    """What the script reads. Strings are numbers into `vocab`; entry j of a text is about its token j + 1."""
    vocab: dict[str, int] = {}

    def ids(words: Sequence[str]) -> list[int]:
        return [vocab.setdefault(word, len(vocab)) for word in words]

    texts = []
    for number in kept:
        text = block.texts[number]
        passes = [
            [[ids(thought) for thought in p.tokens], *map(_short, (p.nll, p.weight, p.reward))] for p in text.passes
        ]
        texts.append([text.id, ids(text.tokens), ids(text.classes), _short(text.base_nll), passes])
    place = {number: at for at, number in enumerate(kept)}
    helped, hurt = ([[place[e.text], e.entry] for e in side] for side in ends)
    gains = [[name, round(mean, 4), count] for name, (mean, count) in class_gains(block.texts).items()]
    return {"vocab": list(vocab), "texts": texts, "helped": helped, "hurt": hurt, "classes": gains}


def _short(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 3) for value in values]
