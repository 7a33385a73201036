"""Tokenizers: Hugging Face folders and one-id-per-character alphabets behind one class."""

from __future__ import annotations

import bisect
import codecs
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qstar.errors import UserError, require
from qstar.files import local_path, read_json
from qstar.text.chat import ChatTemplate

# transformers warns that PyTorch is missing, which reads like a failure: only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# Any of these makes a folder one with a tokenizer; merges.txt and the configs alone are not enough.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_CONFIG = "tokenizer_config.json"
_NAMED_TEMPLATES = "additional_chat_templates/*.jinja"
_EXPORTED = (
    *(_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
)


class Tokenizer:
    """A Hugging Face fast tokenizer, reduced to what the project uses.

    Encoding calls the Rust backend directly: no special token is added implicitly, nothing is truncated or padded, and
    decoding never removes spaces before punctuation (which would break exact answers such as ``6 7 , 1``). Special
    tokens *written out* in a text are still recognised.

    Attributes:
        vocab_size: one more than the largest id, added tokens included.
        bos_id: id that begins a document, or None where the family has none (T5, character alphabets).
        eos_id: id that ends one; every tokenizer here has it.
        pad_id: the tokenizer's own padding id, else 0. It fills arrays and is never used as a mask, so it may coincide
            with a real token (a model with pad == eos must still learn to stop).
        encoder_end: id that ends an encoder's input, for the tokenizer of an encoder-decoder; else None.
        limit: rows of the model's embedding, or None; `encode` refuses ids from there on.
        files: settings, special tokens and chat template of the source folder, copied by `save`.
    """

    def __init__(self, hf: Any):
        """Wraps a `transformers.PreTrainedTokenizerFast`; raises UserError if it has no EOS token."""
        # transformers gives a token that is in no vocabulary, such as "", the id of the unknown one.
        if not hf.eos_token or hf.eos_token_id == hf.unk_token_id and hf.eos_token != hf.unk_token:
            raise UserError(
                f"tokenizer {hf.name_or_path or type(hf).__name__!r} has no eos_token: without one no "
                f"completion can end; set eos_token in its {_CONFIG}"
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
        # Some families set an option, others have BOS in the template of the backend.
        self._adds_bos = self.bos_id is not None and (
            bool(hf.init_kwargs.get("add_bos_token")) or self.bos_id in self._backend.encode("").ids
        )

    @property
    def _backend(self) -> Any:
        # Not stored: an attribute would be pickled as a second copy.
        return self.hf.backend_tokenizer

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of `text`, with `bos_id` in front when `bos` is set and the tokenizer puts one there.

        A text that begins with the BOS token already gets no second one, and a rendered chat template only its own.

        Raises:
            UserError: a character has no id (in an alphabet), or a token's id is beyond the model's vocabulary.
        """
        return self.encode_batch([text], bos=bos)[0]

    def encode_batch(self, texts: Iterable[str], *, bos: bool = False) -> list[list[int]]:
        texts = list(texts)
        try:
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        # tokenizers raises a bare Exception for a missing [UNK].
        except Exception as error:
            raise self._unknown_character(texts) or error from error
        ids = [item.ids for item in encoded]
        if (limit := self.limit) is not None and limit < self.vocab_size:
            bad = next((i for row in ids for i in row if i >= limit), None)
            if bad is not None:
                raise UserError(
                    f"token {self.hf.convert_ids_to_tokens(bad)!r} of the tokenizer has id {bad}, beyond the model's "
                    f"vocabulary of {limit}: take it out of the text, or resize the model's embedding to the tokenizer"
                )
        if not bos or self.bos_id is None:
            return ids
        # GPT-2 names a BOS token but never puts one before a text: only an empty text starts from it.
        # A template that writes no BOS is for a model that was trained on conversations without it.
        chat = self.chat if self._adds_bos and self.chat and not self.chat.has_bos else None
        return [
            [self.bos_id, *x]
            if not x or self._adds_bos and x[0] != self.bos_id and not (chat and chat.rendered(text))
            else x
            for text, x in zip(texts, ids)
        ]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Start and end in `text` of each of its ids."""
        return self._backend.encode(text, add_special_tokens=False).offsets

    @functools.cached_property
    def chat(self) -> ChatTemplate | None:
        """The tokenizer's chat template, or None."""
        return ChatTemplate(self) if self.hf.chat_template else None

    def end_of(self, prompt: str) -> int:
        """The id that ends a completion of `prompt`: of the assistant's turn in a rendered conversation, else EOS."""
        end = self.chat.turn.end_id if self.chat and self.chat.rendered(prompt) else None
        return self.eos_id if end is None else end

    def ended(self, ids: Sequence[int], prompt: str = "") -> list[int]:
        """Ids of a text behind `prompt`, with one end: `end_of(prompt)`, or what the text itself has written out."""
        end = self.end_of(prompt)
        return [*ids] if ids and ids[-1] in (self.eos_id, end) else [*ids, end]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: with BOS in front, or for an encoder with `encoder_end` behind."""
        return self.encode(text, bos=True) if self.encoder_end is None else [*self.encode(text), self.encoder_end]

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt (BOS in front) and of the completion that follows it.

        They are encoded together if that leaves the prompt's own ids unchanged.
        """
        if self.encoder_end is not None:
            # An encoder-decoder has two texts, which never join.
            return self.encode_prompt(prompt), self.encode(completion)
        head, both_ids = self.encode_batch([prompt, prompt + completion], bos=True)
        if both_ids[: len(head)] == head:
            return head, both_ids[len(head) :]
        return head, self.encode_behind(head, completion)

    def encode_behind(self, ids: Sequence[int], text: str) -> list[int]:
        """Ids of a text that follows `ids`."""
        alone = self.encoder_end is not None or self._begins(ids)
        return self.encode(text) if alone else self.encode_continuation(text)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows another: without the space that SentencePiece puts before a document."""
        # The text may merge with an anchor, which changes the ids of both; then the next one is tried.
        for anchor in ("\n", "0", ":", "a") if self._openers else ():
            head, both_ids = self.encode_batch([anchor, anchor + text])
            if both_ids[: len(head)] == head:
                return both_ids[len(head) :]
        return self.encode(text)

    def _begins(self, ids: Sequence[int]) -> bool:
        """Whether a text behind `ids` is encoded as one that begins a document."""
        return not (self._openers and len(ids)) or ids[-1] in self._openers

    @functools.cached_property
    def _openers(self) -> set[int | None]:
        """Where SentencePiece puts a space before a document: the ids behind which it does, too. Else none."""
        added = self._backend.get_added_tokens_decoder().items()
        try:
            start = self.encode("a")
        except UserError:  # an alphabet without this letter
            return set()
        # Decoding drops the first space only: the document twice shows the second one. Text of unknown tokens is "".
        if self._decode(start) == "" or self._decode(start * 2) == "aa":
            return set()
        # By trial: Llama's tokenizer puts it behind every added token, others only where a text begins.
        behind = {i: self._backend.encode(f"{token.content}a", add_special_tokens=False).ids for i, token in added}
        return {self.bos_id, *(i for i in behind if behind[i] == [i, *start])}

    def special_id(self, text: str) -> int | None:
        """The id of a text that is a special token, which decoded texts never hold; else None."""
        added = self._backend.get_added_tokens_decoder().items()
        return next((i for i, token in added if token.special and token.content == text), None)

    def decode(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """Text of `ids` (list or integer array [T]); special tokens are skipped, spaces kept.

        Args:
            after: the ids in front of `ids`, where they continue a prompt. Without them a SentencePiece tokenizer takes
                `ids` for a document and drops its first space.
        """
        ids = np.asarray(ids).astype(int).tolist()
        if not self._begins(after):
            # Any text in front keeps the space; this one is short, and may have a space in front itself.
            head = self.encode("a")
            return self._decode([*head, *ids])[len(self._decode(head)) :]
        return self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def count(self, ids: Sequence[int], text: str, *, after: Sequence[int] = ()) -> int:
        """The least number of `ids` whose text begins with `text`, a prefix of the text of all of them."""
        covers = lambda k: self.decode(ids[:k], after=after).startswith(text)  # noqa: E731
        # Text only grows with further ids, so a few decodings find the place.
        return bisect.bisect_left(range(len(ids)), True, key=covers)

    def finish(
        self, ids: Sequence[int], stop: Sequence[str] = (), *, after: Sequence[int] = (), stopped: bool = False
    ) -> tuple[str, int, bool]:
        """Decodes a sampled completion, up to the first stop string if there is one.

        Args:
            after: the prompt's ids. stopped: whether the last id is a stop token; it is no part of the text, even where
                the tokenizer does not list it as special.

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
        """Ids that spell `text`, a prefix of the text of `ids`: unchanged up to the last token that lies in it whole.

        If `text` ends within a token, the rest is encoded anew.
        """
        if self.decode(ids, after=after) == text:
            return list(ids)
        k = self.count(ids, text, after=after)
        # The last token may reach beyond the text, and a part of a character decodes to U+FFFD.
        while k and not text.startswith(self.decode(ids[:k], after=after)):
            k -= 1
        rest = text[len(self.decode(ids[:k], after=after)) :]
        return [*ids[:k], *(self.encode(rest) if not k and self._begins(after) else self.encode_continuation(rest))]

    def show(self, token: int) -> str:
        """The text of one token for display: with its leading space, special tokens by name."""
        piece = self.hf.convert_ids_to_tokens(token) or f"<{token}>"
        # SentencePiece's space, which decoding a lone token drops.
        if piece.startswith("\u2581"):
            return " " + piece[1:]
        return self.decode([token]) or piece

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes tokenizer.json and the source folder's other tokenizer files, readable by transformers 4 and 5."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if _CONFIG in self.files:
            self._backend.save(str(folder / "tokenizer.json"))
        else:
            self.hf.save_pretrained(str(folder))
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        written = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        settings = _portable_settings(written, json.loads(self.files.get("special_tokens_map.json", b"{}")), self.hf)
        if settings != written:
            (folder / _CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def spells_as(self, other: Tokenizer) -> bool:
        return self is other or self.hf.get_vocab() == other.hf.get_vocab()

    def _unknown_character(self, texts: list[str]) -> UserError | None:
        for text in texts:
            for position, character in enumerate(text):
                try:
                    self._backend.encode(character, add_special_tokens=False)
                except Exception:  # tokenizers raises nothing narrower
                    shown = text if len(text) <= 40 else text[:37] + "..."
                    return UserError(
                        f"character {character!r} (position {position} of {shown!r}) is not in the "
                        "tokenizer's alphabet: add it there or remove it from the text"
                    )
        return None


def _portable_settings(settings: dict[str, Any], special: dict[str, Any], hf: Any) -> dict[str, Any]:
    # The export must load in transformers 4 too, which does not understand all that version 5 writes.
    plain = {k: v for k, v in settings.items() if k not in ("backend", "is_local", "local_files_only")}
    # A class like LlamaTokenizer has default special tokens; tokenizer.json alone, which is exported, has none.
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if name not in plain and name not in special and getattr(hf, name) is not None:
            plain[name] = str(getattr(hf, name))
    # Version 4 has no classes of these names. Others need files that are not exported: Python code, or tekken.json.
    kind = plain.get("tokenizer_class") or "Backend"
    if plain.pop("auto_map", None) or kind.endswith("Backend") or kind.startswith("MistralCommon"):
        plain["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Version 4 expects a map there.
    if isinstance(plain.get("extra_special_tokens"), list):
        tokens = [*(plain.get("additional_special_tokens") or ()), *plain.pop("extra_special_tokens")]
        plain["additional_special_tokens"] = [token for i, token in enumerate(tokens) if token not in tokens[:i]]
    return plain


def load_tokenizer(folder: str | pathlib.Path) -> Tokenizer | None:
    """The tokenizer of a local checkpoint folder in the Hugging Face layout.

    `tokenizer.json` is read as it stands. Older files (SentencePiece, GPT-2's) are converted by transformers,
    which needs a `tokenizer_class` or `model_type`. None if there are no such files. Nothing is downloaded.

    Raises:
        UserError: the files exist and cannot be read, or there is no EOS token.
    """
    folder = local_path(folder)
    named = [path.relative_to(folder).as_posix() for path in sorted(folder.glob(_NAMED_TEMPLATES))]
    files = {name: (folder / name).read_bytes() for name in (*_EXPORTED, *named) if (folder / name).is_file()}
    # Of both faults transformers would blame tokenizer.json.
    marked = next((name for name in files if files[name].startswith(codecs.BOM_UTF8)), "")
    require((not marked, f"{folder / marked}: begins with a byte order mark (BOM); save it as UTF-8 without one"))
    settings = read_json(folder / _CONFIG, "copy it again from the model's source") if _CONFIG in files else {}
    found = [name for name in _VOCABULARIES if (folder / name).is_file()]
    kind = str(settings.get("tokenizer_class"))
    byte_model = (
        f"{folder}: {kind} works on bytes and has no vocabulary file; such models are not supported: "
        "take a T5, mT5 or FLAN-T5 with spiece.model or tokenizer.json"
    )
    require((bool(found) or not kind.startswith("ByT5"), byte_model))
    if not found:
        return None
    # Half a second: a run that reads packed rows, or a test of packing, never needs it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer may rebuild a known family's tokenizer from its vocabulary; the generic class never does.
    reader = PreTrainedTokenizerFast if "tokenizer.json" in found else AutoTokenizer
    try:
        hf = reader.from_pretrained(str(folder), local_files_only=True)
        if found[0] == "tokenizer.model":
            _repair_sentencepiece(hf.backend_tokenizer, folder / "tokenizer.model")
    # Every reader of every family raises its own kind.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "copy them again from the model's source"
        raise UserError(f"{folder / found[0]}: the tokenizer files are broken ({reason}); {advice}") from error
    tokenizer = Tokenizer(hf)
    tokenizer.files = files
    return tokenizer


def char_tokenizer(alphabet: str, *, pad: str, eos: str) -> Tokenizer:
    """A tokenizer with one id per character, in the order of `alphabet`.

    Args:
        alphabet: the characters, each once; any other in a text is an error.
        pad, eos: its characters for padding and for the end of a document; `decode` skips both.

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
    # With an unknown token outside of the vocabulary WordLevel raises for an unknown character instead of skipping it.
    backend = Backend(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<none>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=eos))


def _repair_sentencepiece(backend: Any, path: pathlib.Path) -> None:
    # A tokenizer converted from SentencePiece BPE (Llama 2, Mistral) must give the ids that the model was trained on.
    # transformers 5 ranks the merges by id instead of by score, so that runs of spaces join first, and omits the space
    # that SentencePiece puts before any text where there is one already (everywhere, without a tokenizer_class).
    from tokenizers import decoders, models, normalizers

    # Other formats stay as they are: Llama 3's tokenizer.model is a tiktoken table.
    if not getattr(backend.model, "byte_fallback", False):
        return
    import sentencepiece

    file = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocabulary = {file.id_to_piece(i): i for i in range(file.get_piece_size())}
    texts = [i for i in vocabulary.values() if not (file.is_control(i) or file.is_unknown(i) or file.is_byte(i))]
    ranked = map(file.id_to_piece, sorted(texts, key=lambda i: (-file.get_score(i), i)))
    halves = ((piece[:cut], piece[cut:]) for piece in ranked for cut in range(1, len(piece)))
    merges = [pair for pair in halves if vocabulary.keys() >= {*pair}]
    unknown = file.id_to_piece(file.unk_id())
    backend.model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    leading = file.encode("a", out_type=str)[0].startswith("▁")
    prefix, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if leading else ([], [])
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
