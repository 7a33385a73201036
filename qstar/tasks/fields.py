"""Fields of records, named in options: paths, templates, patterns, and the published shapes of answer choices.

A path names a field: "question", "question.stem" (dots lead into objects and lists), "id|qid" (the first that is there),
"rationale|" (may be missing). Several paths separated by spaces are joined by a space. A text with braces is a template,
"{Body} {Question}". null counts as missing. All functions raise ValueError with what is wrong with the record.
"""

from __future__ import annotations

import functools
import re
from decimal import Decimal
from typing import Any

from qstar.data.sources import keys_of, missing

ANY = (str, int, float, list)
_PLACE = re.compile(r"\{([^{}]+)\}")
_LABELLED = re.compile(r"\s*\(?([A-Za-z0-9])[).:]\s*(.*)")  # "A)32400", "(b) sand"


def value(record: dict, path: str) -> Any:
    """The value at a path; None if the path may be missing and is."""
    for option in path.split("|"):
        if not option:
            return None
        found = record.get(option)  # first as it stands: heads of tables may have dots
        if found is None and "." in option:
            found = functools.reduce(_member, option.split("."), record)
        if found is not None:
            return found
    raise ValueError(f"{missing(record, *path.split('|'))}; the record has {keys_of(record)}")


def text(record: dict, spec: str, kinds: tuple[type, ...] = (str,)) -> str:
    """The text of a template, of a path, or of several paths joined by spaces.

    Args:
        kinds: types that a field may have: of numbers all digits are written, booleans are yes and no, of a list the
            items stand behind each other.
    """
    if "{" in spec:
        return _PLACE.sub(lambda place: text(record, place[1], ANY), spec)
    # A single name may hold spaces, as heads of tables do.
    paths = [spec] if spec in record else spec.split()
    return " ".join(filter(None, (_written(path, value(record, path), kinds) for path in paths)))


def matched(found: str, pattern: str, spec: str) -> str:
    """The last match of a pattern: its first group, else all of it."""
    matches = list(re.finditer(pattern, found))
    if not matches:
        raise ValueError(f"field {spec!r} has no {pattern!r}, it ends in {found[-60:]!r}")
    return matches[-1][1] if matches[-1].re.groups else matches[-1][0]


def choices(record: dict, spec: str, pattern: str = "") -> list[tuple[str, str]]:
    """The choices of a record as (label, text); labels are A, B, ... where the data have none.

    Args:
        spec: a field with a list of texts ("A) 5" gives label and text), a list of {"label", "text"}, an object
            {"label": [..], "text": [..]} or {"A": text, ..}; or one field for each choice.
        pattern: finds the choices in a text: one group, the text, or two, label and text.
    """
    paths = spec.split()
    found: Any = [value(record, path) for path in paths] if len(paths) > 1 else value(record, spec)
    if pattern:
        found = re.findall(pattern, str(found))
    elif isinstance(found, str):
        raise ValueError(f"field {spec!r} is text; give choices_pattern")
    try:
        if isinstance(found, dict):
            pairs = list(zip(found["label"], found["text"], strict=True)) if "text" in found else list(found.items())
        else:
            pairs = [(c["label"], c["text"]) if isinstance(c, dict) else c for c in found]
        if any(pair is None or pair[1:] == (None,) for pair in pairs if not isinstance(pair, (str, int, float))):
            raise ValueError("a choice is null")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"field {spec!r} is no list of choices ({type(error).__name__}: {error})") from None
    if all(isinstance(pair, (str, int, float)) for pair in pairs):
        labelled = [_LABELLED.fullmatch(str(pair)) for pair in pairs]
        if all(labelled) and [m[1].upper() for m in labelled if m] == _letters(len(pairs)):
            pairs = [(m[1], m[2]) for m in labelled if m]
        else:
            pairs = list(zip(_letters(len(pairs)), pairs))
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs) or not pairs:
        raise ValueError(f"field {spec!r} is no list of choices: {str(found)[:60]!r}")
    labels = [str(label).strip() for label, _ in pairs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"choices are labelled {labels}; each label once is expected")
    return [(label, str(choice).strip()) for label, (_, choice) in zip(labels, pairs)]


def chosen(answer: Any, pairs: list[tuple[str, str]], answer_as: str, spec: str) -> int:
    """Which of the choices an answer names; see `MultipleChoice.answer_as`."""
    labels, texts = [label.casefold() for label, _ in pairs], [choice.casefold() for _, choice in pairs]
    written = str(answer).strip().casefold()
    index = int(written) if re.fullmatch(r"-?[0-9]{1,3}", written) else None
    indices = {
        "label": labels.index(written) if written in labels else None,
        "text": texts.index(written) if written in texts else None,
        "index": index if index is not None and 0 <= index < len(pairs) else None,
    }
    # A number in the data is an index; a digit written as text may be a label ("1" to "4" in ARC) or a choice.
    order = ("index", "text") if type(answer) is int else ("label", "text", "index")
    kinds = order if answer_as == "auto" else (answer_as,)
    at = next((indices[kind] for kind in kinds if indices[kind] is not None), None)
    if at is None:
        shown = ", ".join(f"{label} {choice}"[:30] for label, choice in pairs)
        raise ValueError(f"field {spec!r} is {answer!r}, none of the choices {shown} (test rows may have no answers)")
    return at


def _member(holder: Any, part: str) -> Any:
    if isinstance(holder, list) and part.isdecimal() and int(part) < len(holder):
        return holder[int(part)]
    return holder.get(part) if isinstance(holder, dict) else None


def _written(path: str, found: Any, kinds: tuple[type, ...]) -> str:
    if found is None:
        return ""
    if not isinstance(found, kinds):
        raise ValueError(f"field {path!r} is of type {type(found).__name__}, not text")
    if isinstance(found, list):
        # A blank line inside an item would look like the end of an example.
        return " ".join(" ".join(str(item).split()) for item in found)
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, float):
        return str(int(found)) if found.is_integer() else format(Decimal(repr(found)), "f")
    return str(found)


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + i) for i in range(count)]
