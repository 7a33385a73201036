"""Text corpora for Quiet-STaR: rows of tokens by step number, for exact resume. No jax here."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qstar.data.sources import BAD_ROWS, read_records, text_field
from qstar.errors import require
from qstar.text.tokenizer import Tokenizer


class Rows(NamedTuple):
    """B rows of T tokens."""

    tokens: np.ndarray  # [B, T] int32
    mask: np.ndarray  # [B, T] float32: 1 where the token is to be predicted
    segment_ids: np.ndarray  # [B, T] int32: 1.. per document, 0 = padding
    positions: np.ndarray  # [B, T] int32: from 0 in every document
    classes: np.ndarray | None = None  # [B, T] int32 into `Corpus.classes`: the kind of token; -1 = none
    expected: np.ndarray | None = None  # [B, T, S] int32: the thought that would help after a token, padded with -1
    documents: np.ndarray | None = None  # [B] int32: the document of a row; rows of one are not independent


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


def full_rows(tokens: np.ndarray, lengths: np.ndarray, **more: np.ndarray) -> Rows:
    """Rows of one document each, padded on the right. tokens: [B, T]; lengths: [B]; more: further fields of `Rows`."""
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    valid = columns < lengths[:, None]
    # broadcast_to gives a read-only view.
    positions = np.broadcast_to(columns, tokens.shape).copy()
    return Rows(tokens.astype(np.int32), valid.astype(np.float32), valid.astype(np.int32), positions, **more)


class TextCorpus(Corpus):
    """Documents of a file, of a folder or of the hub.

    `mode="crop"` follows the official code: a row is one random crop of one document, padded on the right. In
    `mode="pack"` a row is filled with such crops of further documents, and attention stays within each.
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
        held_out: int = 50,
        bad_rows: float = BAD_ROWS,
    ):
        """Reads the first `limit` documents (0: all) of a `source` of `read_records`; blank ones are left out.

        Args:
          held_out: one document in so many is for testing, chosen by a hash of its text.

        Raises UserError unless there are documents to train on and others to test on.
        """
        require(
            (mode in ("crop", "pack"), f"data.mode={mode!r} is not one of crop, pack"),
            (length >= 2, f"data.length={length} must be at least 2"),
            (held_out >= 2, f"data.held_out={held_out} must be at least 2: one document in so many is held out"),
        )
        parse = functools.partial(text_field, name=field)
        texts = read_records(source, [field], split=split, limit=limit or None, parse=parse, bad_rows=bad_rows)
        texts = [text for text in texts if text.strip()]
        different = len(set(texts))
        few = f"{source}: {different} different documents with text; at least 2 are needed, one of them to test on"
        require((different >= 2, few))
        self.tokenizer, self.length, self.mode = tokenizer, length, mode
        # By the text, so that copies of a document fall on the same side of the split.
        chosen = {text for text in texts if zlib.crc32(text.encode()) % held_out == held_out - 1}
        # Of a few documents none, or all, may fall into the bucket.
        if not 0 < len(chosen) < different:
            chosen = {texts[-1]}
        test = [text for text in texts if text in chosen]
        train = [text for text in texts if text not in chosen]
        self._texts = {"train": train, "test": test, "stopping": test}
        self._encoded = functools.lru_cache(maxsize=100_000)(self._encode)

    def rows(self, step: int, size: int, seed: int) -> Rows:
        # One generator per step and no state: a resumed run reads the rows that it would have read.
        return self._rows("train", np.random.default_rng([seed, step]), size)

    def test_rows(self, size: int) -> Rows:
        return self._rows("test", np.random.default_rng(0), size)

    def hold_out_stopping(self) -> None:
        # By the text again: copies of one that training stops by are not reported on.
        stopping = set(list(dict.fromkeys(self._texts["test"]))[::2])
        rest = [text for text in self._texts["test"] if text not in stopping]
        if rest:
            self._texts |= {"stopping": [text for text in self._texts["test"] if text in stopping], "test": rest}
            # Keyed by part and index, which now name other texts.
            self._encoded.cache_clear()

    def stopping_rows(self, size: int) -> Rows:
        # Another stream than `test_rows`: a single held-out document serves both, in other crops.
        return self._rows("stopping", np.random.default_rng(1), size)

    def _encode(self, part: str, index: int) -> np.ndarray:
        # The end of a document is a token to predict; without it no model learns to stop.
        return np.asarray(self.tokenizer.ended(self.tokenizer.encode(self._texts[part][index], bos=True)), np.int32)

    def _draw(self, part: str, rng: np.random.Generator) -> Iterator[int]:
        while True:
            # A held-out document is drawn again only after all the others: more documents give a narrower interval.
            count = len(self._texts[part])
            yield from (rng.integers(count, size=1) if part == "train" else rng.permutation(count)).tolist()

    def _rows(self, part: str, rng: np.random.Generator, size: int) -> Rows:
        tokens, segments, positions = np.zeros((3, size, self.length), np.int32)
        documents, draw = np.zeros(size, np.int32), self._draw(part, rng)
        for b in range(size):
            at = document = 0
            while at < self.length and (self.mode == "pack" or document == 0):
                documents[b] = next(draw)
                ids = self._encoded(part, int(documents[b]))
                room = self.length - at
                # Anywhere in a document that does not fit, its end included: else no EOS would be learnt from long ones.
                begin = int(rng.integers(max(1, len(ids) - room + 1)))
                piece = ids[begin : begin + room]
                document += 1
                span = np.s_[b, at : at + len(piece)]
                tokens[span], segments[span], positions[span] = piece, document, np.arange(len(piece))
                at += len(piece)
        # Neither padding nor a document's first token, in front of which stands another document.
        predicted = positions > 0
        # A packed row has several documents.
        of_one = documents if self.mode == "crop" else None
        return Rows(tokens, predicted.astype(np.float32), segments, positions, documents=of_one)
