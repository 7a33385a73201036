"""Bounds for a whole config: time per training step and per rollout, and chip-hours, at the roofline of its programs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from qstar.methods import pairs, star
from qstar.methods.guided_cot import GuidedConfig
from qstar.methods.preference_data import PairSettings
from qstar.methods.quiet_star import QuietConfig
from qstar.methods.reinforce import ReinforceSettings
from qstar.methods.rl import RewardedSettings
from qstar.methods.v_star import PRESETS, Supervision, VStarConfig
from qstar.methods.verifier import VerifierSettings
from qstar.plan.cases import base_stage
from qstar.plan.dry_run import pair_updates, star_updates
from qstar.plan.program import Plan
from qstar.plan.steps import Assumed, Case
from qstar.plan.topology import Topology
from qstar.runs.stages import TrainSettings


def runs(config: Any, assumed: Assumed) -> tuple[dict[str, int], int]:
    """Returns how often each update runs in a config, by a part of its program's name, and the number of rollouts.

    At most: every sample is kept, no arm stops early. Evaluation is not counted.
    """
    case = Case(config, None, assumed)  # type: ignore[arg-type]  # settings alone are read
    counts = {"star": _star, "v_star": _star, "quiet_star": _quiet_star, "guided_cot": _guided_cot, "rl": _rl}
    steps, rollouts = counts.get(config.method, _pairs)(case)
    if base := base_stage(case):
        name, _, count = base
        steps[name] = steps.get(name, 0) + count
    return steps, rollouts


def _star(case: Case) -> tuple[dict[str, int], int]:
    verifiers = case.config.method == "v_star"
    cls, presets = (VStarConfig, PRESETS) if verifiers else (star.VariantConfig, star.PRESETS)
    batch, found = case.settings(TrainSettings, "train").batch_size, case.problems
    out, rollouts = {"fine-tuning": 0}, 0
    if verifiers:
        # G_SFT, by the program of all fine-tuning.
        s = case.settings(Supervision, "sft")
        out["fine-tuning"] += star.steps_for(s.steps, 1, min(s.problems or found, found), batch)
    for loop in case.arms(cls, "loop", presets).values():
        problems = min(loop.problems_per_iter or found, found)
        out["fine-tuning"] += star_updates(loop, problems, batch)
        rollouts += loop.n_iters * problems * loop.k * (2 if loop.rationalize else 1)
        if verifiers:
            rows = problems * case.settings(PairSettings, "pairs").per_problem
            steps = pair_updates(loop, functools.partial(case.settings, VerifierSettings), rows)
            out |= {kind.upper(): out.get(kind.upper(), 0) + n for kind, n in steps.items()}
    return out, rollouts


def _quiet_star(case: Case) -> tuple[dict[str, int], int]:
    return {f"{name}: update": arm.steps for name, arm in case.arms(QuietConfig).items()}, 0


def _guided_cot(case: Case) -> tuple[dict[str, int], int]:
    arms, students = case.arms(GuidedConfig).values(), case.config.get("students", 1)
    steps, rollouts = _updates(case, students * sum(arm.start != "base" for arm in arms))
    return {"distillation": students * sum(arm.steps for arm in arms if arm.start == "base"), **steps}, rollouts


def _rl(case: Case) -> tuple[dict[str, int], int]:
    return _updates(case, len(case.config.arms))


def _updates(case: Case, arms: int) -> tuple[dict[str, int], int]:
    s, group = case.settings(ReinforceSettings, "train"), case.settings(RewardedSettings, "rl").group
    each = s.prompts * group
    steps = s.epochs * math.ceil(each / s.batch_size)
    return {"RL: gradient": arms * s.updates * steps, "RL: measuring": arms * s.updates}, arms * s.updates * each


def _pairs(case: Case) -> tuple[dict[str, int], int]:
    out: dict[str, int] = {}
    for name, s in case.arms(pairs.CONTEXTS[case.config.method].TRAIN, "train").items():
        key = "DPO" if case.config.method == "dpo" else name
        out[key] = out.get(key, 0) + s.updates_for(case.assumed.problems)
    return out, 0


def lines(plans: Sequence[Plan], config: Any, assumed: Assumed, topology: Topology) -> list[str]:
    """Returns the lines on time and cost; [] if a program was not compiled."""
    if not all(plan.compiled for plan in plans):
        return []
    steps, rollouts = runs(config, assumed)
    out, total, left = ["bounds of the whole config: links at full speed, everything overlapped"], 0.0, dict(steps)
    # Arms whose programs are equal share one, under the name of the first.
    for plan in plans:
        # The longest, as a name may be the beginning of another arm's.
        key = max((k for k in left if plan.name.startswith(k)), key=len, default=None)
        if key is not None:
            count = left.pop(key)
            total += count * plan.seconds
            out.append(
                f"    {plan.name}: {plan.seconds:.3g} s per step, {count:,} steps, {_hours(count * plan.seconds)}"
            )
    decode = max((p for p in plans if p.tokens and p.rollouts), key=lambda p: p.rollouts, default=None)
    if decode is not None and rollouts:
        reading = sum(p.seconds / p.rollouts for p in plans if p.rollouts and not p.tokens)
        each = reading + decode.seconds / decode.rollouts
        total += rollouts * each
        out.append(f"    rollouts: {1e3 * each:.3g} ms each, {rollouts:,} of them, {_hours(rollouts * each)}")
    chips = len(topology.devices) // topology.chip.devices
    missing = [k for k, n in left.items() if n] + (["rollouts"] if rollouts and decode is None else [])
    note = f"; without {', '.join(missing)}" if missing else ""
    out.append(
        f"    at least {_hours(total)}, {chips * total / 3600:.3g} chip-hours (no evaluation, checkpoints, start{note})"
    )
    return out


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 360 else f"{seconds:.3g} s"
