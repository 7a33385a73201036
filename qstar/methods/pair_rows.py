"""Rows of one's own as token ids: encoding, what fits into the context, and completions that a teacher writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qstar.data.pairs import Row
from qstar.errors import require
from qstar.models.model import Model
from qstar.runs.folder import cached_jsonl, stable_seed
from qstar.runs.rollouts import SampleSettings, to_example, tokenizer_of
from qstar.sample import batching
from qstar.text import Example, chat_example
from qstar.text.chat import as_text

ROUND = 256  # completions of a teacher per file: a kill loses at most so many


def encode(model: Model, row: Row) -> list[Example]:
    """Returns a row as training examples: one, or the chosen and the rejected side of a preference.

    Of a conversation all messages of the assistant are learnt.
    """
    tokenizer = tokenizer_of(model)
    if "messages" in row:
        return [chat_example(tokenizer, row["messages"])]
    prompt = as_text(tokenizer, row["prompt"])
    return [to_example(tokenizer, prompt, row[key]) for key in ("completion", "chosen", "rejected") if key in row]


def parts(row: Row) -> tuple[Any, str]:
    """Returns a row's prompt, and the text that should follow it."""
    if "messages" in row:
        last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
        return row["messages"][:last], row["messages"][last]["content"]
    return row["prompt"], row["chosen"] if "chosen" in row else row["completion"]


def fit(
    say: Callable[[str], None], model: Model, rows: list[Row], limit: int = 0
) -> tuple[list[Row], list[list[Example]]]:
    """Returns the rows that fit into the model's context and into `limit` tokens (0: any), and their examples.

    Raises UserError if none of them fits. `say` prints how many were left out.
    """
    room = model.config.max_positions
    both = [(row, encode(model, row)) for row in rows]
    kept = [(row, x) for row, x in both if max(map(len, x)) <= room and (not limit or sum(map(len, x)) <= limit)]
    lost = len(rows) - len(kept)
    line = f"the model's context of {room} tokens" + (f" or row_length={limit}" if limit else "")
    require((not rows or bool(kept), f"config.data: all {lost} rows are longer than {line}"))
    if lost:
        say(f"[yellow]{lost} of {len(rows)} rows are longer than {line}: left out")
    return [row for row, _ in kept], [x for _, x in kept]


def write_completions(
    say: Callable[[str], None], teacher: Model, rows: list[Row], sample: SampleSettings, seed: int, folder: Path
) -> list[Row]:
    """Returns the rows, those without a completion with one that the teacher samples (FOLDER/rows_NNN.jsonl).

    Completions that were cut off are left out. Raises UserError if no completion ended.
    """
    blank = [row for row in rows if not complete(row)]
    options = dataclasses.asdict(sample)
    options.pop("round_size")
    options["slots"] = options["slots"] or batching.default_slots(min(ROUND, len(blank)))
    done: list[Row] = []
    for at in range(0, len(blank), ROUND):
        prompts = [as_text(tokenizer_of(teacher), row["prompt"]) for row in blank[at : at + ROUND]]

        def make(prompts: list[str] = prompts, at: int = at) -> list[Row]:
            say(f"  the teacher writes completions {at + 1:,} to {at + len(prompts):,} of {len(blank):,}")
            found = batching.generate(teacher, prompts, seed=stable_seed(seed, "teacher", at), **options)
            return [{"completion": x.text, "ended": x.stopped} for (x,) in found]

        done += cached_jsonl(folder / f"rows_{at // ROUND:03d}.jsonl", make)
    # One that was cut off would teach the student to stop in the middle of a sentence.
    texts = {id(row): new["completion"] if new["ended"] else "" for row, new in zip(blank, done)}
    kept = [{**x, "completion": texts[id(x)]} if id(x) in texts else x for x in rows if texts.get(id(x), "as given")]
    if lost := len(rows) - len(kept):
        say(f"[yellow]{lost} completions of the teacher were empty or cut off: left out")
    line = f"config.sample.max_new_tokens={sample.max_new_tokens}: no completion of the teacher ended; raise it"
    require((bool(kept) or not rows, line))
    return kept


def complete(row: Row) -> bool:
    """Returns whether a row has a completion."""
    return "completion" in row or "messages" in row
