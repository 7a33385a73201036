"""Base classes of tasks: problems, prompts, and how answers are parsed and compared.

Everything a method needs to know about a data set is behind `Task`; a method never looks inside a problem.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from etils import epath

from qstar.data.sources import BAD_ROWS, read_records
from qstar.errors import UserError

SPLITS = ("train", "val", "test")
BUILT_IN = "built-in"  # the value of `prompts` that stands for the examples in the folder `examples`
VAL_BUCKETS = 20  # one question in twenty of train is validation


@dataclass(frozen=True)
class Problem:
    """One question with its known answer.

    Attributes:
        id: unique within the task and the same in every run.
        question: the bare question.
        gold: the answer, in the form that `Task.parse` returns.
        solution: a gold rationale where the data has one.
        group: what accuracies are broken down by ("3" digits, "gsm8k").
        meta: whatever else the task needs to write its prompt.
    """

    id: str
    question: str
    gold: str
    solution: str | None = None
    group: str = ""
    meta: dict[str, Any] = field(default_factory=dict, compare=False)


class ZeroShot(NamedTuple):
    """A question and its bare answer, without few-shot text: what zero-shot evaluations of Quiet-STaR score."""

    prompt: str
    answer: str  # follows the prompt
    symbols: tuple[str, ...]  # tokens of the answer that count, without their leading spaces; they rival each other


class Task:
    """Base class; picklable, and free of jax so that worker processes can judge answers.

    A completion is the text a model writes after `prefix(hint) + prompt(problem, hint)`, without its EOS.
    `parse`, `audit` and `leak` accept it raw or already `cut`.
    """

    name: str = ""
    stop: tuple[str, ...] = ()  # strings that end a completion
    bad_rows: float = BAD_ROWS  # share of its records that may be left out; an option of every task that reads some

    def problems(self, split: str) -> list[Problem]:
        """The problems of "train", "val" or "test", in a fixed order; few-shot items are in none."""
        raise NotImplementedError

    def pool(self, iteration: int, seed: int, count: int | None = None) -> list[Problem]:
        """The problems of one outer loop: train shuffled by (seed, iteration), the first `count`."""
        problems = list(self.problems("train"))
        stable_rng(self.name, "pool", seed, iteration).shuffle(problems)
        return problems[:count]

    def prefix(self, hint: bool = False) -> str:
        """Few-shot text in front of every prompt, "" if there is none; with hints in it when `hint`."""
        return ""

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        """The text that follows the prefix; with the answer as a hint when `hint` (rationalisation)."""
        raise NotImplementedError

    def solution(self, problem: Problem) -> str | None:
        """A gold completion in the model's format, or None where the data has no rationale."""
        return problem.solution

    def cut(self, completion: str) -> str:
        """The completion up to the end of its answer: what is kept for training."""
        ends = [at for at in map(completion.find, self.stop) if at >= 0]
        return completion[: min(ends, default=len(completion))]

    def answered_part(self, completion: str) -> str | None:
        """Of a completion that ran into the token limit: the part up to the end of its answer, or None if that is not
        reached. A model that goes on writing behind a whole answer has answered."""
        text = self.cut(completion)
        return text if len(text.rstrip()) < len(completion.rstrip()) else None

    def parse(self, completion: str) -> str | None:
        """The answer as normalised text (equal answers are equal strings), or None if there is none."""
        raise NotImplementedError

    def correct(self, problem: Problem, answer: str | None) -> bool:
        """Whether a parsed answer is right; None never is."""
        return answer is not None and answer == problem.gold

    def judged(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool]:
        """`correct` of many at once, in order; tasks whose answers are costly to judge share the work out."""
        return [self.correct(p, a) for p, a in zip(problems, answers, strict=True)]

    def ballots(self, answers: Sequence[str | None]) -> list[str | None]:
        """What each answer to one problem votes for: equal answers are equal strings, found without the right answer."""
        return list(answers)

    def leak(self, problem: Problem, completion: str) -> str | None:
        """Why a rationalised completion betrays that it was given the answer, or None."""
        return leak_marker(completion, problem.question)

    def zero_shot(self, problem: Problem) -> ZeroShot | None:
        """The problem as one short text, or None where that makes no sense."""
        return None

    def step_by_step(self, problem: Problem) -> tuple[str, str] | None:
        """A zero-shot prompt that asks for reasoning, and the words that then ask for the answer; None: has none."""
        return None

    def parse_closing(self, completion: str) -> str | None:
        """The answer in what follows the second half of `step_by_step`, as `parse` would return it."""
        return self.parse(completion)

    def audit(self, problem: Problem, completion: str) -> bool | None:
        """Whether every step is right, not only the answer; None where the task cannot tell."""
        return None

    def steps(self, completion: str) -> list[int]:
        """Where the steps of a completion end, as character offsets; the last is its length. Here: its lines with text."""
        ends = [line.end() for line in re.finditer(r"[^\n]*\S.*\n", completion)]
        return [e for e in ends if completion[e:].strip()] + [len(completion)]

    def step_labels(self, problem: Problem, completion: str) -> list[bool] | None:
        """Per step, whether all is right up to its end; None where the task cannot tell."""
        return None

    def fault(self, problem: Problem, completion: str) -> str | None:
        """What kind of mistake a wrong completion makes first, in two words; None where the task cannot tell."""
        return None

    def seeds(self) -> list[tuple[Problem, bool]]:
        """(problem, hinted) rows that a from-scratch base is trained on; most tasks have none."""
        return []


class DatasetTask(Task):
    """A task whose problems are the records of a train and a test source, with few-shot text from files.

    Subclasses set `fields`, `default_source`, `test_split` and `prompt_files`, and write `to_problem`.
    """

    fields: tuple[str, ...] = ()
    default_source: str = ""  # hub name; several with spaces between them are read one after the other
    default_test: str = ""  # the same for the test records, where they have a source of their own
    test_split: str = "test"  # the hub's split with labels that nothing is trained on
    prompt_files: tuple[str, str] = ("", "")  # without and with hints, in the folder `prompts`

    def __init__(self, *, train: str | None = None, test: str | None = None, prompts: str | None = None):
        """Reads the prompts; the records are read when they are first asked for.

        Args:
            train: file or hub name of the training records; the hub's own data set when None.
            test: the same for the test records.
            prompts: folder with the few-shot files; "built-in" is the worked examples that come with qstar, in
                the form that `parse` reads; None is zero-shot.
        """
        self._sources = {
            "train": (train or self.default_source, "train"),
            "test": (test or self.default_test or self.default_source, self.test_split),
        }
        self._built_in = prompts == BUILT_IN
        files = self.prompt_files if prompts and not self._built_in else ()
        self._prefix, self._hinted_prefix = [_read_prompts(prompts, name) for name in files] or ["", ""]
        self._examples: list[Problem] | None = None
        self._shots = {_key(question) for question in re.findall(r"^Q: (.*)$", self._prefix, re.MULTILINE)}
        self._records: dict[str, list[Problem]] = {}

    def to_problem(self, record: dict) -> Problem:
        """One record as a problem; a ValueError says what is wrong with the record."""
        raise NotImplementedError

    def problems(self, split: str) -> list[Problem]:
        check_split(split)
        records = self._read("test" if split == "test" else "train")
        shots = self._shots | {_key(example.question) for example in self.examples()}
        records = [problem for problem in records if _key(problem.question) not in shots]
        if split == "test":
            return records
        return [p for p in records if (bucket(p.question, VAL_BUCKETS) == 0) == (split == "val")]

    def prefix(self, hint: bool = False) -> str:
        if self._built_in:
            return "".join(f"{self.prompt(e, hint)}{self.solution(e)}\n\n" for e in self.examples())
        return self._hinted_prefix if hint else self._prefix

    def examples(self) -> list[Problem]:
        """The built-in worked examples, where `prompts` asks for them."""
        if self._examples is None:
            file = pathlib.Path(__file__).with_name("examples") / f"{self.name}.jsonl"
            self._examples = read_records(file, self.fields, parse=self.to_problem) if self._built_in else []
        return self._examples

    def keep_examples(self, count: int) -> None:
        """Uses the first `count` built-in examples only."""
        self._examples = self.examples()[:count]

    def _read(self, part: str) -> list[Problem]:
        if part not in self._records:
            source, hub_split = self._sources[part]
            sources = source.split() if source in (self.default_source, self.default_test) else [source]
            how = dict(split=hub_split, parse=self.to_problem, bad_rows=self.bad_rows)
            problems = [p for each in sources for p in read_records(each, self.fields, **how)]
            self._records[part] = [
                p if p.id else dataclasses.replace(p, id=f"{self.name}-{part}-{number:05d}")
                for number, p in enumerate(problems)
            ]
        return self._records[part]


def stable_rng(*parts: Any) -> random.Random:
    """A generator that depends on `parts` alone: the same in every process, run and Python version."""
    return random.Random("/".join(map(str, parts)))


def bucket(text: str, count: int) -> int:
    """Which of `count` equally likely buckets a text falls into; never changes (crc32)."""
    return zlib.crc32(text.encode()) % count


def check_split(split: str) -> None:
    """Raises UserError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")


_MARKERS = re.compile(r"\(correct\)|\b(?:hints?|given answer|as stated)\b", re.IGNORECASE)


def leak_marker(completion: str, question: str = "") -> str | None:
    """The words by which a completion shows that it saw a hint, or None.

    Looked for, in any case and as whole words: "(CORRECT)", "hint", "given answer", "as stated". A word that
    the question itself uses proves nothing (a quiz with three hints) and is passed over.
    """
    own = {match.lower() for match in _MARKERS.findall(question)}
    found = [match for match in _MARKERS.findall(completion) if match.lower() not in own]
    return f"hint marker {found[0]!r}" if found else None


def _read_prompts(folder: str, name: str) -> str:
    """A few-shot file as it is, closed by one empty line."""
    path = epath.Path(os.fspath(folder)).expanduser() / name
    if not path.is_file():
        raise UserError(f"{path}: no such few-shot file; `prompts` names a folder that holds it, or is None")
    try:
        return path.read_text(encoding="utf-8").rstrip("\n") + "\n\n"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _key(question: str) -> str:
    """A question as it is compared with the few-shot questions: white space does not count."""
    return " ".join(question.split())
