"""Advice for programs that do not fit: what is too large and what would fit, by arithmetic alone."""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import Mesh

from qstar.plan.program import Plan
from qstar.plan.show import size

NAMES = {"optimiser": "optimiser state", "cache": "KV cache"}


def culprit(plan: Plan) -> tuple[str, int]:
    """Returns the largest thing in a program that does not fit, and its bytes per chip."""
    things = {NAMES.get(k, k): v for k, v in {**plan.parts, **plan.resident, "activations": plan.activations}.items()}
    name = max(things, key=things.get)
    return name, things[name]


def advice(plan: Plan, mesh: Mesh, config: Any) -> list[str]:
    """Returns one line that names the culprit, and lines that say what would help."""
    name, bytes_ = culprit(plan)
    over = plan.peak - plan.hbm
    out = [f"{plan.name}: {name} {size(bytes_)} of {size(plan.hbm)} per chip, {size(over)} too much in all"]
    chips, split = mesh.size, mesh.shape["fsdp"] * mesh.shape["tensor"]
    sharded = sum(plan.parts.get(k, 0) for k in ("parameters", "optimiser")) + sum(plan.resident.values())
    rest = plan.peak - sharded
    if split < chips:
        left = sharded * split // chips + rest
        known = "" if plan.activations else ", before activations"
        verdict = f"fits{known}" if left <= plan.hbm else f"still {size(left - plan.hbm)} too much"
        out.append(f"fsdp={chips // mesh.shape['tensor']} would hold {size(left)} per chip ({verdict})")
    room = plan.hbm - rest
    if room > 0 and sharded > 0:
        need = 2 ** math.ceil(math.log2(max(1, sharded * split / room)))
        if need > chips:
            out.append(
                f"{need} of these chips with fsdp={need} would hold parameters and optimiser beside what else there is"
            )
    if plan.parts.get("optimiser") and not config.get("train", {}).get("lora_rank"):
        if config.get("method") not in ("quiet_star", "guided_cot", "rl"):
            out.append("train.lora_rank=16 would leave next to no optimiser state and float32 masters")
    if plan.activations > plan.hbm // 4 and plan.parts.get("optimiser"):
        train = config.get("train", {})
        if config.get("model", {}).get("remat", "none") != "block":
            out.append("model.remat=block would keep the blocks' inputs alone")
        rows = train.get("batch_size", 1) // train.get("accumulate", 1)
        num_shards = chips // mesh.shape["tensor"]
        if rows > num_shards:
            out.append(
                f"train.accumulate={train.get('batch_size', 1) // num_shards} would run one row per chip at a time"
            )
        out.append(f"tensor={2 * mesh.shape['tensor']} would split the activations of heads and MLP once more")
    if plan.name.startswith("sampling") and plan.activations + plan.parts.get("cache", 0) > plan.hbm // 4:
        out.append(
            "fewer rows side by side (sample.slots, of guided_cot's large model world.large.slots) take less of both"
        )
    return out
