"""Text to learn from without questions and answers: what Quiet-STaR trains on. No jax here.

A corpus hands out rows of tokens by step number, so that a run that was killed goes on with the very rows it would have
seen. Two kinds: any text, cropped or packed; and generated documents of known difficulty (`tasks.folds`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qstar.data.sources import BAD_ROWS, read_records
from qstar.errors import require
from qstar.text.tokenizer import Tokenizer

HELD_OUT = 50  # one document of so many is for testing, by its text


class Rows(NamedTuple):
    """B rows of N tokens."""

    tokens: np.ndarray  # [B, N] int32
    mask: np.ndarray  # [B, N] float32: 1 where the token is to be predicted
    segment_ids: np.ndarray  # [B, N] int32: 1.. per document, 0 = padding
    positions: np.ndarray  # [B, N] int32: from 0 in every document
    classes: np.ndarray | None = None  # [B, N] int32 into `Corpus.classes`: what kind of token it is; -1 = none
    expected: np.ndarray | None = None  # [B, N, K] int32: the thought after it that would help, -1 beyond its end


class Corpus:
    """What Quiet-STaR needs of its text."""

    tokenizer: Tokenizer
    classes: tuple[str, ...] = ()  # kinds of token, for the metrics
    length: int  # N

    @property
    def base_length(self) -> int:
        """Tokens of a row of the base model's text."""
        return self.length

    def base_rows(self, step: int, size: int, seed: int) -> Rows:
        """Rows of a step of the base model's training (the same text, unless the corpus says otherwise)."""
        return self.rows(step, size, seed)

    def rows(self, step: int, size: int, seed: int) -> Rows:
        """Rows of a training step: a pure function of its arguments."""
        raise NotImplementedError

    def test_rows(self, size: int) -> Rows:
        """Rows that are held out, always the same."""
        raise NotImplementedError

    def hold_out_stopping(self) -> None:
        """Sets text for `stopping_rows` apart from that of `test_rows`, where both come from one store."""

    def stopping_rows(self, size: int) -> Rows:
        """Held-out rows by which a training is stopped; what is reported is measured on `test_rows`."""
        raise NotImplementedError


def full_rows(tokens: np.ndarray, lengths: np.ndarray, **more: Any) -> Rows:
    """Rows of one document each, padded on the right. tokens: [B, N]; lengths: [B]."""
    there = np.arange(tokens.shape[1]) < lengths[:, None]
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Rows(tokens.astype(np.int32), there.astype(np.float32), there.astype(np.int32), positions.copy(), **more)


class TextCorpus(Corpus):
    """Documents of a jsonl or parquet file, or of the hub.

    `mode="crop"` is the official code's way: a row is one random crop of one document, padded on the right. In
    `mode="pack"` a row holds consecutive documents, each seeing itself alone.
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
        """Reads the documents; they are tokenised when they are first used.

        Args:
          source, bad_rows: see `data.sources.read_records`. limit: first so many documents (0: all).

        Raises:
          UserError: a source that cannot be read, or too few documents to hold some out.
        """
        require(
            (mode in ("crop", "pack"), f"data.mode={mode!r} is not one of crop, pack"),
            (length >= 2, f"data.length={length} must be at least 2"),
        )
        how = dict(split=split, limit=limit or None, parse=functools.partial(_text, field), bad_rows=bad_rows)
        texts = read_records(source, [field], **how)
        require((len(texts) >= 2, f"{source}: {len(texts)} document; at least 2 are needed, one of them to test on"))
        self.tokenizer, self.length, self.mode = tokenizer, length, mode
        held_out = [i % HELD_OUT == HELD_OUT - 1 for i in _ranks(texts)]
        if not any(held_out):
            held_out[-1] = True
        self._train = [t for t, h in zip(texts, held_out) if not h]
        self._test = self._stopping = [t for t, h in zip(texts, held_out) if h]
        self._encoded = functools.lru_cache(maxsize=100_000)(self._encode)

    def rows(self, step: int, size: int, seed: int) -> Rows:
        """See `Corpus`."""
        rng = np.random.default_rng([seed, step])
        return self._rows(self._train, rng, size, "train")

    def test_rows(self, size: int) -> Rows:
        """See `Corpus`: crops of held-out documents."""
        return self._rows(self._test, np.random.default_rng(0), size, "test")

    def hold_out_stopping(self) -> None:
        """See `Corpus`: every other held-out document (a single one serves for both, in other crops)."""
        if len(self._test) > 1:
            self._stopping, self._test = self._test[::2], self._test[1::2]
            self._encoded.cache_clear()

    def stopping_rows(self, size: int) -> Rows:
        """See `Corpus`: crops of the documents that `hold_out_stopping` set apart."""
        return self._rows(self._stopping, np.random.default_rng(1), size, "stopping")

    def _encode(self, split: str, index: int) -> np.ndarray:
        text = {"train": self._train, "test": self._test, "stopping": self._stopping}[split][index]
        eos = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        return np.asarray(self.tokenizer.encode(text, bos=True) + eos, np.int32)

    def _rows(self, texts: Sequence[str], rng: np.random.Generator, size: int, split: str) -> Rows:
        tokens = np.zeros((size, self.length), np.int32)
        segments = np.zeros((size, self.length), np.int32)
        positions = np.zeros((size, self.length), np.int32)
        for b in range(size):
            at, document = 0, 0
            while at < self.length and (self.mode == "pack" or document == 0):
                ids = self._encoded(split, int(rng.integers(len(texts))))
                room = self.length - at
                begin = int(rng.integers(max(1, len(ids) - room + 1))) if self.mode == "crop" else 0
                piece = ids[begin : begin + room]
                document += 1
                tokens[b, at : at + len(piece)] = piece
                segments[b, at : at + len(piece)] = document
                positions[b, at : at + len(piece)] = np.arange(len(piece))
                at += len(piece)
        predicted = positions > 0  # neither padding nor a document's first token: another document stands before it
        return Rows(tokens, predicted.astype(np.float32), segments, positions)


def _text(field: str, record: dict) -> str:
    if not isinstance(record[field], str):
        raise ValueError(f"field {field!r} is of type {type(record[field]).__name__}, not text")
    return record[field]


def _ranks(texts: Sequence[str]) -> list[int]:
    """A number per text that depends on the text alone, so that equal texts fall on the same side of the split."""
    import zlib

    return [zlib.crc32(t.encode()) for t in texts]
