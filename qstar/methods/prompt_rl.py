"""`qstar.reinforce`: RL on prompts and a reward of one's own, in one call.

    model, history = qstar.reinforce(model, prompts, lambda completions: [-len(text) for text in completions], lr=1e-5)

It is the training of `methods.rl` without a task: no answers are read and no model is evaluated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qstar.errors import require, unknown
from qstar.files import as_path
from qstar.methods import reinforce as engine
from qstar.methods import rewards
from qstar.methods.reinforce import ReinforceSettings, RewardOutput
from qstar.methods.rl import GIVEN, given_of, per_response
from qstar.models.model import Model, load
from qstar.runs.folder import ending, open_run, write_json
from qstar.runs.stages import Stage
from qstar.text.chat import as_text
from qstar.train.metrics import Writer, read
from qstar.train.rl import RLSettings
from qstar.types import Completion

# Defaults of a call, where they differ from those of a run: a log row per update, no warmup, the rewards as returned.
DEFAULTS = {"log_every": 1, "warmup": 0, "no_eos_penalty": 0.0}


class PromptEnvironment:
    """Prompts in shuffled passes, and rewards of their completions."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Any],
        given: tuple[rewards.Reward, ...],
        records: Sequence[dict] | None,
        count: int,
        seed: int,
        stop: Sequence[str] = (),
    ):
        """`given`: terms of the reward. `count`: prompts per update."""
        self.asked, self.rewards, self.records, self.count, self.seed = list(prompts), given, records, count, seed
        self.texts = [as_text(model.tokenizer, p) for p in self.asked]
        self.stop, self.made_with = tuple(stop), rewards.made_with(given)
        self.updates_per_pass = len(self.asked) // count

    def _chosen(self, update: int) -> list[int]:
        epoch, at = divmod(update, self.updates_per_pass)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.asked))
        return order[at * self.count : (at + 1) * self.count].tolist()

    def prompts(self, update: int) -> list[Any]:
        return [self.texts[i] for i in self._chosen(update)]

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> RewardOutput:
        places, found = per_response(self._chosen(update), responses)
        given = given_of([self.asked[i] for i in places], found)
        if self.records is not None:
            given["records"] = [self.records[i] for i in places]
        return RewardOutput(*rewards.score(self.rewards, update, **given))


def reinforce(
    model: Model | str | os.PathLike,
    prompts: Sequence[Any],
    reward: str | Callable[..., Any],
    *,
    records: Sequence[dict] | None = None,
    workdir: str | os.PathLike | None = None,
    prompts_per_update: int | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> tuple[Model, list[dict[str, Any]]]:
    """Trains a model by RL (GRPO) on rewards of its completions; returns (model, a row of metrics per update).

    Args:
      model: a Model, a folder or a name on the hub.
      prompts: texts, conversations (lists of messages) or lists of token ids.
      reward: a function, or a text such as "rewards.py:brevity + 0.1 * rewards.py:steps". It is called with lists that have
        an entry per completion, those that it names of prompts, completions, tokens, truncated and (if given) records, and
        returns numbers, or a dict of lists of numbers (see `methods.rewards`).
      records: a dict per prompt with what the reward needs, e.g. the right answer.
      workdir: a run folder: a call with the same arguments continues it or, finished, loads its model; completions are in
        WORKDIR/ESTIMATOR/completions, and `qstar report WORKDIR` makes its page. None: nothing is kept.
      prompts_per_update: default: all, at most 64.
      options: fields of `RLSettings` and `ReinforceSettings`: estimator, group, kl_weight, clip, updates, max_new_tokens,
        lr, lora_rank, batch_size (default: all responses of an update), ...

    Raises UserError for an unknown option, prompts that cannot be used, or a reward that fails; Diverged.
    """
    require(
        (not isinstance(prompts, str) and len(prompts) > 0, "prompts is a list with at least one prompt"),
        (records is None or len(records) == len(prompts), "records must have an entry per prompt"),
    )
    terms = rewards.read_rewards(reward, "reward", (*GIVEN, *(["records"] if records is not None else [])))
    count = min(prompts_per_update or 64, len(prompts))
    of_loss, of_update = ({f.name for f in dataclasses.fields(cls)} for cls in (RLSettings, ReinforceSettings))
    for name in options:
        if name not in of_loss | of_update - {"prompts"}:
            raise unknown(f"option {name!r}", name, sorted(of_loss | of_update - {"prompts"}))
    mine = {**DEFAULTS, **options}
    rl = RLSettings(**{k: v for k, v in mine.items() if k in of_loss})
    rest = {"batch_size": count * rl.group, "prompts": count, **{k: v for k, v in mine.items() if k in of_update}}
    settings = ReinforceSettings(**rest)
    model = model if isinstance(model, Model) else load(model)
    environment = PromptEnvironment(model, prompts, terms, records, count, seed, stop)
    with (
        tempfile.TemporaryDirectory(prefix="qstar-rl-")
        if workdir is None
        else contextlib.nullcontext(workdir) as folder
    ):
        return _train(model, environment, rl, settings, seed, as_path(folder))


def _train(
    model: Model, environment: PromptEnvironment, rl: RLSettings, settings: ReinforceSettings, seed: int, folder: Path
) -> tuple[Model, list[dict[str, Any]]]:
    sections = {"rl": dataclasses.asdict(rl), "train": dataclasses.asdict(settings), **environment.made_with}
    config = {"method": "rl", "name": folder.name, "seed": seed, "arms": {rl.estimator: {}}, **sections}
    open_run(folder, config, "workdir")
    arm, writer = folder / rl.estimator, Writer(folder)
    stage = Stage(arm / "checkpoints" / "iter_001", settings, settings.updates, seed, writer, {"arm": rl.estimator})
    with ending(folder), contextlib.closing(writer):
        trained, _ = engine.reinforce(model, environment, rl, stage, completions=arm / "completions")
        write_json(arm / "status.json", {"status": "finished", "reason": "", "iterations": 1})
    return trained, [row for row in read(folder) if row["stage"] == "rl"]
