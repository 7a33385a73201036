"""Free text of models: removal of markup, ends of solutions, places where an answer is stated, numbers.

`answer_parsing` builds on these steps; the papers' readings (`strict=True`) do not.
"""

from __future__ import annotations

import itertools
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple, TypeVar

# Limits that bound the time of parsing any text: characters of a sentence, headings of further problems.
_SENTENCE, _HEADINGS = 500, 20
# Characters of a number. Python refuses to convert very long ones, and no answer is one.
LONGEST = 100
# Characters that mean one of ASCII: its full-width forms (but not the comma, which may separate a list), dashes, slashes.
CHARACTERS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if code != 0xFF0C} | str.maketrans(
    "\u2010\u2011\u2012\u2013\u2212\ufe63\u2044\u2215", "------//"
)
# Ends on a digit: the common class [0-9,]+ takes a lone comma for a number.
DIGITS = r"(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)"
# What replaces \boxed or <answer>, and a line such as ---, in text without markup. The latter counts as white space.
BOX, RULE = "\x02", "\f"

_THINKING_START, _THINKING_END = (re.compile(rf"<{slash}think(?:ing)?>", re.IGNORECASE) for slash in ("", "/"))
_THINKING = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_TURN = (
    r"<\|(?:im_start|im_end|endoftext|eot_id|eom_id|start_header_id|end_of_text|end|user|assistant)\|>|</s>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]"
)
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
# In this order: boxes before other commands, fractions before braces go, escapes before the characters they protect.
_MARKUP = tuple(
    (re.compile(pattern, re.IGNORECASE), new)
    for pattern, new in (
        (rf"\A\s*(?:{_TURN})(?:assistant|model)?\s*", ""),
        (r"(?m)^[^\S\n]*([-*_=])(?:[^\S\n]*\1){2,}[^\S\n]*$", RULE),
        (r"\\(?:boxed|fbox)\s*\{?|<(?:final_?)?answer>", BOX),
        (r"(?<=[0-9])\s*(?=\\[cdt]?frac)", " "),  # of a mixed number
        (r"\\[cdt]?frac\s*([0-9])([0-9])", r"\1/\2"),
        (r"\}\s*\{", "/"),  # \frac{1}{2}
        (r"\\([$%#&_])", r"\1"),
        *((rf"\\{name}(?![A-Za-z])\s*", sign) for name, sign in (("sqrt", "√"), ("pi", "π"), ("(?:times|cdot)", "×"))),
        (r"\\(?:text|math|mbox|emph|[cdt]?frac)[A-Za-z]*\s*\{|\\[()\[\],;:!]|[{}]|\$\$", ""),
        (r"\\[A-Za-z]+\s*\{", " "),  # a space, lest 2\phantom{3} become 23
        (r"</?[a-z][a-z_]*(?: [^<>\n]*)?/?>", ""),
        (r"\*{2,}|__|(?<!\S)\*(?=\S)|(?<=\S)\*(?!\w)|(?<!\w)_(?=\w)|(?<=\w)_(?!\w)|`+", ""),
        (r"[\u00a0\u2007\u2009\u202f~]|\\ ", " "),
        (r"[\u201c\u201d]", '"'),
        (r"\uff0c(?![0-9])", ","),
    )
)

_NOUN = (
    r"(?:answer|ans|conclusion|(?:correct|right|best|my|final)\s+(?:choice|option|response)"
    r"|final\s+(?:result|total|amount|solution|value|count|number|cost|price|verdict))"
)
_IS = r"(?:is|was|would\s+be|will\s+be|should\s+be|must\s+be|has\s+to\s+be|equals)\b\s*[:=]?"
_STATED = re.compile(
    rf"(?<![^\W_]){_NOUN}\b[\"']?(?:(?:\s+(?:to|of|for|in|here)\b[^.:=\n{BOX}]{{0,80}}?)?\s+{_IS}|\s*(?:\([^()\n]{{0,40}}\))?\s*(?:{_IS}|[:=]))"
    rf"|^[^\w\n]*(?:the\s+)?(?:(?:final|correct)\s+)?(?:answer|conclusion)[^\w\n]*$|^[^\w\n]*(?:A\s*:|(?:result|total)\s*[:=])|{BOX}"
    r"|^[^\w\n]*(?-i:A)ns(?:wer)?(?:\.\s|\s+-\s+(?=[a-z]))|答案(?:是|为|\s*[:=])",
    re.IGNORECASE | re.MULTILINE,
)
_TO_ANSWER = re.compile(r"[\s:=]*(?:(?<=\n)\s*[-\u2022]\s+)?")

# Headings of a problem that the model invents. After an answer each of them ends it; before one, only the "strong"
# ones, which no solution uses for its own parts.
_NEXT = re.compile(
    r"^[^\w\n]*(?:[0-9]+[.)]\s*)?(?:(?:new|next|another|similar|sample|practice|bonus|additional)\s+)?"
    r"(?:(?P<strong>Q|Question|Problem|User|Human|问题|题目)|Example|Exercise|Task|Instructions?|Input|Student)"
    r"[*_\s]*(?:#?\s*[0-9]+)?[*_]*\s*(?:[:.)]|-\s|$)"
    r"|(?<=\n\n)A:"
    # Llama 3's header without special tokens; a rule behind GSM8K's answer line (no heading, no computation).
    r"|(?<=[0-9.!?)\]}$])(?P<turn>(?-i:assistant|user)\n\n)"
    rf"|^#{{4,}}(?!#|\s*1?[0-9][.)]\s)[^A-Za-z0-9=\n]*[0-9][^=\n]*\n\s*?(?P<rule>{RULE})"
    r"|^.*\b(?:another|next|new|similar)\s+(?:problem|question|exercise|example)\b"
    r"|(?<=\n)[^\S\n]*\n(?=[^\n]*\b(?:how|what|which|who|when|where|find|calculate)\b[^\n]*\?\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
_OPENER = re.compile(r"(?i)\W*(?:sure|certainly|of course|ok|okay|let'?s|let us|let me|here|to solve|first)\b")
_END_OF_TURN = re.compile(rf"(?<=\S)\s*(?:{_TURN})", re.IGNORECASE)

_SIGN = "[" + "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c) == "Sc") + "]"
_CODES = "|".join(
    "AU CA US R Rs AED AUD BRL CAD CHF CNY CZK DKK EUR GBP HKD IDR ILS INR JPY KRW MXN MYR NOK NZD PHP PLN RMB RUB SAR SEK"
    " SGD THB TWD USD VND ZAR".split()
)
CURRENCY = rf"(?:(?:(?:{_CODES})\.?\s?(?={_SIGN}|[0-9])|[A-Z]{{1,3}}(?={_SIGN}))?{_SIGN}?)"
_GROUPED = r"[0-9]{1,3}(?:[ '\u2019_\uff0c\u066c][0-9]{3})+(?:\.[0-9]+)?(?![0-9])"  # 1 000, 1'000, 1_000
VULGAR = "¼½¾" + "".join(map(chr, range(0x2150, 0x215F)))
_PARTS = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)}
_PARTS |= {sign: Fraction(unicodedata.numeric(sign)).limit_denominator(10) for sign in VULGAR}
# The groups that `number_of` takes: 1 000, 3/4, 1 3/4, 1¾, 1 and a half, ½.
NUMBER = (
    rf"(?P<sign>[-+]?|(?i:negative|minus)\s+)\s*{_SIGN}?\s*(?P<number>(?:{_GROUPED}|{DIGITS})(?:\s*/\s*{DIGITS}"
    rf"|\s*(?P<part>(?<=\s)[0-9]+/[1-9][0-9]*|(?<=\s)and\s+an?\s+(?:half|third|quarter)|[{VULGAR}]))?|(?P<alone>[{VULGAR}]))"
    r"(?![0-9²³¹⁰-₉])"
)
_LEADING = re.compile(
    # No coordinates, which a comma without a space would make a decimal number.
    r"[\s\"'([]*(?!(?<=[(\[])-?[0-9.]+,(?:[\s√]|[0-9]{1,2}(?![0-9])))"
    r"(?:(?:about|approximately|around|roughly|exactly|only|(?:a\s+)?total\s+of|\u2248|=)\s*)?"
    rf"{CURRENCY}\s*{NUMBER}"
    # Not a part of a longer number, a product, a time, a range, a computation, a list or a choice of two.
    rf"(?![^A-Za-z\s]?[0-9]|[.,]+[0-9]|\s*[:/^]\s*[0-9√]|\s*[√π{VULGAR}]|[eE][-+]?[0-9]|\s+[0-9]"
    rf"|(?:\s*%)?\s*[-+*x×÷=·⋅±∙⨉✕]\s*{CURRENCY}[(]?\.?[0-9√]"
    rf"|(?:\s*%|\s*[A-Za-z]+)?\s+(?:or|to|and)\s+(?:{CURRENCY}\.?[0-9]|(?:an?|one|two|three)\s+(?:half|third|quarter))"
    rf"|[,;][^\S\n]+{CURRENCY}-?\.?[0-9](?![0-9.,]*\s+(?!and\b|or\b)[a-z])"  # "72, 24 of them in May" is one number
    r"|\s+(?!(?:in|of|per|for|at|by|with|after|from|out|than|on|over|every|because|since|as|when|if|so)\b)[A-Za-z]+\s+[0-9])"
)
_COMPUTATION = re.compile(r"(?:[^A-Za-z=]|(?<=[0-9%] )(?:x|of)(?= [$0-9])|(?<=[0-9])x(?=[$0-9]))*=\s*")
_IN_SENTENCE = re.compile(r"(?:[^.!?\n]|[.!?](?=[^\s\"')]))*")
_CONCLUSION = re.compile(r"(?i)(?:so|thus|therefore|hence|in total|in all|altogether|in conclusion|overall)\b,?")

T = TypeVar("T")


class PlainText(NamedTuple):
    """Text without markup. `at[i]` is the place of character i in the original; `at[-1]` is the original's length."""

    text: str
    at: list[int]

    def original_end(self, end: int, original: str, more: str = "") -> int:
        """The end in the original of a piece that ends at `end`, with closing markup and characters of `more`."""
        # Cut in front of its closing markup, a kept completion would teach unclosed ** and \boxed{.
        closing = re.compile(rf"(?:[*_`}}$\"'{more}]|\\[)\]]|</[a-z_]+>)*")
        return _end(closing, original, self.at[end - 1] + 1 if end else 0)


class FoundNumber(NamedTuple):
    """A number that a text states, and where it ends there."""

    value: Fraction
    end: int


def without_thinking(text: str) -> str:
    """The text without its <think> blocks, closed or not."""
    return _THINKING.sub("", text)


def split_thinking(text: str, opened: bool = False) -> tuple[str, str | None]:
    """A text's <think> block with its tags, and what follows it; None if the block does not end.

    Args:
        opened: the prompt has opened the block already.
    """
    closed = max((m.end() for m in _THINKING_END.finditer(text)), default=0)
    unfinished = _THINKING_START.search(text, closed) or (opened and not closed)
    return (text, None) if unfinished else (text[:closed], text[closed:])


def first_turn(text: str) -> str:
    """The text up to the end of the model's turn, where it continues as the user."""
    turn = _END_OF_TURN.search(text)
    return text[: turn.start()] if turn else text


def strip_markup(text: str, characters: Mapping[int, str | int] = CHARACTERS, light: bool = False) -> PlainText:
    """The text without thinking and markup: `**$\\boxed{72}$**` is `$\\x0272$`.

    Args:
        characters: what to write for some; {} also keeps invisible ones.
        light: remove only what no answer consists of.
    """
    # Places are kept through every replacement, so that an answer found in plain text can be cut in the original.
    at = list(range(len(text) + 1))
    invisible = [(_INVISIBLE, "")] if characters else []
    for pattern, new in (*invisible, (_THINKING, ""), *(_MARKUP[:1] if light else _MARKUP)):
        pieces: list[str] = []
        kept: list[int] = []
        last = 0
        for match in pattern.finditer(text):
            put = match.expand(new) if "\\" in new else new
            pieces += [text[last : match.start()], put]
            kept += at[last : match.start()] + [at[match.start()]] * len(put)
            last = match.end()
        if pieces:
            text, at = "".join([*pieces, text[last:]]), kept + at[last:]
    # Last, and one character for one, so that the places need no update.
    return PlainText(text.translate(characters), at)


def solution_ends(text: str) -> Iterator[int]:
    """Possible ends of the solution: before each heading of a further problem, last the end of the text or turn."""
    text = first_turn(text)
    for match in itertools.islice(_NEXT.finditer(text), _HEADINGS):
        end = match.start("rule") if match["rule"] else match.start()
        before = text[:end].strip()
        # A heading that opens the text, or follows "Sure, let's solve it:", repeats the problem at hand.
        opening = not before or ("\n\n" not in before and (_OPENER.match(before) or before.endswith((":", "!"))))
        if not opening:
            yield end
            # No solution uses such a heading for its own parts: what follows cannot hold the answer.
            if match["strong"] or match["turn"]:
                return
    yield len(text)


def first_found(text: str, read: Callable[[str], T | None]) -> T | None:
    """What `read` finds in a text (without markup) up to the first end of the solution where it finds anything."""
    return next((found for end in solution_ends(text) if (found := read(text[:end])) is not None), None)


def statements(text: str) -> list[tuple[int, int]]:
    """Places of "the answer is", "Answer:", boxes and headings in a text without markup: (start, answer's start)."""
    return [(m.start(), _end(_TO_ANSWER, text, m.end())) for m in _STATED.finditer(text)]


def sentence_at(text: str, start: int) -> str:
    """The text from `start` to the end of its sentence or line, or the first part of a very long one."""
    return text[start : _end(_IN_SENTENCE, text, start, start + _SENTENCE)]


def _end(pattern: re.Pattern[str], text: str, start: int, stop: int = sys.maxsize) -> int:
    match = pattern.match(text, start, stop)
    return match.end() if match else start


def number_of(match: re.Match[str]) -> Fraction | None:
    """The value of a match of `NUMBER`, thousands separators allowed."""
    if len(match["number"]) > LONGEST:
        return None
    part = match["part"] or match["alone"] or ""
    # One or two digits behind a comma are decimals, as in much of Europe: 3,50.
    written = re.sub(r"^([0-9]+),([0-9]{1,2})$", r"\1.\2", match["number"].removesuffix(part).strip() or "0")
    above, _, below = (re.sub(r"[^0-9./]", "", text) for text in written.partition("/"))
    more = (_PARTS.get(part.split()[-1]) or Fraction(part)) if part else Fraction(0)
    # Fraction raises for a model's 5/0, and 5 12/11 is no mixed number.
    if (below and not Fraction(below)) or more >= 1:
        return None
    value = Fraction(above) / Fraction(below or 1) + more
    return -value if match["sign"] not in ("", "+") else value


def number_at(text: str, start: int, *, words: bool = False) -> FoundNumber | None:
    """The number that opens an answer at `start` or follows its last "="; with `words` also the only one in it."""
    text = text[start : start + _SENTENCE].partition(RULE)[0].replace(BOX, " ")
    # Brackets are blanked, not removed, so that offsets stay those of the text.
    sentence = re.sub(r"\([^()]*\)", lambda m: " " * len(m[0]), sentence_at(text, 0))
    begin = sentence.rfind("=") + 1
    if not (begin and (words or _COMPUTATION.fullmatch(sentence, 0, begin))):
        begin = 0
    match = _LEADING.match(text, begin)
    if match is None and words and not re.search("[=√π]", sentence):
        first = re.search(rf"{_SIGN}?(?<![\w.,/])(?:-|\b(?i:minus|negative)\s+)?(?:\.?[0-9]|[{VULGAR}])", sentence)
        match = first and _LEADING.match(text, first.start())
        # Of two numbers in a sentence of words neither is certain to be the answer.
        if match and re.search("[0-9]", sentence[match.end() :]):
            match = None
    value = match and number_of(match)
    return FoundNumber(value, start + match.end("number")) if match and value is not None else None


def conclusions(text: str) -> list[int]:
    """The place behind "so", "therefore" ... where the last sentence of a text begins with it and is finished."""
    text = text.rstrip()
    starts = [m.end() for m in re.finditer(r"\A\s*|\n\s*|[.!?]\s+", text)]
    match = _CONCLUSION.match(text, starts[-1])
    # Without its full stop the sentence may have been truncated within the number.
    return [match.end()] if match and text.endswith((".", "!")) else []


def bold_pieces(text: str) -> list[str]:
    """The pieces in bold in the last line of a text with its markup."""
    last = text.rstrip().rpartition("\n")[2]
    return [m[1] or m[2] for m in re.finditer(r"\*\*([^*\n]+)\*\*|__([^_\n]+)__", last)]
