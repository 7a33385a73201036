"""Config, text and base model of a Quiet-STaR run: the sections, the corpus, training from scratch, and the gates."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from typing import Any, ClassVar, cast

import jax
import numpy as np
from einops import rearrange

from qstar.data.corpus import Corpus, Rows, TextCorpus
from qstar.errors import Settings, bounded, check_type, require, unknown, within
from qstar.files import local_path
from qstar.mesh import put_global_batch, to_host
from qstar.models import heads
from qstar.models.config import ModelConfig
from qstar.models.hf import read_config
from qstar.models.hub import resolve
from qstar.models.model import Model
from qstar.models.thought_config import ThoughtConfig
from qstar.runs import base_model
from qstar.runs.context import RunContext
from qstar.runs.folder import stable_seed
from qstar.runs.settings import Gate, Sections, check_keys, settings_from
from qstar.runs.stages import Stage, TrainSettings, UpdateSettings, sft_step, train_stage
from qstar.tasks.fold_digits import Folds
from qstar.text.tokenizer import load_tokenizer
from qstar.thoughts import measure
from qstar.types import Batch

AnyArray = jax.Array | np.ndarray  # on the devices or, as in `Scores` that were fetched, on the host
FOLD_METRICS = ("direct_nll", "worked_nll", "worked_accuracy", "step_nll")


@dataclasses.dataclass(frozen=True)
class EvalConfig(Settings):
    """How models are evaluated on held-out text. A config's `evaluate` section."""

    rows: int = bounded(1200, ge=1)
    batch_size: int = bounded(100, ge=1)
    every: int = bounded(0, ge=0)  # steps between two evaluations; 0: only at the end
    viewer_texts: int = bounded(40, ge=0)  # texts whose thoughts are written out for the report
    thoughts_per_position: int = bounded(1, ge=1)


@dataclasses.dataclass(frozen=True)
class BaseGate(Gate):
    """A bound on a measurement of the base model, see `fold_measurements`."""

    NAMES: ClassVar = (*FOLD_METRICS, "thought_accuracy", "thought_accuracy_greedy")


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
    gates: dict[str, BaseGate] = dataclasses.field(default_factory=dict)  # type: ignore[assignment]  # narrower, frozen
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
        path = base_model.model_folder(self.settings.model)
        why = "an encoder-decoder (T5) cannot think before each token of a text, as Quiet-STaR has it; take a decoder"
        require((not path or not base_model.is_encoder_decoder(path), f"config.model.path={path}: {why}"))
        self.corpus = make_corpus(self.settings.data, path)
        options = check_keys(ThoughtConfig, options, "thoughts")
        self.thoughts = thought_config(options, parity, self.corpus)
        # Evaluated for its check, before anything is written: `start_text` may have no token.
        _ = self.start_id

    @property
    def start_id(self) -> int:
        """The token whose embedding initializes the start and end vectors (in the official code the first of "---")."""
        with within("config.thoughts.start_text: "):
            ids = self.corpus.tokenizer.encode(self.start_text)
        require((len(ids) > 0, f"config.thoughts.start_text={self.start_text!r} has no token"))
        return ids[0]

    def arm_config(self, cls: type, name: str) -> Any:
        """Returns an arm's settings, after a check of its thoughts and train settings."""
        arm = settings_from(cls, self.settings.arms[name], f"arms.{name}")
        arm = dataclasses.replace(arm, thoughts=check_keys(ThoughtConfig, arm.thoughts, f"arms.{name}.thoughts"))
        # Built for their checks alone: a value out of range fails before the first arm trains.
        self.thoughts.replace(**arm.thoughts)
        self.update_settings(arm.train, f"arms.{name}.train")
        return arm

    def update_settings(self, changes: dict[str, Any], where: str = "train") -> UpdateSettings:
        """Returns the config's `train` section with an arm's changes."""
        return settings_from(UpdateSettings, {**self.config.train.to_dict(), **changes}, where)

    def batch(self, rows: Rows) -> Batch:
        """Returns rows as host arrays; `fit` places them on the devices."""
        columns: list[Any] = [np.asarray(x) for x in rows[:4]]
        return Batch(*columns)

    def global_batch(self, rows: Rows) -> Batch:
        """Returns rows, which every process has read whole, on the devices."""
        return put_global_batch(self.batch(rows), self.mesh)


def thought_config(options: dict[str, Any], parity: bool, corpus: Corpus) -> ThoughtConfig:
    """Returns a config's `thoughts`: changes of the defaults or, with `parity`, of the official code's choices."""
    if "forbidden_ids" not in options:
        # Thoughts do not contain padding. Without a padding token `pad_id` is 0, an ordinary token, hence `hf`.
        pad = corpus.tokenizer.hf.pad_token_id
        options = {**options, "forbidden_ids": () if pad is None else (pad,)}
    return ThoughtConfig.parity(**options) if parity else ThoughtConfig(**options)


def make_corpus(options: dict[str, Any], model_path: str) -> Corpus:
    """Returns the text of a config's `data` section, {"name": "fold_digits" | "text", ...}; raises UserError."""
    options = dict(options)
    name = options.pop("name", "")
    if name == "fold_digits":
        return _make(Folds, options)
    if name != "text":
        raise unknown(f"config.data.name={name!r}", str(name), ["fold_digits", "text"])
    folder, source = options.pop("tokenizer", "") or model_path, options.pop("source", "")
    check_type("config.data.tokenizer", folder, str)
    check_type("config.data.source", source, str)
    require(
        (bool(source), "config.data.source is not set; name a jsonl or parquet file, or a hub data set"),
        (bool(folder), "config.data.tokenizer is not set; name a folder with tokenizer files, or set model.path"),
    )
    where = f"config.data.tokenizer={folder}"
    if folder == model_path:
        read_config(folder)  # raises for a folder that is no model
    else:
        folder = str(resolve(folder, weights=False))
    require((local_path(folder).is_dir(), f"{where}: no such folder; name one that holds tokenizer files"))
    tokenizer = load_tokenizer(folder)
    require((tokenizer is not None, f"{where}: this folder has no tokenizer files; name another one"))
    return _make(TextCorpus, options, source, tokenizer)


def _make(cls: type, options: dict[str, Any], *args: Any) -> Any:
    # From the signature: a misspelt option gets a proposal instead of Python's TypeError.
    known, hints = list(inspect.signature(cls).parameters)[len(args) :], typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    for option, value in options.items():
        if option not in known:
            raise unknown(f"config.data.{option}", option, known)
        check_type(f"config.data.{option}", value, hints[option])
    with within("config.data: "):
        return cls(*args, **options)


# ------------------------------------------------------------------------------------------------------- base model


def prepare_base(ctx: QuietContext, model: Model) -> Model:
    """Trains the base on the corpus' own text for `config.base.steps` (0: as it is), and checks its gates.

    Raises:
      UserError: a gate that does not hold, or a training that diverged.
    """

    def train(stage: Stage) -> tuple[Model, dict[str, Any]]:
        tx, step = sft_step(model.config, TrainSettings(**vars(stage.settings)))
        size = stage.settings.batch_size
        rows_at = functools.partial(ctx.corpus.base_rows, size=size, seed=ctx.seed)
        return train_stage(model, stage, tx, lambda n: step, lambda n: ctx.batch(rows_at(n)))

    base = base_model.train_base(ctx, train, UpdateSettings) if ctx.settings.base.steps else model
    # Before any arm trains: REINFORCE needs a base that sometimes writes the steps. Where the base already writes them
    # by greedy decoding, the control without policy gradient scores as well.
    if ctx.settings.gates:
        line = "config.gates: only data.name='fold_digits' has measurements of the base"
        require((isinstance(ctx.corpus, Folds), line))
        base_model.check_gates(ctx, ctx.workdir / "base", lambda: fold_measurements(ctx, base))
    return base


def fold_measurements(ctx: QuietContext, model: Model, size: int = 600) -> dict[str, float]:
    """Returns measurements of a base model's skill at the steps, in nats and shares.

    direct_nll: of hard answers without steps, given that no dash follows. worked_nll, worked_accuracy: of hard answers
    after the correct steps; step_nll: of the steps. thought_accuracy, thought_accuracy_greedy: share of thoughts that
    hold all steps, with the dash as start and end, before any training.
    """
    # One document per row, whatever the run's rows hold, so that every answer is at index -2.
    corpus, config = Folds(), cast(ModelConfig, model.config.replace(thoughts=ctx.thoughts))
    rows, worked, hard = corpus.test_rows(size), corpus.worked_rows(size), len(corpus.classes) - 1
    assert rows.classes is not None and rows.expected is not None and worked.classes is not None
    batch, dashed = ctx.global_batch(rows), rows.tokens.copy()
    dashed[:, -2] = ctx.start_id

    def score_text(batch: Batch) -> tuple[np.ndarray, ...]:
        return to_host(measure.score_text(model.params, config, batch))

    nll, dash_nll = score_text(batch)[0], score_text(ctx.global_batch(rows._replace(tokens=dashed)))[0]
    at = rows.classes[:, 1:] == hard
    # Given that no dash follows: the base expects one (worked documents have it), until it trains on direct text.
    # The replaced token is a target only; as an input it affects later scores, which are not used.
    direct = nll + np.log1p(-np.minimum(np.exp(-dash_nll), 1 - 1e-6))
    w_nll, w_hit, _ = score_text(ctx.global_batch(worked))
    answer, step = worked.classes[:, 1:] == hard, worked.classes[:, 1:] == 2
    values = (direct[at], w_nll[answer], w_hit[answer], w_nll[step])
    out = {name: float(x.mean()) for name, x in zip(FOLD_METRICS, values)}
    # Any key will do: it seeds the mixing head, which does not affect the thoughts.
    params = heads.attach_thoughts(model.params, config, jax.random.key(0), ctx.start_id)
    for name, temperature in (("thought_accuracy", 1.0), ("thought_accuracy_greedy", 0.0)):
        scores = measure.score(params, config, batch, jax.random.key(stable_seed("gates")), temperature=temperature)
        share = holds_steps(to_host(scores.thoughts), rows.expected[:, :-1])
        out[name] = float(share[:, 0][at].mean())
    return out


def holds_steps(thoughts: AnyArray, expected: np.ndarray) -> np.ndarray:
    """Returns whether thoughts begin with the expected tokens, as far as both reach, bool [B, P, M].

    Args:
      thoughts: [B, P, M, S]. expected: [B, M, S'], -1 beyond the end; where nothing is expected the result is False.
    """
    n = min(thoughts.shape[-1], expected.shape[-1])
    expected = rearrange(expected[..., :n], "b m s -> b 1 m s")
    return np.all((thoughts[..., :n] == expected) | (expected < 0), axis=-1) & (expected[..., 0] >= 0)
