"""Documents of (prompt, completion) token ids become rectangular training rows. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qstar.errors import UserError


@dataclass(frozen=True)
class Example:
    """One document. `completion` includes EOS, so that stopping is learnt like any other token."""

    prompt: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def pack(
    examples: Sequence[Example], length: int, *, packed: bool = True, loss_on_prompt: bool = False
) -> dict[str, np.ndarray]:
    """Lays documents into rows of `length` tokens; no document is ever split or shortened.

    With `packed` the rows are filled first-fit-decreasing: documents by falling length (ties in the order
    given), each into the first row that still has room. That is deterministic and uses at most 11/9 of the
    smallest possible number of rows. Otherwise each document gets a row of its own, in the order given.

    Segment ids keep attention inside a document and positions restart in each, so a packed row means the
    same as its documents one by one; the STaR release packs without either and lets documents see each other.

    Args:
        examples: the documents, each with at least one token.
        length: tokens per row, L.
        packed: several documents per row, or one.
        loss_on_prompt: predict the prompt too (the release's behaviour; its loss mask is never used).

    Returns:
        Arrays [N, L], where segment 0 is padding (tokens 0, mask 0, positions 0):
        `tokens` int32; `mask` float32, 1 where the token at that place is to be *predicted*; `segment_ids`
        int32, 1, 2, .. within a row; `positions` int32. The first token of a document has no context and is
        never predicted, even when the prompt is empty.

    Raises:
        UserError: a document is empty or longer than `length`.
    """
    sizes = [len(example) for example in examples]
    for index, size in enumerate(sizes):
        if size == 0:
            raise UserError(f"document {index} has no tokens: drop it before packing")
        if size > length:
            raise UserError(
                f"document {index} has {size} tokens but a row has {length}: "
                "raise the row length or drop it before packing"
            )
    rows = _first_fit_decreasing(sizes, length) if packed else [[i] for i in range(len(sizes))]
    shape = (len(rows), length)
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    arrays["mask"] = np.zeros(shape, np.float32)
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, start=1):
            example, size = examples[index], sizes[index]
            place = np.s_[row, start : start + size]
            arrays["tokens"][place] = [*example.prompt, *example.completion]
            arrays["segment_ids"][place] = segment
            arrays["positions"][place] = np.arange(size)
            first_predicted = 1 if loss_on_prompt else max(1, len(example.prompt))
            arrays["mask"][row, start + first_predicted : start + size] = 1
            start += size
    return arrays


def _first_fit_decreasing(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows as lists of document indices; each document goes to the first row with room for it."""
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])  # sorted() is stable
    room = np.full(len(sizes), length)  # at most one row per document
    rows: list[list[int]] = []
    for index in order:
        row = int(np.argmax(room[: len(rows) + 1] >= sizes[index]))  # the last of them is a fresh row
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[row] -= sizes[index]
    return rows
