"""Dry runs: all checks of a run, its samples, updates and tokens per stage, and its peak memory; nothing is written."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qstar import methods
from qstar.errors import UserError
from qstar.methods.guided_hotpotqa import MultiHop
from qstar.methods.guided_two_hop import BATCH, LENGTH
from qstar.methods.pair_rows import fit
from qstar.methods.pairs import CONTEXTS
from qstar.methods.star import steps_for
from qstar.models.hub import resolve
from qstar.models.model import Model
from qstar.plan import host
from qstar.plan.steps import Assumed
from qstar.runs.folder import ChecksPassed
from qstar.sample.batching import MAX_SLOTS
from qstar.text.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage does at most."""

    stage: str
    samples: int = 0
    sampled_tokens: int = 0
    updates: int = 0
    trained_tokens: int = 0  # places in the rows of all updates, padding included; of responses in RL and distillation


def dry_run(config: Any, workdir: Any, console: Any) -> dict[str, Any]:
    """Checks a run and returns its model, prompt lengths, work and memory as plain values.

    Raises UserError for whatever the run would refuse before it starts.
    """
    passed = methods.check(config, workdir, console)
    ctx, found = passed.context, {"name": config.get("name"), "method": config.method, "workdir": str(workdir)}
    if ctx is None:
        return found
    assumed, longest = lengths(ctx, passed.resolved)
    if longest:
        found["prompt_tokens"], found["prefix_tokens"] = longest, assumed.prefix
    found["work"] = [dataclasses.asdict(w) for w in work(passed)]
    smaller = config.copy_and_resolve_references()
    if "sample" in config and "round_size" in config.sample:
        # As many rows are decoded side by side as there are samples, up to `round_size`.
        most = max([w["samples"] for w in found["work"] if not w["updates"]], default=0)
        with smaller.unlocked():
            smaller.sample.round_size = max(1, min(config.sample.round_size, most))
    try:
        need = host.estimate(smaller, assumed)
    except UserError as e:  # a method or a kind of model that `qstar plan` does not take
        return found | {"not_estimated": str(e)}
    limit, phases = host.machine(), {p.name: p.parts for p in need.phases}
    found["memory"] = {"peak": need.peak, "process": need.process, "machine": limit, "phases": phases}
    if jax.default_backend() == "cpu" and need.peak > limit:
        low = host.estimate(smaller, assumed, compiled=False).peak
        found["refused"] = host.refusal(smaller, assumed, need, need.peak - low, limit)
    return found


def lengths(ctx: Any, found: dict[str, Any]) -> tuple[Assumed, int]:
    """Returns the lengths to assume, in tokens, and that of the longest prompt (0: not counted).

    Of a run on rows of one's own the longest row is counted, of a run on a task the prompts and the few-shot prefix;
    other runs get the defaults. The prompt that counts for memory is not the longest: few long prompts do not fill the
    slots. `found`: `ChecksPassed.resolved`.
    """
    if ctx.settings.method in CONTEXTS:
        options = ctx.settings.model
        tokenizer = load_tokenizer(resolve(options["path"], options.get("revision"), weights=False))
        rows = fit(ctx.say, Model(found["model"], {}, tokenizer), ctx.read(None)[0], 0)[1]
        return Assumed(row=max(sum(map(len, some)) for some in rows)), 0
    task, tokenizer = getattr(ctx, "task", None), getattr(ctx, "tokenizer", None)
    if task is None or tokenizer is None or not hasattr(task, "prefix"):
        return Assumed(), 0
    problems = [*task.pool(1, ctx.seed, None), *task.problems(ctx.settings.evaluate.split)]
    # Sorted by characters: encoding every prompt of a large task takes long.
    texts = sorted({task.prompt(p) for p in problems}, key=len, reverse=True)
    prefix = task.prefix()

    def tokens(some: list[str]) -> int:
        return max(len(tokenizer.encode(text, bos=not prefix)) for text in some)

    slots, samples = ctx.settings.sample.slots or MAX_SLOTS, getattr(getattr(ctx.settings, "loop", None), "k", 1)
    shares = [min(1.0, (i + 1) * samples / slots) * len(text) for i, text in enumerate(texts)]
    most = shares.index(max(shares))
    share, longest = shares[most] / len(texts[most]), tokens(texts[:16])
    prompt = longest if most < 16 and share == 1 else round(share * tokens(texts[most : most + 16]))
    return Assumed(prompt, len(tokenizer.encode(prefix, bos=True)) if prefix else 0), longest


# ------------------------------------------------------------------------------------------------------------- work


def work(passed: ChecksPassed) -> list[Work]:
    """Returns what the stages of a run do at most: all samples are kept, no arm stops early."""
    by = {"star": _star, "v_star": _star, "rl": _rl, "quiet_star": _quiet_star, "guided_cot": _guided_cot}
    by |= dict.fromkeys(CONTEXTS, _pairs)
    ctx = passed.context
    base, corpus = getattr(ctx.settings, "base", None), getattr(ctx, "corpus", None)
    # A pretrained model is taken as it is, but on text: there the base's text may be another.
    out = []
    if base is not None and base.steps and (corpus is not None or not ctx.settings.model.get("path")):
        out.append(_updates("base", base, base.steps, ctx, getattr(corpus, "base_length", 0)))
    return out + list(by[ctx.settings.method](ctx, passed.resolved["arms"])) if ctx.settings.method in by else out


def _updates(stage: str, s: Any, steps: int, ctx: Any, length: int = 0) -> Work:
    length = length or getattr(s, "row_length", 0) or getattr(getattr(ctx, "corpus", None), "length", 0)
    return Work(stage, updates=steps, trained_tokens=steps * s.batch_size * length)


def _samples(stage: str, count: int, tokens: int) -> Work:
    return Work(stage, count, count * tokens)


def _evaluation(ctx: Any, name: str, rounds: int) -> Iterator[Work]:
    e, new = ctx.settings.evaluate, ctx.settings.sample.max_new_tokens
    count = len(ctx.task.problems(e.split)[: e.limit or None]) * (2 if e.hinted else 1)
    yield _samples(f"{name}: evaluation of {rounds} models", count * rounds, new)
    if e.split == "val":
        # Of the best model alone, see `Arm.finish`.
        yield _samples(f"{name}: test", len(ctx.task.problems("test")[: e.limit or None]), new)


def _star(ctx: Any, arms: dict[str, Any]) -> Iterator[Work]:
    train, new = ctx.settings.train, ctx.settings.sample.max_new_tokens
    supervision = getattr(ctx.settings, "sft", None)
    if supervision is not None:
        rows = len(ctx.task.pool(0, ctx.seed, supervision.problems))
        yield _updates("G_SFT", train, steps_for(supervision.steps, 1, rows, train.batch_size), ctx)
    for name, loop in arms.items():
        problems = len(ctx.task.pool(1, ctx.seed, loop.problems_per_iter))
        each = problems * loop.k * (2 if loop.rationalize else 1)
        yield _samples(f"{name}: sampling of {loop.n_iters} loops", each * loop.n_iters, new)
        yield _updates(f"{name}: fine-tuning", train, star_updates(loop, problems, train.batch_size), ctx)
        if supervision is not None:
            pairs = problems * ctx.settings.pairs.per_problem
            for kind, steps in pair_updates(loop, functools.partial(getattr, ctx.settings), pairs).items():
                what = kind if kind == "rpo" else f"verifier {kind}"
                yield _updates(f"{name}: {what}", getattr(ctx.settings, kind), steps, ctx)
        yield from _evaluation(ctx, name, loop.n_iters + 1)
        if supervision is not None and ctx.settings.select.samples:
            s, every = ctx.settings.select, loop.verifiers and loop.verifier_every_iter
            count = len(ctx.task.problems(ctx.settings.evaluate.split)[: s.limit or None]) * s.samples
            yield _samples(f"{name}: candidates for selection", count * (loop.n_iters if every else 1), new)


def star_updates(loop: Any, problems: int, batch_size: int) -> int:
    """Returns the updates of all loops of an arm of STaR if every sample of every problem is kept."""
    steps = 0
    # V-STaR's generators may stay G_SFT, or be trained on pairs (`pair_updates`).
    loops = loop.n_iters if getattr(loop, "retrain", True) and getattr(loop, "update", "sft") == "sft" else 0
    for n in range(1, loops + 1):
        rows = problems * (loop.k * (n if loop.accumulate else 1) + loop.include_sft_data)
        most = math.inf if loop.max_epochs is None else max(1, loop.max_epochs * rows / batch_size)
        steps += int(min(most, steps_for(loop.steps, n, rows, batch_size)))
    return steps


def pair_updates(loop: Any, settings: Callable[[str], Any], rows: int) -> dict[str, int]:
    """Returns the updates of an arm of V-STaR on pairs and for verifiers, by config section; `rows` each time."""
    once = min(1, loop.n_iters)
    times = dict.fromkeys(loop.verifiers, loop.n_iters if loop.verifier_every_iter else once)
    times |= {"rpo": loop.n_iters} if loop.update == "rpo" else {}
    each = {kind: settings(kind) for kind in times}
    return {k: times[k] * (s.steps or math.ceil(s.epochs * rows / s.batch_size)) for k, s in each.items()}


def _rl(ctx: Any, arms: dict[str, Any]) -> Iterator[Work]:
    for name, arm in arms.items():
        yield from _reinforced(ctx, name, arm)
        yield from _evaluation(ctx, name, ctx.settings.loop.rounds + 1)


def _reinforced(ctx: Any, name: str, arm: dict[str, Any], models: int = 1) -> Iterator[Work]:
    s, count = arm["train"], models * arm["train"].updates * arm["train"].prompts * arm["rl"].group
    yield _samples(f"{name}: sampling", count, s.max_new_tokens)
    yield _updates(f"{name}: gradient steps", s, count * s.epochs // s.batch_size, ctx, s.max_new_tokens)


def _quiet_star(ctx: Any, arms: dict[str, Any]) -> Iterator[Work]:
    for name, arm in arms.items():
        yield _updates(name, ctx.update_settings(arm["arm"].train), arm["arm"].steps, ctx)


def _guided_cot(ctx: Any, arms: dict[str, Any]) -> Iterator[Work]:
    students, s, task = ctx.settings.students, ctx.settings.distil_train, ctx.task
    g = task.settings
    if isinstance(task, MultiHop):
        chains, test = len(task.teacher_problems()) + len(task.test), len(task.test)
        yield _samples("large model: chains of thought", chains, g.cot_tokens)
        yield _samples("large model: answers without a student", 3 * test, g.answer_tokens)
    else:
        steps = {"large model": g.copy_steps + g.mixed_steps, "small models": students * g.small_steps}
        steps["small models alone"] = students * g.direct_steps
        yield from (Work(name, updates=n, trained_tokens=n * BATCH * LENGTH) for name, n in steps.items())
    for name, arm in arms.items():
        if arm["arm"].start == "base":
            yield _updates(f"{name}: distillation", s, students * arm["arm"].steps, ctx, s.max_new_tokens)
        else:
            rollouts, update = _reinforced(ctx, name, arm, students)
            yield from (rollouts, update)
            if isinstance(task, MultiHop) and arm["arm"].accuracy_weight:
                yield _samples(f"{name}: answers of the large model", rollouts.samples, g.answer_tokens)
    if isinstance(task, MultiHop):
        # The student before distillation is measured, too.
        count = students * (len(arms) + 1) * len(task.test) * (1 + g.votes)
        yield _samples("evaluation: rationales of the students", count, g.max_new_tokens)
        yield _samples("evaluation: answers of the large model", count, g.answer_tokens)


def _pairs(ctx: Any, arms: dict[str, Any]) -> Iterator[Work]:
    rows = len(ctx.read(None)[0])
    for name, s in arms.items():
        yield _updates(name, s, s.updates_for(rows), ctx)


# ------------------------------------------------------------------------------------------------------------- text


def lines(found: dict[str, Any]) -> list[str]:
    """Returns a dry run as text."""
    out = [f"{found['name']}: checked; nothing was written"]
    if found.get("prompt_tokens"):
        prefix = f", after a prefix of {found['prefix_tokens']:,}" if found["prefix_tokens"] else ""
        out.append(f"  longest prompt: {found['prompt_tokens']:,} tokens{prefix}")
    for w in found.get("work", []):
        samples = f"{w['samples']:,} samples, {w['sampled_tokens']:,} tokens" if w["samples"] else ""
        tokens = f", {w['trained_tokens']:,} tokens" if w["trained_tokens"] else ""
        updates = f"{w['updates']:,} updates{tokens}" if w["updates"] else ""
        out.append(f"  {w['stage']}: at most {samples or updates or 'nothing'}")
    if "not_estimated" in found:
        out.append(f"  memory: not estimated ({found['not_estimated']})")
    if "memory" in found:
        memory = found["memory"]
        for name, parts in memory["phases"].items():
            shown = " · ".join(f"{k} {n / 1e9:.2f} GB" for k, n in parts.items() if n >= 5e6)
            out.append(f"  memory, {name}: {sum(parts.values()) / 1e9:.2f} GB" + (f" ({shown})" if shown else ""))
        peak, machine, process = (f"{memory[key] / 1e9:.1f} GB" for key in ("peak", "machine", "process"))
        out.append(f"  memory at its peak: about {peak} of {machine} ({process} of it programs and libraries)")
    return out
