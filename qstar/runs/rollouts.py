"""Attempts at problems: sampling them in rounds that survive a kill, scoring them, and choosing what is trained on."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qstar.errors import Settings, bounded
from qstar.runs.folder import cached_jsonl, stable_seed
from qstar.models.model import Model
from qstar.sample.batching import default_slots, stream
from qstar.tasks.base import Problem, Task
from qstar.text.packing import Example
from qstar.text.tokenizer import Tokenizer
from qstar.types import Completion, Rollout


@dataclasses.dataclass(frozen=True)
class SampleSettings(Settings):
    """How completions are drawn. Read from a config's `sample` section, field by field."""

    max_new_tokens: int = bounded(96, ge=1)
    temperature: float = bounded(0.0, ge=0, note="0: greedy")  # the release: top_p .9 at temperature .01, near greedy
    top_k: int = bounded(0, ge=0, note="0: off")
    top_p: float = bounded(1.0, gt=0, le=1)
    slots: int | None = bounded(None, ge=1)
    round_size: int = bounded(1024, ge=1)  # completions between two done-markers: what a kill can lose


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is kept for training (spec 5.2, 5.4)."""

    dedupe: bool = True
    cap_per_problem: int | None = None
    min_rationale_tokens: int = 0
    exact_filter: bool = False  # oracle: keep only what the task's step audit passes


def sample_rollouts(
    model: Model,
    task: Task,
    problems: Sequence[Problem],
    settings: SampleSettings,
    *,
    k: int,
    hinted: bool,
    iteration: int,
    seed: int,
    folder: Path,
    stage: str,
    few_shot: bool = True,
    progress: Callable[[int, Rollout | None], None] | None = None,
) -> list[Rollout]:
    """Samples k completions of every problem and scores them, one JSONL file per round of problems.

    A round is a pure function of (model, problems, seed), so that a killed run makes the same files.
    """
    size = max(1, settings.round_size // k)
    if settings.slots is None:  # one shape for all rounds, the last and shorter one too
        settings = dataclasses.replace(settings, slots=default_slots(min(size, len(problems)) * k))
    out: list[Rollout] = []
    for r, start in enumerate(range(0, len(problems), size)):
        chunk = problems[start : start + size]
        round_seed = stable_seed(seed, stage, iteration, r)

        fresh = False

        def make(chunk: Sequence[Problem] = chunk, round_seed: int = round_seed) -> list[dict[str, Any]]:
            nonlocal fresh
            fresh = True
            rows = _round(model, task, chunk, settings, k, hinted, iteration, round_seed, few_shot, progress)
            return [row.to_json() for row in rows]

        rows = cached_jsonl(folder / f"{stage}_{r:03d}.jsonl", make)
        if progress is not None and not fresh:  # an earlier process has made it
            progress(len(rows), None)
        out += [Rollout(**row) for row in rows]
    return out


def _round(model, task, problems, settings, k, hinted, iteration, seed, few_shot, progress) -> list[Rollout]:
    prompts = [task.prompt(p, hint=hinted) for p in problems]
    prefix = task.prefix(hint=hinted) if few_shot else ""
    found: dict[tuple[int, int], Rollout] = {}
    for i, j, done in stream(
        model,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        n=k,
        stop=task.stop,
        seed=seed,
        slots=settings.slots,
        prefix=prefix,
    ):
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
            correct=False,  # judged below
            verdict="",
            reason="",
            truncated=not ended,
            valid=task.audit(problems[i], text),
            logprob=round(float(sum(done.logprobs)), 4),
            n_tokens=len(done.tokens),
            tokens=kept_tokens(model, prefix + prompts[i], done, text),
        )
        found[i, j] = row
        if progress is not None:
            progress(len(found), row)
    rows = [found[key] for key in sorted(found)]
    at = [problems[i] for i, _ in sorted(found)]
    right = judge(task, at, [row.answer for row in rows], [not row.truncated for row in rows])
    return [dataclasses.replace(row, correct=z) for row, z in zip(rows, right)]


def read_answer(task: Task, done: Completion) -> tuple[str, str | None, bool]:
    """Returns a completion up to the end of its answer, the answer, and whether that end was reached: by a stop id or stop
    string, or by text behind the answer."""
    part = None if done.stopped else task.answered_part(done.text)
    text = task.cut(done.text) if part is None else part
    return text, task.parse(text), done.stopped or part is not None


def judge(
    task: Task, problems: Sequence[Problem], answers: Sequence[str | None], ended: Sequence[bool]
) -> Sequence[bool]:
    """Whether answers are right, for evaluations and for rewards alike: what is cut off is wrong, unjudged."""
    return task.judged(problems, [a if done else None for a, done in zip(answers, ended, strict=True)])


def select(
    rollouts: Sequence[Rollout], problems: dict[str, Problem], task: Task, rules: Selection, seen: Iterable[tuple] = ()
) -> list[Rollout]:
    """Returns the rollouts with verdict and reason filled in: kept, rationalised (kept, but hinted) or rejected.

    Args:
      rollouts: unhinted and hinted attempts of one loop, in order.
      seen: (problem, completion) pairs kept before, where data accumulates over loops: no duplicates of them.
    """
    taken = set(seen)
    per_problem: dict[str, int] = collections.Counter()
    out = []
    for row in rollouts:
        reason = why_rejected(row, problems[row.problem_id], task, rules)
        key = (row.problem_id, " ".join(row.completion.split()))
        if reason is None and rules.dedupe and key in taken:
            reason = "duplicate"
        if (
            reason is None
            and rules.cap_per_problem is not None
            and per_problem[row.problem_id] >= rules.cap_per_problem
        ):
            reason = "over the cap per problem"
        if reason is not None:
            out.append(dataclasses.replace(row, verdict="rejected", reason=reason))
            continue
        taken.add(key)
        per_problem[row.problem_id] += 1
        verdict = "rationalised" if row.hinted else "kept"
        why = "right answer, given as a hint" if row.hinted else "right answer"
        out.append(dataclasses.replace(row, verdict=verdict, reason=why))
    return out


def why_rejected(row: Rollout, problem: Problem, task: Task, rules: Selection) -> str | None:
    """Returns why an attempt is not trained on, by itself, or None."""
    if row.truncated:
        return "truncated"
    if row.answer is None:
        return "no answer"
    if not row.correct:
        return "wrong answer"
    if row.n_tokens < rules.min_rationale_tokens:
        return "rationale too short"
    if rules.exact_filter and row.valid is False:
        return "wrong step"
    if row.hinted and (leak := task.leak(problem, row.completion)) is not None:
        return f"hint leak: {leak}"
    return None


def kept_tokens(model: Model, prompt: str, done: Completion, text: str) -> list[int]:
    """Returns the ids that are trained on and scored for `text`, the part of a completion that is kept.

    They are those that were sampled, the stop token included. Where a stop string or the task cut the text, its last token
    is encoded anew if the cut fell within it. What did not end with a stop token gets the tokenizer's EOS.
    """
    tokenizer = model.tokenizer
    alone = tokenizer.encoder_end is not None  # what an encoder-decoder writes has nothing before it
    before = [] if alone else tokenizer.encode(prompt[-64:], bos=True)  # only whether there is text before counts
    drawn = bool(done.tokens) and done.tokens[-1] in model.stop_ids
    body = done.tokens[:-1] if drawn else done.tokens
    end = done.tokens[-1] if drawn and text == done.text else tokenizer.eos_id
    return [*tokenizer.keep(body, text, after=before), end]


def to_example(tokenizer: Tokenizer, prompt: str, completion: str, tokens: Sequence[int] | None = None) -> Example:
    """Returns a training example: BOS and prompt, then completion and EOS (so that the model learns to stop).

    Args:
      tokens: the completion as it was sampled (`Rollout.tokens`). They stay what they are where the hint was taken out of
        the prompt or few-shot text put before it: the prompt is encoded by itself, as the model will read it when it is to
        answer, and no token of the completion reaches into it. None: the completion is encoded.
    """
    if tokens is not None:
        return Example(tokenizer.encode_prompt(prompt), list(tokens))
    head, tail = tokenizer.encode_pair(prompt, completion)
    return Example(head, [*tail, tokenizer.eos_id])


def show_hint(row: Rollout, share: float) -> bool:
    """Whether a rationalised row is trained on with its hint left in (an ablation; the paper's share is 0)."""
    return row.hinted and share > 0 and random.Random(f"{row.problem_id}/{row.iteration}").random() < share


def summary(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Returns the counts and rates of one loop's attempts (after `select`), as the iteration's metrics hold them."""
    plain, hinted = [r for r in rollouts if not r.hinted], [r for r in rollouts if r.hinted]
    kept, rationalised = _of(rollouts, "kept"), _of(rollouts, "rationalised")
    solved = {r.problem_id for r in plain if r.correct}
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
        "distinct_per_problem": _distinct(plain),
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


def _distinct(rollouts: Sequence[Rollout]) -> float | None:
    texts: dict[str, set[str]] = collections.defaultdict(set)
    for r in rollouts:
        texts[r.problem_id].add(r.completion)
    return _mean([len(t) for t in texts.values()])
