"""Batches of packed rows as a pure function of (arrays, seed, step)."""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qstar.errors import UserError

Arrays = Mapping[str, np.ndarray]


def batches(
    arrays: Arrays, batch_size: int, *, seed: int, mix: tuple[Arrays, float] | None = None
) -> Sequence[dict[str, np.ndarray]]:
    """An endless sequence of batches: rows shuffled anew every epoch, epochs joined without a gap.

    `batches(...)[step]` depends on nothing but the arguments and `step`, so a run that resumes at step 700 reads the
    batches that it would have read.

    Args:
        arrays: equally long arrays [N, ...], such as `qstar.text.pack` makes.
        batch_size: rows of a batch, B. Every process of a run reads all of them.
        mix: (other arrays, share): the last round(share * B) rows of a batch come from there, shuffled on their own.

    Raises:
        UserError: no rows, keys or row shapes that differ, a share outside 0..1, B below 1.
    """
    other, share = mix if mix is not None else ({}, 0.0)
    if not 0 <= share <= 1:
        raise UserError(f"mix share {share} is not between 0 and 1")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} must be at least 1")
    # A fixed number per batch: drawn row by row, the share would vary from step to step.
    mixed = round(share * batch_size)
    parts = [(arrays, batch_size - mixed, f"{seed}/main"), (other, mixed, f"{seed}/mix")]
    return _Batches([part for part in parts if part[1] > 0])


class _Batches(Sequence):
    def __init__(self, parts: list[tuple[Arrays, int, str]]):
        _check([arrays for arrays, _, _ in parts])
        # A hash of the name, since the two parts must not share an order.
        self._parts = [(arrays, size, zlib.crc32(name.encode())) for arrays, size, name in parts]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: Any) -> Any:
        if step < 0:
            raise IndexError(f"step {step}: batches count from 0 and have no end")
        chosen = [(arrays, _row_numbers(arrays, size, seed, step)) for arrays, size, seed in self._parts]
        return {key: np.concatenate([np.asarray(arrays[key])[rows] for arrays, rows in chosen]) for key in chosen[0][0]}


def _row_numbers(arrays: Arrays, size: int, seed: int, step: int) -> np.ndarray:
    """The numbers [size] of a batch's rows: a piece of the shuffled epochs, laid end to end."""
    count = len(next(iter(arrays.values())))
    at = np.arange(step * size, (step + 1) * size)
    epochs = np.unique(at // count)
    orders = np.concatenate([_shuffled(count, seed, int(epoch)) for epoch in epochs])
    return orders[at - epochs[0] * count]


@functools.lru_cache(maxsize=4)  # an epoch and the next one, of both parts: most batches lie within one epoch
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    # Sorted raw bits of a counter-based generator are the same in every release of numpy; `Generator.permutation` need not
    # be, and a run may go on after an upgrade.
    return np.argsort(np.random.Philox(key=(seed, epoch)).random_raw(count), kind="stable")


def _check(parts: list[Arrays]) -> None:
    layouts = [{key: (array.shape[1:], array.dtype) for key, array in arrays.items()} for arrays in parts]
    for arrays, layout in zip(parts, layouts, strict=True):
        lengths = {key: len(array) for key, array in arrays.items()}
        if not lengths or min(lengths.values()) == 0:
            raise UserError("no rows to make batches of: the kept set, or the set mixed in, is empty")
        if len(set(lengths.values())) > 1:
            raise UserError(f"arrays differ in their number of rows: {lengths}")
        if layout != layouts[0]:
            raise UserError(f"rows that are mixed need the same keys, shapes and dtypes: {layouts[0]}, {layout}")
