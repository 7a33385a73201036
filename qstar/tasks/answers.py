"""Answers in free text: markup removed, invented further problems cut off, the last statement of an answer found.

Instruction-tuned models write answers in bold, in LaTeX, after "The answer is" or below a heading, and go on with an
explanation or a problem of their own. The tasks share these steps; the papers' readings (`strict=True`) use none of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

_SENTENCE = 500  # characters: what is looked at of one, so that no text takes long
_HEADINGS = 20  # of further problems, likewise
LONGEST = 100  # characters of a number; Python refuses to convert very long ones, and no answer is one
MINUS = str.maketrans(dict.fromkeys("\u2212\u2012\u2013\ufe63\uff0d", "-"))
DIGITS = r"[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?"  # begins and ends on a digit, so a lone "," is not a number
BOX = "\x02"  # stands for \boxed and <answer> in text without markup

_THINKING = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_TURN = (
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_of_text|end|user|assistant)\|>|</s>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]"
)
_MARKUP = tuple(
    (re.compile(pattern, re.IGNORECASE), new)
    for pattern, new in (
        (rf"\A\s*(?:{_TURN})(?:assistant|model)?\s*", ""),
        (r"\\(?:boxed|fbox)\s*\{?|<(?:final_?)?answer>", BOX),
        (r"\\[dt]?frac\s*([0-9])([0-9])", r"\1/\2"),
        (r"\}\s*\{", "/"),  # \frac{1}{2}
        (r"\\([$%#&_])", r"\1"),
        (r"\\[A-Za-z]+\s*\{|\\[()\[\],;:!]|[{}]|\$\$", ""),
        (r"</?[a-z][a-z_]*(?: [^<>\n]*)?/?>", ""),
        (r"\*{2,}|__|(?<!\S)\*(?=\S)|(?<=\S)\*(?!\w)|(?<!\w)_(?=\w)|(?<=\w)_(?!\w)|`+", ""),
        (r"[\u00a0\u2007\u2009\u202f~]|\\ ", " "),
        (r"[\u201c\u201d]", '"'),
    )
)

_NOUN = (
    r"(?:answer|ans|conclusion|(?:correct|right|best|my|final)\s+(?:choice|option|response)"
    r"|final\s+(?:result|total|amount|solution|value|count|number|cost|price|verdict))"
)
_IS = r"(?:is|was|would\s+be|will\s+be|should\s+be|must\s+be|has\s+to\s+be|equals)\b\s*[:=]?"
_STATED = re.compile(
    rf"\b{_NOUN}\b[\"']?(?:(?:\s+(?:to|of|for|in|here)\b[^.:=\n{BOX}]{{0,80}}?)?\s+{_IS}|\s*(?:\([^()\n]{{0,40}}\))?\s*(?:{_IS}|[:=]))"
    rf"|^[^\w\n]*(?:the\s+)?(?:(?:final|correct)\s+)?(?:answer|conclusion)[^\w\n]*$|^[^\w\n]*(?:A\s*:|(?:result|total)\s*[:=])|{BOX}",
    re.IGNORECASE | re.MULTILINE,
)
_TO_ANSWER = re.compile(r"[\s:=]*(?:(?<=\n)\s*[-\u2022]\s+)?")

# Headings of a problem that the model makes up. After an answer each of them ends it; before one, only those that
# no solution uses for its own parts.
_NEXT = re.compile(
    r"^[^\w\n]*(?:[0-9]+[.)]\s*)?(?:(?:new|next|another|similar|sample|practice|bonus|additional)\s+)?"
    r"(?:(?P<strong>Q|Question|Problem|User|Human)|Example|Exercise|Task|Instructions?|Input|Student)"
    r"[*_\s]*(?:#?\s*[0-9]+)?[*_]*\s*(?:[:.)]|-\s|$)"
    r"|(?<=\n\n)A:"
    r"|^.*\b(?:another|next|new|similar)\s+(?:problem|question|exercise|example)\b"
    r"|(?<=\n)\s*\n(?=[^\n]*\b(?:how|what|which|who|when|where|find|calculate)\b[^\n]*\?\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
_OPENER = re.compile(
    r"\W*(?:sure|certainly|of course|ok|okay|let'?s|let us|let me|here|to solve|first)\b", re.IGNORECASE
)
_END_OF_TURN = re.compile(rf"(?<=\S)\s*(?:{_TURN})", re.IGNORECASE)

_SIGN = r"[$€£¥₹₽₩₪₫฿]"
_GROUPED = r"[0-9]{1,3}(?:[ '\u2019][0-9]{3})+(?:\.[0-9]+)?(?![0-9])"  # 1 000, 1'000
_LEADING = re.compile(
    r"[\s\"'([]*(?:(?:about|approximately|around|roughly|exactly|only|(?:a\s+)?total\s+of|\u2248|=)\s*)?"
    rf"(?:(?:US|AU|CA|R|Rs\.?|USD|EUR|GBP|INR)\s?(?={_SIGN}|[0-9]))?{_SIGN}?\s*(?P<sign>[-+]?)\s*{_SIGN}?\s*"
    rf"(?P<number>(?:{_GROUPED}|{DIGITS})(?:\s*/\s*{DIGITS})?)"
    # Not a part of a longer number, a time, a range, a computation or a choice of two.
    rf"(?![0-9]|[.,]+[0-9]|\s*[:/^]\s*[0-9]|[eE][-+]?[0-9]|\s+[0-9]|\s*[-+*x×÷=]\s*{_SIGN}?[(]?[0-9]"
    rf"|\s+(?:or|to|and)\s+{_SIGN}?[0-9]|\s+(?!(?:in|of|per|for|at|by|with|after|from|out|than|on|over|every)\b)[A-Za-z]+\s+[0-9])"
)
_COMPUTATION = re.compile(r"[^A-Za-z=]*=\s*")


class Plain(NamedTuple):
    """Text without markup. `at[i]` is where character i stands in the original; `at[-1]` is the original's length."""

    text: str
    at: list[int]

    def original_end(self, end: int, original: str, more: str = "") -> int:
        """Where a piece that ends at `end` ends in the original, with the markup that closes it and characters of `more`."""
        closing = re.compile(rf"(?:[*_`}}$\"'{more}]|\\[)\]]|</[a-z_]+>)*")
        return closing.match(original, self.at[end - 1] + 1 if end else 0).end()


class Found(NamedTuple):
    """A number that a text states, and where it ends there."""

    value: Fraction
    end: int


def without_thinking(text: str) -> str:
    """The text without its <think> blocks, closed or not."""
    return _THINKING.sub("", text)


def first_turn(text: str) -> str:
    """The text up to the end of the model's turn, where it writes on as the user."""
    turn = _END_OF_TURN.search(text)
    return text[: turn.start()] if turn else text


def plain(text: str) -> Plain:
    """The text without thinking, Markdown, LaTeX and HTML: `**$\\boxed{72}$**` is `$\\x0272$`."""
    at = list(range(len(text) + 1))
    for pattern, new in ((_THINKING, ""), *_MARKUP):
        pieces, kept, last = [], [], 0
        for match in pattern.finditer(text):
            put = match.expand(new) if "\\" in new else new
            pieces += [text[last : match.start()], put]
            kept += at[last : match.start()] + [at[match.start()]] * len(put)
            last = match.end()
        if last or pieces:
            text, at = "".join([*pieces, text[last:]]), kept + at[last:]
    return Plain(text.translate(MINUS), at)


def ends(text: str) -> Iterator[int]:
    """Where the solution may end: before each heading of a further problem, last where the text or the turn ends.

    The first end before which an answer is found is the right one. A heading that opens the text, or follows a line
    such as "Sure, let's solve it:", repeats the problem at hand.
    """
    text = first_turn(text)
    for match in itertools.islice(_NEXT.finditer(text), _HEADINGS):
        before = text[: match.start()].strip()
        opening = not before or ("\n\n" not in before and (_OPENER.match(before) or before.endswith((":", "!"))))
        if not opening:
            yield match.start()
            if match["strong"]:
                return
    yield len(text)


def statements(text: str) -> list[tuple[int, int]]:
    """Where a text (without markup) says "the answer is", "Answer:", opens a box or has such a heading, and where the
    answer begins behind that.
    """
    return [(m.start(), _TO_ANSWER.match(text, m.end()).end()) for m in _STATED.finditer(text)]


def line_at(text: str, start: int) -> str:
    """The text from `start` to the end of its line."""
    return text[start:].partition("\n")[0]


def sentence_at(text: str, start: int) -> str:
    """The text from `start` to the end of its sentence or line."""
    return re.compile(r"(?:[^.!?\n]|[.!?](?=[^\s\"')]))*").match(text, start)[0]


def number_of(match: re.Match) -> Fraction | None:
    """The value of a match with the groups `sign` and `number`, thousands separators allowed."""
    if len(match["number"]) > LONGEST:
        return None
    written = re.sub(r"^([0-9]+),([0-9]{1,2})$", r"\1.\2", match["number"])  # 3,50 as in much of Europe
    parts = [Fraction(re.sub(r"[^0-9.]", "", part)) for part in written.split("/")]
    if parts[1:] == [0]:
        return None
    value = parts[0] / parts[1] if len(parts) == 2 else parts[0]
    return -value if match["sign"] == "-" else value


def number_at(text: str, start: int, *, words: bool = False) -> Found | None:
    """The number that an answer which begins at `start` states.

    It stands first ("72 clips"), or behind the last "=" of a computation ("48 + 24 = 72"). With `words`, text may stand
    before either, if then there is one number in the sentence only ("that she sold 72 clips").
    """
    text = text[start : start + _SENTENCE].replace(BOX, " ")
    sentence = re.sub(r"\([^()]*\)", lambda m: " " * len(m[0]), sentence_at(text, 0))
    begin = sentence.rfind("=") + 1
    if not (begin and (words or _COMPUTATION.fullmatch(sentence, 0, begin))):
        begin = 0
    match = _LEADING.match(text, begin)
    if match is None and words and "=" not in sentence:
        first = re.search(rf"{_SIGN}?(?<![\w.,])-?[0-9]", sentence)
        match = first and _LEADING.match(text, first.start())
        if match and re.search("[0-9]", sentence[match.end() :]):
            match = None
    value = match and number_of(match)
    return None if value is None else Found(value, start + match.end("number"))


_CONCLUSION = re.compile(
    r"(?:so|thus|therefore|hence|in total|in all|altogether|in conclusion|overall)\b,?", re.IGNORECASE
)


def concluded(text: str) -> list[int]:
    """Where the last sentence of a text, if it is finished, says what follows: behind its "so", "therefore" ..."""
    text = text.rstrip()
    starts = [m.end() for m in re.finditer(r"\A\s*|\n\s*|[.!?]\s+", text)]
    match = _CONCLUSION.match(text, starts[-1])
    return [match.end()] if match and text.endswith((".", "!")) else []


def emphasised(text: str) -> list[str]:
    """The pieces in bold of the last line of a text with its markup."""
    last = text.rstrip().rpartition("\n")[2]
    return [m[1] or m[2] for m in re.finditer(r"\*\*([^*\n]+)\*\*|__([^_\n]+)__", last)]
