"""MATH (Hendrycks et al., 2103.03874): competition problems whose answer stands in the last \\boxed of the solution."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from qstar.errors import UserError
from qstar.tasks import answers
from qstar.tasks.base import BUILT_IN, DatasetTask, Problem, leak_marker
from qstar.tasks.equal import Comparison, check_installed, comparer
from qstar.tasks.gsm8k import MARK, number

_SUBSETS = ("all", "v_star")
_FORMATS = ("boxed", "gsm8k")
# The hub's copy has a configuration per subject and none of all.
_HUB_CONFIGS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
                "precalculus")  # fmt: skip
_V_STAR_SUBJECTS = {"algebra", "counting & probability", "prealgebra", "number theory"}
_NUMERIC = re.compile(r"-?(?:[0-9]+(?:,[0-9]{3})*)?(?:\.[0-9]+)?")
_EMPHASIS = re.compile(r"\*\*|__|`")
_TAG = re.compile(r"<(?:final_?)?answer>(.*?)</(?:final_?)?answer>", re.DOTALL | re.IGNORECASE)
_EXPLANATION = re.compile(r"\W*(?:explanation|note|reasoning|steps?|verification|solution|why)\b", re.IGNORECASE)
_FORMULA = re.compile(r"\$+(.+?)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_CLAUSE = re.compile(r"(?:[^.\n]|\.(?=\S))+")
_QUANTITY = re.compile(r"(\$?-?[0-9][0-9,./]*%?)\s+[A-Za-z]{2,}[A-Za-z ]*")  # 5 apples
_DROPPED = re.compile(r"\\(?:left|right)(?![A-Za-z])|(?<!\\)\\[!,;: ]|\\\$|\$|\^\{?\\circ\}?|\\?%")
_SPACE = re.compile(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])|\s+")  # a command and a letter stay apart
_BARE_FRACTION = re.compile(r"\\frac(?:([0-9a-z])([0-9a-z])|\{([^{}]*)\}([0-9a-z])|([0-9a-z])\{([^{}]*)\})")


class MATH(DatasetTask):
    """Problem, solution in LaTeX, answer in its last ``\\boxed{..}``.

    Answers are equal if their normal forms are (`normal`), or if math-verify says so, in a process that is killed
    after `timeout_s`; what times out is wrong. In a vote answers that are equal to each other count together.

    Without a box the answer is what the text states last ("The final answer is $5$."). What stands in thinking or behind an
    invented further problem does not count. `strict` takes the last box of all and nothing else.

    `subset="v_star"` is the rule of V-STaR (2402.06457, section 4.1): level 1 of algebra, counting and probability,
    prealgebra and number theory, numeric answers, no LaTeX in the question. With "no LaTeX" read as "no command", so
    that "$2x + 3$" may stand there, it leaves 155 of the 5,000 test problems, where the paper speaks of 150.
    `format="gsm8k"` prompts and reads answers as the GSM8K task does: for models that were trained on that.
    """

    name = "math"
    default_source = " ".join(f"EleutherAI/hendrycks_math:{name}" for name in _HUB_CONFIGS)
    fields = ("level",)

    def __init__(
        self,
        *,
        train: str | None = None,
        test: str | None = None,
        prompts: str | None = None,
        subset: str = "all",
        format: str = "boxed",
        timeout_s: float = 5.0,
        strict: bool = False,
    ):
        """`train`, `test`: files. `prompts`: "built-in" or None. `subset`: "all" or "v_star". `format`: "boxed" or "gsm8k".
        `timeout_s`: per comparison.
        """
        for option, value, known in (("subset", subset, _SUBSETS), ("format", format, _FORMATS)):
            if value not in known:
                raise UserError(f"math: {option}={value!r} is not one of {', '.join(known)}")
        if not timeout_s > 0:
            raise UserError(f"math: timeout_s={timeout_s} must be above 0")
        check_installed()  # now, not at the first answer
        if prompts not in (None, BUILT_IN):
            raise UserError(f"math: prompts={prompts!r} is neither {BUILT_IN!r} nor None; it has no few-shot files")
        super().__init__(train=train, test=test, prompts=prompts)
        self.strict = strict
        self.subset, self.format, self.timeout_s = subset, format, timeout_s
        self.stop = ("\nQ:",) if format == "gsm8k" else ("\nProblem:",)

    def to_problem(self, record: dict) -> Problem:
        """Reads the published columns (problem, solution, type) and those of its two common copies."""
        question = record.get("problem", record.get("question"))
        solution = record.get("solution", record.get("answer"))
        subject = record.get("subject", record.get("type"))
        for field, text in (("problem", question), ("solution", solution), ("subject", subject)):
            if not isinstance(text, str):
                raise ValueError(f"field {field!r} is missing or not text")
        level = re.fullmatch(r"(?:Level )?([1-5?])", str(record["level"]))
        if level is None:
            raise ValueError(f"field 'level' is {record['level']!r}, not 1 to 5")
        written = boxed(solution)
        gold = written and normal(written)
        if not gold:
            raise ValueError("the solution holds no \\boxed answer")
        return Problem(
            id=str(record.get("unique_id") or ""),
            question=question,
            gold=gold,
            solution=f" {solution}" if self.format == "boxed" else f" {solution}\n{MARK} {written}",
            group=subject.lower().replace(" ", "_").replace("&", "and"),
            meta={"level": level[1], "subject": subject, "written": written},
        )

    def problems(self, split: str) -> list[Problem]:
        found = super().problems(split)
        return found if self.subset == "all" else [p for p in found if in_v_star_subset(p)]

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        hint_text = f" ({problem.meta['written']})" if hint else ""
        if self.format == "gsm8k":
            return f"Q: {problem.question}{hint_text}\nA:"
        return f"Problem:\n{problem.question}{hint_text}\n\nSolution:"

    def cut(self, completion: str) -> str:
        text = super().cut(completion)
        if self.format == "gsm8k":
            start = text.rfind(MARK)
            return text if start < 0 else text[:start] + text[start:].partition("\n")[0]
        return text

    def parse(self, completion: str) -> str | None:
        text = super().cut(completion)
        if self.strict:
            marked = text.rpartition(MARK)[2].partition("\n")[0] if MARK in text else None
            written = marked if self.format == "gsm8k" else boxed(text)
            return (normal(written) or None) if written is not None else None
        text = answers.without_thinking(text)
        for end in answers.ends(text):
            written = _marked(text[:end]) if self.format == "gsm8k" else _written(text[:end])
            if written and normal(written):
                return normal(written)
        return None

    def ballots(self, answers: Sequence[str | None]) -> list[str | None]:
        """Answers that are equal to an earlier one vote for that."""
        votes: list[str | None] = []
        for answer in answers:
            known = dict.fromkeys(vote for vote in votes if vote is not None)
            same = answer in known or answer is None
            votes.append(answer if same else next((v for v in known if _equal(v, answer, self.timeout_s)), answer))
        return votes

    def correct(self, problem: Problem, answer: str | None) -> bool:
        return answer is not None and self.compare(problem, answer).equal

    def compare(self, problem: Problem, answer: str) -> Comparison:
        """How the answer compares with the right one; time-outs and errors are told from answers that differ."""
        if normal(answer) == problem.gold:
            return Comparison(True, "equal")
        if _NUMERIC.fullmatch(problem.gold) and self.format == "gsm8k":  # units behind it, $, commas
            if number(answer) is not None:
                same = number(answer) == number(problem.gold)
                return Comparison(same, "equal" if same else "different")
        return comparer(self.timeout_s).compare(problem.meta["written"], answer)

    def leak(self, problem: Problem, completion: str) -> str | None:
        return leak_marker(completion, problem.question)


@functools.lru_cache(maxsize=65536)
def _equal(one: str, other: str, timeout_s: float) -> bool:
    """Whether two answers are equal, by their numbers where both are numbers."""
    if _NUMERIC.fullmatch(one) and _NUMERIC.fullmatch(other):
        return number(one) == number(other)
    return comparer(timeout_s).compare(one, other).equal


def _marked(text: str) -> str | None:
    """What stands behind the last mark that opens no explanation."""
    lines = [line.strip() for line in re.findall(rf"{MARK}+[ \t]*(.*)", text)]
    lines = [line for line in lines if not _EXPLANATION.match(line)]
    return (boxed(lines[-1]) or lines[-1].strip("*`_ ")) if lines else None


def _written(text: str) -> str | None:
    """What stands in the last box, else behind the last mark or statement of an answer."""
    if (found := boxed(text)) is not None:
        return found.strip("$")
    text = _EMPHASIS.sub("", _TAG.sub(r"\nAnswer: \1\n", text))
    if (found := _marked(text)) is not None:
        return found
    for _, start in reversed(answers.statements(text)):
        found = _FORMULA.match(text, start) or _CLAUSE.match(text, start)
        if found and found[found.lastindex or 0].strip():
            written = found[found.lastindex or 0].strip()
            return written[: quantity.end(1)] if (quantity := _QUANTITY.fullmatch(written)) else written
    return None


def in_v_star_subset(problem: Problem) -> bool:
    """Whether V-STaR's rule for its MATH subset holds (see `MATH`)."""
    return (
        problem.meta["level"] == "1"
        and problem.meta["subject"].lower() in _V_STAR_SUBJECTS
        and bool(problem.gold and _NUMERIC.fullmatch(problem.gold))
        and "\\" not in problem.question
    )


def boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{..}`` (or ``\\fbox{..}``, ``\\boxed 5``); None without one, or if it is not closed.

    Braces are matched, escaped ones not counted.
    """
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|[^\s{}$]+)", text))
    if not found:
        return None
    if found[-1][1] != "{":
        return found[-1][1]
    start, depth = found[-1].end(), 1
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return text[start : start + match.start()]
    return None


def normal(text: str) -> str:
    """An answer in a form in which the usual variants of writing it are one string.

    White space, sizes of brackets, dollar and per cent signs, degrees and a full stop go; \\dfrac and \\tfrac become
    \\frac, \\frac12 gets its braces, a leading point its zero, and thousands lose their commas.
    """
    text = re.sub(r"\\[dt]frac", r"\\frac", text.strip().removesuffix("."))
    text = _SPACE.sub(lambda m: f"{m[1]} " if m[1] else "", _DROPPED.sub("", text))
    text = _BARE_FRACTION.sub(_braced, text)
    text = re.sub(r"(?<![0-9])\.([0-9])", r"0.\1", text)
    return text.replace(",", "") if re.fullmatch(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", text) else text


def _braced(match: re.Match) -> str:
    above, below = (part for part in match.groups() if part is not None)
    return f"\\frac{{{above}}}{{{below}}}"
