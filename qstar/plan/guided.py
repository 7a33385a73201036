"""The programs of LM-Guided CoT and of RL with verifiable rewards."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qstar.methods import distillation, reinforce
from qstar.methods.distillation import DistilTrain, only_updates
from qstar.methods.guided_cot import GuidedConfig
from qstar.methods.guided_hotpotqa import MultiHopSettings
from qstar.methods.reinforce import ReinforceSettings
from qstar.models import heads, scoring
from qstar.models.decoder import PARAM_AXES
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model
from qstar.plan import flops
from qstar.plan.cases import Case, abstract_model, sampling, train_program, trained
from qstar.plan.program import Program
from qstar.runs.rollouts import SampleSettings
from qstar.runs.settings import settings_from
from qstar.sample import seq2seq
from qstar.sample.batching import default_slots, padded_length
from qstar.sample.logits import SamplingParams
from qstar.sample.sampler import Sampler
from qstar.train.distil import DistilSettings, Lesson
from qstar.train.rl import Experience, RLSettings, measure_jit
from qstar.train.state import abstract


def programs(case: Case) -> Iterator[Program]:
    """Distillation and RL of the small model, and both models' sampling, on questions (task hotpotqa and its like)."""
    world = settings_from(MultiHopSettings, case.section("world"), "world")
    small = abstract_model(case, {"path": world.small}, "world.small")
    options = dict(world.large)
    side_by_side = options.pop("slots", None)
    large = None if "url" in options else abstract_model(case, options, "world.large")
    resident = {} if large is None else {"the large model": large.params}
    prompt, R = padded_length(world.small_limit), world.max_new_tokens
    recipes = [settings_from(GuidedConfig, case.config.arms[n].to_dict(), f"arms.{n}") for n in case.config.arms]
    train = settings_from(DistilTrain, case.section("distil_train"), "distil_train")
    kind = settings_from(DistilSettings, case.section("distil"), "distil")
    limit = scoring.text_limit(small.config)
    if any(r.start == "base" for r in recipes):
        other = small if kind.kind == "hard" or large is None else large
        made = distillation.compiled(small.config, other.config, kind, limit, only_updates(train))
        roles = None if kind.kind == "hard" else {"teacher": other.params}
        rows = _responses(case, train.batch_size, prompt, R)
        batch = Lesson(*rows, case.spec((train.batch_size, R), jnp.float32, split=True), *rows[:2])
        needed = flops.respond(small.config, train.batch_size, prompt, R, back=True)
        yield train_program(case, "distillation", small, train, made, batch, needed, roles, resident)
    if any(r.start != "base" for r in recipes):
        s = {**case.section("train"), "max_new_tokens": R}
        yield from _rl(case, small, settings_from(ReinforceSettings, s, "train"), prompt, resident)
    done = trained(case, small, train)
    yield from answering(case, done, world.test * max(1, world.votes), prompt, R, "rationales", resident)
    if large is not None:
        limits = padded_length(world.large_limit)
        kept = {"the small model": done.params}
        chains = "the large model's chains"
        yield from answering(case, large, world.questions, limits, world.cot_tokens, chains, kept, side_by_side)


def rl(case: Case) -> Iterator[Program]:
    """RL with verifiable rewards: sampling, measuring, updates."""
    model = abstract_model(case, case.section("model"))
    train = settings_from(ReinforceSettings, case.section("train"), "train")
    prompt = padded_length(case.assumed.prompt)
    yield from _rl(case, model, train, prompt, {})
    sample = settings_from(SampleSettings, {**case.section("sample"), "max_new_tokens": train.max_new_tokens}, "sample")
    settings = settings_from(RLSettings, case.section("rl"), "rl")
    yield from sampling(case, trained(case, model, train), sample, settings.group, train.prompts * settings.group, 0)


def _rl(case: Case, model: Model, s: ReinforceSettings, prompt: int, resident: dict[str, Any]) -> Iterator[Program]:
    """Measuring the responses of an update, and a gradient step on a minibatch of them."""
    settings, R = settings_from(RLSettings, case.section("rl"), "rl"), s.max_new_tokens
    limit, static = scoring.text_limit(model.config), {"config": model.config, "settings": settings}
    roles = {}
    if settings.estimator == "ppo":
        roles["value"] = case.like(functools.partial(heads.init_critic, model.config.hidden_size), jax.random.key(0))
    rows = _responses(case, s.batch_size, prompt, R)
    each = case.spec((s.batch_size, R), jnp.float32, split=True)
    batch = Experience(*rows, *[each] * 6, case.spec((s.batch_size,), jnp.float32, split=True))
    made = reinforce.compiled(**static, limit=limit, update=only_updates(s))
    needed = flops.respond(model.config, s.batch_size, prompt, R, back=True)
    yield train_program(case, "RL: gradient step", model, s, made, batch, needed, roles, resident)
    start, count = trained(case, model, s), s.prompts * settings.group
    params, all_rows = {"policy": start.params, **roles}, _responses(case, count, prompt, R)
    yield Program(
        f"RL: measuring {count} responses",
        lambda: measure_jit.lower(params, *all_rows, **static, limit=limit),
        {"parameters": params, "batch": all_rows},
        {"the reference": start.params, **resident},
        *flops.respond(model.config, count, prompt, R),
        notes=case.notes(count),
    )


def _responses(case: Case, rows: int, prompt: int, response: int) -> tuple[Any, ...]:
    """Abstract prompts, their masks, and responses."""
    return tuple(case.spec((rows, n), jnp.int32, split=True) for n in (prompt, prompt, response))


def answering(
    case: Case,
    model: Model,
    requests: int,
    prompt: int,
    new: int,
    what: str,
    resident: dict[str, Any],
    slots: int | None = None,
) -> Iterator[Program]:
    """Yields the sampling of either kind of model."""
    if not isinstance(model.config, EncDecConfig):
        settings = SampleSettings(max_new_tokens=new, slots=slots)
        yield from sampling(case, model, settings, 1, requests, 0)
        return
    c, slots = model.config, slots or default_slots(requests)
    sampler = Sampler(c, (c.eos_id,), slots, prompt, new, scoring.text_limit(c))
    ready = jax.eval_shape(lambda p: seq2seq.prepare(p, c), model.params)
    params = {k: abstract({k: v}, case.mesh, PARAM_AXES, seq2seq.rules_of(k))[k] for k, v in ready.items()}
    tokens, lengths = case.spec((slots, prompt), jnp.int32, split=True), case.spec((slots,), jnp.int32, split=True)
    asked = case.spec((slots, 1, 2), jnp.int32, split=True)
    sampling_params = jax.tree.map(lambda x: case.spec(x.shape, x.dtype), jax.eval_shape(SamplingParams.make))
    seed = case.spec((), jax.random.key(0).dtype)
    yield Program(
        f"sampling: {what}, {slots} rows of {prompt} and {new} tokens",
        lambda: seq2seq.sample_rows.lower(params, sampler, tokens, lengths, asked, seed, sampling_params),
        {"parameters": params, "batch": tokens},
        {"the model as it is": model.params, **resident},
        *flops.respond(c, slots, prompt, new),
        steps=new,
        notes=case.notes(slots),
    )
