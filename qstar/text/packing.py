"""Packing: documents of (prompt, completion) token ids as rectangular training rows. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qstar.errors import UserError


@dataclass(frozen=True)
class Example:
    """One document. `completion` includes EOS, so that stopping is learnt like any other token."""

    prompt: list[int]
    completion: list[int]
    # Per token of both, 1 where it is to be predicted: a conversation is learnt in parts. None: the whole completion.
    loss: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def pack(
    examples: Sequence[Example], length: int, *, packed: bool = True, loss_on_prompt: bool = False
) -> dict[str, np.ndarray]:
    """Packs documents into rows of `length` tokens; no document is split or shortened.

    With `packed`, rows are filled first-fit-decreasing: documents by falling length (ties in the order given), each
    into the first row that has room. This is deterministic and uses at most 11/9 of the smallest possible number of
    rows. Otherwise each document gets its own row, in the order given.

    Args:
        examples: the documents, each with at least one token.
        length: tokens per row, T.
        packed: several documents per row, or one.
        loss_on_prompt: predict the prompt too, as the release, which never uses its loss mask.

    Returns:
        Arrays [B, T] in which segment 0 is padding (tokens 0, mask 0, positions 0): `tokens` int32; `mask` float32, 1
        where the token at that place is to be *predicted*; `segment_ids` int32, 1, 2, .. within a row; `positions`
        int32. The first token of a document has no context and is never predicted, even when the prompt is empty.

    Raises:
        UserError: a document is empty or longer than `length`.
    """
    return pack_groups([[example] for example in examples], length, packed=packed, loss_on_prompt=loss_on_prompt)[0]


def pack_groups(
    groups: Sequence[Sequence[Example]],
    length: int,
    *,
    packed: bool = True,
    loss_on_prompt: bool = False,
    extras: Mapping[str, Sequence[Sequence[np.ndarray]]] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`pack` for groups of M documents that stay in one row: member m of a row's g-th group is segment g M + m + 1.

    Args:
        groups: equally many documents in each (a pair for preferences).
        extras: name -> per group and document, a float for each of its tokens; laid out as float32 [B, T].

    Returns:
        The arrays of `pack` with the extras, and int32 [B, G]: which groups are in a row, -1 where there is none.

    Raises:
        UserError: a document is empty, or a group is longer than `length`.
    """
    sizes = [sum(map(len, group)) for group in groups]
    for index, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        what = f"document {index}" if len(group) == 1 else f"pair {index}"
        if not all(map(len, group)):
            raise UserError(f"{what} has no tokens: drop it before packing")
        if size > length:
            advice = "raise the row length or drop it before packing"
            raise UserError(f"{what} has {size} tokens but a row has {length}: {advice}")
    rows = _first_fit_decreasing(sizes, length) if packed else [[i] for i in range(len(sizes))]
    extras = extras or {}
    shape = (len(rows), length)
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    arrays |= {name: np.zeros(shape, np.float32) for name in ("mask", *extras)}
    # -1, since 0 is the number of a group.
    members = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int32)
    for row, indices in enumerate(rows):
        members[row, : len(indices)] = indices
        start = segment = 0
        for index in indices:
            for member, example in enumerate(groups[index]):
                segment += 1
                span = np.s_[row, start : start + len(example)]
                arrays["tokens"][span] = [*example.prompt, *example.completion]
                # Attention stays inside a segment and positions restart, so a packed row trains like its documents one
                # by one. The STaR release has neither: its documents attend to each other.
                arrays["segment_ids"][span] = segment
                arrays["positions"][span] = np.arange(len(example))
                # The first token has no context, even where the prompt is empty.
                first_predicted = 1 if loss_on_prompt else max(1, len(example.prompt))
                arrays["mask"][row, start + first_predicted : start + len(example)] = 1
                if example.loss is not None and not loss_on_prompt:
                    arrays["mask"][row, start + 1 : start + len(example)] = example.loss[1:]
                for name, values in extras.items():
                    arrays[name][span] = values[index][member]
                start += len(example)
    return arrays, members


def _first_fit_decreasing(sizes: Sequence[int], length: int) -> list[list[int]]:
    # sorted() is stable: ties keep their order, and packing is the same in every run.
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    room = np.full(len(sizes), length)  # at most one row per document
    rows: list[list[int]] = []
    for index in order:
        # The search includes one row that is not in use yet, so it always finds a place.
        row = int(np.argmax(room[: len(rows) + 1] >= sizes[index]))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[row] -= sizes[index]
    return rows
