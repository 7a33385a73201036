"""Programs of a run, from its config: the steps and samplers that `methods` calls, with abstract arguments.

Only the config is read and, where the model is a folder, its config.json.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp

from qstar.data.corpus import TextCorpus
from qstar.errors import require, unknown, within
from qstar.mesh import make_mesh
from qstar.methods import distillation, pairs, reinforce, star
from qstar.methods.distillation import DistilTrain
from qstar.methods.guided_cot import GuidedConfig
from qstar.methods.guided_hotpotqa import MultiHopSettings
from qstar.methods.quiet_data import QuietBase, make_corpus
from qstar.methods.quiet_star import QuietConfig, optimiser, update
from qstar.methods.reinforce import ReinforceSettings
from qstar.methods.resolved import LAYOUTS
from qstar.methods.rl import RewardedSettings
from qstar.methods.v_star import PRESETS, VStarConfig
from qstar.methods.verifier import VerifierSettings, update_step
from qstar.models import heads, scoring
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model
from qstar.models.thought_config import ThoughtConfig
from qstar.plan.program import Program
from qstar.plan.steps import (
    Assumed,
    Case,
    abstract_model,
    decoder_model,
    sampling,
    seq2seq_sampling,
    train_program,
    trained,
)
from qstar.runs.rollouts import SampleSettings
from qstar.runs.settings import BaseSettings, check_keys, narrowed, settings_from
from qstar.runs.stages import TrainSettings, UpdateSettings, check_trainable, only_updates, sft_step
from qstar.sample.batching import default_slots, padded_length
from qstar.thoughts import measure
from qstar.train import flops
from qstar.train.distil import DistilSettings, Lesson
from qstar.train.rl import Experience, RLSettings, measure_jit
from qstar.types import Graded, Preference


def programs(config: Any, devices: Any, assumed: Assumed) -> list[Program]:
    """Returns the programs of a config on devices, those of training first.

    Raises UserError for a method that is unknown or not planned, and for what the method's settings refuse.
    """
    known = {"star": _star, "v_star": _v_star, "quiet_star": _quiet_star, "guided_cot": _guided_cot, "rl": _rl}
    known |= {"sft": _pairs, "dpo": _pairs}
    method = config.get("method")
    if method not in LAYOUTS:
        raise unknown(f"config.method={method!r}", str(method), LAYOUTS)
    require((method in known, f"config.method={method!r}: plan does not take it; it takes {', '.join(known)}"))
    settings_from(LAYOUTS[method].sections, config.to_dict(), "")
    case = Case(config, make_mesh(config.mesh, list(devices)), assumed)
    return [*known[method](case), *_base(case)]


def named(found: list[Program], only: str) -> list[Program]:
    """Returns the programs whose names contain `only`; raises UserError if there is none."""
    names = "; ".join(p.name for p in found)
    out = [p for p in found if only in p.name]
    require((bool(out), f"--only={only}: in the name of no program of this config; they are: {names}"))
    return out


# ---------------------------------------------------------------------------------------------------- the base

BASE = "base"  # its program


def base_stage(case: Case) -> tuple[str, TrainSettings, int] | None:
    """Returns the program, settings and updates of a base that is trained from scratch, None where there is none."""
    options, quiet = case.section("base"), case.config.method == "quiet_star"
    if not options.get("steps") or case.section("model").get("path") and not quiet:
        return None
    if quiet:
        s = narrowed(UpdateSettings, case.settings(QuietBase, "base"))
        length = text_lengths(case.section("data"))[1]
        return BASE, TrainSettings(**vars(s), row_length=length), options["steps"]
    s, train = narrowed(TrainSettings, case.settings(BaseSettings, "base")), case.section("train")
    # Fine-tuning on rows of the same shape is the same program.
    same = all(train.get(k) == getattr(s, k) for k in ("batch_size", "accumulate", "row_length"))
    same = same and case.config.method != "rl" and not train.get("lora_rank")
    return "fine-tuning" if same else BASE, s, options["steps"]


def _base(case: Case) -> Iterator[Program]:
    name, s, _ = base_stage(case) or ("", None, 0)
    if name == BASE and s is not None:
        yield _sft(case, name, decoder_model(case), s)


def _sft(case: Case, name: str, model: Model, s: TrainSettings) -> Program:
    """Returns the update of fine-tuning, which also trains a base from scratch."""
    batch = case.batch(s.batch_size, s.row_length)
    needed = flops.update(model.config, s.batch_size, s.row_length, lora=s.lora_rank > 0)
    return train_program(case, name, model, s, sft_step(model.config, s), batch, needed)


def text_lengths(options: dict[str, Any]) -> tuple[int, int]:
    """Returns the row lengths of a config's `data` section, for the arms and for the base, in tokens; reads no text."""
    if options.get("name") == "fold_digits":
        corpus = make_corpus(options, "")
        return corpus.length, corpus.base_length
    length = options.get("length", inspect.signature(TextCorpus).parameters["length"].default)
    return length, length


# --------------------------------------------------------------------------------------------------- STaR, V-STaR


def _fine_tuning(case: Case) -> tuple[Model, Model, SampleSettings, Program]:
    model, s = decoder_model(case), case.settings(TrainSettings, "train")
    with within("config.train."):
        check_trainable(model.config, s)
    program = _sft(case, "fine-tuning", model, s)
    return model, trained(case, model, s), case.settings(SampleSettings, "sample"), program


def _star(case: Case) -> Iterator[Program]:
    _, done, sample, program = _fine_tuning(case)
    yield program
    variants = case.arms(star.VariantConfig, "loop", star.PRESETS).values()
    # One set of programs for all arms, of the largest k and with a prefix if any arm has one: an upper bound.
    prefix = case.assumed.prefix if any(v.few_shot_at_sample for v in variants) else 0
    yield from sampling(case, done, sample, max(1, *(v.k for v in variants)), sample.round_size, prefix)


def _v_star(case: Case) -> Iterator[Program]:
    model, done, sample, program = _fine_tuning(case)
    yield program
    variants = case.arms(VStarConfig, "loop", PRESETS).values()
    # Each kind once: arms share the settings of a verifier's section, so they would compile the same program.
    trained_on_pairs = {"rpo"} if any(v.update == "rpo" for v in variants) else set()
    for kind in sorted(trained_on_pairs | {kind for v in variants for kind in v.verifiers}):
        s = case.settings(VerifierSettings, kind)
        yield _verifier(case, kind, done, s, {"the model before fine-tuning": model.params})
    yield from sampling(case, done, sample, max(v.k for v in variants), sample.round_size, 0)
    # Log-probabilities of completions, as `scoring.logprobs` computes them: reference values of DPO, selection.
    longest = padded_length(case.assumed.prompt + sample.max_new_tokens)
    length = max(longest, scoring.shared_length(longest))
    rows, shared = max(1, scoring.CHUNK_TOKENS // length), longest <= scoring.SHARED_TOKENS
    ids = case.spec((rows, length), jnp.int32, split=True)
    yield Program(
        f"scoring: {rows} rows of {length} tokens",
        lambda: scoring.next_logprobs.lower(done.params, done.config, ids, ids, ids, shared),
        {"parameters": done.params},
        {},
        *flops.forward(done.config, rows, length, predicted=rows * length),
    )


def _pairs(case: Case) -> Iterator[Program]:
    """Yields the updates of `sft` or `dpo` on rows of one's own."""
    model, method = decoder_model(case), case.config.method
    kind = TrainSettings if method == "sft" else VerifierSettings
    done = set()
    for name, s in case.arms(pairs.CONTEXTS[method].TRAIN, "train").items():
        s = narrowed(kind, dataclasses.replace(s, row_length=s.row_length or padded_length(case.assumed.row)))
        if s in done:
            continue
        done.add(s)
        yield _verifier(case, "dpo", model, s, {}) if method == "dpo" else _sft(case, name, model, s)


def _verifier(case: Case, kind: str, model: Model, s: VerifierSettings, resident: dict[str, Any]) -> Program:
    rows, length = s.batch_size, s.row_length
    batch, needed = case.batch(rows, length), flops.update(model.config, rows, length, lora=s.lora_rank > 0)
    if kind in ("dpo", "rpo"):
        # A pair repeats its prompt before both completions: a row holds at most so many.
        pairs = max(1, length // (2 * case.assumed.prompt))
        two, one = (case.spec(shape, jnp.float32, split=True) for shape in ((rows, pairs, 2), (rows, pairs)))
        step = update_step(model.config, s, kind)
        return train_program(case, kind.upper(), model, s, step, Preference(batch, two, one), needed, resident=resident)
    # Attached here: the model of the config has none, and `update_step` expects it among the parameters.
    head = {"kernel": jnp.zeros((model.config.hidden_size, 1)), "bias": jnp.zeros((1,))}
    params = case.like(lambda p: {**p, "value": head}, model.params)
    grader = Model(model.config.replace(value_head=kind), params, None, case.mesh)
    each = case.spec((rows, length), jnp.float32, split=True)
    graded = Graded(batch, each, each)
    step = update_step(grader.config, s, kind)
    return train_program(case, kind.upper(), grader, s, step, graded, needed, resident=resident)


# ------------------------------------------------------------------------------------------------------ Quiet-STaR


def _quiet_star(case: Case) -> Iterator[Program]:
    options = case.section("thoughts")
    # The text is tokenized by the run; a plan loads no tokenizer, and no shape depends on it.
    options.pop("start_text", None)
    parity = options.pop("parity", False)
    options = check_keys(ThoughtConfig, {"forbidden_ids": (), **options}, "thoughts")
    thoughts = (ThoughtConfig.parity if parity else ThoughtConfig)(**options)
    model, length = decoder_model(case), text_lengths(case.section("data"))[0]
    done = set()
    for name, arm in case.arms(QuietConfig).items():
        t = thoughts.replace(**check_keys(ThoughtConfig, arm.thoughts, f"arms.{name}.thoughts"))
        s = settings_from(UpdateSettings, {**case.section("train"), **arm.train}, f"arms.{name}.train")
        # Arms that differ in nothing that is compiled have the same programs.
        key = (arm.thought_source, t, s.batch_size, s.accumulate, arm.trainable, arm.teacher)
        if key not in done:
            done.add(key)
            yield from _thinking(case, name, model.replace(config=model.config.replace(thoughts=t)), arm, s, length)


def _thinking(
    case: Case, name: str, model: Model, arm: QuietConfig, s: UpdateSettings, length: int
) -> Iterator[Program]:
    config, with_thoughts, key = cast(ModelConfig, model.config), arm.thought_source != "none", jax.random.key(0)
    attach = lambda p, k: heads.attach_thoughts(p, config, k, 0)  # noqa: E731
    start = model.replace(params=case.like(attach, model.params, key)) if with_thoughts else model
    tx = optimiser(only_updates(s), arm.trainable)
    S, teacher = config.required_thoughts.thought_tokens, config if arm.teacher else None
    step = update(config, arm.thought_source, S, tx, s.accumulate, teacher, arm.teacher_weight)
    frozen = {"teacher": case.like(attach, trained(case, model, s).params, key)} if teacher else None
    needed = flops.update(config, s.batch_size, length, with_thoughts=with_thoughts)
    batch = case.batch(s.batch_size, length)
    yield train_program(case, f"{name}: update", start, s, (tx, step), batch, needed, frozen=frozen)
    if not with_thoughts:
        return
    rows = case.section("evaluate").get("batch_size", 8)
    params, text, rng = trained(case, start, s).params, case.batch(rows, length), case.specs(key)
    yield Program(
        f"{name}: thoughts on held-out text, {rows} rows",
        lambda: measure.score.lower(params, config, text, rng),
        {"parameters": params, "batch": text},
        {"the base model": model.params},
        *flops.thoughts(config, rows, length),
    )


# ---------------------------------------------------------------------------------- LM-Guided CoT, reinforcement


def _guided_cot(case: Case) -> Iterator[Program]:
    """Yields distillation and RL of the small model, and both models' sampling, on questions such as hotpotqa."""
    task = case.section("task").get("name")
    line = "plan does not take questions and models that are generated; it takes hotpotqa and 2wikimultihopqa"
    require((task != "two_hop", f"config.task.name={task!r}: {line}"))
    world = case.settings(MultiHopSettings, "guided")
    small = abstract_model(case, {"path": world.small}, "guided.small")
    options = dict(world.large)
    side_by_side = options.pop("slots", None)
    # A large model behind a URL takes no memory here.
    large = None if "url" in options else abstract_model(case, options, "guided.large")
    resident = {} if large is None else {"the large model": large.params}
    prompt, R = padded_length(world.small_limit), world.max_new_tokens
    starts = [a.start for a in case.arms(GuidedConfig).values()]
    train, kind = case.settings(DistilTrain, "distil_train"), case.settings(DistilSettings, "distil")
    if "base" in starts:
        # Hard distillation trains on the teacher's text alone; the other kinds need its logits, so it is in memory.
        other = small if kind.kind == "hard" or large is None else large
        limit = scoring.text_limit(small.config)
        made = distillation.compiled(small.config, other.config, kind, limit, only_updates(train))
        frozen = None if kind.kind == "hard" else {"teacher": other.params}
        residents = resident if frozen is None else {}
        rows = case.responses(train.batch_size, prompt, R)
        batch = Lesson(*rows, case.spec((train.batch_size, R), jnp.float32, split=True), *rows[:2])
        needed = flops.respond(small.config, train.batch_size, prompt, R, back=True)
        yield train_program(case, "distillation", small, train, made, batch, needed, None, residents, frozen)
    if any(start != "base" for start in starts):
        s = case.settings(ReinforceSettings, "train", max_new_tokens=R)
        yield from _rl_updates(case, small, s, prompt, resident)
    done = trained(case, small, train)
    sample, count = SampleSettings(max_new_tokens=R), world.test_questions * max(1, world.votes)
    yield from _answers(case, done, sample, 1, count, prompt, "rationales", resident)
    if large is not None:
        limit, chains = padded_length(world.large_limit), "the large model's chains"
        kept = {"the small model": done.params}
        sample = SampleSettings(max_new_tokens=world.cot_tokens, slots=side_by_side)
        yield from _answers(case, large, sample, 1, world.teacher_questions, limit, chains, kept)


def _answers(
    case: Case, model: Model, s: SampleSettings, k: int, requests: int, prompt: int, what: str, resident: dict[str, Any]
) -> Iterator[Program]:
    if isinstance(model.config, EncDecConfig):
        slots = s.slots or default_slots(requests)
        yield seq2seq_sampling(case, model, what, slots, prompt, s.max_new_tokens, resident)
    else:
        yield from sampling(case, model, s, k, requests, 0)


def _rl(case: Case) -> Iterator[Program]:
    model, train = abstract_model(case, case.section("model")), case.settings(ReinforceSettings, "train")
    prompt = padded_length(case.assumed.prompt)
    yield from _rl_updates(case, model, train, prompt, {})
    sample = case.settings(SampleSettings, "sample", max_new_tokens=train.max_new_tokens)
    done, group = trained(case, model, train), case.settings(RewardedSettings, "rl").group
    yield from _answers(case, done, sample, group, train.prompts * group, prompt, "responses", {})


def _rl_updates(
    case: Case, model: Model, s: ReinforceSettings, prompt: int, resident: dict[str, Any]
) -> Iterator[Program]:
    with within("config.train."):
        check_trainable(model.config, s)
    settings, R = narrowed(RLSettings, case.settings(RewardedSettings, "rl")), s.max_new_tokens
    limit, static = scoring.text_limit(model.config), {"config": model.config, "settings": settings}
    roles = {}
    # PPO alone has a critic; GRPO and RLOO take their baseline from the group.
    if settings.estimator == "ppo":
        roles["value"] = case.like(functools.partial(heads.init_critic, model.config.hidden_size), jax.random.key(0))
    each, one = (case.spec(shape, jnp.float32, split=True) for shape in ((s.batch_size, R), (s.batch_size,)))
    batch = Experience(*case.responses(s.batch_size, prompt, R), each, each, each, each, each, each, one)
    made = reinforce.compiled(**static, limit=limit, update=only_updates(s))
    needed = flops.respond(model.config, s.batch_size, prompt, R, back=True, lora=s.lora_rank > 0)
    yield train_program(case, "RL: gradient step", model, s, made, batch, needed, roles, resident)
    # All responses of an update are scored at once, unlike the gradient steps on minibatches of them.
    start, count = trained(case, model, s), s.prompts * settings.group
    params, rows = {"policy": start.params, **roles}, case.responses(count, prompt, R)
    yield Program(
        f"RL: measuring {count} responses",
        lambda: measure_jit.lower(params, *rows, **static, limit=limit),
        {"parameters": params, "batch": rows},
        # With LoRA the reference is the policy without its adapters.
        {**({} if s.lora_rank else {"the reference": model.params}), **resident},
        *flops.respond(model.config, count, prompt, R),
    )
