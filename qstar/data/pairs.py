"""Training rows of users' own: prompts with completions, conversations, and preferences.

    pairs         {"prompt": ..., "completion": ...}   or   {"messages": [{"role": ..., "content": ...}, ...]}
    preferences   {"prompt": ..., "chosen": ..., "rejected": ...}
    prompts       {"prompt": ...}; some may have a completion

A prompt is a text or a list of messages; what follows it is a text, or a list of messages that ends with one of the
assistant. A list of several messages is the whole conversation, the earlier ones its prompt. Other keys are ignored.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from qstar.data.sources import keys_of, missing, read_records
from qstar.errors import UserError, require
from qstar.text.chat import check_messages

Row = dict[str, Any]  # as above, completions always texts
FORMS = {
    "pairs": "prompt and completion, or messages",
    "preferences": "prompt, chosen and rejected",
    "prompts": "prompt",
}


def read_rows(source: Any, form: str, *, split: str = "train", limit: int = 0, bad_rows: float = 0.0) -> list[Row]:
    """Returns the checked rows of a file, a folder, a hub data set, or a list of dicts.

    Args:
      source: a path or hub name (see `sources.read_records`, also for `split` and `bad_rows`), or the rows themselves.
      form: a key of FORMS. limit: first so many (0: all).

    Raises:
      UserError: names the file and line (or the number of the row in the list) and what is wrong with it.
    """
    parse = {"pairs": _pair, "preferences": _preference, "prompts": _prompt}[form]
    require((limit >= 0, f"{form}: limit={limit} must be 0 or more (0: all rows)"))
    if isinstance(source, str | os.PathLike):
        return read_records(source, (), split=split, limit=limit or None, parse=parse, bad_rows=bad_rows, texts=True)
    advice = f"give a path, the name of a hub data set, or a list of dicts of {FORMS[form]}"
    require((isinstance(source, Iterable), f"{form}: {source!r} holds no rows; {advice}"))
    rows = list(source)
    require((bool(rows), f"{form}: the list is empty; give at least one dict of {FORMS[form]}"))
    for i, row in enumerate(rows[: limit or None]):
        require((isinstance(row, dict), f"{form}[{i}]: is a {type(row).__name__}, not a dict of {FORMS[form]}"))
        try:
            rows[i] = parse(row)
        except ValueError as e:
            raise UserError(f"{form}[{i}]: {e}") from None
    return rows[: limit or None]


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Returns (rows to train on, held-out rows); the latter are `share` of all, none of a share of 0.

    Chosen by a hash of their content, so that the order of the rows does not matter.
    """
    count = round(share * len(rows)) or int(share > 0)
    fault = f"held_out={share} of {len(rows)} rows leaves none to train on; lower it, or give more rows"
    # Copies of a row fall on one side: a held-out row that was trained on measures nothing.
    copies: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        copies.setdefault(repr(row), []).append(i)
    order = sorted(copies, key=lambda text: zlib.crc32(f"{seed} {text}".encode("utf-8", "replace")))
    held_out: set[int] = set()
    for text in order:
        if len(held_out) + len(copies[text]) <= count:
            held_out.update(copies[text])
    if count and not held_out:
        held_out.update(copies[min(order, key=lambda text: len(copies[text]))])
    require((len(held_out) < len(rows), fault))
    return [x for i, x in enumerate(rows) if i not in held_out], [x for i, x in enumerate(rows) if i in held_out]


# ------------------------------------------------------------------------------------- checks; all raise ValueError


def _pair(row: Row) -> Row:
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
        if not any(m["role"] == "assistant" and m["content"] for m in messages):
            raise ValueError("messages: none is of the assistant, so that there is nothing to train on")
        return {"messages": messages}
    prompt, completion = _reply(row, "completion", "pairs")
    return {"prompt": prompt, "completion": completion}


def _preference(row: Row) -> Row:
    (prompt, chosen), (other, rejected) = (_reply(row, key, "preferences") for key in ("chosen", "rejected"))
    if prompt != other:
        raise ValueError("chosen and rejected begin with different conversations; only their last message may differ")
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt(row: Row) -> Row:
    # A table has a blank cell where a row has no completion.
    if row.get("completion") not in (None, ""):
        return _pair(row)
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
        return _pair({"completion": messages}) if messages[-1]["role"] == "assistant" else {"prompt": messages}
    return {"prompt": _text_or_messages(row, "prompt", "prompts")}


def _reply(row: Row, key: str, form: str) -> tuple[Any, str]:
    """The prompt of a row and the text of what follows it."""
    value = _text_or_messages(row, key, form)
    if isinstance(value, str):
        prompt, text = _text_or_messages(row, "prompt", form), value
    else:
        *before, last = value
        if last["role"] != "assistant":
            raise ValueError(f"{key}: its last message is of the role {last['role']!r} and not of the assistant")
        prompt, text = before or _text_or_messages(row, "prompt", form), last["content"]
    if not text:
        raise ValueError(f"{key} is empty")
    return prompt, text


def _text_or_messages(row: Row, key: str, form: str) -> Any:
    value = row.get(key)
    if value is None:
        raise ValueError(f"{missing(row, key)} (a row has {FORMS[form]}); the row has {keys_of(row)}")
    if not isinstance(value, str | Sequence):
        raise ValueError(f"{key} is of type {type(value).__name__}, not text or a list of messages")
    return value if isinstance(value, str) else _messages(value, key)


def _messages(value: Any, key: str) -> list[dict[str, str]]:
    try:
        check_messages(value)
    except UserError as e:
        raise ValueError(f"{key}: {str(e).removeprefix('messages ')}") from None
    return [{"role": m["role"], "content": m["content"]} for m in value]
