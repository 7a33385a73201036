"""Sums of two n-digit numbers with a scratchpad (STaR, 2203.14465, section 4.2): generated, checkable.

Three formats of one task:

* ``compact``: one character per token, for models trained from scratch. ``737+361=`` is followed by
  ``737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098``.
* ``release``: the text of the STaR release for pretrained models, with few-shot examples of the same length.
* ``direct``: ``737+361=`` is followed by ``#1098``; the baseline without a rationale.

The scratchpad restates the sum with carry 0; then one line for each digit pair but the units, right to left:
the pair, the sum so far, the carry into the pair; then the last carry; then the sum with its carry digit
(always n + 1 digits: this is the hint); then the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from random import Random

from qstar.errors import UserError
from qstar.tasks.base import Problem, Task, bucket, check_split, leak_marker, stable_rng

PAD, EOS = ".", "$"
ALPHABET = ".$0123456789+,C|#=()"  # compact and direct
RELEASE_ALPHABET = ".$0123456789+,:<>/ \n" + "".join(sorted(set("InputTargetscratchC")))

FORMATS = ("compact", "release", "direct")
MAX_DIGITS = 10
POOL = {1: 60, 2: 800, 3: 2400}
SEEDS = {1: (60, 60), 2: (500, 500), 3: (20, 150)}
SHOT_POOL = 50  # few-shot examples per length, as in the release
_SMALL = 10_000  # up to so many pairs are listed rather than drawn one by one

_RELEASE_ANSWER = re.compile(r"(?:^|\n)</scratch>\n([0-9](?: [0-9])*)(?=\n|\Z)")
_COMPACT_ANSWER = re.compile(r"#([0-9]+)\Z")
_COMPACT_LINE = re.compile(r"((?:[0-9]\+[0-9])?),([0-9]+)C([0-9])")  # pair, sum so far, carry


class Arithmetic(Task):
    """Addition of two numbers with equally many digits."""

    name = "arithmetic"

    def __init__(
        self,
        *,
        format: str = "compact",
        pool: Mapping[int, int] = POOL,
        seeds: Mapping[int, Sequence[int]] = SEEDS,
        eval_digits: Sequence[int] | None = None,
        eval_per_length: int = 250,
        shots: int = 10,
        seed: int = 0,
    ):
        """Makes the task; keys of `pool` and `seeds` may be text, as configs write them.

        Args:
            format: "compact", "release" or "direct".
            pool: digits -> problems drawn per outer loop (all there are, if fewer).
            seeds: digits -> (plain, hinted) gold rows for the base model; both kinds show the same problems.
            eval_digits: lengths of "val" and "test"; those of `pool` when None.
            eval_per_length: problems per length in "val" and "test" (fewer exist with one digit).
            shots: few-shot examples in a prompt of the release format.
            seed: of the seed rows and the "train" sample; "val" and "test" are the same for every seed.

        Raises:
            UserError: an option that makes no sense, named.
        """
        if format not in FORMATS:
            raise UserError(f"arithmetic: unknown format {format!r}; there are {', '.join(FORMATS)}")
        if not 0 <= shots <= SHOT_POOL:
            raise UserError(f"arithmetic: shots={shots} is not between 0 and {SHOT_POOL}")
        if eval_per_length < 1:
            raise UserError(f"arithmetic: eval_per_length={eval_per_length} must be at least 1")
        self.format = format
        self.pool_counts = {_digits(n, "pool"): _counts(n, (count,), "pool")[0] for n, count in pool.items()}
        self.seed_counts = {_digits(n, "seeds"): _counts(n, rows, "seeds", 2) for n, rows in seeds.items()}
        lengths = self.pool_counts if eval_digits is None else eval_digits
        self.eval_digits = sorted({_digits(n, "eval_digits") for n in lengths})
        self.eval_per_length = eval_per_length
        self.shots = shots if format == "release" else 0
        self.seed = seed
        self.stop = ("\n\n",) if format == "release" else ()

    def problems(self, split: str) -> list[Problem]:
        """ "val" and "test" are fixed samples per length; "train" is the draw of loop 0."""
        check_split(split)
        if split == "train":
            return self.pool(0, self.seed)
        drawn = []
        for n in self.eval_digits:
            drawn += _draw(stable_rng("arithmetic", split, n), n, self.eval_per_length, split)
        return [self.problem(*pair) for pair in drawn]

    def problem(self, a: int, b: int) -> Problem:
        """The problem a + b, for two numbers with equally many digits."""
        write = {"compact": _compact, "release": _release, "direct": lambda a, b: f"#{a + b}"}[self.format]
        text = f"{a}+{b}"
        return Problem(id=text, question=text, gold=str(a + b), solution=write(a, b), group=str(len(str(a))))

    def pool(self, iteration: int, seed: int, count: int | None = None) -> list[Problem]:
        drawn = []
        for n, wanted in self.pool_counts.items():
            rng = stable_rng("arithmetic", "pool", seed, iteration, n)
            drawn += _draw(rng, n, wanted, "train", self._reserved.get(n, frozenset()))
        stable_rng("arithmetic", "order", seed, iteration).shuffle(drawn)
        return [self.problem(*pair) for pair in drawn[:count]]

    def seeds(self) -> list[tuple[Problem, bool]]:
        rows = []
        for n, (plain, hinted) in self.seed_counts.items():
            problems = [self.problem(*pair) for pair in self._seed_pairs[n]]
            rows += [(problem, False) for problem in problems[:plain]]
            rows += [(problem, True) for problem in problems[:hinted]]
        return rows

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        """The query, after `shots` worked examples of the same length in the release format.

        Those depend on the length, so they cannot stand in `prefix`; which ones is settled by the problem's
        id. With `hint` every example carries its hint too, padded like the query's (the release's code gives
        its examples the bare answer, which differs where there is no carry).
        """
        examples = [self.query(shot, hint) + self.solution(shot) + "\n\n" for shot in self._examples(problem)]
        return "".join(examples) + self.query(problem, hint)

    def query(self, problem: Problem, hint: bool = False) -> str:
        """The prompt without its few-shot examples; the hint is the sum padded to n + 1 digits."""
        hinted = problem.gold.zfill(int(problem.group) + 1)
        if self.format != "release":
            return f"{problem.question}=" + (f"({hinted})" if hint else "")
        return f"Input:\n{_spaced(problem.question)}\nTarget:" + (f" {_spaced(hinted)}\n" if hint else "\n")

    def cut(self, completion: str) -> str:
        """Release: up to the end of the answer's line. The others end there: anything more is wrong."""
        found = _RELEASE_ANSWER.search(completion) if self.format == "release" else None
        return completion[: found.end(1)] if found else super().cut(completion)

    def parse(self, completion: str) -> str | None:
        """Compact, direct: the digits behind the last "#", to the end. Release: the line after </scratch>."""
        if self.format == "release":
            found = _RELEASE_ANSWER.search(completion)
        else:
            found = _COMPACT_ANSWER.search(completion)
        return found[1].replace(" ", "") if found else None

    def leak(self, problem: Problem, completion: str) -> str | None:
        """Besides the hint markers: brackets or a new "Target:", or the sum before a carry was worked out.

        The restated sum shows the first "C"; a result that stands before the second one was not computed.
        """
        if marker := leak_marker(completion):
            return marker
        for mark in ("Target", "Input") if self.format == "release" else ("(", ")"):
            if mark in completion:
                return f"prompt text {mark!r} in the completion"
        if self.format == "direct":
            return None
        padded = problem.gold.zfill(int(problem.group) + 1)
        results = (padded, "#") if self.format == "compact" else (_spaced(padded), "</scratch>")
        first = min((at for at in map(completion.find, results) if at >= 0), default=len(completion))
        return "states the answer before computing anything" if completion[:first].count("C") < 2 else None

    def audit(self, problem: Problem, completion: str) -> bool | None:
        """Whether every character is that of the gold scratchpad; None without a scratchpad."""
        return None if self.format == "direct" else self.cut(completion) == problem.solution

    def steps(self, completion: str) -> list[int]:
        """Compact: every line, with the mark that closes it. The others: as in any text."""
        if self.format != "compact":
            return super().steps(completion)
        return [at + 1 for at, c in enumerate(completion[:-1]) if c == "|"] + [len(completion)]

    def step_labels(self, problem: Problem, completion: str) -> list[bool] | None:
        """Whether everything up to the end of a line is that of the gold scratchpad."""
        if self.format == "direct":
            return None
        ends = self.steps(completion)
        right = [problem.solution.startswith(completion[:end]) for end in ends]
        return [*right[:-1], completion == problem.solution]

    def fault(self, problem: Problem, completion: str) -> str | None:
        """Compact: of the first line that is not the gold scratchpad's, what is wrong; None if there is none."""
        if self.format != "compact" or completion == problem.solution:
            return None
        gold, ours = problem.solution.split("|"), completion.split("|")
        at = next((i for i, (a, b) in enumerate(zip(gold, ours)) if a != b), min(len(gold), len(ours)))
        if at >= len(gold) - 2:
            return {len(gold) - 2: "copied sum", len(gold) - 1: "copied answer"}.get(at, "extra lines")
        if at == 0:
            return "restated sum"
        wanted, found = _COMPACT_LINE.fullmatch(gold[at]), _COMPACT_LINE.fullmatch(ours[at] if at < len(ours) else "")
        if found is None or len(found[2]) != len(wanted[2]):
            return "skipped line"
        if found[1] != wanted[1] or found[2][1:] != wanted[2][1:]:
            return "miscopied digit"
        return "wrong digit" if found[2] != wanted[2] else "wrong carry"

    def _examples(self, problem: Problem) -> list[Problem]:
        """The few-shot examples of one problem, never the problem itself nor its mirror image."""
        if not self.shots:
            return []
        others = [pair for pair in _shot_pairs(int(problem.group)) if set(pair) != set(_operands(problem))]
        return [self.problem(*pair) for pair in stable_rng("shots", problem.id).sample(others, self.shots)]

    @cached_property
    def _seed_pairs(self) -> dict[int, list[tuple[int, int]]]:
        return {
            n: _draw(stable_rng("arithmetic", "seeds", self.seed, n), n, max(rows), "train")
            for n, rows in self.seed_counts.items()
        }

    @cached_property
    def _reserved(self) -> dict[int, frozenset[tuple[int, int]]]:
        """Seed problems and few-shot examples, which no pool draws (of one digit too few exist)."""
        lengths = [n for n in self.pool_counts if n >= 2]
        shots = {n: _shot_pairs(n) if self.shots else [] for n in lengths}
        return {n: frozenset([*self._seed_pairs.get(n, []), *shots[n]]) for n in lengths}


def side(a: int, b: int) -> str:
    """The split that a + b belongs to, by hash; b + a is always on the same side.

    "test" is a fifth, "val" one in twenty-five, "train" the rest, from which pools, seeds and shots come.
    """
    text = f"{min(a, b)},{max(a, b)}"
    if bucket(text, 5) == 0:
        return "test"
    return "val" if bucket(text, 25) == 1 else "train"


def _draw(rng: Random, digits: int, count: int, split: str, without: frozenset = frozenset()) -> list[tuple[int, int]]:
    """`count` different pairs of one side, or all of them if there are fewer, in random order."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    pairs = (high - low + 1) ** 2
    # The smallest side holds 1/25 of the pairs: below 1/50 a try always has room left and luck enough.
    if pairs <= _SMALL or 50 * (count + len(without)) >= pairs:
        numbers = range(low, high + 1)
        there = [(a, b) for a in numbers for b in numbers if side(a, b) == split and (a, b) not in without]
        return rng.sample(there, min(count, len(there)))
    drawn: dict[tuple[int, int], None] = {}  # a set that keeps its order
    while len(drawn) < count:
        pair = rng.randint(low, high), rng.randint(low, high)
        if side(*pair) == split and pair not in without:
            drawn[pair] = None
    return list(drawn)


def _shot_pairs(digits: int) -> list[tuple[int, int]]:
    return _draw(stable_rng("arithmetic", "shots", digits), digits, SHOT_POOL, "train")


def _operands(problem: Problem) -> tuple[int, ...]:
    return tuple(map(int, problem.question.split("+")))


def _steps(a: int, b: int) -> tuple[list[tuple[str, str, int]], str]:
    """The scratchpad before it is written: lines of (pair, sum so far, carry) and the padded sum."""
    lines = [(f"{a}+{b}", "", 0)]
    so_far, carry = "", 0
    for place, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        if place > 0:  # the units pair has no line of its own
            lines.append((f"{x}+{y}", so_far, carry))
        carry, digit = divmod(int(x) + int(y) + carry, 10)
        so_far = f"{digit}{so_far}"
    return [*lines, ("", so_far, carry)], f"{carry}{so_far}"


def _compact(a: int, b: int) -> str:
    lines, padded = _steps(a, b)
    return "|".join([*(f"{pair},{so_far}C{carry}" for pair, so_far, carry in lines), padded, f"#{a + b}"])


def _release(a: int, b: int) -> str:
    lines, padded = _steps(a, b)
    written = [" ".join([*pair, ",", *so_far, "C:", str(carry)]) for pair, so_far, carry in lines]
    return "\n".join(["<scratch>", *written, _spaced(padded), "</scratch>", _spaced(a + b)])


def _spaced(text: object) -> str:
    """One space between characters: what makes a subword tokenizer see single digits."""
    return " ".join(str(text))


def _digits(value: object, option: str) -> int:
    if not str(value).isdigit() or not 1 <= int(str(value)) <= MAX_DIGITS:
        raise UserError(f"arithmetic: {option} names {value!r} digits; 1 to {MAX_DIGITS} are possible")
    return int(str(value))


def _counts(digits: object, values: object, option: str, size: int = 1) -> tuple[int, ...]:
    fine = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == size
    if not fine or not all(isinstance(v, int) and v >= 0 for v in values):
        what = "a count" if size == 1 else "(plain, hinted) counts"
        raise UserError(f"arithmetic: {option}[{digits}] = {values!r} is not {what} of 0 or more")
    return tuple(values)
