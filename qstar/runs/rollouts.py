"""Rollouts: sampling completions of problems in resumable rounds, scoring them, and selecting those to train on."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qstar.errors import MAX_TEMPERATURE, QstarWarning, Settings, UserError, bounded
from qstar.models.model import Model
from qstar.models.thought_config import ThoughtConfig
from qstar.runs.folder import cached_jsonl, stable_seed
from qstar.sample import batching
from qstar.sample.batching import default_slots, stream
from qstar.tasks.answer_text import split_thinking
from qstar.tasks.base import Problem, Task
from qstar.text.chat import as_text
from qstar.text.packing import Example
from qstar.text.tokenizer import Tokenizer
from qstar.types import Completion, Rollout


@dataclasses.dataclass(frozen=True)
class SampleSettings(Settings):
    """How completions are sampled. A config's `sample` section."""

    max_new_tokens: int = bounded(96, ge=1)
    # STaR's code has top_p=0.9 at temperature 0.01, which is near greedy.
    temperature: float = bounded(0.0, ge=0, le=MAX_TEMPERATURE, note="0: greedy")
    top_k: int = bounded(0, ge=0, note="0: off")
    top_p: float = bounded(1.0, gt=0, le=1)
    slots: int | None = bounded(None, ge=1)
    # Completions per file: a kill loses at most so many.
    round_size: int = bounded(1024, ge=1)


@dataclasses.dataclass(frozen=True)
class Selection(Settings):
    """Which right solutions are kept for training."""

    dedupe: bool = True
    cap_per_problem: int | None = bounded(None, ge=1)
    exact_filter: bool = False  # an oracle: only solutions that pass the task's check of every step


def sample_rollouts(
    model: Model,
    task: Task,
    problems: Sequence[Problem],
    settings: SampleSettings,
    *,
    folder: Path,
    stage: str,
    k: int = 1,
    hinted: bool = False,
    iteration: int = 0,
    seed: int = 0,
    few_shot: bool = True,
    progress: Callable[[int, Rollout | None], None] | None = None,
) -> list[Rollout]:
    """Samples k completions of every problem and scores them, in rounds of problems: FOLDER/<stage>_NNN.jsonl."""
    size = max(1, settings.round_size // k)
    # One batch shape for all rounds, the last and shorter one included: no round compiles anew.
    slots = settings.slots or default_slots(min(size, len(problems)) * k)
    settings = dataclasses.replace(settings, slots=slots)
    out: list[Rollout] = []
    for r, start in enumerate(range(0, len(problems), size)):
        chunk = problems[start : start + size]
        made: list[Rollout] = []

        def make(chunk: Sequence[Problem] = chunk, r: int = r, made: list[Rollout] = made) -> list[dict[str, Any]]:
            # A seed per round, so that a resumed run, which skips the finished rounds, writes the same files.
            round_seed = stable_seed(seed, stage, iteration, r)
            made += _round(model, task, chunk, settings, k, hinted, iteration, round_seed, few_shot, progress)
            return [vars(row) for row in made]

        rows = cached_jsonl(folder / f"{stage}_{r:03d}.jsonl", make)
        # Nothing was made: the round is of an earlier process.
        if progress is not None and not made:
            progress(len(rows), None)
        out += [Rollout(**row) for row in rows]
    return out


def _round(model, task, problems, settings, k, hinted, iteration, seed, few_shot, progress) -> list[Rollout]:
    prompts = [task.prompt(p, hint=hinted) for p in problems]
    prefix = task.prefix(hint=hinted) if few_shot else ""
    # What all prompts begin with is computed once: the few-shot text, or the head of a chat template.
    shared, rest = prefix or task.opening, [prompt.removeprefix(task.opening) for prompt in prompts]
    how = dataclasses.asdict(settings)
    how.pop("round_size")
    found: dict[tuple[int, int], Rollout] = {}
    for i, j, done in stream(model, rest, n=k, stop=task.stop, seed=seed, prefix=shared, **how):
        text, answer, ended = read_answer(task, done)
        row = Rollout(
            problem_id=problems[i].id,
            iteration=iteration,
            sample=j,
            hinted=hinted,
            group=problems[i].group,
            prompt=prompts[i],
            completion=text,
            answer=answer,
            gold=problems[i].gold,
            # Judged below, all at once: tasks of code run their programs side by side.
            correct=False,
            verdict="",
            reason="",
            truncated=not ended,
            valid=task.audit(problems[i], text),
            logprob=round(float(sum(done.logprobs)), 4),
            n_tokens=len(done.tokens),
            tokens=kept_tokens(model, prompts[i], done, text),
        )
        found[i, j] = row
        if progress is not None:
            progress(len(found), row)
    # Completions end in an order that depends on the batch; records are in the order of the problems.
    rows = [found[key] for key in sorted(found)]
    at = [problems[i] for i, _ in sorted(found)]
    right = judge(task, at, [row.answer for row in rows], [not row.truncated for row in rows])
    return [dataclasses.replace(row, correct=z) for row, z in zip(rows, right)]


def check_lengths(
    model: Model,
    task: Task,
    problems: Sequence[Problem],
    max_new_tokens: int,
    *,
    hinted: bool = False,
    few_shot: bool = True,
) -> None:
    """Raises UserError, naming the problem, unless prompts leave room for `max_new_tokens` in the model's context."""
    texts = {p.id: task.prompt(p, hint=hinted) for p in problems}
    prefix, room = task.prefix(hint=hinted) if few_shot else "", model.config.max_positions
    tokenizer = tokenizer_of(model)
    # The longest texts stand for all, with those that could exceed the context if each of their bytes were a token:
    # encoding every prompt of a large task would delay the start.
    free = room - max_new_tokens - len(tokenizer.encode(prefix, bos=True))
    names = sorted(texts, key=lambda k: len(texts[k]), reverse=True)
    for name in (k for i, k in enumerate(names) if i < 16 or len(texts[k].encode()) > free):
        count = len(tokenizer.encode(task.behind(prefix, texts[name]), bos=True))
        if count + max_new_tokens > room:
            raise UserError(
                f"problem {name}: {count} prompt tokens + max_new_tokens={max_new_tokens} exceed the model's context "
                f"of {room} tokens; lower max_new_tokens, or take fewer few-shot examples or a model with more context"
            )


def tokenizer_of(model: Model) -> Tokenizer:
    """Returns the model's tokenizer; raises UserError if its folder has none."""
    if model.tokenizer is None:
        raise UserError("this needs a tokenizer, and the model has none (no tokenizer files in its folder)")
    return model.tokenizer


def read_answer(task: Task, done: Completion) -> tuple[str, str | None, bool]:
    """Returns a completion up to the end of its answer, the answer, and whether it is complete: ended by a stop id or
    stop string, or followed by more text. A <think> block stays in the text, but holds no answer."""
    thinking, written = split_thinking(done.text or "", task.opens_thinking)
    if written is None:
        return thinking, None, done.stopped
    part = None if done.stopped else task.answered_part(written)
    text = task.cut(written) if part is None else part
    return thinking + text, task.parse(text), done.stopped or part is not None


def judge(task: Task, problems: Sequence[Problem], answers: Sequence[str | None], ended: Sequence[bool]) -> list[bool]:
    """Returns whether answers are right, in evaluation and as rewards."""
    # A truncated completion is wrong even if its answer matches: it may be the first digits of a longer one.
    return task.judged(problems, [a if done else None for a, done in zip(answers, ended, strict=True)])


def select(
    rollouts: Sequence[Rollout], problems: dict[str, Problem], task: Task, rules: Selection, seen: Iterable[tuple] = ()
) -> list[Rollout]:
    """Returns a loop's rollouts with verdict and reason: kept, rationalised (kept, but hinted) or rejected.

    `seen`: `text_key` of rows that earlier loops kept, if data accumulates: their duplicates are rejected.
    """
    taken = set(seen)
    per_problem: dict[str, int] = collections.Counter()
    out = []
    for row in rollouts:
        reason = why_rejected(row, problems[row.problem_id], task, rules)
        key = text_key(row)
        if reason is None and rules.dedupe and key in taken:
            reason = "duplicate"
        cap = math.inf if rules.cap_per_problem is None else rules.cap_per_problem
        if reason is None and per_problem[row.problem_id] >= cap:
            reason = "over the cap per problem"
        if reason is not None:
            out.append(dataclasses.replace(row, verdict="rejected", reason=reason))
            continue
        # Only kept rows enter: a rejected one must not make a duplicate of a later row.
        taken.add(key)
        per_problem[row.problem_id] += 1
        verdict, reason = ("rationalised", "right answer, given as a hint") if row.hinted else ("kept", "right answer")
        out.append(dataclasses.replace(row, verdict=verdict, reason=reason))
    return out


def text_key(row: Any) -> tuple[str, str]:
    """Returns what makes two rows duplicates: the problem and the text up to white space."""
    return row.problem_id, " ".join(row.completion.split())


def why_rejected(row: Rollout, problem: Problem, task: Task, rules: Selection) -> str | None:
    """Returns why a rollout is not trained on, whatever the others are; or None."""
    if row.truncated:
        return "truncated"
    if row.answer is None:
        return "no answer"
    if not row.correct:
        return "wrong answer"
    if rules.exact_filter and row.valid is False:
        return "wrong step"
    # The hint leaves the prompt before training: a rationale that mentions it would refer to nothing.
    if row.hinted and (leak := task.leak(problem, row.completion)) is not None:
        return f"hint leak: {leak}"
    return None


def kept_tokens(model: Model, prompt: str, done: Completion, text: str) -> list[int]:
    """Returns the token ids of `text`, the kept part of a completion, for training and scoring.

    They are the sampled ids with the stop token. Where a stop string or the task cut the text within a token, that
    token is encoded anew. A completion without a stop token gets the one of `Tokenizer.end_of`.
    """
    tokenizer = tokenizer_of(model)
    # An encoder-decoder's output has no text before it. Otherwise 64 characters do: only the last token matters.
    alone = tokenizer.encoder_end is not None
    before = [] if alone else tokenizer.encode(prompt[-64:], bos=True)
    drawn = bool(done.tokens) and done.tokens[-1] in model.stop_ids
    body = done.tokens[:-1] if drawn else done.tokens
    end = done.tokens[-1] if drawn and text == done.text else tokenizer.end_of(prompt)
    return [*tokenizer.keep(body, text, after=before), end]


def to_example(tokenizer: Tokenizer, prompt: Any, completion: str, tokens: Sequence[int] | None = None) -> Example:
    """Returns a training example: BOS and prompt, then completion and one EOS (so that the model learns to stop).

    Args:
      prompt: a text or chat messages. A rendered conversation ends with its end of turn in place of EOS.
      tokens: the sampled ids of the completion (`Rollout.tokens`). They are kept when the hint is taken out of the
        prompt or few-shot text is put before it: the prompt is encoded by itself, as in sampling. None: the completion
        is encoded.
    """
    prompt = as_text(tokenizer, prompt)
    if tokens is not None:
        return Example(tokenizer.encode_prompt(prompt), list(tokens))
    head, tail = tokenizer.encode_pair(prompt, completion)
    return Example(head, tokenizer.ended(tail, prompt))


def show_hint(row: Rollout, share: float) -> bool:
    """Returns whether a rationalised row is trained on with the hint in its prompt (an ablation; 0 in the paper)."""
    # Seeded by the row, so that the choice is the same whenever and in whichever process the row is trained on.
    return row.hinted and share > 0 and random.Random(f"{row.problem_id}/{row.iteration}").random() < share


def summary(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Returns counts and rates of one loop's rollouts (after `select`): columns of its metrics row."""
    plain, hinted = [r for r in rollouts if not r.hinted], [r for r in rollouts if r.hinted]
    kept, rationalised = _of(rollouts, "kept"), _of(rollouts, "rationalised")
    solved, problems = {r.problem_id for r in plain if r.correct}, len({r.problem_id for r in plain})
    out: dict[str, Any] = {
        "attempted": len(plain),
        "solved": sum(r.correct for r in plain),
        "solve_rate": _mean([r.correct for r in plain]),
        "problems_solved": len(solved),
        "hinted_attempted": len(hinted),
        "hinted_solved": sum(r.correct for r in hinted),
        "hinted_solve_rate": _mean([r.correct for r in hinted]),
        "kept": len(kept),
        "rationalised": len(rationalised),
        "share_rationalised": len(rationalised) / max(1, len(kept) + len(rationalised)),
        "truncation_rate": _mean([r.truncated for r in rollouts]),
        "parse_failure_rate": _mean([r.answer is None for r in rollouts]),
        "mean_tokens": _mean([r.n_tokens for r in rollouts]),
        "distinct_per_problem": len({(r.problem_id, r.completion) for r in plain}) / problems if problems else None,
        "valid_kept": _mean([r.valid for r in kept if r.valid is not None]),
        "valid_rationalised": _mean([r.valid for r in rationalised if r.valid is not None]),
    }
    for group in sorted({r.group for r in rollouts}, key=lambda g: (len(g), g)):
        out[f"kept/{group}"] = sum(r.group == group for r in kept)
        out[f"rationalised/{group}"] = sum(r.group == group for r in rationalised)
    for reason, count in sorted(collections.Counter(r.reason.split(":")[0] for r in _of(rollouts, "rejected")).items()):
        out[f"rejected_{reason.replace(' ', '_')}"] = count
    return out


def _of(rollouts: Sequence[Rollout], verdict: str) -> list[Rollout]:
    return [r for r in rollouts if r.verdict == verdict]


def _mean(values: Sequence[Any]) -> float | None:
    return float(sum(values)) / len(values) if values else None


def generate(
    model: Model, prompts: Sequence[Any], *, thoughts: ThoughtConfig | bool | None = None, **sampling: Any
) -> list[list[Completion]]:
    """Samples n completions of every prompt. Warns where one is empty.

    Args:
      prompts: texts, lists of chat messages [{"role": "user", "content": text}], to which the tokenizer's chat template
        is applied, or lists of token ids taken as they are.
      thoughts: True or a ThoughtConfig samples a thought before every token (Quiet-STaR); completions then hold them.
      sampling: max_new_tokens, temperature, top_k, top_p, n, stop, seed, prefix, slots, weights: see
        `sample.batching.SamplingOptions`, also for the errors.

    Returns:
      Per prompt, a list of n `Completion(text, tokens, logprobs, sample_logprobs, stopped)`.
    """
    prompts = batching.listed(prompts)
    if thoughts:
        # Imported here: slow, and needed for thoughts alone.
        from qstar.thoughts import decode

        found: list[list[Completion]] = list(map(list, decode.generate(model, prompts, thoughts=thoughts, **sampling)))
    else:
        found = batching.generate(model, prompts, **sampling)
    empty = [(p, d) for p, some in zip(prompts, found) for d in some if d.text == "" and d.stopped]
    # The tokens of a stop string are cut off, the EOS is not.
    if ended := [prompt for prompt, done in empty if done.tokens]:
        chat = model.tokenizer.chat if model.tokenizer is not None else None
        raw = chat is not None and isinstance(ended[0], str) and not chat.rendered(ended[0])
        advice = "this model has a chat template: give the prompt as messages (--chat)" if raw else "try another prompt"
        warnings.warn(f"a completion is empty, the model ended it at once; {advice}", QstarWarning, stacklevel=2)
    elif empty:
        advice = "leave that out of `stop`, or end the prompt with it"
        warnings.warn(f"a completion is empty: it begins with a stop string; {advice}", QstarWarning, stacklevel=2)
    return found
