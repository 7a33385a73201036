"""MBPP (Austin et al., 2108.07732): short Python functions asked for in one sentence and three assertions."""

from __future__ import annotations

from collections.abc import Sequence

from qstar.data.sources import read_records
from qstar.errors import UserError
from qstar.tasks.base import Problem, check_split
from qstar.tasks.code import END, TEMPLATE, CodeTask, check_tests, text_fields
from qstar.tasks.verify import Job

SOURCE = "google-research-datasets/mbpp:full"
_HUB_SPLITS = ("prompt", "test", "validation", "train")
_RANGES = {"few_shot": range(1, 11), "test": range(11, 511), "val": range(511, 601), "train": range(601, 975)}


class MBPP(CodeTask):
    """974 tasks, split by number as published: 1-10 few-shot, 11-510 test, 511-600 validation, 601-974 train.

    The prompt is that of the paper: the sentence, its assertions, "[BEGIN]"; the completion is the code, and ends
    before "[DONE]". The same three assertions judge it (the paper's and V-STaR's protocol: the model has seen them).
    """

    name = "mbpp"
    fields = ("task_id", "code", "test_list")

    def __init__(
        self,
        *,
        data: str | None = None,
        shots: Sequence[int] = (2, 3, 4),
        timeout_s: float = 10.0,
        memory_mb: int = 512,
        allow: Sequence[str] = (),
    ):
        """Reads nothing yet.

        Args:
            data: file with all tasks, in the full or the sanitized layout; the hub's full data set when None.
            shots: numbers of the few-shot tasks in front of prompts, those of the paper; () is zero-shot.
            timeout_s: wall time that a program and its tests may take.
            memory_mb: address space of a program, in MiB.
            allow: installed packages that programs may import, e.g. ("numpy",); see `verify.Verifier`.

        Raises:
            UserError: a shot that is none of the few-shot tasks, or limits that are not positive.
        """
        super().__init__(timeout_s=timeout_s, memory_mb=memory_mb, allow=allow)
        for shot in shots:
            if shot not in _RANGES["few_shot"]:
                raise UserError(f"mbpp: shots={tuple(shots)}: {shot!r} is not a few-shot task, which are 1 to 10")
        self.shots = tuple(shots)
        self._data = data
        self._tasks: dict[int, Problem] | None = None

    def problems(self, split: str) -> list[Problem]:
        check_split(split)
        return self.every(split)

    def every(self, part: str) -> list[Problem]:
        """The tasks of "train", "val", "test" or "few_shot", by number."""
        tasks = self._read()
        return [tasks[number] for number in _RANGES[part] if number in tasks]

    def to_problem(self, record: dict) -> Problem:
        """One record as a problem; a ValueError says what is wrong with it."""
        name = "text" if record.get("text") is not None or "prompt" not in record else "prompt"  # the sanitized layout
        if record.get(name) is None:
            raise ValueError("has neither field 'text' nor, as in the sanitized layout, 'prompt'")
        text, code = text_fields(record, name, "code")
        number, tests = record["task_id"], record["test_list"]
        if type(number) is not int or not 1 <= number <= 974:
            raise ValueError(f"field 'task_id' is {number!r}, not a whole number from 1 to 974")
        if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
            raise ValueError("field 'test_list' is not a list of assertions")
        imports = record.get("test_imports") or []
        if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
            raise ValueError("field 'test_imports' is not a list of import statements")
        setup = "\n".join([*imports, *filter(None, [record.get("test_setup_code")])])
        check_tests("\n".join(tests))
        return Problem(
            id=f"mbpp-{number}",
            question=text,
            gold=code.strip("\n"),
            solution=code.strip("\n"),
            group=self.name,
            meta={"number": number, "tests": list(tests), "setup": setup.replace("\r\n", "\n")},
        )

    def prefix(self, hint: bool = False) -> str:
        self.refuse_hint(hint)
        tasks = self._read() if self.shots else {}
        if missing := [shot for shot in self.shots if shot not in tasks]:
            raise UserError(f"mbpp: shots={self.shots}: {self._data or SOURCE} has no task {missing[0]}")
        return "".join(f"{self.prompt(tasks[shot])}{tasks[shot].solution}{END}\n\n" for shot in self.shots)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        self.refuse_hint(hint)
        return TEMPLATE.format(task=problem.question, tests="\n".join(problem.meta["tests"]))

    def job(self, problem: Problem, program: str) -> Job:
        return Job(program, "\n".join([problem.meta["setup"], *problem.meta["tests"]]))

    def _read(self) -> dict[int, Problem]:
        if self._tasks is None:
            parts = [(self._data, None)] if self._data else [(SOURCE, split) for split in _HUB_SPLITS]
            how = dict(parse=self.to_problem, bad_rows=self.bad_rows)
            found = [p for s, split in parts for p in read_records(s, self.fields, split=split, **how)]
            self._tasks = {p.meta["number"]: p for p in found}
            if len(self._tasks) < len(found):
                raise UserError(f"{self._data or SOURCE}: a task_id stands there twice; each task has its own")
        return self._tasks
