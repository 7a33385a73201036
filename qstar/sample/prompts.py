"""The inputs of sampling: `SamplingOptions`, and prompts as token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qstar.errors import MAX_TEMPERATURE, Settings, UserError, bounded, check_seed, require
from qstar.models.encdec import EncDecConfig
from qstar.models.int8 import KINDS
from qstar.models.model import Model
from qstar.sample.logits import SamplingParams
from qstar.text.chat import PROMPTS, as_text, is_messages, text_or_ids
from qstar.text.tokenizer import Tokenizer

LEAST_SHARED = 64  # from so many common leading tokens on, they are prefilled once without a named prefix


@dataclasses.dataclass(frozen=True)
class SamplingOptions(Settings):
    """Keyword arguments of `generate` and `stream`. None of `temperature`, `top_k`, `top_p`, `seed` recompiles."""

    max_new_tokens: int = bounded(ge=1)  # most tokens of a completion
    temperature: float = bounded(1.0, ge=0, le=MAX_TEMPERATURE, note="0 is greedy")
    top_k: int = bounded(0, ge=0, note="0 is off")  # filters, applied in this order
    top_p: float = bounded(1.0, gt=0, le=1)
    n: int = bounded(1, ge=1, le=1_000_000)  # completions per prompt
    stop: Sequence[str] = ()  # strings or special tokens that end a completion (they are cut off); EOS always does
    seed: int = 0  # draws depend on (seed, prompt index, sample index) alone, not on batching
    prefix: str | Sequence[int] = ""  # text or ids in front of every prompt, run once and shared (few-shot examples)
    slots: int | None = bounded(None, ge=1)  # rows decoded side by side; default: one per request, up to 256
    weights: str = bounded("", choices=KINDS)  # "int8": the blocks' weights of a decoder in 8 bits (`models.int8`)

    def __post_init__(self):
        super().__post_init__()
        check_seed("seed", self.seed)
        given = () if self.stop is None else self.stop
        given = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
        require(
            (all(isinstance(x, str) for x in given), f"stop={self.stop!r} must be a text or a list of texts"),
            ("" not in given, f"stop={given} holds an empty string, which every text contains; leave it out"),
        )
        prefix = "" if self.prefix is None else self.prefix
        if not isinstance(prefix, str):
            prefix = text_or_ids(None, prefix, "prefix must be text or a list of token ids") or ""
        object.__setattr__(self, "stop", given)
        object.__setattr__(self, "prefix", prefix)

    def sampling_params(self) -> SamplingParams:
        return SamplingParams.make(self.temperature, self.top_k, self.top_p)


def listed(prompts: Any) -> list[Any]:
    """Returns prompts as a list (a generator is read once); raises UserError for a lone text or conversation."""
    lone = isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable)
    many = [] if lone else list(prompts)
    if lone or is_messages(many):
        given = "list of messages" if is_messages(many) else "text" if isinstance(prompts, str) else "prompt"
        raise UserError(
            f"prompts is a list of texts, of lists of messages, or of lists of token ids: put the {given} in [ ]"
        )
    return many


def encode_prompts(model: Model, prompts: Sequence, options: SamplingOptions) -> tuple[list[int], list[list[int]]]:
    """Returns the ids that all rows begin with (if there is a prefix), and what follows them in each row.

    Raises:
      UserError: text for a model without tokenizer, an empty or too long prompt, or an id outside the vocabulary.
    """
    tokenizer, prefix = model.tokenizer, options.prefix
    no_tokenizer = "stop strings need a tokenizer, and this model has none; pass tokens and rely on the EOS id"
    require((not options.stop or tokenizer is not None, no_tokenizer))
    prompts = listed(prompts)
    talks = any(map(is_messages, prompts)) and len(prefix)
    require((not talks, "prefix stands in front of texts; with messages, put earlier turns into each prompt"))
    given = [text_or_ids(tokenizer, as_text(tokenizer, p), f"prompt {i} {PROMPTS}") for i, p in enumerate(prompts)]
    if prefix:
        text_or_ids(tokenizer, prefix, "prefix")
    decoder = not isinstance(model.config, EncDecConfig)
    long = f"max_new_tokens={options.max_new_tokens} exceeds the model's context of {model.config.max_positions} tokens"
    require((decoder or options.max_new_tokens <= model.config.max_positions, f"{long}; lower it"))
    rows = [[*prefix, *row] for row in given] if tokenizer is None else _rows(tokenizer, given, prefix, decoder)
    # The response of an encoder-decoder takes no room from its prompt.
    _check_rows(model, given, rows, options.max_new_tokens if decoder else 0)
    # An encoder reads whole prompts. Without a prefix a few equal tokens are chance, and would compile one more program;
    # many are examples or instructions that the caller put in front of every prompt.
    shared = _common_length(rows) if decoder else 0
    if not len(prefix) and (len(rows) < 2 or shared < LEAST_SHARED):
        shared = 0
    return rows[0][:shared] if rows else [], [row[shared:] for row in rows]


def _rows(tokenizer: Tokenizer, prompts: list[Any], prefix: str | Sequence[int], decoder: bool) -> list[list[int]]:
    # Text is encoded with its prefix in front, since a token may span the two.
    texts = [prefix + p for p in prompts if isinstance(p, str)] if isinstance(prefix, str) else []
    encoded = iter(tokenizer.encode_batch(texts, bos=decoder))
    end = [] if decoder or tokenizer.encoder_end is None else [tokenizer.encoder_end]
    head = prefix if not isinstance(prefix, str) else tokenizer.encode(prefix, bos=decoder) if prefix else ()

    def row(p: Any) -> list[int]:
        if not isinstance(p, str):
            return [*head, *p]
        return [*next(encoded), *end] if isinstance(prefix, str) else [*head, *tokenizer.encode_behind(head, p), *end]

    return [row(p) for p in prompts]


def _check_rows(model: Model, prompts: list[Any], rows: list[list[int]], new: int) -> None:
    room, vocab = model.config.max_positions, model.config.vocab_size
    for i, row in enumerate(rows):
        bad = next((t for t in row if not 0 <= t < vocab), None)
        need = f"{len(row)} prompt tokens" + (f" + max_new_tokens={new} = {len(row) + new}" if new else "")
        advice = "shorten the prompt" + (" or lower max_new_tokens" if new else "")
        why = " (the model has no BOS token to start from)" if isinstance(prompts[i], str) else ""
        require(
            (row, f"prompt {i} is empty: give it at least one token{why}"),
            (len(row) + new <= room, f"prompt {i}: {need} exceed the model's context of {room} tokens; {advice}"),
            (bad is None, f"prompt {i}: token id {bad} is outside the model's vocabulary of {vocab}"),
        )


def _common_length(rows: list[list[int]]) -> int:
    # At least one token of each row is its own: its first draw needs a state from its own prefill.
    if not rows:
        return 0
    low, high = min(rows), max(rows)  # the two that differ earliest, in lexicographic order
    most = min(len(row) for row in rows) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)
