"""Checks before a run starts: problems, rows and prompts that cannot work are refused before anything is written."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qstar.errors import QstarWarning, UserError, require
from qstar.runs.context import RunContext
from qstar.runs.supervised import TrainSettings, check_trainable
from qstar.runs.stages import UpdateSettings
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model
from qstar.tasks.base import Problem, Task
from qstar.text.packing import Example
from qstar.text.tokenizer import Tokenizer


def check_problems(ctx: RunContext, arms: Iterable[Any]) -> None:
    """Reads the problems, before the model is read.

    Args:
      arms: their `Loop` settings.

    Raises:
      UserError: a fault in the data, or no problems to sample from or to evaluate on.
    """
    found = {"train": [p for loop in arms for p in ctx.task.pool(1, ctx.seed, loop.problems_per_iter)]}
    for split in ("val", "test") if ctx.evaluation.split == "val" else (ctx.evaluation.split,):
        found[split] = ctx.task.problems(split)
    for split, problems in found.items():
        fault = f"config.task: {ctx.task.name} has no problems in its split {split!r}; give it more data"
        require((bool(problems), fault))


def check_model(ctx: RunContext, start: Model, arms: Iterable[Any]) -> None:
    """Raises UserError where an arm trains in a way that this kind of model cannot be trained in."""
    if isinstance(ctx.train_settings, UpdateSettings):
        try:
            if isinstance(ctx.train_settings, TrainSettings):
                check_trainable(start.config, ctx.train_settings)
            ctx.train_settings.check_targets(start.config)
        except UserError as e:
            raise UserError(f"config.train.{e}") from None
    if not isinstance(start.config, EncDecConfig):
        return
    for loop in arms:
        pairs = [*getattr(loop, "verifiers", ()), *(["rpo"] if getattr(loop, "update", "sft") == "rpo" else [])]
        line = f"config.model.path={ctx.config.model.path}: an encoder-decoder (T5) cannot be trained by"
        require(
            (not pairs, f"{line} {pairs and pairs[0]!r} (only by fine-tuning); leave that arm out, or take a decoder")
        )


def check_room(ctx: RunContext, start: Model, arms: Iterable[Any]) -> None:
    """Looks for rows and prompts that are too long for the model or the settings.

    Raises:
      UserError: a seed row longer than a row of `train`, or a prompt that the model's context has no room for.
    """
    if any(loop.seed_share for loop in arms):
        hinted_seeds = [ctx.seed_example(p, hinted) for p, hinted in ctx.task.seeds() if hinted]
        check_fits(hinted_seeds, ctx.train_settings.row_length, "train")
    length = ctx.sample_settings.max_new_tokens
    problems = ctx.task.problems(ctx.evaluation.split)[: ctx.evaluation.limit or None]
    few_shot = any(loop.few_shot_at_sample for loop in arms)
    for hinted in {False, ctx.evaluation.hinted}:
        check_lengths(start, ctx.task, problems, length, hinted=hinted, few_shot=few_shot)
    for loop in arms:
        problems = ctx.task.pool(1, ctx.seed, loop.problems_per_iter)
        for hinted in {False, loop.rationalize}:
            check_lengths(start, ctx.task, problems, length, hinted=hinted, few_shot=loop.few_shot_at_sample)


def check_lengths(
    model: Model,
    task: Task,
    problems: Sequence[Problem],
    max_new_tokens: int,
    *,
    hinted: bool = False,
    few_shot: bool = True,
) -> None:
    """Looks ahead for prompts that leave no room in the context: of the longest texts, the tokens are counted.

    Raises:
      UserError: a prompt and `max_new_tokens` exceed the context; the line names the problem.
    """
    texts = {p.id: task.prompt(p, hint=hinted) for p in problems}
    prefix, room = task.prefix(hint=hinted) if few_shot else "", model.config.max_positions
    for name in sorted(texts, key=lambda k: len(texts[k]), reverse=True)[:16]:
        count = len(model.tokenizer.encode(prefix + texts[name], bos=True))
        if count + max_new_tokens > room:
            raise UserError(
                f"problem {name}: {count} prompt tokens + max_new_tokens={max_new_tokens} exceed the model's context "
                f"of {room} tokens; lower max_new_tokens, or take fewer few-shot examples or a model with more context"
            )


TOO_LONG = ("error", "skip", "truncate")


def fit_prompts(
    model: Model, task: Task, problems: Sequence[Problem], max_new_tokens: int, too_long: str
) -> tuple[Task, list[Problem], int]:
    """Makes an evaluation fit into the model's context.

    Args:
      too_long: what happens to a prompt that leaves no room for `max_new_tokens`: "error", "skip" leaves its problem out,
        "truncate" drops the first tokens of the prompt, never of the few-shot prefix.

    Returns:
      The task (with shorter prompts), the problems, and how many were left out or shortened. A warning names them.

    Raises:
      UserError: see `check_lengths`; nothing is left.
    """
    require((too_long in TOO_LONG, f"too_long={too_long!r} is not one of {', '.join(TOO_LONG)}"))
    if too_long == "error":
        try:
            check_lengths(model, task, problems, max_new_tokens)
        except UserError as e:
            raise UserError(f"{e}; --too-long=skip or truncate goes on") from None
        return task, list(problems), 0
    prefix, limit = task.prefix(), model.config.max_positions - max_new_tokens
    texts = [task.prompt(p) for p in problems]
    encoded = model.tokenizer.encode_batch([prefix + text for text in texts], bos=True)
    long = {p.id: text for p, text, ids in zip(problems, texts, encoded) if len(ids) > limit}
    if not long:
        return task, list(problems), 0
    names = f"{', '.join(list(long)[:5])}{', ...' if len(long) > 5 else ''}"
    what = f"{len(long)} of {len(problems)} prompts exceed the context of {model.config.max_positions} tokens"
    if too_long == "skip":
        require(
            (len(long) < len(problems), f"{what} with max_new_tokens={max_new_tokens}; nothing is left to evaluate")
        )
        warnings.warn(f"{what} and are left out: {names}", QstarWarning, stacklevel=2)
        return task, [p for p in problems if p.id not in long], len(long)
    short = {name: _last_tokens(model.tokenizer, prefix, text, limit) for name, text in long.items()}
    warnings.warn(f"{what} and have lost their first tokens: {names}", QstarWarning, stacklevel=2)
    task = copy.copy(task)
    task.prompt = functools.partial(_shortened, task.prompt, short)
    return task, list(problems), len(long)


def _shortened(prompt: Any, short: Mapping[str, str], problem: Problem, hint: bool = False) -> str:
    return prompt(problem, hint=hint) if hint or problem.id not in short else short[problem.id]


def _last_tokens(tokenizer: Tokenizer, prefix: str, text: str, limit: int) -> str:
    """The end of `text` that has, behind `prefix`, at most `limit` tokens."""
    ids = tokenizer.encode(text)
    for keep in range(len(ids) - 1, 0, -1):
        end = tokenizer.decode(ids[-keep:])
        over = len(tokenizer.encode(prefix + end, bos=True)) - limit
        if over <= 0:
            return end
    raise UserError(
        f"the few-shot prefix leaves no room for a prompt in {limit} tokens; lower max_new_tokens, or take fewer examples"
    )


def check_fits(examples: list[Example], row_length: int, section: str) -> None:
    """Raises UserError unless all examples fit into the rows of a config section."""
    longest = max(map(len, examples), default=0)
    fault = f"config.{section}.row_length={row_length} is too short: the longest seed row has {longest} tokens"
    require((longest <= row_length, fault))
