"""Run context of Quiet-STaR: the sections of its config, its text, and the run folder's writers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from rich.console import Console

from qstar.data.corpus import Corpus, Rows, TextCorpus
from qstar.errors import Settings, UserError, bounded, check_type, require, unknown
from qstar.mesh import make_mesh, put_global_batch
from qstar.models.hf import read_config
from qstar.models.thought_config import ThoughtConfig
from qstar.runs import base_model
from qstar.runs.console import Screen
from qstar.runs.settings import Gate, Log, Sections, check_keys, settings_from
from qstar.runs.stages import UpdateSettings
from qstar.tasks.fold_digits import Folds
from qstar.text.tokenizer import load_tokenizer
from qstar.train.metrics import Writer
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


@dataclasses.dataclass
class QuietContext(Screen):
    """One run: built once from the ConfigDict; nothing below `methods` sees a ConfigDict."""

    config: Any
    workdir: Path
    console: Console
    corpus: Corpus
    mesh: Any
    seed: int
    thoughts: ThoughtConfig
    evaluation: EvalConfig
    base_settings: UpdateSettings
    base_steps: int
    gates: dict[str, Gate]
    start_text: str
    writer: Writer = None

    @classmethod
    def make(cls, config: Any, workdir: Path, console: Console) -> QuietContext:
        """Reads a config; all that can be wrong in it is found here, before anything is written."""
        values = config.to_dict()
        extra = {"data": values.pop("data", {}), "thoughts": values.pop("thoughts", {})}
        sections = settings_from(Sections, {"task": {"name": "text"}, "loop": {}, "sample": {}, **values}, "")
        base = {"steps": 0, **sections.base}
        check_type("config.base.steps", base["steps"], int)
        settings_from(Log, sections.log, "log")
        start_text = extra["thoughts"].pop("start_text", "---")
        parity = extra["thoughts"].pop("parity", False)
        path = sections.model.get("path", "")
        why = "an encoder-decoder (T5) cannot think before each token of a text, as Quiet-STaR has it; take a decoder"
        require((not path or not base_model.is_encoder_decoder(path), f"config.model.path={path}: {why}"))
        corpus = make_corpus(extra["data"], path)
        update = settings_from(UpdateSettings, sections.train, "train")
        require(
            (
                not update.lora_rank,
                f"config.train.lora_rank={update.lora_rank}: Quiet-STaR trains all of a model; leave it at 0",
            )
        )
        check_keys(ThoughtConfig, extra["thoughts"], "thoughts")
        ctx = cls(
            config=config,
            workdir=workdir,
            console=console,
            corpus=corpus,
            mesh=make_mesh(config.mesh) if jax.device_count() > 1 or config.mesh != "data=-1" else None,
            seed=config.seed,
            thoughts=thought_config(extra["thoughts"], parity, corpus),
            evaluation=settings_from(EvalConfig, sections.evaluate, "evaluate"),
            base_steps=base.pop("steps"),
            base_settings=settings_from(UpdateSettings, base, "base"),
            gates={k: settings_from(BaseGate, gate, f"gates.{k}") for k, gate in sections.gates.items()},
            start_text=start_text,
        )
        _ = ctx.start_id  # or say now what is wrong with its text
        return ctx

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
        own = self.config.arms[name].to_dict()
        recipe = settings_from(cls, own, f"arms.{name}")
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

    def begin(self) -> None:
        """Opens the metrics files."""
        self.writer = Writer.of_run(self.workdir, self.config.to_dict())

    def end(self) -> None:
        """Flushes the metrics files."""
        self.writer.close()


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
