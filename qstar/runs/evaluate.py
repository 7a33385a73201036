"""Evaluation of a model on a task: greedy accuracy, pass@k and majority@k, with intervals over problems."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qstar.errors import QstarWarning, UserError, require
from qstar.models.model import Model
from qstar.runs.folder import end_run, fingerprint, open_run
from qstar.runs.rollouts import SampleSettings, check_lengths, sample_rollouts, tokenizer_of
from qstar.sample.vote import voted_right_at_k
from qstar.tasks.base import Problem, Task
from qstar.tasks.prompts import PromptFormat, formatted
from qstar.text.tokenizer import Tokenizer
from qstar.train.stats import pass_at_k, summarise
from qstar.types import Rollout

# Completions per file: an interruption loses at most so many.
ROUND = 512
TOO_LONG = ("error", "skip", "truncate")


def evaluate_model(
    model: Model,
    task: Task,
    *,
    split: str = "test",
    limit: int = 0,
    samples: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    out: Path | None = None,
    made_with: dict[str, Any] | None = None,
    score: Callable[[list[Rollout], Path, Tokenizer], dict[str, Any]] | None = None,
    too_long: str = "error",
    prompt_format: PromptFormat | None = None,
) -> dict[str, Any]:
    """Returns greedy accuracy and, from `samples` completions per problem, pass@k and majority@k for k = 1, 2, 4, ...

    Every metric comes with its 95% bootstrap interval over problems, and per group of problems. `answered` is the share
    of greedy completions in which an answer was found.

    Args:
      out: folder that keeps the answers as JSONL; those that are there are not sampled again.
      made_with: what the answers depend on; kept in `out`, so that answers of another model are not counted.
      score: (samples, folder, tokenizer) -> further metrics; it keeps the scores of the samples in the folder.
      too_long: what to do with prompts beyond the model's context, see `fit_prompts`; "too_long" counts them.
      prompt_format: see `tasks.prompts`; None: chat for a model with a chat template, else few-shot.

    Raises UserError for no tokenizer, no problems, too long a prompt, or an `out` of another evaluation.
    """
    tokenizer = tokenizer_of(model)
    problems = problems_of(task, split, limit)
    task = formatted(task, tokenizer, prompt_format)
    task = fit_examples(model, task, max_new_tokens)
    task, problems, long = fit_prompts(model, task, problems, max_new_tokens, too_long)
    if out is not None:
        # Answers of other weights of the same name are not read back.
        open_run(out, {**(made_with or {}), "parameters": fingerprint(model.params)}, "--out")
    # Rounds of samples are files; without `out` they are thrown away.
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        greedy_settings = SampleSettings(max_new_tokens=max_new_tokens, temperature=0.0, round_size=ROUND)
        attempt = functools.partial(sample_rollouts, model, task, problems, seed=seed, folder=folder)
        greedy = attempt(greedy_settings, stage="greedy")
        result: dict[str, Any] = {"problems": len(problems)} | ({"too_long": long} if too_long != "error" else {})
        result.update(summarise("accuracy", [float(r.correct) for r in greedy], [r.group for r in greedy]))
        result["answered"] = sum(r.answer is not None for r in greedy) / len(greedy)
        result["truncation_rate"] = sum(r.truncated for r in greedy) / len(greedy)
        if samples:
            settings = dataclasses.replace(greedy_settings, temperature=temperature)
            sampled = attempt(settings, k=samples, stage="samples")
            result.update(many(sampled, samples, task.ballots))
            result.update(score(sampled, folder, tokenizer) if score else {})
    if out is not None:
        end_run(out)
    return result


def problems_of(task: Task, split: str, limit: int) -> list[Problem]:
    """Returns the first `limit` problems of a split (0: all); raises UserError if it has none."""
    problems = task.problems(split)[: limit or None]
    require((bool(problems), f"task {task.name} has no problems in split {split!r}"))
    return problems


def fit_prompts(
    model: Model, task: Task, problems: Sequence[Problem], max_new_tokens: int, too_long: str
) -> tuple[Task, list[Problem], int]:
    """Makes an evaluation fit into the model's context.

    Args:
      too_long: what happens to a prompt that leaves no room for `max_new_tokens`: "error" raises UserError, "skip"
        leaves its problem out (UserError if none is left), "truncate" drops the first tokens of the prompt, never of
        the few-shot prefix.

    Returns:
      The task (with shorter prompts), the problems, and how many were left out or shortened. A warning names them.
    """
    require((too_long in TOO_LONG, f"too_long={too_long!r} is not one of {', '.join(TOO_LONG)}"))
    if too_long == "error":
        try:
            check_lengths(model, task, problems, max_new_tokens)
        except UserError as e:
            raise UserError(f"{e}; --too-long=skip or truncate goes on") from None
        return task, list(problems), 0
    prefix, limit = task.prefix() or task.opening, model.config.max_positions - max_new_tokens
    room = f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the context of {model.config.max_positions}"
    require((limit > 0, f"{room} tokens; lower it"))
    texts = [task.prompt(p).removeprefix(task.opening) for p in problems]
    encoded = tokenizer_of(model).encode_batch([prefix + text for text in texts], bos=True)
    long = {p.id: text for p, text, ids in zip(problems, texts, encoded) if len(ids) > limit}
    if not long:
        return task, list(problems), 0
    names = f"{', '.join(list(long)[:5])}{', ...' if len(long) > 5 else ''}"
    what = f"{len(long)} of {len(problems)} prompts exceed the context of {model.config.max_positions} tokens"
    if too_long == "skip":
        nothing = f"{what} with max_new_tokens={max_new_tokens}; nothing is left to evaluate"
        require((len(long) < len(problems), nothing))
        warnings.warn(f"{what} and are left out: {names}", QstarWarning, stacklevel=2)
        return task, [p for p in problems if p.id not in long], len(long)
    cut = functools.partial(_last_tokens, tokenizer_of(model), prefix)
    short = {name: task.opening + cut(text, limit) for name, text in long.items()}
    warnings.warn(f"{what} and have lost their first tokens: {names}", QstarWarning, stacklevel=2)
    # A copy, so that the caller's task keeps its prompts.
    task = copy.copy(task)
    task.prompt = functools.partial(_shortened, task.prompt, short)  # type: ignore[method-assign]
    return task, list(problems), len(long)


def _shortened(prompt: Any, short: Mapping[str, str], problem: Problem, hint: bool = False) -> str:
    return prompt(problem, hint=hint) if hint or problem.id not in short else short[problem.id]


def _last_tokens(tokenizer: Tokenizer, prefix: str, text: str, limit: int) -> str:
    # Not by decoding the last ids: that would drop special tokens, which a chat template writes behind a message.
    for start, _ in tokenizer.offsets(text)[1:]:
        end = text[start:]
        # Encoded anew: cut text behind the prefix may split into more tokens than it had.
        over = len(tokenizer.encode(prefix + end, bos=True)) - limit
        if over <= 0:
            return end
    advice = "lower max_new_tokens, or take fewer examples" if prefix else "lower max_new_tokens"
    raise UserError(f"no part of a prompt fits into {limit} tokens{' behind the prefix' if prefix else ''}; {advice}")


def fit_examples(model: Model, task: Task, max_new_tokens: int) -> Task:
    """Returns the task without built-in examples that would take more than half of the room that answers leave in a short
    context. A warning has their number."""
    # Whole examples: one that is cut in its answer would teach a wrong form. A copy: the caller's task keeps them all.
    room, task, dropped = (model.config.max_positions - max_new_tokens) // 2, copy.copy(task), 0
    while len(tokenizer_of(model).encode(task.prefix(), bos=True)) > room and task.drop_example():
        dropped += 1
    if dropped:
        text = f"{dropped} worked examples are left out: they would fill more than half of the model's context"
        warnings.warn(text, QstarWarning, stacklevel=3)
    return task


def unanswered(result: Mapping[str, Any]) -> str:
    """Returns a warning if most completions hold no answer that the task can parse; or ""."""
    share = result.get("answered", 1.0)
    if share >= 0.5:
        return ""
    return (
        f"warning: an answer was found in only {share:.0%} of the completions, so that accuracy is not informative. Look at "
        "the completions (--out), and give more --max-new-tokens or a prompt that shows the form of an answer"
    )


def result_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a table of what `evaluate_model` found: metric, value and its interval."""
    rows = []
    # With a single group its numbers are those of all problems.
    one_group = sum(key.startswith("accuracy/") for key in result) == 1
    for key, value in result.items():
        name, slash, group = key.partition("/")
        # Bounds stand in the row of their metric, not in rows of their own.
        if not name.endswith(("_low", "_high")) and not (one_group and group):
            bounds = (result.get(f"{name}_{side}{slash}{group}") for side in ("low", "high"))
            rows.append(dict(zip(("metric", "value", "95% low", "95% high"), (key, value, *bounds))))
    return rows


def by_problem(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Returns the samples of each problem."""
    groups: dict[str, list[Rollout]] = collections.defaultdict(list)
    for r in rollouts:
        groups[r.problem_id].append(r)
    return list(groups.values())


def many(
    rollouts: list[Rollout], samples: int, ballots: Callable[[Sequence[str | None]], Sequence[str | None]] = list
) -> dict[str, Any]:
    """Returns pass@k and majority@k for k = 1, 2, 4, ... up to `samples`. `ballots`: see `Task.ballots`."""
    rows = by_problem(rollouts)
    # Truncated completions do not vote: their answer may be the first digits of a longer one.
    answers = [ballots([None if r.truncated else r.answer for r in some]) for some in rows]
    return votes(answers, [[r.correct for r in some] for some in rows], [some[0].group for some in rows], samples)


def votes(
    answers: Sequence[Sequence[str | None]], right: Sequence[Sequence[bool]], groups: Sequence[str], samples: int
) -> dict[str, Any]:
    """Returns pass@k and majority@k with intervals, k = 1, 2, 4, ... up to `samples`, of each problem's answers.

    Equal strings vote together (`Task.ballots`); None does not vote, but passes if it is right.
    """
    out: dict[str, Any] = {}
    for k in (2**i for i in range(samples.bit_length())):
        # Both are expectations over all subsets of k: one set of samples serves every k.
        voted = [voted_right_at_k(*pair, k) for pair in zip(answers, right)]
        out.update(summarise(f"pass@{k}", [pass_at_k(len(some), sum(some), k) for some in right], groups))
        out.update(summarise(f"majority@{k}", voted, groups))
    return out
