"""HumanEval (Chen et al., 2107.03374): complete a Python function from its signature and docstring. A test set only."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from qstar.data.sources import read_records
from qstar.errors import UserError
from qstar.tasks.answers import without_thinking
from qstar.tasks.base import Problem
from qstar.tasks.code import END, CodeTask, check_has, check_tests, text_fields
from qstar.tasks.programs import as_body, blocks, is_body, program_in
from qstar.tasks.verify import Job

SOURCE = "openai/openai_humaneval"
_TEMPLATES = ("mbpp", "completion")


class HumanEval(CodeTask):
    """164 functions. `template` chooses what the model sees.

    "mbpp": the frame of MBPP's prompt, as in V-STaR, whose models are trained on MBPP; the function's head and
    docstring stand where MBPP has its sentence, and the model writes the whole function. "completion": the head and
    docstring alone, as in the data set's paper, and the model goes on with the body.
    Helper functions that a prompt brings along are the tests' own when they judge: a program cannot redefine them.
    """

    name = "humaneval"
    fields = ("task_id", "prompt", "canonical_solution", "test", "entry_point")

    def __init__(
        self,
        *,
        data: str | None = None,
        template: str = "mbpp",
        timeout_s: float = 10.0,
        memory_mb: int = 512,
        allow: Sequence[str] = (),
    ):
        """`data` is a file, the hub's data set when None; the others as in MBPP.

        Raises:
            UserError: unknown template, or limits that are not positive.
        """
        super().__init__(timeout_s=timeout_s, memory_mb=memory_mb, allow=allow)
        if template not in _TEMPLATES:
            raise UserError(f"humaneval: template={template!r} is not one of {', '.join(_TEMPLATES)}")
        self.template = template
        self.stop = (END,) if template == "mbpp" else ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
        self._data = data
        self._problems: list[Problem] | None = None

    def problems(self, split: str) -> list[Problem]:
        check_has(self.name, split, ("test",))
        if self._problems is None:
            self._problems = read_records(
                self._data or SOURCE, self.fields, split="test", parse=self.to_problem, bad_rows=self.bad_rows
            )
        return self._problems

    def to_problem(self, record: dict) -> Problem:
        """One record as a problem; a ValueError says what is wrong with it."""
        prompt, body, test, entry = text_fields(record, "prompt", "canonical_solution", "test", "entry_point")
        try:
            tree = ast.parse(prompt)
        except SyntaxError as error:
            raise ValueError(f"field 'prompt' is not Python ({error})") from None
        helpers = [node for node in tree.body if getattr(node, "name", None) != entry]
        if len(helpers) == len(tree.body):
            raise ValueError(f"field 'prompt' does not define {entry!r}, the entry_point")
        tests = check_tests(f"{ast.unparse(ast.Module(helpers, []))}\n{test}\ncheck({entry})\n")
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
        return super().cut(completion) if self.template == "mbpp" or self._continues(completion) else completion

    def parse(self, completion: str) -> str | None:
        if self.template == "mbpp":
            return super().parse(completion)
        if not self._continues(completion):
            program = program_in(completion)
            return program and as_body(program)
        lines = as_body(self.cut(completion).replace("\r\n", "\n").rstrip()).split("\n")
        full_text = "\n".join(lines)
        while len(lines) > 1 and not is_body("\n".join(lines)):  # an explanation behind the body
            lines.pop()
        return ("\n".join(lines).rstrip() if is_body("\n".join(lines)) else full_text) or None

    def _continues(self, completion: str) -> bool:
        """Whether a completion goes on with the body of the function, not with a message that holds the program."""
        text = completion.replace("\r\n", "\n")
        if without_thinking(text) != text or text.lstrip("\n").startswith(
            ("def ", "from ", "import ", "class ", "@", "[BEGIN]")
        ):
            return False
        fenced = blocks(text)
        before = "\n".join(text.split("\n")[: fenced[0].start]) if fenced else ""
        return not fenced or (bool(before.strip()) and is_body(as_body(before.rstrip())))

    def job(self, problem: Problem, program: str) -> Job:
        joint = "\n" if self.template == "mbpp" else ""  # the head alone is a function that returns None
        return Job(problem.question + joint + program + "\n", problem.meta["tests"])
