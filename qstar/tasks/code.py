"""Base of MBPP and HumanEval: an answer is a program, correct if it passes the problem's tests in the sandbox."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from qstar.errors import UserError, require
from qstar.tasks import verify
from qstar.tasks.base import Problem, Task, check_split
from qstar.tasks.programs import as_module, normal_program, program_in, through_program

# After the prompt of the MBPP paper (Austin et al., 2108.07732). V-STaR asks both data sets with "the MBPP template" and
# does not print it: that this is the one is our assumption.
TEMPLATE = (
    "You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:\n\n"
    "{tests}\n[BEGIN]\n"
)
END = "\n[DONE]"


class CodeTask(Task):
    """Base of the tasks whose answers are programs. Subclasses write `every`, `prompt`, and `job`.

    `parse` returns the program as text.
    There is nothing to give as a hint: rationalisation is refused.
    """

    stop: tuple[str, ...] = (END,)
    first_block = False  # of several complete blocks in a completion the program is the last

    def __init__(self, *, timeout_s: float, memory_mb: int, allow: Sequence[str] = ()):
        require(
            (timeout_s > 0, f"{self.name}: timeout_s={timeout_s} must be above 0"),
            (memory_mb > 0, f"{self.name}: memory_mb={memory_mb} must be above 0"),
        )
        self.timeout_s, self.memory_mb, self.allow = timeout_s, memory_mb, tuple(allow)

    def job(self, problem: Problem, program: str) -> verify.Job:
        """The program as a whole and the tests that judge it."""
        raise NotImplementedError

    def answered_part(self, completion: str) -> str | None:
        part = super().answered_part(completion)
        return part if part is not None else through_program(completion)  # a message: the program, then an explanation

    def parse(self, completion: str) -> str | None:
        program = program_in(completion, first=self.first_block)
        return program and as_module(program)

    def correct(self, problem: Problem, answer: str | None) -> bool:
        return answer is not None and self.verdict(problem, answer).passed

    def verdict(self, problem: Problem, answer: str) -> verify.Verdict:
        """Why a program passes or fails: wrong answers, errors and time-outs are told apart (`verify.REASONS`)."""
        return _judged(self.job(problem, answer), self.timeout_s, self.memory_mb, self.allow)

    def verdicts(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[verify.Verdict]:
        """`verdict` of many, judged by all workers at once, in order; the same program is run once."""
        jobs = [self.job(p, a) for p, a in zip(problems, answers, strict=True)]
        distinct = list(dict.fromkeys(jobs))
        found = verify.pool(self.allow).run_many(distinct, timeout_s=self.timeout_s, memory_mb=self.memory_mb)
        of = dict(zip(distinct, found))
        return [of[job] for job in jobs]

    def judged(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool]:
        there = [i for i, a in enumerate(answers) if a is not None]
        found = self.verdicts([problems[i] for i in there], [answers[i] for i in there])
        passed = dict(zip(there, (v.passed for v in found)))
        return [passed.get(i, False) for i in range(len(answers))]

    def ballots(self, answers: Sequence[str | None]) -> list[str | None]:
        """A vote is for a program's text without comments, docstrings and layout; the tests have no say in it."""
        return [a and normal_program(a) for a in answers]

    def refuse_hint(self, hint: bool) -> None:
        """Raises UserError where a hinted prompt is asked for."""
        if hint:
            raise UserError(f"{self.name}: a program has no short answer to hint at; set rationalize=False")


@functools.lru_cache(maxsize=65536)
def _judged(job: verify.Job, timeout_s: float, memory_mb: int, allow: tuple[str, ...]) -> verify.Verdict:
    """Samples repeat: the same program is not run twice."""
    return verify.pool(allow).run(job, timeout_s=timeout_s, memory_mb=memory_mb)


def text_fields(record: dict, *names: str) -> list[str]:
    """Fields of a record that have to be text, with line ends of one kind; a ValueError names the one that is not."""
    for name in names:
        if not isinstance(record[name], str):
            raise ValueError(f"field {name!r} is of type {type(record[name]).__name__}, not text")
    return [record[name].replace("\r\n", "\n") for name in names]


def check_tests(tests: str) -> str:
    """The tests, if they parse and assert something; else a ValueError."""
    verify.needed_names(tests)
    return tests


def check_has(name: str, split: str, has: Sequence[str]) -> None:
    """Raises UserError where a data set has nothing for a split."""
    check_split(split)
    if split not in has:
        raise UserError(f"{name}: has no {split!r} problems, only {', '.join(has)}")
