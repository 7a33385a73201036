"""Run context of Quiet-STaR: the sections of its config, its text, and the run folder's writers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qstar.data.corpus import Corpus, Rows, TextCorpus
from qstar.errors import Settings, UserError, bounded, require, unknown
from qstar.mesh import put_global_batch
from qstar.models.hf import read_config
from qstar.models.thought_config import ThoughtConfig
from qstar.runs import base_model
from qstar.runs.context import RunContext
from qstar.runs.settings import Gate, Sections, check_keys, settings_from
from qstar.runs.stages import UpdateSettings
from qstar.tasks.fold_digits import Folds
from qstar.text.tokenizer import load_tokenizer
from qstar.types import Batch


@dataclasses.dataclass(frozen=True)
class EvalConfig(Settings):
    """How models are measured. A config's `evaluate` section."""

    rows: int = bounded(1200, ge=1)  # of held-out text
    batch_size: int = bounded(100, ge=1)
    every: int = bounded(0, ge=0)  # steps between two measurements; 0: only at the end
    shown: int = 40  # texts whose thoughts are written out for the viewer
    passes: int = bounded(1, ge=1)  # thoughts per position


@dataclasses.dataclass(frozen=True)
class BaseGate(Gate):
    """A bound on a measurement of the base model, see `quiet_base.fold_measurements`."""

    NAMES: ClassVar = ("direct_nll", "worked_nll", "worked_accuracy", "step_nll", "right", "right_greedy")


@dataclasses.dataclass(frozen=True)
class QuietBase(UpdateSettings):
    """How a from-scratch base model is trained. A config's `base` section."""

    steps: int = bounded(0, ge=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuietSections(Sections):
    """The sections of a Quiet-STaR config."""

    model: dict
    train: UpdateSettings
    evaluate: EvalConfig
    gates: dict[str, BaseGate] = dataclasses.field(default_factory=dict)
    base: QuietBase = dataclasses.field(default_factory=QuietBase)
    data: dict = dataclasses.field(default_factory=dict)
    thoughts: dict = dataclasses.field(default_factory=dict)  # a ThoughtConfig's fields, `parity` and `start_text`

    def __post_init__(self) -> None:
        super().__post_init__()
        why = f"train.lora_rank={self.train.lora_rank}: Quiet-STaR trains all of a model; leave it at 0"
        require((not self.train.lora_rank, why))


@dataclasses.dataclass
class QuietContext(RunContext):
    """One Quiet-STaR run."""

    SECTIONS: ClassVar = QuietSections
    corpus: Corpus = dataclasses.field(init=False)
    thoughts: ThoughtConfig = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        options = dict(self.settings.thoughts)
        self.start_text, parity = options.pop("start_text", "---"), options.pop("parity", False)
        path = self.settings.model.get("path", "")
        why = "an encoder-decoder (T5) cannot think before each token of a text, as Quiet-STaR has it; take a decoder"
        require((not path or not base_model.is_encoder_decoder(path), f"config.model.path={path}: {why}"))
        self.corpus = make_corpus(self.settings.data, path)
        check_keys(ThoughtConfig, options, "thoughts")
        self.thoughts = thought_config(options, parity, self.corpus)
        _ = self.start_id  # raises if `start_text` has no token

    @property
    def start_id(self) -> int:
        """The token whose embedding the start and end vectors begin as (the official code: the first of "---")."""
        try:
            ids = self.corpus.tokenizer.encode(self.start_text)
        except UserError as e:
            raise UserError(f"config.thoughts.start_text: {e}") from None
        require((len(ids) > 0, f"config.thoughts.start_text={self.start_text!r} has no token"))
        return ids[0]

    def recipe(self, cls: type, name: str) -> Any:
        """Returns an arm's settings; its thoughts and train settings are checked, too."""
        recipe = settings_from(cls, self.settings.arms[name], f"arms.{name}")
        check_keys(ThoughtConfig, recipe.thoughts, f"arms.{name}.thoughts")
        self.thoughts.replace(**recipe.thoughts)
        self.update_settings(recipe.train, f"arms.{name}.train")
        return recipe

    def update_settings(self, changes: dict[str, Any], where: str = "train") -> UpdateSettings:
        """Returns the config's `train` section with an arm's changes."""
        return settings_from(UpdateSettings, {**self.config.train.to_dict(), **changes}, where)

    def batch(self, rows: Rows) -> Batch:
        """Returns all of the rows as host arrays; `fit` places them on the devices."""
        return Batch(*(np.asarray(x) for x in rows[:4]))

    def whole_batch(self, rows: Rows) -> Batch:
        """Returns all of the rows, which every process has read, placed on the devices: what is measured."""
        return put_global_batch(self.batch(rows), self.mesh)


def thought_config(options: dict[str, Any], parity: bool, corpus: Corpus) -> ThoughtConfig:
    """Returns the config's `thoughts`: the defaults, or the official code's where `parity` is set, with changes.

    The padding token, where the tokenizer has one, is never thought, unless `forbidden_ids` says otherwise.
    """
    if "forbidden_ids" not in options:
        pad = corpus.tokenizer.hf.pad_token_id  # not `pad_id`, which is 0, a word, where there is no padding token
        options = {**options, "forbidden_ids": () if pad is None else (pad,)}
    return ThoughtConfig.parity(**options) if parity else ThoughtConfig(**options)


def make_corpus(options: dict[str, Any], model_path: str) -> Corpus:
    """Returns the text of a config's `data` section: {"name": "folds" | "text", ...}.

    Raises:
      UserError: unknown name or option, or a text that cannot be read.
    """
    options = dict(options)
    name = options.pop("name", "")
    if name == "folds":
        return _call(Folds, options)
    if name != "text":
        raise unknown(f"config.data.name={name!r}", str(name), ["folds", "text"])
    folder, source = options.pop("tokenizer", "") or model_path, options.pop("source", "")
    require(
        (bool(source), "config.data.source is not set; name a jsonl or parquet file, or a hub data set"),
        (bool(folder), "config.data.tokenizer is not set; name a folder with tokenizer files, or set model.path"),
    )
    if folder == model_path:
        read_config(folder)  # whether there is such a model at all
    where = f"config.data.tokenizer={folder}"
    require((Path(folder).expanduser().is_dir(), f"{where}: no such folder; name one that holds tokenizer files"))
    tokenizer = load_tokenizer(folder)
    require((tokenizer is not None, f"{where}: this folder has no tokenizer files; name another one"))
    return _call(TextCorpus, options, source, tokenizer)


def _call(cls: type, options: dict[str, Any], *args: Any) -> Any:
    import inspect

    known = list(inspect.signature(cls).parameters)[len(args) :]
    for option in options:
        if option not in known:
            raise unknown(f"config.data.{option}", option, known)
    try:
        return cls(*args, **options)
    except UserError as e:
        raise UserError(f"config.data: {e}") from None
