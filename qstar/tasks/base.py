"""The protocol of tasks, `Task`, and the base classes of data sets. A method never looks inside a problem.

A class of one's own, named as "file.py:Class" or "package.module:Class", needs two methods (`Task` gives the others):

    problems(split) -> list[Problem]       or, in a subclass of `DatasetTask`, to_problem(record) -> Problem
    parse(completion) -> str | None        the answer as normalised text; `answer_parsing` has parsers

Most also define `prompt(problem, hint)` ("Q: ...", "A:" by default), `instruction` (for chat models), `stop` and, where equal
answers are not equal texts, `correct(problem, answer)`. Options are arguments of the constructor: fields of a dataclass.
A data set whose answers are numbers, choices or words needs no class: see `generic`.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
import pathlib
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from etils import epath

from qstar.data.sources import BAD_ROWS, read_records
from qstar.errors import Settings, UserError, bounded, require
from qstar.files import warn

SPLITS = ("train", "val", "test")
BUILT_IN = "built-in"  # value of `prompts`: the worked examples in the folder `examples`
VAL_BUCKETS = 20  # one train question in twenty is validation


@dataclass(frozen=True)
class Problem:
    """One question with its known answer."""

    id: str  # unique within the task and the same in every run
    question: str  # bare
    gold: str  # in the form that `Task.parse` returns
    solution: str | None = None  # a gold rationale where the data has one
    group: str = ""  # the key by which accuracies are broken down ("3" digits, "gsm8k")
    # A dict has no hash; compared, it would make problems unusable as keys.
    meta: dict[str, Any] = field(default_factory=dict, compare=False)


# What stands around the question in a text that a base model goes on with.
_CUES = re.compile(
    r"^(?:Q|Question|Problem):\s*|\n(?:A|Answer|Solution):\s*\Z| (?:Reasoning|Answer):\Z|\n\[BEGIN\]\s*\Z", re.MULTILINE
)


class ZeroShot(NamedTuple):
    """A question and its bare answer, without few-shot text: what zero-shot evaluations of Quiet-STaR score."""

    prompt: str
    answer: str  # follows the prompt
    symbols: tuple[str, ...]  # competing tokens of the answer that count, without their leading spaces


class Task:
    """Base class; picklable, and free of jax so that worker processes can judge answers.

    A completion is the text a model writes after `prefix(hint) + prompt(problem, hint)`, without its EOS.
    `parse`, `audit` and `leak` accept it raw or already `cut`.
    """

    name: str = ""
    stop: tuple[str, ...] = ()  # strings that end a completion
    instruction: str = ""  # asks a chat model for the form that `parse` reads; `tasks.prompts` puts it into messages
    opening: str = ""  # what all prompts begin with: the head of a chat template
    opens_thinking: bool = False  # whether prompts end in an open <think> block

    def problems(self, split: str) -> list[Problem]:
        """The problems of "train", "val" or "test", in a fixed order, without few-shot items."""
        raise NotImplementedError

    def pool(self, iteration: int, seed: int, count: int | None = None) -> list[Problem]:
        """The problems of one outer loop: train shuffled by (seed, iteration), the first `count`."""
        # Seeded by the iteration, not by a state: a resumed run draws the same problems.
        problems = list(self.problems("train"))
        stable_rng(self.name, "pool", seed, iteration).shuffle(problems)
        return problems[:count]

    def prefix(self, hint: bool = False) -> str:
        """Few-shot text in front of every prompt, "" if there is none; with hints in it when `hint`."""
        return ""

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        """The text that follows the prefix; with the answer as a hint when `hint` (rationalisation)."""
        return f"Q: {problem.question}{f' ({problem.gold})' if hint else ''}\nA:"

    def behind(self, prefix: str, prompt: str) -> str:
        """A prompt with the few-shot text `prefix`, or "", in front of it."""
        return prefix + prompt.removeprefix(self.opening) if prefix else prompt

    def message(self, problem: Problem, hint: bool = False) -> str:
        """The problem as a message to a chat model: the prompt without the cues of a text to go on with ("Q:", "A:")."""
        return _CUES.sub("", self.prompt(problem, hint)).strip()

    def examples(self) -> list[Problem]:
        """Worked examples, with a solution each, that come with the task; [] if there are none."""
        return []

    def in_format(self, format: str) -> Task:
        """The task with worked examples in `prefix` ("few_shot") or without ("plain")."""
        return self

    def drop_example(self) -> bool:
        """Leaves out the last worked example of `prefix`, where the context is short; False if there is none."""
        return False

    def solution(self, problem: Problem) -> str | None:
        """A gold completion in the model's format, or None where the data has no rationale."""
        return problem.solution

    def cut(self, completion: str) -> str:
        """The completion up to the end of its answer: the part that is kept for training."""
        ends = [at for at in map(completion.find, self.stop) if at >= 0]
        return completion[: min(ends, default=len(completion))]

    def answered_part(self, completion: str) -> str | None:
        """The part up to the end of the answer, for a completion at the token limit; None if it has no answer yet."""
        text = self.cut(completion)
        return text if len(text.rstrip()) < len(completion.rstrip()) else None

    def parse(self, completion: str) -> str | None:
        """The answer as normalised text (equal answers are equal strings), or None if there is none."""
        raise NotImplementedError

    def correct(self, problem: Problem, answer: str | None) -> bool:
        """Whether a parsed answer is right; None never is."""
        return answer is not None and answer == problem.gold

    def judged(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool]:
        """`correct` of many at once, in order; tasks whose answers are costly to judge use several workers."""
        return [self.correct(p, a) for p, a in zip(problems, answers, strict=True)]

    def ballots(self, answers: Sequence[str | None]) -> list[str | None]:
        """The vote of each answer to one problem: equal answers become equal strings, without the gold answer."""
        return list(answers)

    def leak(self, problem: Problem, completion: str) -> str | None:
        """How a rationalised completion betrays that the model was given the answer, or None."""
        return leak_marker(completion, problem.question)

    def zero_shot(self, problem: Problem) -> ZeroShot | None:
        """The problem as one short text, or None if the task has no such form."""
        return None

    def step_by_step(self, problem: Problem) -> tuple[str, str] | None:
        """A zero-shot prompt that asks for reasoning, and the words that then ask for the answer; None: has none."""
        return None

    def parse_closing(self, completion: str) -> str | None:
        """The answer in the text after the second half of `step_by_step`, as `parse` would return it."""
        return self.parse(completion)

    def audit(self, problem: Problem, completion: str) -> bool | None:
        """Whether every step is right, not only the answer; None where the task cannot check steps."""
        return None

    def steps(self, completion: str) -> list[int]:
        """Ends of the steps of a completion as character offsets; the last is its length. Here: its lines with text."""
        ends = [line.end() for line in re.finditer(r"[^\n]*\S.*\n", completion)]
        return [e for e in ends if completion[e:].strip()] + [len(completion)]

    def step_labels(self, problem: Problem, completion: str) -> list[bool] | None:
        """Per step, whether everything is right up to its end; None where the task cannot check steps."""
        return None

    def fault(self, problem: Problem, completion: str) -> str | None:
        """The kind of a wrong completion's first mistake, in two words; None where the task cannot check steps."""
        return None

    def seeds(self) -> list[tuple[Problem, bool]]:
        """(problem, hinted) rows for training a base model from scratch; most tasks have none."""
        return []


@dataclass(kw_only=True, eq=False)
class RecordTask(Task, Settings):
    """A task whose problems are records of files or the hub; its options are dataclass fields, checked by `Settings`.

    Options:
        bad_rows: share of unusable records that may be left out.
    """

    bad_rows: float = bounded(BAD_ROWS, ge=0, lt=1, note="a share of the records")

    fields: ClassVar[tuple[str, ...]] = ()  # keys that every record must have
    example_end = ""  # behind the solution of a worked example
    _examples = None  # not read yet

    def __init_subclass__(cls) -> None:
        # `Settings` puts it in front of its errors, which then name the task.
        cls.WHERE = f"{cls.name}: "
        # `prompts = None` in a subclass is another default of that option, though it has no annotation.
        own, options = inspect.get_annotations(cls), {f.name: f.type for f in dataclasses.fields(cls)}
        if changed := {name: options[name] for name in options.keys() & vars(cls).keys() - own.keys()}:
            cls.__annotations__ = changed | own
            if not own:  # a class with options of its own has the decorator
                dataclass(kw_only=True, eq=False)(cls)

    def to_problem(self, record: dict) -> Problem:
        """One record as a problem; a ValueError says what is wrong with the record."""
        raise NotImplementedError

    def read(self, source: str, split: str | None = None) -> list[Problem]:
        return read_records(source, self.fields, split=split, parse=self._problem, bad_rows=self.bad_rows)

    def _problem(self, record: dict) -> Problem:
        problem = self.to_problem(record)
        if not isinstance(problem, Problem):
            advice = "for a record of no use it raises a ValueError"
            raise ValueError(f"to_problem returned {problem!r:.60}, not a Problem; {advice}")
        return problem

    def examples(self) -> list[Problem]:
        if self._examples is None:
            self._examples = self._shipped(self.name)
        return self._examples

    def shown(self) -> list[Problem]:
        """The worked examples in `prefix`."""
        return []

    def prefix(self, hint: bool = False) -> str:
        return "".join(f"{self.prompt(e, hint)}{self.solution(e)}{self.example_end}\n\n" for e in self.shown())

    def drop_example(self) -> bool:
        if not self.shown():
            return False
        self._examples = self.examples()[:-1]
        return True

    def _shipped(self, name: str) -> list[Problem]:
        path = pathlib.Path(__file__).with_name("examples") / f"{name}.jsonl"
        return read_records(path, self.fields, parse=self.to_problem) if path.is_file() else []


@dataclass(kw_only=True, eq=False)
class DatasetTask(RecordTask):
    """A task with a train and a test source, and few-shot text from files or of its own.

    Subclasses are dataclasses too: they set the class attributes, add their options as fields and write `to_problem`,
    `prompt` and `parse`. Records are read at first use.

    Options:
        train: file, folder or hub name of the training records (see `read_records`); the hub's data set when None.
        test: the same for the test records.
        prompts: folder with the few-shot files; "built-in" is the worked examples that come with qstar, in the form
            that `parse` reads; None is zero-shot.
        train_split, test_split: splits of a source that has several, or parts: "train[:700]", of one file "[:80%]".
    """

    train: str | None = None
    test: str | None = None
    prompts: str | None = None
    train_split: str = "train"
    test_split: str = "test"

    default_source: ClassVar[str] = ""  # hub name; several, separated by spaces, are read one after the other
    default_test: ClassVar[str] = ""  # the same for the test records, where they have their own source

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.prompts not in (None, BUILT_IN)
        files = self.few_shot_files() if own else ()
        known = f"neither {BUILT_IN!r} nor None; it has no few-shot files"
        require((not own or bool(files), f"{self.name}: prompts={self.prompts!r} is {known}"))
        self._prefix, self._hinted_prefix = [_read_prompts(str(self.prompts), name) for name in files] or ["", ""]
        self._problems: dict[str, list[Problem]] = {}

    def few_shot_files(self) -> tuple[str, ...]:
        """Returns the names of two files in the folder `prompts`, without and with hints, or () if there are none."""
        return ()

    def problems(self, split: str) -> list[Problem]:
        check_split(split)
        # A few-shot question is never a problem, whichever split it comes from: the shots of STaR's release are rows of
        # the training files, and a prompt that holds the question holds its answer.
        shots = {_key(question) for question in re.findall(r"^Q: (.*)$", self._prefix, re.MULTILINE)}
        shots |= {_key(example.question) for example in self.shown()}
        problems = self._read("test" if split == "test" else "train")
        problems = [problem for problem in problems if _key(problem.question) not in shots]
        if split == "test":
            return problems
        # By a hash of the question: another order or further rows leave the rest of the split unchanged.
        return [p for p in problems if (bucket(p.question, VAL_BUCKETS) == 0) == (split == "val")]

    def shown(self) -> list[Problem]:
        return self.examples() if self.prompts == BUILT_IN else []

    def prefix(self, hint: bool = False) -> str:
        return (self._hinted_prefix if hint else self._prefix) or super().prefix(hint)

    def in_format(self, format: str) -> Task:
        given = self.prompts or BUILT_IN
        if format == "few_shot" and given == BUILT_IN and not self.examples():
            raise UserError(f"{self.name}: has no worked examples; give a folder of few-shot files as `prompts`")
        prompts = given if format == "few_shot" else None
        if prompts == self.prompts:
            return self
        task = dataclasses.replace(self, prompts=prompts)
        task._problems, task._examples = self._problems, self._examples
        return task

    def _read(self, part: str) -> list[Problem]:
        if part not in self._problems:
            own, default, split = self.train, self.default_source, self.train_split
            if part == "test":
                # Validation is cut out of train: the test records never select anything.
                own, default, split = self.test, self.default_test or self.default_source, self.test_split
            if own is None and not default:
                advice = f"set its option {part!r} to a file or a hub name owner/name[:config]"
                raise UserError(f"task {self.name} has no source of {part} records; {advice}")
            problems = [p for source in (default.split() if own is None else [own]) for p in self.read(source, split)]
            ids = collections.Counter(p.id for p in problems if p.id)
            if repeated := [name for name, count in ids.items() if count > 1]:
                what = f"{len(repeated)} ids of {part} records are not unique ({repeated[0]!r})"
                warn(f"task {self.name}: {what}; record numbers are appended to them")
            # The number makes ids that are the same in every run, since records keep the file's order.
            self._problems[part] = [
                p if ids[p.id] == 1 else dataclasses.replace(p, id=f"{p.id or f'{self.name}-{part}'}-{number:05d}")
                for number, p in enumerate(problems)
            ]
            # The rows that ship are a few for smoke runs.
            if len(self._problems) == 2 and not str(self.train).startswith("built-in:"):
                self._warn_of_overlap(self._problems["train"], self._problems["test"])
        return self._problems[part]

    def _warn_of_overlap(self, train: Sequence[Problem], test: Sequence[Problem]) -> None:
        shared = {_key(p.question) for p in train} & {_key(p.question) for p in test}
        # Questions such as "Which of these is true?" differ in their choices or context, which prompts hold.
        learnt = {self.prompt(p) for p in train if _key(p.question) in shared}
        if count := sum(_key(p.question) in shared and self.prompt(p) in learnt for p in test):
            advice = "name other files, or parts of them with train_split and test_split"
            what = f"{count} of its {len(test)} test problems are among its train problems"
            warn(f"task {self.name}: {what}, so that accuracies count answers learnt by heart; {advice}")


def stable_rng(*parts: Any) -> random.Random:
    """A generator that depends on `parts` alone: the same in every process, run and Python version."""
    # Text is hashed with SHA-512 here; a tuple would go through hash(), which is salted per process.
    return random.Random("/".join(map(str, parts)))


def bucket(text: str, count: int) -> int:
    """Which of `count` equally likely buckets a text falls into."""
    # crc32 never changes, unlike hash(), which is salted per process: splits must be the same in every run.
    return zlib.crc32(text.encode()) % count


def check_split(split: str, has: Sequence[str] = SPLITS, name: str = "") -> None:
    """Raises UserError unless `split` is one of SPLITS, and one that the data set `name` has."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if split not in has:
        raise UserError(f"{name}: has no {split!r} problems, only {', '.join(has)}")


_MARKERS = re.compile(r"\(correct\)|\b(?:hints?|given answer|as stated)\b", re.IGNORECASE)


def leak_marker(completion: str, question: str = "") -> str | None:
    """The words that show a hint was given ("(CORRECT)", "hint", "given answer", "as stated", in any case), or None."""
    # A word of the question itself is no sign of a hint (a quiz with three hints).
    in_question = {match.lower() for match in _MARKERS.findall(question)}
    found = [match for match in _MARKERS.findall(completion) if match.lower() not in in_question]
    return f"hint marker {found[0]!r}" if found else None


def _read_prompts(folder: str, name: str) -> str:
    path = epath.Path(folder).expanduser() / name
    if not path.is_file():
        raise UserError(f"{path}: no such few-shot file; `prompts` names a folder that holds it, or is None")
    try:
        # Exactly one blank line in front of the question, however the file ends.
        return path.read_text(encoding="utf-8").removeprefix("\ufeff").rstrip("\n") + "\n\n"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _key(question: str) -> str:
    # Few-shot files and records may break lines at different places.
    return " ".join(question.split())
