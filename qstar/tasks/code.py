"""MBPP and HumanEval: an answer is a program, correct if it passes the problem's tests in the sandbox."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence
from dataclasses import dataclass

from qstar.data.sources import text_field
from qstar.errors import UserError, bounded
from qstar.tasks import sandbox
from qstar.tasks.answer_text import without_thinking
from qstar.tasks.base import Problem, RecordTask, Task, check_split
from qstar.tasks.program_parsing import as_body, as_module, blocks, is_body, normal_program, program_in, through_program

# The prompt of the MBPP paper. V-STaR asks both data sets with "the MBPP template" and does not print it: that it is
# this one is our assumption.
TEMPLATE = (
    "You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:\n\n"
    "{tests}\n[BEGIN]\n"
)
END = "\n[DONE]"


@dataclass(kw_only=True, eq=False)
class CodeTask(RecordTask):
    """Base of tasks whose answers are programs; subclasses write `problems`, `prompt` and `job`.

    Options:
        data: file or folder with all records; the hub's data set when None.
        timeout_s: wall time that a program and its tests may take.
        memory_mb: address space of a program, in MiB.
        allow: installed packages that programs may import, e.g. ("numpy",); see `sandbox.Sandbox`.
    """

    data: str | None = None
    timeout_s: float = bounded(10.0, gt=0)
    memory_mb: int = bounded(512, gt=0)
    allow: Sequence[str] = ()

    instruction = (
        "Write the whole function in Python, in one block of code that begins with ```python and ends with ```."
    )
    example_end = END
    _few_shot = False  # whether the worked examples that come with qstar stand in front

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop = (END,)
        self._problems: list[Problem] | None = None

    def job(self, problem: Problem, program: str) -> sandbox.Job:
        """The whole program and the tests that judge it."""
        raise NotImplementedError

    def answered_part(self, completion: str) -> str | None:
        part = super().answered_part(completion)
        # Chat models explain the program behind its block: the part up to the block is complete.
        return part if part is not None else through_program(completion)

    def parse(self, completion: str) -> str | None:
        program = program_in(completion)
        return program and as_module(program)

    def correct(self, problem: Problem, answer: str | None) -> bool:
        return self.judged([problem], [answer])[0]

    def verdicts(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[sandbox.Verdict]:
        """Why programs pass or fail (`sandbox.REASONS`), judged by all workers at once; equal programs run once."""
        jobs = [self.job(p, a) for p, a in zip(problems, answers, strict=True)]
        # Samples repeat, and a run costs a process.
        distinct = list(dict.fromkeys(jobs))
        pool = sandbox.pool(self.allow)
        verdicts = pool.run_many(distinct, timeout_s=self.timeout_s, memory_mb=self.memory_mb)
        found = dict(zip(distinct, verdicts))
        return [found[job] for job in jobs]

    def judged(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool]:
        answered = [(i, p, a) for i, (p, a) in enumerate(zip(problems, answers, strict=True)) if a is not None]
        verdicts = self.verdicts([p for _, p, _ in answered], [a for _, _, a in answered])
        passed = {i for (i, _, _), verdict in zip(answered, verdicts) if verdict.passed}
        return [i in passed for i in range(len(answers))]

    def ballots(self, answers: Sequence[str | None]) -> list[str | None]:
        """A program's text without comments, docstrings and layout: the tests do not influence votes."""
        return [a and normal_program(a) for a in answers]

    def in_format(self, format: str) -> Task:
        task = copy.copy(self)
        task._few_shot = format == "few_shot"
        return task

    def shown(self) -> list[Problem]:
        return self.examples() if self._few_shot else []

    def prefix(self, hint: bool = False) -> str:
        self.refuse_hint(hint)
        return super().prefix()

    def refuse_hint(self, hint: bool) -> None:
        """Raises UserError where a hinted prompt is asked for."""
        if hint:
            raise UserError(f"{self.name}: a program has no short answer to hint at; set rationalize=False")


def _code_field(record: dict, name: str) -> str:
    return text_field(record, name).replace("\r\n", "\n")


# ------------------------------------------------------------------------------------------------------------- MBPP

_MBPP = "google-research-datasets/mbpp:full"
_RANGES = {"few_shot": range(1, 11), "test": range(11, 511), "val": range(511, 601), "train": range(601, 975)}


@dataclass(kw_only=True, eq=False)
class MBPP(CodeTask):
    """MBPP (Austin et al., 2108.07732): 974 tasks, by number: 1-10 few-shot, 11-510 test, 511-600 val, 601-974 train.

    Prompt and test assertions are those of the paper (and of V-STaR). `data` may have the full or the sanitized layout.

    Options:
        shots: numbers of the few-shot tasks in front of prompts, by default those of the paper; () is zero-shot.
    """

    shots: Sequence[int] = (2, 3, 4)

    name = "mbpp"
    fields = ("task_id", "code", "test_list")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shots = tuple(self.shots)
        self._few_shot = bool(self.shots)
        for shot in self.shots:
            if shot not in _RANGES["few_shot"]:
                raise UserError(f"mbpp: shots={self.shots}: {shot!r} is not a few-shot task, which are 1 to 10")

    def problems(self, split: str) -> list[Problem]:
        check_split(split)
        return self.every(split)

    def every(self, part: str) -> list[Problem]:
        """The tasks of "train", "val", "test" or "few_shot", by number."""
        return [p for _, p in sorted(self._by_number().items()) if p.meta["number"] in _RANGES[part]]

    def _by_number(self) -> dict[int, Problem]:
        if self._problems is None:
            splits = ("prompt", "test", "validation", "train")
            sources = [(_MBPP, s) for s in splits] if self.data is None else [(self.data, "all")]
            self._problems = [p for source in sources for p in self.read(*source)]
        tasks = {p.meta["number"]: p for p in self._problems}
        if len(tasks) < len(self._problems):
            raise UserError(f"{self.data or _MBPP}: a task_id stands there twice; each task has its own")
        return tasks

    def to_problem(self, record: dict) -> Problem:
        name = "text" if record.get("text") is not None or "prompt" not in record else "prompt"  # the sanitized layout
        if record.get(name) is None:
            raise ValueError("has neither field 'text' nor, as in the sanitized layout, 'prompt'")
        text, code = _code_field(record, name), _code_field(record, "code").strip("\n")
        number, tests, imports = record["task_id"], record["test_list"], record.get("test_imports") or []
        if type(number) is not int or not 1 <= number <= 974:
            raise ValueError(f"field 'task_id' is {number!r}, not a whole number from 1 to 974")
        if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
            raise ValueError("field 'test_list' is not a list of assertions")
        if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
            raise ValueError("field 'test_imports' is not a list of import statements")
        sandbox.needed_names("\n".join(tests))  # refuses tests that do not parse or assert nothing
        setup = "\n".join([*imports, *filter(None, [record.get("test_setup_code")])]).replace("\r\n", "\n")
        meta = {"number": number, "tests": list(tests), "setup": setup}
        return Problem(id=f"mbpp-{number}", question=text, gold=code, solution=code, group=self.name, meta=meta)

    def shown(self) -> list[Problem]:
        # Zero-shot prompts must work with files that lack the few-shot tasks.
        if not self._few_shot or not self.shots:
            return super().shown()
        tasks = self._by_number()
        if missing := [shot for shot in self.shots if shot not in tasks]:
            raise UserError(f"mbpp: shots={self.shots}: {self.data or _MBPP} has no task {missing[0]}")
        return [tasks[shot] for shot in self.shots]

    def drop_example(self) -> bool:
        return not self.shots and super().drop_example()

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        self.refuse_hint(hint)
        return TEMPLATE.format(task=problem.question, tests="\n".join(problem.meta["tests"]))

    def job(self, problem: Problem, program: str) -> sandbox.Job:
        return sandbox.Job(program, "\n".join([problem.meta["setup"], *problem.meta["tests"]]))


# -------------------------------------------------------------------------------------------------------- HumanEval

_HUMANEVAL = "openai/openai_humaneval"
_PROGRAM_STARTS = ("def ", "from ", "import ", "class ", "@", "[BEGIN]")


@dataclass(kw_only=True, eq=False)
class HumanEval(CodeTask):
    """HumanEval (Chen et al., 2107.03374): complete a Python function from its head and docstring. 164 test problems.

    Options:
        template: "mbpp" is the frame of MBPP's prompt, as in V-STaR, whose models are trained on MBPP; the function's
            head and docstring replace MBPP's sentence, and the model writes the whole function. "completion" is the
            head and docstring alone, as in the data set's paper, and the model writes the body.
    """

    template: str = bounded("mbpp", choices=("mbpp", "completion"))

    name = "humaneval"
    fields = ("task_id", "prompt", "canonical_solution", "test", "entry_point")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template == "completion":
            # The stop strings of the paper (class, def, #, if, print at the margin), and decorators and fences.
            self.stop = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
            self.example_end = "\n"

    def problems(self, split: str) -> list[Problem]:
        check_split(split, has=("test",), name=self.name)
        if self._problems is None:
            self._problems = self.read(_HUMANEVAL if self.data is None else self.data, "test")
        return self._problems

    def to_problem(self, record: dict) -> Problem:
        prompt, body, test, entry = (_code_field(record, name) for name in self.fields[1:])
        try:
            tree = ast.parse(prompt)
        except SyntaxError as error:
            raise ValueError(f"field 'prompt' is not Python ({error})") from None
        # The tests define the helpers again, so that a program cannot replace what they call.
        helpers = [node for node in tree.body if getattr(node, "name", None) != entry]
        if len(helpers) == len(tree.body):
            raise ValueError(f"field 'prompt' does not define {entry!r}, the entry_point")
        tests = f"{ast.unparse(ast.Module(helpers, []))}\n{test}\ncheck({entry})\n"
        sandbox.needed_names(tests)  # refuses tests that do not parse or assert nothing
        return Problem(
            id=str(record["task_id"]),
            question=prompt,
            gold=(prompt + body).rstrip(),
            solution=(prompt + body).strip("\n") if self.template == "mbpp" else body,
            group=self.name,
            meta={"tests": tests},
        )

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        self.refuse_hint(hint)
        if self.template == "completion":
            return problem.question
        return (
            "You are an expert Python programmer, and here is your task: Complete this function.\n\n"
            f"{problem.question.strip()}\n[BEGIN]\n"
        )

    def cut(self, completion: str) -> str:
        return super().cut(completion) if self.template == "mbpp" or _continues(completion) else completion

    def parse(self, completion: str) -> str | None:
        if self.template == "mbpp":
            return super().parse(completion)
        if not _continues(completion):
            program = program_in(completion)
            return program and as_body(program)
        lines = as_body(self.cut(completion).replace("\r\n", "\n").rstrip()).split("\n")
        full_text = "\n".join(lines)
        # An explanation may follow the body.
        while len(lines) > 1 and not is_body("\n".join(lines)):
            lines.pop()
        return ("\n".join(lines).rstrip() if is_body("\n".join(lines)) else full_text) or None

    def job(self, problem: Problem, program: str) -> sandbox.Job:
        # The head alone is a function that returns None, so a whole program may follow it and define it again.
        joint = "\n" if self.template == "mbpp" else ""
        return sandbox.Job(problem.question + joint + program + "\n", problem.meta["tests"])


def _continues(completion: str) -> bool:
    # An instruction-tuned model answers a bare head with a message, which has to be read like any other.
    text = completion.replace("\r\n", "\n")
    if without_thinking(text) != text or text.lstrip("\n").startswith(_PROGRAM_STARTS):
        return False
    fenced = blocks(text)
    before = "\n".join(text.split("\n")[: fenced[0].start]) if fenced else ""
    return not fenced or (bool(before.strip()) and is_body(as_body(before.rstrip())))
