"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from qstar.plan.program import Plan
from qstar.plan.topology import Topology


def size(n: float) -> str:
    """Returns bytes in words: 1.5 GB (10^9), as chips are sold and papers count."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} B"


def seconds(t: float) -> str:
    """Returns a time in words."""
    return f"{t:.3g} s" if t >= 1 else f"{1e3 * t:.3g} ms"


def lines(plan: Plan, topology: Topology) -> list[str]:
    """Returns what there is to say of one program."""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    out = [f"{plan.name}: {verdict}, {size(plan.peak)} of {size(plan.hbm)} per chip"]
    rows = {**plan.parts, "activations": plan.activations} if plan.compiled else dict(plan.parts)
    if not plan.compiled and plan.activations:
        rows["activations, at least"] = plan.activations
    out.append("    " + " · ".join(f"{k} {size(v)}" for k, v in rows.items() if v))
    if resident := {k: v for k, v in plan.resident.items() if v}:
        out.append("    kept beside it: " + " · ".join(f"{k} {size(v)}" for k, v in resident.items()))
    if plan.compiled:
        moved = " · ".join(
            f"{k} {size(c['bytes'])} in {c['count']:.0f}" for k, c in plan.collectives.items() if c["bytes"]
        )
        out.append(f"    collectives: {moved or 'none'}")
        out.append(
            f"    {plan.flops:.3g} FLOPs, {plan.needed:.3g} needed ({plan.rule}) · memory traffic {size(plan.traffic)}"
        )
        which = max(plan.times, key=plan.times.get)
        each = ", ".join(f"{k} {seconds(t)}" for k, t in plan.times.items())
        out.append(f"    at best {seconds(plan.seconds)} ({which}; {each}) · MFU at most {100 * plan.mfu:.0f}%")
        out.append(f"    compiled in {plan.compile_seconds:.0f} s, {plan.compile_cpu_seconds:.0f} of a CPU")
    return out + [f"    note: {note}" for note in plan.notes]


def as_json(plans: list[Plan], topology: Topology, mesh: str, advice: list[str]) -> dict[str, Any]:
    """Returns everything as plain values; sizes in bytes, per chip."""
    programs = [dataclasses.asdict(p) | {"seconds_at_best": p.seconds} for p in plans]
    chip = dataclasses.asdict(topology.chip)
    return {
        "topology": topology.name,
        "chips": len(topology.devices),
        "chip": chip,
        "mesh": mesh,
        "fits": all(p.fits for p in plans),
        "programs": programs,
        "advice": advice,
    }


def comparison(found: list[dict[str, Any]]) -> str:
    """Returns a table of one program per line and slice: how it scales."""
    rows = [("slice", "chips", "program", "per chip", "activations", "collectives", "at best", "MFU")]
    for plan in found:
        for p in plan["programs"]:
            wire = sum(c["bytes"] for c in p["collectives"].values())
            numbers = (
                size(p["peak"]),
                size(p["activations"]),
                size(wire),
                seconds(p["seconds_at_best"]),
                f"{100 * p['mfu']:.0f}%",
            )
            rows.append((plan["topology"], str(plan["chips"]), p["name"], *numbers))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows)
