"""Training on rows of one's own, in one stage: fine-tuning (`sft`), preferences (`dpo`), a teacher (`distil`).

    sft      -log p(completion | prompt); of a conversation, the assistant's messages
    dpo      the loss of arXiv 2305.18290; the reference is the model before training
    distil   a divergence from a teacher's predictions on given completions, or on those that the teacher writes
             (arXiv 2306.13649); kind="hard" imitates the completions alone

Some rows are held out (`data.held_out`): the loss on them is measured before training and at every log. Every arm trains
the same model on the same rows; the keys of an arm replace those of `train`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qstar.data.pairs import Row, read_rows, split_rows
from qstar.errors import Settings, bounded, require, within
from qstar.methods import distillation
from qstar.methods.pair_rows import complete, fit, parts, write_completions
from qstar.methods.preference_data import Pair
from qstar.methods.verifier import Verifier, VerifierSettings, score, train_dpo
from qstar.models import lora
from qstar.models.model import Model
from qstar.models.scoring import logprobs
from qstar.runs import base_model
from qstar.runs.context import RunContext
from qstar.runs.folder import cached_jsonl, check_run, once_json, stable_seed, write_json
from qstar.runs.rollouts import SampleSettings, tokenizer_of
from qstar.runs.settings import EpochSettings, Sections, arms_from
from qstar.runs.stages import Stage, TrainSettings, check_trainable, fine_tune
from qstar.sample import batching
from qstar.text import Example
from qstar.text.chat import as_text
from qstar.text.packing import pack_groups
from qstar.train.distil import DistilSettings
from qstar.train.loop import Diverged
from qstar.types import Params

# -------------------------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class PairData(Settings):
    """The rows. A config's `data` section."""

    source: str = ""  # a file, a folder or a hub data set: see `data.pairs` and `data.read_records`
    rows: list = dataclasses.field(default_factory=list)  # the rows themselves, in place of a source
    split: str = "train"  # of a hub data set
    limit: int = bounded(0, ge=0, note="0: all")
    held_out: float = bounded(0.05, ge=0, lt=1)  # share of the rows that is not trained on
    validation: str = ""  # another source of held-out rows, in place of that share
    bad_rows: float = bounded(0.0, ge=0, lt=1)


@dataclasses.dataclass(frozen=True)
class PairEvaluation(Settings):
    """Completions of held-out prompts, before and after training. A config's `evaluate` section."""

    examples: int = bounded(8, ge=0)
    max_new_tokens: int = bounded(128, ge=1)


@dataclasses.dataclass(frozen=True)
class _Updates(EpochSettings):
    """Defaults for rows of unknown number and length."""

    batch_size: int = 8
    lr: float = 1e-5
    schedule: str = "linear"
    warmup: int = 0
    log_every: int = 10

    def sized(self, examples: Sequence[Sequence[Example]]) -> Any:
        """Returns the settings with the number of updates and the lengths that these examples need."""
        new: dict[str, Any] = {}
        if not getattr(self, "row_length", 1):
            new["row_length"] = max(2, *(sum(map(len, some)) for some in examples))
        if not getattr(self, "max_new_tokens", 1):
            new["max_new_tokens"] = max(len(x.completion) for some in examples for x in some)
        rows = len(examples)
        if getattr(self, "packed", False):
            rows = len(pack_groups(examples, new.get("row_length", getattr(self, "row_length", 0)))[1])
        return dataclasses.replace(self, steps=self.updates_for(rows), **new)


@dataclasses.dataclass(frozen=True)
class SFTTrain(_Updates, TrainSettings):
    """The `train` section of `sft`."""

    packed: bool = False
    row_length: int = bounded(0, ge=0, note="0: that of the longest row")


@dataclasses.dataclass(frozen=True)
class DPOTrain(_Updates, VerifierSettings):
    """The `train` section of `dpo`."""

    lr: float = 1e-6
    packed: bool = False
    row_length: int = bounded(0, ge=0, note="0: that of the longest pair")


@dataclasses.dataclass(frozen=True)
class DistilTrain(_Updates, distillation.DistilTrain):
    """The `train` section of `distil`."""

    max_new_tokens: int = bounded(0, ge=0, note="0: that of the longest completion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSections(Sections):
    """The sections of `sft` and `dpo`."""

    model: dict
    data: PairData
    train: dict
    evaluate: PairEvaluation = dataclasses.field(default_factory=PairEvaluation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilSections(PairSections):
    """The sections of `distil`."""

    teacher: dict = dataclasses.field(default_factory=dict)  # as `model`
    distil: DistilSettings = DistilSettings(kind="forward_kl")
    sample: SampleSettings = SampleSettings(max_new_tokens=256)  # of the teacher's completions


class PairContext(RunContext):
    """One run on rows of one's own."""

    SECTIONS: ClassVar = PairSections
    FORM: ClassVar[str] = "pairs"
    TRAIN: ClassVar[type[EpochSettings]] = SFTTrain

    def load(self, section: str = "model") -> Model:
        """Returns the model of a section; raises UserError if there is none, or it has no tokenizer."""
        named = getattr(self.settings, section)
        require((bool(named.get("path")), f"config.{section}.path is not set; name a folder or a model of the hub"))
        here = copy.copy(self)
        here.settings = dataclasses.replace(self.settings, model=named)
        model = base_model.loaded_or_random(here)
        tokenizer_of(model)
        return model

    def fit_arm(
        self,
        start: Model,
        rows: list[Row],
        examples: list[list[Example]],
        stage: Stage,
        watch: Callable[[int, Params], None],
        teacher: Model | None,
    ) -> tuple[Model, dict[str, Any]]:
        """Trains a copy of `start` on rows (`examples`: as token ids); returns the new model with a summary."""
        return fine_tune(start, [x for (x,) in examples], stage, watch=watch)

    def read(self, given: Sequence[Row] | None) -> tuple[list[Row], list[Row]]:
        """Returns the rows to train on and the held-out ones. `given`: in place of the source."""
        data = self.settings.data
        source = (data.source or data.rows) if given is None else given
        line = "config.data: neither source (a file or a hub data set) nor rows is set; set one of them"
        require((bool(source) or given is not None, line))
        options: dict[str, Any] = {"split": data.split, "bad_rows": data.bad_rows}
        rows = read_rows(source, self.FORM, limit=data.limit, **options)
        if data.validation:
            return rows, read_rows(data.validation, self.FORM, **options)
        return split_rows(rows, data.held_out, self.seed)


class DPOContext(PairContext):
    """One run of `dpo`."""

    FORM, TRAIN = "preferences", DPOTrain

    def fit_arm(self, start, rows, examples, stage, watch, teacher):
        tokenizer = tokenizer_of(start)
        pairs = [Pair(str(i), as_text(tokenizer, x["prompt"]), x["chosen"], x["rejected"]) for i, x in enumerate(rows)]
        return train_dpo(start, pairs, stage, watch=watch)


class DistilContext(PairContext):
    """One run of `distil`."""

    SECTIONS, FORM, TRAIN = DistilSections, "prompts", DistilTrain

    def fit_arm(self, start, rows, examples, stage, watch, teacher):
        some = []
        for row, (x,) in zip(rows, examples):
            theirs = list(x.prompt)
            if teacher is not None:
                # In the teacher's own template, where it has one.
                theirs = tokenizer_of(teacher).encode_prompt(as_text(teacher.tokenizer, parts(row)[0]))
            own = () if theirs == list(x.prompt) else tuple(theirs)
            some.append(distillation.Pair(tuple(x.prompt), tuple(x.completion), own))
        return distillation.distil(start, some, self.settings.distil, stage, teacher, watch)


CONTEXTS: dict[str, type[PairContext]] = {"sft": PairContext, "dpo": DPOContext, "distil": DistilContext}


# ------------------------------------------------------------------------------------------------ loss on held-out rows


def held_out_loss(model: Model, examples: Sequence[Sequence[Example]]) -> dict[str, float]:
    """Returns the mean negative log-likelihood per token of the completions, in nats."""
    flat = [x for (x,) in examples]
    found = logprobs(model, [x.prompt for x in flat], [x.completion for x in flat])
    masks = [x.loss[len(x.prompt) :] if x.loss is not None else np.ones(len(x.completion)) for x in flat]
    return {"loss": -float(sum(np.dot(x, m) for x, m in zip(found, masks)) / sum(map(np.sum, masks)))}


def preference_sums(model: Model, examples: Sequence[Sequence[Example]]) -> np.ndarray:
    """Returns log p(chosen) and log p(rejected) of every preference, [N, 2] float32."""
    prompts, both = [some[0].prompt for some in examples], [[x.completion for x in some] for some in examples]
    return score(Verifier(model, "logp"), prompts, both)


def held_out_margin(
    model: Model, examples: Sequence[Sequence[Example]], reference: np.ndarray, beta: float
) -> dict[str, float]:
    """Returns DPO's loss and the share of preferences whose chosen completion gained more than the rejected one."""
    gain = preference_sums(model, examples) - reference
    margin = beta * (gain[:, 0] - gain[:, 1]).astype(np.float64)
    wins = (margin > 0) + 0.5 * (margin == 0)
    return {"loss": float(np.logaddexp(0, -margin).mean()), "accuracy": float(wins.mean())}


# ---------------------------------------------------------------------------------------------------------------- run


Encoded = tuple[list[Row], list[list[Example]]]


def run(
    config: Any,
    workdir: Path,
    console: Any,
    *,
    start: Model | None = None,
    rows: Sequence[Row] | None = None,
    teacher: Model | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Runs every arm of a config in `workdir`, continuing an earlier run; returns the last model and its summary.

    `start`, `rows`, `teacher`: in place of those that the config names (see `methods.api`).
    """
    ctx = CONTEXTS[config.method].make(config, workdir, console)
    check_run(ctx.workdir, config.to_dict())
    arms = arms_from(ctx.TRAIN, vars(ctx.settings), "train")
    sets = ctx.read(rows)
    start, started = ctx.load() if start is None else start, False
    for name, settings in arms.items():
        with within(f"config.arms.{name}: "):
            check_trainable(start.config, settings)
    if isinstance(ctx, DistilContext):
        blank = not all(complete(row) for some in sets for row in some)
        if teacher is None and (blank or ctx.settings.distil.kind != "hard"):
            teacher = ctx.load("teacher")
        if teacher is not None and blank:
            # The teacher writes into the run folder, which is therefore opened before the rows' lengths are checked.
            ctx.start(start, arms=arms)
            started = True
            write = functools.partial(write_completions, ctx.say, teacher, sample=ctx.settings.sample, seed=ctx.seed)
            folders = (ctx.workdir / "teacher", ctx.workdir / "teacher_held_out")
            sets = write(sets[0], folder=folders[0]), write(sets[1], folder=folders[1])
    limit = max(getattr(s, "row_length", 0) for s in arms.values())
    train, held_out = (fit(ctx.say, start, some, limit) for some in sets)
    if not started:
        ctx.start(start, arms=arms)
    if rows is None:
        base_model.show_parameters(ctx, start)
    ctx.say(f"\n{len(train[0]):,} rows to train on, {len(held_out[0]):,} held out")
    results = []
    for name, settings in arms.items():
        model, done = train_arm(ctx, name, settings.sized(train[1]), start, train, held_out, teacher)
        results.append({"arm": name, **done})
    ctx.table("", results)
    ctx.close()
    return model, done


def train_arm(
    ctx: PairContext, name: str, settings: Any, start: Model, train: Encoded, held_out: Encoded, teacher: Model | None
) -> tuple[Model, dict[str, Any]]:
    """Trains one arm; returns its model and its results (WORKDIR/<arm>/results.json)."""
    folder, last = ctx.workdir / name, {}
    (rows, examples), (_, unseen) = train, held_out
    reference = preference_sums(start, unseen) if ctx.FORM == "preferences" and unseen else None

    def measure(model: Model, step: int) -> dict[str, float]:
        if reference is None:
            found = held_out_loss(model, unseen)
        else:
            found = held_out_margin(model, unseen, reference, settings.beta)
        ctx.writer.write(stage="heldout", step=step, arm=name, iteration=1, **found)
        return found

    def watch(step: int, params: Params) -> None:
        if unseen:
            trained = lora.attach(start.params, params, settings.lora.scale) if settings.lora_rank else params
            last.update(measure(start.replace(params=trained), step))

    before = once_json(folder / "before.json", lambda: measure(start, 0)) if unseen else {}
    ctx.say(f"\n[bold]{name}[/bold]: {settings.steps:,} updates")
    where, seed = folder / "checkpoints" / "iter_001", stable_seed(ctx.seed, name, "train")
    opened = ctx.stage(where, settings, steps=settings.steps, seed=seed, arm=name, iteration=1)
    with within(f"config.train.lr={settings.lr}: ", Diverged), opened as stage:
        model, done = ctx.fit_arm(start, rows, examples, stage, watch, teacher)
    results = {"rows": len(rows), "steps": done["steps"], "loss": done["loss"]}
    if unseen:
        after = once_json(folder / "after.json", lambda: last or measure(model, done["steps"]))
        results["held_out_rows"] = len(unseen)
        for key in before:
            results |= {f"held_out_{key}_before": before[key], f"held_out_{key}_after": after[key]}
    write_examples(ctx, folder, start, model, held_out[0] or rows)
    write_json(folder / "results.json", results)
    write_json(folder / "status.json", {"status": "finished", "reason": "", "iterations": 1})
    return model, results


def write_examples(ctx: PairContext, folder: Path, start: Model, model: Model, rows: Sequence[Row]) -> None:
    """Writes greedy completions of the first prompts before and after training to FOLDER/examples.jsonl."""
    e = ctx.settings.evaluate

    def make() -> list[dict[str, Any]]:
        some = [(as_text(start.tokenizer, prompt), text) for prompt, text in map(parts, rows[: e.examples])]
        room = start.config.max_positions - e.max_new_tokens
        some = [x for x in some if len(tokenizer_of(start).encode_prompt(x[0])) <= room]
        write = functools.partial(batching.generate, max_new_tokens=e.max_new_tokens, temperature=0.0)
        both = [write(m, [prompt for prompt, _ in some]) if some else [] for m in (start, model)]
        return [
            {"prompt": prompt, "expected": text, "before": old[0].text, "after": new[0].text}
            for (prompt, text), old, new in zip(some, *both)
        ]

    if e.examples:
        cached_jsonl(folder / "examples.jsonl", make)
