"""Answer parsers: the final number, letter, yes or no, or phrase of a completion. Tasks call these from `Task.parse`.

Each looks for the last statement of an answer, then for weaker signs, before a further problem that the model invents.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from qstar.tasks import answer_text
from qstar.tasks.answer_text import BOX, CHARACTERS, CURRENCY, NUMBER, VULGAR, FoundNumber

# ---------------------------------------------------------------------------------------------------------- numbers

MARK = "####"  # of GSM8K's answer line
# Units, %, a full stop may follow: anything without another digit, so neither 1e3 nor "5 or 6" passes.
_NUMBER = re.compile(rf"\s*{CURRENCY}\s*{NUMBER}[^0-9√π{VULGAR}]*")
# "#### Total: 72"; not beyond a rule
_MARK = re.compile(r"#{4,}[ \t\r\n:]*(?:[A-Za-z]{2}[A-Za-z ]{0,40}[:=](?=[^A-Za-z\n]*[0-9]))?[ \t\r\n]*")
_ENUMERATION = re.compile(r"1?[0-9][.)]\s+[A-Za-z]")  # "#### 2. Add up" is a heading


def number(text: str) -> Fraction | None:
    """The exact number of which an answer consists ($, %, units, and "million" or "k", by which GSM8K counts); else None."""
    match = _NUMBER.fullmatch(text.translate(CHARACTERS))
    return match and answer_text.number_of(match)


def final_number(text: str) -> FoundNumber | None:
    """The number behind the last ``####``, else the last that the text states or consists of, and where it ends."""
    clean = answer_text.strip_markup(text)
    for end in answer_text.solution_ends(clean.text):
        part = clean.text[:end]
        marks = [mark.end() for mark in _MARK.finditer(part)]
        # The mark is the form of the data set, so it outweighs any other statement.
        found, unreadable = _marked(part, marks)
        if found is None and not unreadable:
            stated = (answer_text.number_at(part, at, words=True) for _, at in answer_text.statements(part)[::-1])
            # Last, a mark whose number looks like that of a heading: no other answer is stated.
            headings = (answer_text.number_at(part, at) for at in reversed(marks))
            found = next(filter(None, stated), None) or next(filter(None, headings), None)
        if found is not None:
            return FoundNumber(found.value, clean.original_end(found.end, text))
        if unreadable:
            return None
        if (value := _implied(part, text[: clean.at[end]])) is not None:
            return FoundNumber(value, clean.original_end(len(part.rstrip()), text))
    return None


def _marked(text: str, marks: list[int]) -> tuple[FoundNumber | None, bool]:
    stated = answer_text.statements(text) if marks else []
    # GSM8K's form puts the answer line last; an earlier mark may open a section, a later one may be empty.
    end, stop, digits = len(text), len(text), False
    for at in reversed(marks):
        # Only up to the next mark, whose end and digits hold for the rest of the line: lines may have thousands of marks.
        line, breaks, _ = text[at:stop].partition("\n")
        end, digits = (at + len(line), False) if breaks else (end, digits)
        digits, stop = digits or bool(re.search("[0-9]", line)), at
        found = answer_text.number_at(text, at)
        if found and not _ENUMERATION.match(line):
            return found, False
        # "#### 5 or 6" is an answer that cannot be read: no number from elsewhere may stand in for it.
        if not found and not line[:1].isalpha() and digits:
            return None, True
        for start, tail in stated:  # "#### Final answer: 72"
            if at <= start <= end and (found := answer_text.number_at(text, tail, words=True)):
                return found, False
    return None, False


def _implied(part: str, original: str) -> Fraction | None:
    # In falling order of certainty. Bold needs the original, since `part` has lost its markup.
    for piece in reversed(answer_text.bold_pieces(original)):
        if found := answer_text.number_at(answer_text.strip_markup(piece).text, 0, words=True):
            return found.value
    found = next((answer_text.number_at(part, at, words=True) for at in answer_text.conclusions(part)), None)
    return found.value if found else number(part)


def _statements(text: str) -> list[tuple[int, int]]:
    """Those of `answer_text`, and GSM8K's mark where it stands once, in the last line: several are headings."""
    stated = answer_text.statements(text)
    before, mark, line = text.rstrip().rpartition(MARK)
    at = len(before) + len(mark)
    # A line with a colon, or a long one, mostly is a heading or a remark.
    if mark and MARK not in before and re.fullmatch(r"[^\n:]{1,60}", line) and (not stated or stated[-1][1] < at):
        stated.append((len(before), at))
    return stated


# ---------------------------------------------------------------------------------------------------------- letters

# Behind a letter that is no article. "A (big) dog" is one, "A (sand)." is not.
_ENDS = r"(?=\$?\s*(?:[.,;:!\"')\n\u2014-]|$|\([^()\n]{1,80}\)\s*(?:[.,;:!\n]|$)|(?i:because|since|as|is)\b))"


class _LetterPatterns(NamedTuple):
    bracketed: re.Pattern[str]
    last: re.Pattern[str]
    leading: re.Pattern[str]
    is_correct: re.Pattern[str]
    chosen: re.Pattern[str]
    wrong: re.Pattern[str]


@functools.cache
def _letter_patterns(last: str) -> _LetterPatterns:
    # A lone "A" is mostly the article, so a bracket, punctuation or "because" must follow; later letters need none.
    big, small, no_article = f"[A-{last.upper()}]", f"[a-{last}]", f"[B-{last.upper()}]"
    return _LetterPatterns(
        # "not (b)", "(a) or (b)" and "(a) and (b)" choose nothing, "(a) and (b) is wrong" does.
        bracketed=re.compile(
            rf"(?<!not )(?<!n't )(?<!\) or )(?<!\) and )[(\[]({small})[)\]](?!\s+or\b|\s+and\s+\(\w\)(?! is\b))", re.I
        ),
        # At the end of its sentence: "blotter: E", but not "not this one: E".
        last=re.compile(rf"(?:(?!\b(?:not|wrong|incorrect)\b|n't\b).)*:\s+\(?({big})\b\)?[.\s]*$", re.DOTALL),
        # At the start of an answer: "E", "option e", "E) blotter", "E. blotter", "E blotter", but not "a blotter".
        leading=re.compile(
            rf"[\s\"'{BOX}:]*(?i:(?:most likely|probably|likely|clearly)\s+)?"
            r"(?i:(?:the\s+)?(?:option|choice|letter|answer)\s+)?"
            rf"(?:[\"'(\[]|\$(?=\w\$))?(?!\w[)\]]?\s+(?:or|and)\b)"
            rf"(?:({big})(?:[)\]]|{_ENDS})|({no_article})\b|({small})(?:[)\]](?!\.)|[.:]\s+\w|(?=[.!\s\"']*$)"
            r"|(?=\$(?:[\s.,]*$|[.,]\s)|,\s|\s+(?:[\u2014-]\s|(?:because|since|as)\b))))"
        ),
        # Without a statement of an answer: "E is correct", "I choose option E", "Therefore, E."
        is_correct=re.compile(
            rf"\b({big}|(?<=\(){small}(?=\)))\)?[\"']?\s+is\s+(?:the\s+)?(?:most\s+)?(?:correct|right|best|answer|likely)\b"
        ),
        chosen=re.compile(
            r"(?i:\b(?:option|choice|choose|pick|select|must be|therefore|thus|hence|so)\b,?)"
            rf"\s+\(?({big})\b\)?(?=\s*(?:[.,;:!]|$))"
        ),
        wrong=re.compile(
            rf"[(\[]?[A-{last.upper()}a-{last}][)\]]?[^.\n]{{0,40}}\s(?:is|are)\s+(?:wrong|incorrect|not|out)\b"
        ),
    )


def final_letter(text: str, last: str = "e") -> tuple[str, int] | None:
    """The last choice ("a" to `last`) that is stated, else the leading letter, else the last "(x)"; and its end."""
    clean = answer_text.strip_markup(text)
    patterns = _letter_patterns(last)

    def read(part: str) -> tuple[str, int] | None:
        for found in _letters(part, patterns):
            group = found.lastindex or 0
            # The bracket and full stop behind the letter stay in the kept text: the few-shot form is "(e).".
            return found[group].lower(), clean.original_end(found.end(group), text, more=r")）\].")
        for bold in reversed(answer_text.bold_pieces(text[: clean.at[len(part)]])):
            if match := patterns.leading.match(answer_text.strip_markup(bold).text):
                return match[match.lastindex or 0].lower(), clean.original_end(len(part.rstrip()), text)
        return None

    return answer_text.first_found(clean.text, read)


def _letters(text: str, patterns: _LetterPatterns) -> Iterator[re.Match[str]]:
    # The strongest sign first: a bracketed letter on its own may only be mentioned.
    for _, start in reversed(_statements(text)):
        end = start + len(answer_text.sentence_at(text, start))
        leading = patterns.leading.match(text, start) or patterns.bracketed.search(text, start, end)
        if found := leading or patterns.last.match(text, start, end):
            yield found
    for pattern in (patterns.is_correct, patterns.chosen):
        yield from reversed(list(pattern.finditer(text)))
    # "(b) is wrong because ..." begins with a letter that it rejects.
    if (found := patterns.leading.match(text)) and not patterns.wrong.match(text.strip()):
        yield found
    yield from reversed(list(patterns.bracketed.finditer(text)))


# --------------------------------------------------------------------------------------------------------- yes or no

YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_SURELY = r"(?:absolutely|certainly|clearly|definitely|undoubtedly|without\s+(?:a|any)\s+doubt)\b,?\s+"
# "no" before a noun ("no proof") is no answer, nor is "yes and no" or "yes/no".
_VERDICT = (
    r"(?:(?P<not>not)\s+)?\b(?P<verdict>yes|yeah|true|false|nope|no|(?<=[:=] )[yn](?=[.!]?\s*\Z))\b"
    r"(?!\s*/|\s+(?:and|or)\s+(?:yes|no|true|false)\b)"
    r"(?:(?<!no)|(?=\W*$|\s*[.,;:!()\"'\n\u2014-]|\s+(?:because|since|as|for|I|it|they|he|she|this|that|these|those|there|you|we|the|but"
    r"|so|if|in|unless|while|although|not|thus|therefore)\b))"
)
_STATED_VERDICT = re.compile(
    rf"[\s\"'(:{BOX}]*(?:(?:that|it\s+is|an?|most|very|likely|probably|definite|simply|clear|resounding|firm|strong|big)\s+|{_SURELY})*"
    rf"[\"'(]?{_VERDICT}",
    re.IGNORECASE,
)
_ISNT = re.compile(r"\bisn['\u2019]t\b")
# Without a statement of an answer: a sentence that begins with one, a conclusion, what is said of a statement.
_SAID_VERDICTS = tuple(
    re.compile(before + _VERDICT, re.IGNORECASE | re.MULTILINE)
    for before in (
        rf"(?:^|[.!?]\s)(?:[^\S\n]|[\"'(])*(?:{_SURELY})?(?=(?:yes|yeah|nope|no)\b|(?:true|false)\s*(?:[.,;:!]|$))",
        r"\b(?:so|thus|therefore|hence|in (?:conclusion|short|summary)|overall|I(?:\s+would|['\u2019]d)\s+say)\b[\s,:]*",
        r"\b(?:statement|claim|that|this|it)(?:\s+is|['\u2019]s)\s+(?:(?:definitely|clearly)\s+)?(?=(?:not\s+)?(?:true|false)\b)",
    )
)


def final_yes_no(text: str) -> str | None:
    """The last stated answer that is yes, no, true or false ("not yes" is no), else the last sentence that is one."""

    def read(part: str) -> str | None:
        stated = [_STATED_VERDICT.match(part, start) for _, start in reversed(_statements(part))]
        said = [m for pattern in _SAID_VERDICTS for m in pattern.finditer(part)]
        # Conclusions come last: a later verdict outweighs those of the steps before it.
        for found in filter(None, (*stated, *sorted(said, key=lambda m: m.start(), reverse=True))):
            return "yes" if (found["verdict"][0] in "yYtT") != bool(found["not"]) else "no"
        return None

    return answer_text.first_found(_ISNT.sub("is not", answer_text.strip_markup(text).text), read)


# ---------------------------------------------------------------------------------------------------------- phrases

_NEXT_SLOT = re.compile(r"(?<=\S)\s+(?:Question|Context)\s*:")
_BARE_VERDICT = re.compile(
    r"\W*((?i:yes|no))\b(?=\s*(?:\.(?!\s*[0-9])|[;:!\u2014]|$|[,\u2013-]\s+[a-z]|(?:because|since)\b))"
)
_REASON = re.compile(r",?\s+(?:because|since)\b")
_SENTENCE_END = re.compile(r"[.!?]\s+(?=(?P<opener>(?:The|This|That|These|It|He|She|They|We|I)\b)|[A-Z])")
_ABBREVIATIONS = set("mrs prof inc ltd gen col rev hon capt sgt etc vol bros sen rep gov maj adm univ corp".split())
# Initials, too, of which the last point is cut: "J.R" of "J.R. Smith".
_INITIALS = re.compile(r"(?:[A-Za-z]\.)*[A-Za-z]")
_SHORT = 8  # words of a first line that is an answer although another statement follows
_LINE = 1000  # characters of a phrase, which bound the time as many statements share a line


def final_phrases(part: str, *, reasoning: bool) -> list[str]:
    """Phrases that a text without markup answers with, the best first; with `reasoning` not the first line."""
    # T5 has no line breaks: a further "Question:" follows on the same line.
    text = _NEXT_SLOT.split(part.strip(), maxsplit=1)[0]
    first, stated = text.partition("\n")[0], _statements(text)
    in_first = bool(stated) and stated[0][0] < len(first)
    if not reasoning and not in_first and (not stated or len(first.split()) <= _SHORT):
        return [_phrase(first)]
    return [_phrase(text[start : start + _LINE].partition("\n")[0]) for _, start in reversed(stated)]


def _phrase(line: str) -> str:
    line = line.replace(BOX, " ").strip()
    if verdict := _BARE_VERDICT.match(line):
        return verdict[1]
    for stop in _SENTENCE_END.finditer(line):
        word = line[: stop.start()].split()[-1:]
        # Titles ("Mamma Mia! Here We Go Again"), initials and abbreviations ("U.S. Army", "St. Louis") go on.
        goes_on = stop[0][0] != "." or not word or len(word[0]) < 3 or word[0].lower() in _ABBREVIATIONS
        if stop["opener"] or not (goes_on or _INITIALS.fullmatch(word[0])):
            line = line[: stop.start()]
            break
    return _REASON.split(line, maxsplit=1)[0]
