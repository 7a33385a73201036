"""MATH (Hendrycks et al., 2103.03874): competition problems, and equality of mathematical answers by math-verify."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qstar.errors import UserError, bounded, pip_install
from qstar.tasks import answer_text
from qstar.tasks.answer_parsing import MARK, number
from qstar.tasks.base import DatasetTask, Problem
from qstar.tasks.sandbox import Helper, codec, of_this_process

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
_DROPPED = re.compile(r"\\(?:left|right)(?![A-Za-z])|(?<!\\)\\[!,;: ]|\\\$|\$|\^(?:\{\s*\\circ\s*\}|\\circ)|\\?%")
_SPACE = re.compile(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])|\s+")  # a command and a letter stay apart
_BARE_FRACTION = re.compile(r"\\frac(?:([0-9a-z])([0-9a-z])|\{([^{}]*)\}([0-9a-z])|([0-9a-z])\{([^{}]*)\})")


@dataclass(kw_only=True, eq=False)
class MATH(DatasetTask):
    """Problem, solution in LaTeX, answer in its last ``\\boxed{..}``.

    Answers are equal if their normal forms are (`normal`), or if math-verify says so, in a process that is killed
    after `timeout_s`; what times out is wrong. In a vote answers that are equal to each other count together.

    Options:
        subset: "all", or "v_star" for the rule of V-STaR (2402.06457, section 4.1): level 1 of algebra, counting and
            probability, prealgebra and number theory, numeric answers, no LaTeX in the question. With "no LaTeX" read
            as "no command", so that "$2x + 3$" is allowed, 155 of the 5,000 test problems remain; the paper has 150.
        format: "boxed", or "gsm8k" to prompt and read answers as the GSM8K task does, for models trained on that.
        timeout_s: seconds per comparison.
        strict: read the last box and nothing else.
    """

    subset: str = bounded("all", choices=("all", "v_star"))
    format: str = bounded("boxed", choices=("boxed", "gsm8k"))
    timeout_s: float = bounded(5.0, gt=0)
    strict: bool = False

    name = "math"
    default_source = " ".join(f"EleutherAI/hendrycks_math:{name}" for name in _HUB_CONFIGS)
    fields = ("level",)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Now, not after an hour of sampling.
        check_installed()
        self.stop = ("\nQ:",) if self.format == "gsm8k" else ("\nProblem:",)
        form = "a line that holds #### and the answer alone, like this: #### 42"
        end = form if self.format == "gsm8k" else "the final answer in \\boxed{}, like this: \\boxed{42}"
        self.instruction = f"Solve the problem step by step. End with {end}"

    def to_problem(self, record: dict) -> Problem:
        """Reads the published columns (problem, solution, type) and those of its two common copies."""
        question = record.get("problem", record.get("question"))
        solution = record.get("solution", record.get("answer"))
        subject = record.get("subject", record.get("type"))
        if not isinstance(question, str) or not question.strip():
            raise ValueError("field 'problem' is missing or not text")
        if not isinstance(solution, str):
            raise ValueError("field 'solution' is missing or not text")
        if not isinstance(subject, str):
            raise ValueError("field 'type' or 'subject' is missing or not text")
        # A few published rows are of "Level ?".
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
        if self.format == "gsm8k" and (start := text.rfind(MARK)) >= 0:
            return text[:start] + text[start:].partition("\n")[0]
        return text

    def parse(self, completion: str) -> str | None:
        text = super().cut(completion)
        if self.strict:
            marked = text.rpartition(MARK)[2].partition("\n")[0] if MARK in text else ""
            return normal((marked if self.format == "gsm8k" else boxed(text)) or "") or None
        find = (lambda part: _marked(part) or _written(part)) if self.format == "gsm8k" else _written
        text = answer_text.without_thinking(text)
        return answer_text.first_found(text, lambda part: normal(find(part) or "") or None)

    def ballots(self, answers: Sequence[str | None]) -> list[str | None]:
        votes: list[str | None] = []
        for answer in answers:
            known = dict.fromkeys(vote for vote in votes if vote is not None)
            if answer is not None and answer not in known:
                # The first of its class stands for all: votes are counted by equal strings.
                answer = next((v for v in known if _equal(v, answer, self.timeout_s)), answer)
            votes.append(answer)
        return votes

    def correct(self, problem: Problem, answer: str | None) -> bool:
        return answer is not None and self.compare(problem, answer) == "equal"

    def compare(self, problem: Problem, answer: str) -> str:
        """See `Comparer.compare`, with the right answer; time-outs and errors are distinguished from answers that differ."""
        # Most answers end here; a question to the helper process costs milliseconds.
        if normal(answer) == problem.gold:
            return "equal"
        # Units behind a number, $ and commas are usual in this form.
        if _NUMERIC.fullmatch(problem.gold) and self.format == "gsm8k":
            if number(answer) is not None:
                return "equal" if number(answer) == number(problem.gold) else "different"
        return comparer(self.timeout_s).compare(problem.meta["written"], answer)


# A vote compares the same few answers again and again.
@functools.lru_cache(maxsize=65536)
def _equal(one: str, other: str, timeout_s: float) -> bool:
    # Numbers need no helper process.
    if _NUMERIC.fullmatch(one) and _NUMERIC.fullmatch(other):
        return number(one) == number(other)
    return comparer(timeout_s).compare(one, other) == "equal"


def _marked(text: str) -> str | None:
    lines = [line.strip() for line in re.findall(rf"{MARK}+[ \t]*(.*)", text)]
    lines = [line for line in lines if line and not _EXPLANATION.match(line)]
    return (boxed(lines[-1]) or lines[-1].strip("*`_ ")) if lines else None


def _written(text: str) -> str | None:
    if (inside := boxed(text)) is not None:
        return inside.strip("$")
    text = _EMPHASIS.sub("", _TAG.sub(r"\nAnswer: \1\n", text))
    if (marked := _marked(text)) is not None:
        return marked
    for _, start in reversed(answer_text.statements(text)):
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
    """The content of the last ``\\boxed{..}`` (or ``\\fbox{..}``, ``\\boxed 5``), None if none is closed."""
    # The last box, as in the scorer of the data set; earlier ones hold intermediate results.
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|[^\s{}$]+)", text))
    if not found:
        return None
    if found[-1][1] != "{":
        return found[-1][1]
    start, depth = found[-1].end(), 1
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):  # an escaped brace does not count
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return text[start : start + match.start()]
    return None


def normal(text: str) -> str:
    """An answer in a form in which its usual variants are one string.

    White space, sizes of brackets, dollar and per cent signs, degrees and a full stop are removed; \\dfrac and \\tfrac
    become \\frac, \\frac12 gets its braces, a leading point its zero, and thousands lose their commas.
    """
    text = re.sub(r"\\[dt]frac", r"\\frac", text.strip().removesuffix(".")).replace("{,}", ",")
    text = _SPACE.sub(lambda m: f"{m[1]} " if m[1] else "", _DROPPED.sub("", text))
    text = _BARE_FRACTION.sub(_braced, text)
    text = re.sub(r"(?<![0-9])\.([0-9])", r"0.\1", text)
    return text.replace(",", "") if re.fullmatch(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", text) else text


def _braced(match: re.Match) -> str:
    above, below = (part for part in match.groups() if part is not None)
    return f"\\frac{{{above}}}{{{below}}}"


# --------------------------------------------------------------------------------------------------------- equality


def check_installed() -> None:
    """Raises UserError unless math-verify can be imported."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"the math task compares answers with math-verify: {pip_install('eval')}")


class Comparer(Helper):
    """One process with math-verify, started by the first comparison; threads take turns."""

    # math-verify passes a model's text to SymPy, which may take for ever (`9**9**9`) or all memory. Its own time-outs
    # are alarms of the main thread, which neither stop C code nor work in other threads; a process can be killed.

    def __init__(self, *, timeout_s: float = 5.0, memory_mb: int = 2048):
        """`timeout_s`: wall time of one comparison. `memory_mb`: address space of the process, in MiB."""
        check_installed()
        if not (timeout_s > 0 and memory_mb > 0):
            raise UserError(f"timeout_s={timeout_s} and memory_mb={memory_mb} must be above 0")
        # Two minutes to start: `timeout_s` is for a comparison, and the import of math-verify is slow.
        super().__init__("math_equal.py", str(memory_mb), env={**os.environ, "PYTHONHASHSEED": "0"}, start_s=120)
        self.timeout_s = timeout_s
        # One pair of pipes: without turns two threads could read each other's answers.
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def compare(self, gold: str, answer: str) -> str:
        """Compares two answers, each LaTeX without dollar signs or plain text.

        Returns equal, different, unparsed, timeout or error (mostly lack of memory).
        """
        with self._lock:
            if not self.running() and self.start() is None:
                raise UserError("math-verify does not start: try `python -c 'import math_verify'`")
            try:
                codec.send(self._jobs, [gold, answer])
                reason = codec.receive(self._answers, time.monotonic() + self.timeout_s)
            except TimeoutError:
                reason = "timeout"
            except (codec.Closed, codec.TooLong, ValueError):
                reason = "error"
            # A late answer would be read as that of the next pair.
            if reason in ("timeout", "error"):
                self.stop()
        return reason

    def close(self) -> None:
        # In a fork the process belongs to the parent.
        if self._owner == os.getpid():
            with self._lock:
                self.stop()


def comparer(timeout_s: float = 5.0) -> Comparer:
    """This process's comparer, closed at exit."""
    return of_this_process(Comparer, timeout_s=timeout_s)
