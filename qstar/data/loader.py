"""Batches of packed rows as a pure function of (arrays, seed, step).

grain does the shuffling. It is imported when the first stream is made, not with this module, because grain
itself imports jax, which `data` and all that imports it must not need (worker processes, fast tests).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from qstar.errors import UserError

Arrays = Mapping[str, np.ndarray]


def batches(
    arrays: Arrays,
    batch_size: int,
    *,
    seed: int,
    mix: tuple[Arrays, float] | None = None,
) -> Batches:
    """An endless sequence of batches: rows shuffled anew every epoch, epochs joined without a gap.

    `batches(...)[step]` depends on nothing but the arguments and `step`, so a run that resumes at step 700
    reads the very batches that it would have read. Only row numbers go through grain; the rows are gathered
    from `arrays` at once.

    Args:
        arrays: equally long arrays [N, ...], such as `qstar.text.pack` makes.
        batch_size: rows of a batch, B. Every process of a run reads all of them.
        seed: of both shuffles.
        mix: (other arrays, share): the last round(share * B) rows of every batch come from there, shuffled
            and repeated on their own (hinted seed rows beside self-generated ones, for instance).

    Raises:
        UserError: no rows, keys or row shapes that differ, a share outside 0..1, B below 1.
    """
    return Batches(arrays, batch_size, seed=seed, mix=mix)


class Batches:
    """What `batches` returns: index it with a step, get a dict of arrays [B, ...]."""

    def __init__(self, arrays: Arrays, batch_size: int, *, seed, mix):
        other, share = mix if mix is not None else ({}, 0.0)
        if not 0 <= share <= 1:
            raise UserError(f"mix share {share} is not between 0 and 1")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} must be at least 1")
        mixed = round(share * batch_size)
        sources = [(arrays, batch_size - mixed, f"{seed}/main"), (other, mixed, f"{seed}/mix")]
        sources = [source for source in sources if source[1] > 0]
        _check([rows for rows, _, _ in sources])
        self._sources = [
            (rows, _row_numbers(len(next(iter(rows.values()))), size, name)) for rows, size, name in sources
        ]

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of `step` (0, 1, ..)."""
        if step < 0:
            raise IndexError(f"step {step}: batches count from 0 and have no end")
        chosen = [(arrays, stream[step]) for arrays, stream in self._sources]
        return {key: np.concatenate([np.asarray(arrays[key])[rows] for arrays, rows in chosen]) for key in chosen[0][0]}


def _row_numbers(rows: int, size: int, name: str):
    """grain's endless shuffled row numbers, [size] of them per step."""
    from grain import MapDataset  # imports jax: see the head of this file

    seed = zlib.crc32(name.encode())  # grain wants 32 bits; main and mix must not share an order
    return MapDataset.range(rows).shuffle(seed=seed).repeat().batch(size)


def _check(sources: list[Arrays]) -> None:
    """Every source has rows; all agree in keys, row shape and dtype."""
    first = {key: (array.shape[1:], array.dtype) for key, array in sources[0].items()}
    for arrays in sources:
        lengths = {key: len(array) for key, array in arrays.items()}
        if not lengths or min(lengths.values()) == 0:
            raise UserError("no rows to make batches of: the kept set, or the set mixed in, is empty")
        if len(set(lengths.values())) > 1:
            raise UserError(f"arrays differ in their number of rows: {lengths}")
        these = {key: (array.shape[1:], array.dtype) for key, array in arrays.items()}
        if these != first:
            raise UserError(f"rows that are mixed need the same keys, shapes and dtypes: {first}, {these}")
