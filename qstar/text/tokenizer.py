"""One small face for every tokenizer: Hugging Face folders and one-id-per-character alphabets.

`transformers` is imported inside the functions that need it: it costs half a second, and a run that reads
packed rows, or a test of packing, never tokenises.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qstar.errors import UserError
from qstar.text import tokenizer_files

# transformers says that there is no PyTorch, which reads like a failure: tokenizers are all that it is used for.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# Any of these in a folder means "there is a tokenizer here"; merges.txt and the configs alone are not enough.
_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class Tokenizer:
    """A Hugging Face fast tokenizer, stripped to what the project uses.

    Encoding goes to the Rust backend directly, so no special token is ever added behind the caller's back,
    nothing is truncated or padded, and decoding never "cleans up" spaces before punctuation (which would
    break exact answers such as ``6 7 , 1``). Special tokens *written out* in a text are still recognised.

    Attributes:
        vocab_size: one more than the largest id, added tokens included.
        bos_id: id that begins a document, or None where the family has none (T5, character alphabets).
        eos_id: id that ends one; every tokenizer here has it.
        pad_id: the tokenizer's own padding id, else 0. It fills arrays and is never used as a mask, so it
            may coincide with a real token (pad == eos must not teach a model to never stop).
        encoder_end: id that ends what an encoder reads, where the tokenizer is an encoder-decoder's; else None.
        limit: rows of the embedding of the model it belongs to, or None; `encode` refuses ids from there on.
        files: settings, special tokens and chat template of the folder that it was read from, which `save` repeats.
    """

    def __init__(self, hf: Any):
        """Wraps a `transformers.PreTrainedTokenizerFast`; raises UserError if it has no EOS token."""
        if hf.eos_token_id is None:
            raise UserError(
                f"tokenizer {hf.name_or_path or type(hf).__name__!r} has no eos_token: without one no "
                "completion can end; set eos_token in its tokenizer_config.json"
            )
        self.hf = hf
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = max(hf.get_vocab().values()) + 1
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int = hf.eos_token_id
        self.pad_id: int = 0 if hf.pad_token_id is None else hf.pad_token_id
        self.encoder_end: int | None = None
        self.limit: int | None = None
        self.files: dict[str, bytes] = {}
        self._adds_bos = self.bos_id is not None and (
            bool(hf.init_kwargs.get("add_bos_token")) or self.bos_id in self._backend.encode("a").ids
        )

    @property
    def _backend(self) -> Any:
        return self.hf.backend_tokenizer

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of `text`, with `bos_id` in front when `bos` is asked for and the tokenizer puts one there.

        A text that begins with the BOS token already (a rendered chat template) gets no second one.

        Raises:
            UserError: a character has no id (only alphabets without an unknown token refuse one), or the id of a
                token is beyond the model's vocabulary.
        """
        return self.encode_batch([text], bos=bos)[0]

    def encode_batch(self, texts: Iterable[str], *, bos: bool = False) -> list[list[int]]:
        """`encode` of every text, in parallel threads."""
        texts = list(texts)
        try:
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception for a missing [UNK]
            raise self._refusal(texts, error) from error
        ids = [item.ids for item in encoded]
        if self.limit is not None and self.limit < self.vocab_size:
            self._refuse_beyond(ids)
        if not bos or self.bos_id is None:
            return ids
        # GPT-2 names a BOS token but never puts one before a text: only an empty text starts from it.
        return [[self.bos_id, *x] if not x or self._adds_bos and x[0] != self.bos_id else x for x in ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text as a model reads it before it writes: BOS in front, or after it the end that an encoder needs."""
        return self.encode(text, bos=True) if self.encoder_end is None else [*self.encode(text), self.encoder_end]

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt (BOS in front) and of the completion that goes on where it ends.

        They are encoded together as long as that leaves the prompt's own ids alone. An encoder-decoder reads the one and
        writes the other: two texts.
        """
        if self.encoder_end is not None:
            return self.encode_prompt(prompt), self.encode(completion)
        head, both_ids = self.encode_batch([prompt, prompt + completion], bos=True)
        if both_ids[: len(head)] == head:
            return head, both_ids[len(head) :]
        alone = self._special_ids.issuperset(head)
        return head, self.encode(completion) if alone else self.encode_continuation(completion)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on after another one: without the space that SentencePiece puts before a document."""
        for anchor in ("\n", "0", ":", "a") if self._adds_space else ():
            head, both_ids = self.encode_batch([anchor, anchor + text])
            if both_ids[: len(head)] == head:
                return both_ids[len(head) :]
        return self.encode(text)

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether a space is put before every document when it is encoded, and taken away when it is decoded."""
        try:
            return self._decode(self.encode("a") * 2) != "aa"
        except UserError:  # an alphabet without this letter
            return False

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids that `decode` skips."""
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def decode(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """Text of `ids` (list or integer array [T]); special tokens are skipped, spaces left alone.

        Args:
            after: the ids that stand before, where `ids` go on after a prompt. Without them a SentencePiece tokenizer
                takes `ids` for a document and drops its first space.
        """
        ids = np.asarray(ids).astype(int).tolist()
        if self._adds_space and not self._special_ids.issuperset(map(int, after)):
            return self._decode([*self.encode("a"), *ids])[1:]  # any text before keeps the space; this one is short
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def decode_batch(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """`decode` of every row; rows may have different lengths."""
        rows = [np.asarray(row).astype(int).tolist() for row in ids]
        return self._backend.decode_batch(rows, skip_special_tokens=True)

    def count(self, ids: Sequence[int], text: str, *, after: Sequence[int] = ()) -> int:
        """How many of `ids` it takes to spell `text`, a beginning of what all of them spell."""
        spells = lambda k: self.decode(ids[:k], after=after).startswith(text)  # noqa: E731
        return bisect.bisect_left(range(len(ids)), True, key=spells)

    def finish(
        self, ids: Sequence[int], stop: Sequence[str] = (), *, after: Sequence[int] = (), stopped: bool = False
    ) -> tuple[str, int, bool]:
        """Reads a sampled completion, up to the first stop string if there is one.

        Args:
            after: the prompt's ids. stopped: whether the last id is one that ends a text; it is no part of the text, even
                where the tokenizer does not list it as special.

        Returns:
            The text, how many ids belong to it (the token in which a stop string begins may reach into it), and whether
            it has ended.
        """
        body = ids[:-1] if stopped else ids
        text = self.decode(body, after=after)
        cuts = [at for at in map(text.find, stop) if at >= 0]
        if not cuts:
            return text, len(ids), stopped
        return text[: min(cuts)], self.count(body, text[: min(cuts)], after=after), True

    def keep(self, ids: Sequence[int], text: str, *, after: Sequence[int] = ()) -> list[int]:
        """Ids that spell `text`, a beginning of what `ids` spell: as they are up to the last token that lies in it whole.

        What is left over, where `text` ends within a token, is encoded.
        """
        if self.decode(ids, after=after) == text:
            return list(ids)
        k = self.count(ids, text, after=after)
        while k and not text.startswith(self.decode(ids[:k], after=after)):
            k -= 1
        rest = text[len(self.decode(ids[:k], after=after)) :]
        return [*ids[:k], *(self.encode_continuation(rest) if k or len(after) else self.encode(rest))]

    def show(self, token: int) -> str:
        """The text of one token as a reader wants to see it: with its leading space, special tokens by name."""
        piece = self.hf.convert_ids_to_tokens(token) or f"<{token}>"
        if piece.startswith("\u2581"):  # SentencePiece's space, which decoding a lone token drops
            return " " + piece[1:]
        return self.decode([token]) or piece

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes tokenizer.json and the source folder's other tokenizer files, the Hugging Face layout, into `folder`."""
        tokenizer_files.write(self.hf, self.files, pathlib.Path(folder))

    def spells_as(self, other: Tokenizer) -> bool:
        """Whether the ids of the other tokenizer mean the same here."""
        return self is other or self.hf.get_vocab() == other.hf.get_vocab()

    def _refuse_beyond(self, rows: Iterable[Sequence[int]]) -> None:
        """Raises UserError for an id that the model has no embedding of."""
        bad = next((i for row in rows for i in row if i >= self.limit), None)
        if bad is not None:
            raise UserError(
                f"token {self.hf.convert_ids_to_tokens(bad)!r} of the tokenizer has id {bad}, beyond the model's "
                f"vocabulary of {self.limit}: take it out of the text, or resize the model's embedding to the tokenizer"
            )

    def _refusal(self, texts: list[str], error: Exception) -> Exception:
        """The UserError that names the first character without an id, or `error` if there is none."""
        for text in texts:
            for position, character in enumerate(text):
                try:
                    self._backend.encode(character, add_special_tokens=False)
                except Exception:  # tokenizers raises nothing narrower
                    return UserError(
                        f"character {character!r} (position {position} of {_shorten(text)!r}) is not in the "
                        "tokenizer's alphabet: add it there or remove it from the text"
                    )
        return error


def load_tokenizer(folder: str | pathlib.Path) -> Tokenizer | None:
    """The tokenizer kept in a local checkpoint folder, in the Hugging Face layout.

    `tokenizer.json` is read as it stands. Without it the older files (SentencePiece `tokenizer.model` or
    `spiece.model`, GPT-2's `vocab.json` and `merges.txt`) are converted by transformers, which then needs
    `tokenizer_class` in tokenizer_config.json or `model_type` in config.json. Nothing is downloaded.

    A SentencePiece tokenizer puts a space before every text it is given, so the ids of `prompt + completion`
    are not those of the two joined: `encode_pair` and `decode` with `after` know what stands before.

    Returns:
        The tokenizer, or None when the folder holds no tokenizer files (weights alone are fine).

    Raises:
        UserError: the files are there and cannot be read, or there is no EOS token.
    """
    folder = pathlib.Path(folder).expanduser()
    found = [name for name in _FILES if (folder / name).is_file()]
    if not found:
        kind = _tokenizer_class(folder)
        if kind.startswith("ByT5"):
            raise UserError(
                f"{folder}: {kind} works on bytes and has no vocabulary file; such models are not supported: "
                "take a T5, mT5 or FLAN-T5 with spiece.model or tokenizer.json"
            )
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer may rebuild a known family's tokenizer from its vocabulary; the generic class never does.
    reader = PreTrainedTokenizerFast if "tokenizer.json" in found else AutoTokenizer
    try:
        hf = reader.from_pretrained(str(folder), local_files_only=True)
        if found[0] == "tokenizer.model":
            _repair_sentencepiece(hf.backend_tokenizer, folder / "tokenizer.model")
    except Exception as error:  # every reader of every family raises its own kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder / found[0]}: the tokenizer files are broken ({reason}); copy them again from the model's source"
        ) from error
    made = Tokenizer(hf)
    made.files = tokenizer_files.read_kept(folder)
    return made


def _tokenizer_class(folder: pathlib.Path) -> str:
    try:
        settings = json.loads((folder / tokenizer_files.CONFIG).read_text(encoding="utf-8"))
        return str(settings.get("tokenizer_class", ""))
    except (OSError, ValueError, AttributeError):  # a folder without tokenizer: weights alone are fine
        return ""


def char_tokenizer(alphabet: str, *, pad: str, eos: str) -> Tokenizer:
    """A tokenizer with one id per character, in the order of `alphabet`.

    It is an ordinary `tokenizers` model without an unknown token, so it is saved and loaded in the Hugging
    Face layout like any other, and a character outside the alphabet is an error, never a silent gap.

    Args:
        alphabet: the characters, each once.
        pad: the character of `alphabet` used for padding; `decode` skips it.
        eos: the character of `alphabet` that ends a document; `decode` skips it too.

    Raises:
        UserError: a character occurs twice, or `pad` or `eos` is not one character of the alphabet.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    twice = sorted({c for c in alphabet if alphabet.count(c) > 1})
    if twice:
        raise UserError(f"alphabet {alphabet!r} repeats {twice[0]!r}: give each character once")
    for role, token in (("pad", pad), ("eos", eos)):
        if len(token) != 1 or token not in alphabet:
            raise UserError(f"{role}={token!r} is not one character of the alphabet {alphabet!r}")
    # The unknown token is a name outside the vocabulary: WordLevel then raises instead of guessing.
    model = models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<none>")
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=eos))


def _repair_sentencepiece(backend: Any, path: pathlib.Path) -> None:
    """Makes a tokenizer that was converted from SentencePiece BPE (Llama 2, Mistral) agree with its file.

    transformers 5 ranks the merges by id instead of by score, so that runs of spaces join first, and leaves
    out the space that SentencePiece puts before any text where one is there already (everywhere, when the
    folder names no tokenizer_class). The ids would differ from those the model was trained on. Files that
    are not SentencePiece BPE (Llama 3's tokenizer.model is a tiktoken table) are left alone.
    """
    from tokenizers import decoders, models, normalizers

    if not getattr(backend.model, "byte_fallback", False):
        return
    import sentencepiece

    file = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocabulary = {file.id_to_piece(i): i for i in range(file.get_piece_size())}
    ranked = []
    for piece, i in vocabulary.items():
        if not (file.is_control(i) or file.is_unknown(i) or file.is_byte(i)):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            ranked += [(-file.get_score(i), i, pair) for pair in halves if all(h in vocabulary for h in pair)]
    merges = [pair for _, _, pair in sorted(ranked, key=lambda item: item[:2])]
    unknown = file.id_to_piece(file.unk_id())
    backend.model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    leading = file.encode("a", out_type=str)[0].startswith("▁")
    prefix = [normalizers.Prepend("▁")] if leading else []
    strip = [decoders.Strip(" ", 1, 0)] if leading else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _shorten(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
