"""Addition of two n-digit numbers with a scratchpad (STaR, 2203.14465, section 4.2): generated, every step checkable.

Three formats of one task:

* ``compact``: one character per token, for models trained from scratch. ``737+361=`` is followed by
  ``737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098``.
* ``release``: the text of the STaR release for pretrained models, with few-shot examples of the same length.
* ``direct``: ``737+361=`` is followed by ``#1098``; the baseline without a rationale.

The scratchpad restates the sum with carry 0; then one line for each digit pair but the units, right to left: the pair,
the sum so far, the carry into the pair; then the last carry; then the sum with its carry digit (always n + 1 digits:
this is the hint); then the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from random import Random

from qstar.errors import UserError, require
from qstar.tasks.base import Problem, Task, bucket, check_split, leak_marker, stable_rng

PAD, EOS = ".", "$"
ALPHABET = ".$0123456789+,C|#=()"  # compact and direct

FORMATS = ("compact", "release", "direct")
# The release generates sums of up to 10 digits: 1 to 5 to train on, 6 to 10 to test lengths never trained on.
MAX_DIGITS = 10
POOL = {1: 60, 2: 800, 3: 2400}
SEEDS = {1: (60, 60), 2: (500, 500), 3: (20, 150)}
SHOT_POOL = 50  # few-shot examples per length, as in the release
# Up to so many pairs are listed rather than drawn one by one.
_SMALL = 10_000

_RELEASE_ANSWER = re.compile(r"(?:^|\n)</scratch>\n([0-9](?: [0-9])*)(?=\n|\Z)")
# Anchored at the end, so that every kept completion stops behind its answer.
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
        """Checks the options; keys of `pool` and `seeds` may be text, as configs write them.

        Args:
            format: "compact", "release" or "direct".
            pool: digits -> problems drawn per outer loop (all that exist, if fewer).
            seeds: digits -> (plain, hinted) gold rows for the base model; both kinds show the same problems.
            eval_digits: lengths of "val" and "test"; those of `pool` when None.
            eval_per_length: problems per length in "val" and "test" (fewer exist with one digit).
            shots: few-shot examples in a prompt of the release format.
            seed: of the seed rows and the "train" sample; "val" and "test" are the same for every seed.
        """
        require(
            (format in FORMATS, f"arithmetic: unknown format {format!r}; there are {', '.join(FORMATS)}"),
            (0 <= shots <= SHOT_POOL, f"arithmetic: shots={shots} is not between 0 and {SHOT_POOL}"),
            (eval_per_length >= 1, f"arithmetic: eval_per_length={eval_per_length} must be at least 1"),
        )
        self.format = format
        self.pool_counts = {_digits(n, "pool"): _counts(n, (count,), "pool")[0] for n, count in pool.items()}
        self.seed_counts = {_digits(n, "seeds"): _counts(n, rows, "seeds", 2) for n, rows in seeds.items()}
        lengths = self.pool_counts if eval_digits is None else eval_digits
        self.eval_digits = sorted({_digits(n, "eval_digits") for n in lengths})
        self.eval_per_length = eval_per_length
        # The compact alphabet has no line breaks, which separate examples.
        self.shots = shots if format == "release" else 0
        self.seed = seed
        self.stop = ("\n\n",) if format == "release" else ()
        form = "#1098" if format != "release" else "</scratch> and, in a line below, the sum with spaces: 1 0 9 8"
        work = "" if format == "direct" else "Add digit by digit from the right, with a line for each carry, then "
        self.instruction = f"{work}end with the sum in this form: {form}"

    def problems(self, split: str) -> list[Problem]:
        """ "val" and "test" are fixed samples per length; "train" is the draw of loop 0."""
        check_split(split)
        if split == "train":
            return self.pool(0, self.seed)
        # Without `seed`, so that runs of all seeds are measured on the same problems.
        draws = (_draw(stable_rng("arithmetic", split, n), n, self.eval_per_length, split) for n in self.eval_digits)
        return [self.problem(a, b) for pairs in draws for a, b in pairs]

    def problem(self, a: int, b: int) -> Problem:
        return Problem(f"{a}+{b}", f"{a}+{b}", str(a + b), _solution(self.format, a, b), group=str(len(str(a))))

    def pool(self, iteration: int, seed: int, count: int | None = None) -> list[Problem]:
        drawn: list[tuple[int, int]] = []
        for n, wanted in self.pool_counts.items():
            # One generator per length: another count for one length leaves the other draws unchanged.
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
        """The query, after `shots` worked examples of the same length in the release format."""
        # Not in `prefix`, since they depend on the problem. With `hint` every example has its hint too, padded like the
        # query's (the release gives examples the bare answer, which differs where there is no carry).
        examples = [f"{self.query(shot, hint)}{self.solution(shot)}\n\n" for shot in self._examples(problem)]
        return "".join(examples) + self.query(problem, hint)

    def query(self, problem: Problem, hint: bool = False) -> str:
        """The prompt without its few-shot examples; the hint is the sum padded to n + 1 digits."""
        if self.format != "release":
            return f"{problem.question}=" + (f"({_padded(problem)})" if hint else "")
        return f"Input:\n{_spaced(problem.question)}\nTarget:" + (f" {_spaced(_padded(problem))}\n" if hint else "\n")

    def examples(self) -> list[Problem]:
        return [self.problem(*pair) for n in self.eval_digits[:4] for pair in _shot_pairs(n, SHOT_POOL)[:2]]

    def cut(self, completion: str) -> str:
        # Only the release format may continue behind its answer, with a further example.
        found = _RELEASE_ANSWER.search(completion) if self.format == "release" else None
        return completion[: found.end(1)] if found else super().cut(completion)

    def parse(self, completion: str) -> str | None:
        """Compact, direct: the digits behind the last "#", to the end. Release: the line after </scratch>."""
        found = (_RELEASE_ANSWER if self.format == "release" else _COMPACT_ANSWER).search(completion)
        return found[1].replace(" ", "") if found else None

    def leak(self, problem: Problem, completion: str) -> str | None:
        """Besides the hint markers: brackets or a new "Target:", or the sum before a carry was worked out."""
        if marker := leak_marker(completion):
            return marker
        for mark in ("Target", "Input") if self.format == "release" else ("(", ")"):
            if mark in completion:
                return f"prompt text {mark!r} in the completion"
        if self.format == "direct":
            return None
        # The hint is the padded sum: copied, it appears before any carry was worked out.
        padded = _padded(problem)
        results = (padded, "#") if self.format == "compact" else (_spaced(padded), "</scratch>")
        first = min((at for at in map(completion.find, results) if at >= 0), default=len(completion))
        # The restated sum shows the first "C"; a result before the second one was not computed.
        return "states the answer before computing anything" if completion[:first].count("C") < 2 else None

    def audit(self, problem: Problem, completion: str) -> bool | None:
        return None if self.format == "direct" else self.cut(completion) == problem.solution

    def steps(self, completion: str) -> list[int]:
        """Compact: every line, with the mark that closes it. The others: as in any text."""
        if self.format != "compact":
            return super().steps(completion)
        return [at + 1 for at, c in enumerate(completion[:-1]) if c == "|"] + [len(completion)]

    def step_labels(self, problem: Problem, completion: str) -> list[bool] | None:
        if self.format == "direct":
            return None
        gold = problem.solution or ""
        return [*(gold.startswith(completion[:end]) for end in self.steps(completion)[:-1]), completion == gold]

    def fault(self, problem: Problem, completion: str) -> str | None:
        """Compact: the mistake in the first line that differs from the gold scratchpad's; None if there is none."""
        if self.format != "compact" or completion == problem.solution:
            return None
        gold, written = (problem.solution or "").split("|"), completion.split("|")
        same = zip(gold, written)
        at = next((i for i, (a, b) in enumerate(same) if a != b), min(len(gold), len(written)))
        if at >= len(gold) - 2:
            return {len(gold) - 2: "copied sum", len(gold) - 1: "copied answer"}.get(at, "extra lines")
        if at == 0:
            return "restated sum"
        wanted, found = (_COMPACT_LINE.fullmatch(line) for line in (gold[at], written[at] if at < len(written) else ""))
        if wanted is None or found is None or len(found[2]) != len(wanted[2]):
            return "skipped line"
        if found[1] != wanted[1] or found[2][1:] != wanted[2][1:]:
            return "miscopied digit"
        return "wrong digit" if found[2] != wanted[2] else "wrong carry"

    def _examples(self, problem: Problem) -> list[Problem]:
        operands = set(map(int, problem.question.split("+")))
        # An example with the same operands, in either order, would show the answer.
        others = [pair for pair in _shot_pairs(int(problem.group), self.shots) if set(pair) != operands]
        return [self.problem(*pair) for pair in stable_rng("shots", problem.id).sample(others, self.shots)]

    @cached_property
    def _seed_pairs(self) -> dict[int, list[tuple[int, int]]]:
        rng = {n: stable_rng("arithmetic", "seeds", self.seed, n) for n in self.seed_counts}
        # The larger count: plain and hinted rows take their problems from the same list.
        return {n: _draw(rng[n], n, max(rows), "train") for n, rows in self.seed_counts.items()}

    @cached_property
    def _reserved(self) -> dict[int, frozenset[tuple[int, int]]]:
        # Seed problems and few-shot examples, which no pool draws. Of one digit too few pairs exist to reserve any.
        lengths = [n for n in self.pool_counts if n >= 2]
        return {n: frozenset([*self._seed_pairs.get(n, []), *_shot_pairs(n, self.shots)]) for n in lengths}


def side(a: int, b: int) -> str:
    """The split of a + b by hash: "test" is a fifth, "val" one in 25, "train" the rest (pools, seeds and shots)."""
    # Sorted: b + a has the same answer, so both must be on the same side.
    text = f"{min(a, b)},{max(a, b)}"
    if bucket(text, 5) == 0:
        return "test"
    return "val" if bucket(text, 25) == 1 else "train"


def _draw(rng: Random, digits: int, count: int, split: str, without: frozenset = frozenset()) -> list[tuple[int, int]]:
    low, high = 10 ** (digits - 1), 10**digits - 1
    pairs = (high - low + 1) ** 2
    # The smallest side holds 1/25 of the pairs: below 1/50, drawing until enough differ ends soon.
    if pairs <= _SMALL or 50 * (count + len(without)) >= pairs:
        numbers = range(low, high + 1)
        all_pairs = [(a, b) for a in numbers for b in numbers if side(a, b) == split and (a, b) not in without]
        return rng.sample(all_pairs, min(count, len(all_pairs)))
    drawn: dict[tuple[int, int], None] = {}  # a set that keeps its order
    while len(drawn) < count:
        pair = rng.randint(low, high), rng.randint(low, high)
        if side(*pair) == split and pair not in without:
            drawn[pair] = None
    return list(drawn)


def _shot_pairs(digits: int, shots: int) -> list[tuple[int, int]]:
    return _draw(stable_rng("arithmetic", "shots", digits), digits, SHOT_POOL, "train") if shots else []


def _solution(format: str, a: int, b: int) -> str:
    if format == "direct":
        return f"#{a + b}"
    lines = [(f"{a}+{b}", "", 0)]  # (pair, sum so far, carry)
    so_far, carry = "", 0
    for place, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        # As in the release (its generator, gen_sums.py): the units digit first appears in the line of the tens.
        if place > 0:
            lines.append((f"{x}+{y}", so_far, carry))
        carry, digit = divmod(int(x) + int(y) + carry, 10)
        so_far = f"{digit}{so_far}"
    lines.append(("", so_far, carry))
    padded = f"{carry}{so_far}"
    if format == "compact":
        return "|".join([*(f"{pair},{so_far}C{carry}" for pair, so_far, carry in lines), padded, f"#{a + b}"])
    written = [" ".join([*pair, ",", *so_far, "C:", str(carry)]) for pair, so_far, carry in lines]
    return "\n".join(["<scratch>", *written, _spaced(padded), "</scratch>", _spaced(str(a + b))])


def _padded(problem: Problem) -> str:
    return problem.gold.zfill(int(problem.group) + 1)


def _spaced(text: str) -> str:
    # A subword tokenizer then has one token per digit.
    return " ".join(text)


def _digits(value: object, option: str) -> int:
    if not str(value).isdecimal() or not 1 <= int(str(value)) <= MAX_DIGITS:
        raise UserError(f"arithmetic: {option} names {value!r} digits; 1 to {MAX_DIGITS} are possible")
    return int(str(value))


def _counts(digits: object, values: object, option: str, size: int = 1) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) != size or any(type(v) is not int or v < 0 for v in values):
        what = "a count" if size == 1 else "(plain, hinted) counts"
        raise UserError(f"arithmetic: {option}[{digits}] = {values!r} is not {what} of 0 or more")
    return tuple(values)
