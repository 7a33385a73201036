"""Rotary positions, with the frequency scalings of transformers: linear, dynamic, yarn, longrope, llama3.

The scaling is read from config.json by `read_scaling`, which checks it, and kept in `ModelConfig.rope_scaling`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.errors import require
from qstar.models import fields
from qstar.models.config import ModelConfig
from qstar.models.fields import Flag, Number, Numbers

RopeTables = tuple[jax.Array, jax.Array]  # of rotary positions: cosines and signed sines [T, rotary_dim]

_FACTOR = Number(1e-6, 1e6)
_ORIGINAL = {"original_max_position_embeddings": Number(2, 2**31 - 1, integer=True)}
# Of each kind: the keys that it needs, and those that it may have.
KINDS: dict[str, tuple[dict[str, fields.Field], dict[str, fields.Field]]] = {
    "default": ({}, {}),
    "linear": ({"factor": _FACTOR}, {}),
    "dynamic": ({"factor": _FACTOR}, {}),
    "yarn": (
        {"factor": _FACTOR, **_ORIGINAL},
        {
            **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), Number(0, 1e6)),
            "truncate": Flag(),
        },
    ),
    "longrope": (
        {"short_factor": Numbers(_FACTOR), "long_factor": Numbers(_FACTOR), **_ORIGINAL},
        {"factor": _FACTOR, "attention_factor": Number(0, 1e6)},
    ),
    "llama3": ({"factor": _FACTOR, "low_freq_factor": _FACTOR, "high_freq_factor": _FACTOR, **_ORIGINAL}, {}),
}


def read_scaling(c: dict[str, Any], where: str, head_dim: int) -> dict[str, Any]:
    """Returns `rope_theta`, `rope_scaling`, `max_positions` and `trained_positions` of a config.json.

    linear, dynamic and yarn are there to reach `factor` times further than the model was trained, so the context grows with
    them; of longrope and llama3 `max_position_embeddings` is the longer context already.

    Raises:
      UserError: an unknown kind, or an entry that is missing, of another type or out of range.
    """
    for key in ("rope_scaling", "rope_parameters"):
        nested = isinstance(c.get(key), dict) and any(isinstance(v, dict) for v in c[key].values())
        good = (c.get(key) is None or isinstance(c[key], dict)) and not nested
        require((good, f"{where}: {key}={c.get(key)!r} must be one object for all layers"))
    raw = c.get("rope_scaling") or c.get("rope_parameters") or {}
    place = f"{where}: {'rope_scaling' if c.get('rope_scaling') else 'rope_parameters'}"
    kind = raw.get("rope_type") or raw.get("type") or "default"
    known = isinstance(kind, str) and kind in KINDS
    require((known, f"{place}: rope_type {kind!r} is not one of {', '.join(KINDS)}"))
    needs, allows = KINDS[kind]
    trained = c.get("max_position_embeddings") or 2048
    raw = {k: v for k, v in {"rope_theta": c.get("rope_theta"), **raw}.items() if v is not None}
    if "original_max_position_embeddings" in needs:
        top = c.get("original_max_position_embeddings")  # as Phi-3 writes it; transformers lets it win
        raw["original_max_position_embeddings"] = top or raw.get("original_max_position_embeddings", trained)
        if kind == "yarn" and type(raw["original_max_position_embeddings"]) is int:
            raw.setdefault("factor", trained / max(1, raw["original_max_position_embeddings"]))
    fields.check(raw, place, needs, {**allows, "rope_theta": Number(1, 1e15), "partial_rotary_factor": Number(1, 1)})
    theta = float(raw.get("rope_theta", 10000.0))
    scaling = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in needs or k in allows}
    for key in ("short_factor", "long_factor"):
        count, half = len(scaling.get(key, ())), head_dim // 2
        require(
            (key not in scaling or count == half, f"{place}: {key} has {count} entries; half of head_dim is {half}")
        )
    require(
        (kind != "dynamic" or head_dim > 2, f"{place}: dynamic scaling needs a head_dim above 2"),
        (kind != "yarn" or theta > 1, f"{place}: rope_theta={theta} must be above 1 for yarn"),
        (kind != "llama3" or scaling["high_freq_factor"] > scaling["low_freq_factor"],
         f"{place}: high_freq_factor={scaling.get('high_freq_factor')} must be above low_freq_factor"),
    )  # fmt: skip
    reach = trained
    if kind in ("linear", "dynamic", "yarn"):
        reach = max(trained, int(scaling.get("original_max_position_embeddings", trained) * scaling["factor"]))
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else tuple(sorted({**scaling, "rope_type": kind}.items())),
        "max_positions": min(reach, 2**31 - 1),
        "trained_positions": trained if reach > trained else None,
    }


def rope_frequencies(config: ModelConfig, lengths: jax.Array) -> tuple[jax.Array, float]:
    """Returns rotary inverse frequencies [T or 1, rotary_dim / 2], and what multiplies all cosines and sines.

    Args:
      lengths: [T], tokens in the text of each position: dynamic and longrope depend on it.
    """
    dim = config.rotary_dim or config.head_dim
    powers = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    s = dict(config.rope_scaling or ())
    kind = s.get("rope_type", s.get("type"))
    trained = config.trained_positions or config.max_positions
    if kind == "dynamic":
        stretch = s["factor"] * jnp.maximum(lengths, trained)[:, None] / trained - (s["factor"] - 1)
        return (config.rope_theta * stretch ** (dim / (dim - 2))) ** -powers, 1.0
    freq = config.rope_theta ** -powers[None]
    if kind == "linear":
        return freq / s["factor"], 1.0
    if kind == "llama3":  # keep short wavelengths, stretch long ones by `factor`, blend in between
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        blend = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return freq * (blend + (1 - blend) / s["factor"]), 1.0
    if kind == "yarn":
        kept = _yarn_kept(s, config.rope_theta, dim)
        return freq * (kept + (1 - kept) / s["factor"]), _yarn_attention(s)
    if kind == "longrope":
        original = s["original_max_position_embeddings"]
        short, long = (jnp.asarray(s[key], jnp.float32) for key in ("short_factor", "long_factor"))
        factor = s.get("factor") or trained / original
        gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return freq / jnp.where((lengths > original)[:, None], long, short), s.get("attention_factor", gain)
    return freq, 1.0


def _yarn_kept(s: dict[str, Any], theta: float, dim: int) -> np.ndarray:
    """Returns the share [dim / 2] of each frequency that is kept, rather than divided by the factor."""

    def index(rotations: float) -> float:  # of the frequency that turns so often within the trained length
        return dim * math.log(s["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(s.get("beta_fast") or 32), index(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    return 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def _yarn_attention(s: dict[str, Any]) -> float:
    def gain(mscale: float) -> float:
        return 1.0 if s["factor"] <= 1 else 0.1 * mscale * math.log(s["factor"]) + 1.0

    both = s.get("mscale") and s.get("mscale_all_dim")
    default = gain(s["mscale"]) / gain(s["mscale_all_dim"]) if both else gain(1.0)
    return s.get("attention_factor", default)


def _lengths(positions: jax.Array) -> jax.Array:
    """Returns [T]: one more than the largest position of each position's text; where positions begin anew so does a text."""
    text = jnp.cumsum(positions == 0)
    longest = jax.ops.segment_max(positions, text, num_segments=positions.shape[0] + 1)
    return longest[text] + 1


def rope_turns(config: ModelConfig, positions: jax.Array) -> RopeTables:
    """Returns what turns the heads at positions [T]: cosines and signed sines [T, rotary_dim] float32, once for all layers.

    A number per element and not per pair: the two halves are then joined in memory, and not computed anew, cosine and
    sine, wherever they are used (a CPU's compiler fuses them into every rotation of every layer).
    """
    kind = dict(config.rope_scaling or ()).get("rope_type")
    freq, gain = rope_frequencies(config, _lengths(positions) if kind in ("dynamic", "longrope") else positions)
    angles = positions[:, None].astype(jnp.float32) * freq
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if gain != 1.0:
        cos, sin = gain * cos, gain * sin
    if config.rope_interleaved:
        return jnp.repeat(cos, 2, axis=1), jnp.stack([-sin, sin], axis=2).reshape(sin.shape[0], -1)
    return jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)


def apply_rope(x: jax.Array, turns: RopeTables, config: ModelConfig) -> jax.Array:
    """Rotates the first `rotary_dim` of each head of x [T, H, K] by turns, of `rope_turns`.

    Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) where `rope_interleaved`.
    """
    cos, sin = (t[:, None] for t in turns)  # [T, 1, rotary_dim]
    dim = cos.shape[-1]
    part, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
    if config.rope_interleaved:
        partner = jnp.flip(part.reshape(*part.shape[:-1], -1, 2), -1).reshape(part.shape)
    else:
        partner = jnp.roll(part, dim // 2, axis=-1)
    turned = (part * cos + partner * sin).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
