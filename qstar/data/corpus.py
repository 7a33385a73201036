"""Text corpora for Quiet-STaR: rows of tokens by step number, for exact resume. No jax here."""

from __future__ import annotations

import functools
import os
import zlib
from typing import NamedTuple

import numpy as np

from qstar.data.sources import BAD_ROWS, read_records, text_field
from qstar.errors import require
from qstar.text.tokenizer import Tokenizer

HELD_OUT = 50  # one document in 50 is for testing


class Rows(NamedTuple):
    """B rows of T tokens."""

    tokens: np.ndarray  # [B, T] int32
    mask: np.ndarray  # [B, T] float32: 1 where the token is to be predicted
    segment_ids: np.ndarray  # [B, T] int32: 1.. per document, 0 = padding
    positions: np.ndarray  # [B, T] int32: from 0 in every document
    classes: np.ndarray | None = None  # [B, T] int32 into `Corpus.classes`: the kind of token; -1 = none
    expected: np.ndarray | None = None  # [B, T, S] int32: the thought that would help after a token, padded with -1


class Corpus:
    """Base class of the texts that Quiet-STaR trains on: `TextCorpus`, and generated ones (`tasks.fold_digits`)."""

    tokenizer: Tokenizer
    classes: tuple[str, ...] = ()  # kinds of token, for the metrics
    length: int  # T

    @property
    def base_length(self) -> int:
        return self.length

    def base_rows(self, step: int, size: int, seed: int) -> Rows:
        return self.rows(step, size, seed)

    def rows(self, step: int, size: int, seed: int) -> Rows:
        """Rows of one training step: a pure function of its arguments."""
        raise NotImplementedError

    def test_rows(self, size: int) -> Rows:
        """Held-out rows, always the same."""
        raise NotImplementedError

    def hold_out_stopping(self) -> None:
        """Separates the text of `stopping_rows` from that of `test_rows`, where both come from one store."""

    def stopping_rows(self, size: int) -> Rows:
        """Held-out rows for early stopping; reported numbers are measured on `test_rows`."""
        raise NotImplementedError


def full_rows(
    tokens: np.ndarray, lengths: np.ndarray, classes: np.ndarray | None = None, expected: np.ndarray | None = None
) -> Rows:
    """Rows of one document each, padded on the right. tokens: [B, T]; lengths: [B]."""
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    valid = columns < lengths[:, None]
    # broadcast_to gives a read-only view.
    positions = np.broadcast_to(columns, tokens.shape).copy()
    return Rows(tokens.astype(np.int32), valid.astype(np.float32), valid.astype(np.int32), positions, classes, expected)


class TextCorpus(Corpus):
    """Documents of a file or of the hub.

    `mode="crop"` follows the official code: a row is one random crop of one document, padded on the right. In
    `mode="pack"` a row holds consecutive documents, and attention stays within each.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        tokenizer: Tokenizer,
        *,
        length: int = 256,
        field: str = "text",
        mode: str = "crop",
        split: str | None = None,
        limit: int = 0,
        bad_rows: float = BAD_ROWS,
    ):
        """Reads the first `limit` documents (0: all; at least 2, else a UserError) of a `source` of `read_records`."""
        require(
            (mode in ("crop", "pack"), f"data.mode={mode!r} is not one of crop, pack"),
            (length >= 2, f"data.length={length} must be at least 2"),
        )
        parse = functools.partial(text_field, name=field)
        texts = read_records(source, [field], split=split, limit=limit or None, parse=parse, bad_rows=bad_rows)
        require((len(texts) >= 2, f"{source}: {len(texts)} document; at least 2 are needed, one of them to test on"))
        self.tokenizer, self.length, self.mode = tokenizer, length, mode
        # By a hash of the text, so that copies of a document fall on the same side of the split.
        held_out = [zlib.crc32(text.encode()) % HELD_OUT == HELD_OUT - 1 for text in texts]
        # Of a few dozen documents none may fall into the bucket.
        if not any(held_out):
            held_out[-1] = True
        test = [t for t, h in zip(texts, held_out) if h]
        self._texts = {"train": [t for t, h in zip(texts, held_out) if not h], "test": test, "stopping": test}
        self._encoded = functools.lru_cache(maxsize=100_000)(self._encode)

    def rows(self, step: int, size: int, seed: int) -> Rows:
        # One generator per step and no state: a resumed run reads the rows that it would have read.
        return self._rows("train", np.random.default_rng([seed, step]), size)

    def test_rows(self, size: int) -> Rows:
        return self._rows("test", np.random.default_rng(0), size)

    def hold_out_stopping(self) -> None:
        test = self._texts["test"]
        if len(test) > 1:
            self._texts |= {"stopping": test[::2], "test": test[1::2]}
            # Keyed by part and index, which now name other texts.
            self._encoded.cache_clear()

    def stopping_rows(self, size: int) -> Rows:
        # Another stream than `test_rows`: a single held-out document serves both, in other crops.
        return self._rows("stopping", np.random.default_rng(1), size)

    def _encode(self, part: str, index: int) -> np.ndarray:
        # The end of a document is a token to predict; without it no model learns to stop.
        return np.asarray([*self.tokenizer.encode(self._texts[part][index], bos=True), self.tokenizer.eos_id], np.int32)

    def _rows(self, part: str, rng: np.random.Generator, size: int) -> Rows:
        tokens, segments, positions = np.zeros((3, size, self.length), np.int32)
        for b in range(size):
            at = document = 0
            while at < self.length and (self.mode == "pack" or document == 0):
                ids = self._encoded(part, int(rng.integers(len(self._texts[part]))))
                room = self.length - at
                begin = int(rng.integers(max(1, len(ids) - room + 1))) if self.mode == "crop" else 0
                piece = ids[begin : begin + room]
                document += 1
                span = np.s_[b, at : at + len(piece)]
                tokens[span], segments[span], positions[span] = piece, document, np.arange(len(piece))
                at += len(piece)
        # Neither padding nor a document's first token, in front of which stands another document.
        predicted = positions > 0
        return Rows(tokens, predicted.astype(np.float32), segments, positions)
