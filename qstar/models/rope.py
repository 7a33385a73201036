"""Rotary positions, with the frequency scalings of transformers: linear, dynamic, yarn, longrope, llama3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from qstar.errors import require
from qstar.models import fields
from qstar.models.config import ModelConfig
from qstar.models.fields import FLAG, Field, number, numbers

RopeTables = tuple[Array, Array]  # cosines and signed sines [T, rotary_dim]

PART, WHOLE = number(1e-3, 1), number(1, 1)._replace(expected="1, unless the model is a phi3")  # of each head rotated
_FACTOR = number(1e-6, 1e6)
_TRAINED = "original_max_position_embeddings"
_ORIGINAL = {_TRAINED: number(2, 2**31 - 1, integer=True)}
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# Entries of each kind: required, and optional.
KINDS: dict[str, tuple[dict[str, Field], dict[str, Field]]] = {
    "default": ({}, {}),
    "linear": ({"factor": _FACTOR}, {}),
    "dynamic": ({"factor": _FACTOR}, {}),
    "yarn": ({"factor": _FACTOR, **_ORIGINAL}, {**dict.fromkeys(_YARN, number(0, 1e6)), "truncate": FLAG}),
    "longrope": (
        {"short_factor": numbers(_FACTOR), "long_factor": numbers(_FACTOR), **_ORIGINAL},
        {"factor": _FACTOR, "attention_factor": number(0, 1e6)},
    ),
    "llama3": ({**dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), _FACTOR), **_ORIGINAL}, {}),
}


def read_scaling(c: dict[str, Any], where: str, head_dim: int, theta: float = 10000.0) -> dict[str, Any]:
    """Returns `rope_theta` (default: theta) and the other fields of rotary positions of a config.json.

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
    phi3 = c.get("model_type") == "phi3"
    # Older names of the same.
    kind = "longrope" if phi3 and kind in ("su", "yarn") else kind
    known = isinstance(kind, str) and kind in KINDS
    require((known, f"{place}: rope_type {kind!r} is not one of {', '.join(KINDS)}"))
    required, optional = KINDS[kind]
    trained = c.get("max_position_embeddings") or 2048
    above = {key: c.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    raw = {k: v for k, v in {**above, **raw}.items() if v is not None}
    if _TRAINED in required:
        # At the top level in Phi-3's files; transformers prefers that place, where its Phi-3 has 4096 by default.
        raw[_TRAINED] = c.get(_TRAINED) or (4096 if phi3 else raw.get(_TRAINED, trained))
        if kind == "yarn" and type(raw[_TRAINED]) is int:
            raw.setdefault("factor", trained / max(1, raw[_TRAINED]))
    others = {"rope_theta": number(1, 1e15), "partial_rotary_factor": PART if phi3 else WHOLE}
    fields.check(raw, place, required, {**optional, **others})
    theta, rotated = float(raw.get("rope_theta", theta)), int(head_dim * raw.get("partial_rotary_factor", 1))
    kept = required.keys() | optional.keys()
    scaling: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in kept}
    half = rotated // 2
    for key in {"short_factor", "long_factor"} & scaling.keys():
        count = len(scaling[key])
        require((count == half, f"{place}: {key} has {count} entries; half of the rotated width is {half}"))
    low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
    require(
        (kind != "dynamic" or head_dim > 2, f"{place}: dynamic scaling needs a head_dim above 2"),
        (kind != "yarn" or theta > 1, f"{place}: rope_theta={theta} must be above 1 for yarn"),
        (high > low, f"{place}: high_freq_factor={high} must be above low_freq_factor"),
    )
    # These kinds extend the trained context by `factor`; for longrope and llama3, `max_position_embeddings` is the
    # longer context already.
    reach = trained
    if kind in ("linear", "dynamic", "yarn"):
        reach = max(trained, int(scaling.get(_TRAINED, trained) * scaling["factor"]))
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else tuple(sorted({**scaling, "rope_type": kind}.items())),
        "rotary_dim": None if rotated == head_dim else rotated,
        "max_positions": min(reach, 2**31 - 1),
        "trained_positions": trained if reach > trained else None,
    }


def rope_frequencies(config: ModelConfig, lengths: Array) -> tuple[Array, float]:
    """Returns inverse frequencies [T or 1, rotary_dim / 2] and a factor on cosines and sines, for text lengths [T]."""
    dim = config.rotary_dim or config.head_dim
    powers = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    s = dict(config.rope_scaling or ())
    kind = s.get("rope_type")
    trained = config.trained_positions or config.max_positions
    if kind == "dynamic":
        stretch = s["factor"] * jnp.maximum(lengths, trained)[:, None] / trained - (s["factor"] - 1)
        return (config.rope_theta * stretch ** (dim / (dim - 2))) ** -powers, 1.0
    # An axis of length 1, not T: these do not depend on the length of the text.
    freq = config.rope_theta ** -powers[None]
    if kind == "linear":
        return freq / s["factor"], 1.0
    if kind == "llama3":  # keep short wavelengths, stretch long ones by `factor`, blend in between
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s[_TRAINED] * freq / (2 * math.pi)
        blend = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return freq * (blend + (1 - blend) / s["factor"]), 1.0
    if kind == "yarn":
        kept = _yarn_kept(s, config.rope_theta, dim)
        return freq * (kept + (1 - kept) / s["factor"]), _yarn_attention(s)
    if kind == "longrope":
        short, long = (jnp.asarray(s[key], jnp.float32) for key in ("short_factor", "long_factor"))
        factor = s.get("factor") or trained / s[_TRAINED]
        gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(s[_TRAINED]))
        return freq / jnp.where((lengths > s[_TRAINED])[:, None], long, short), s.get("attention_factor", gain)
    return freq, 1.0


def _yarn_kept(s: dict[str, Any], theta: float, dim: int) -> np.ndarray:
    """Returns the share [dim / 2] of each frequency that is kept, rather than divided by the factor."""

    def index(rotations: float) -> float:  # of the frequency with so many rotations within the trained length
        return dim * math.log(s[_TRAINED] / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(s.get("beta_fast") or 32), index(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # As in transformers: no division by 0 below.
    high += 0.001 * (low == high)
    return 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def _yarn_attention(s: dict[str, Any]) -> float:
    def gain(mscale: float) -> float:
        return 1.0 if s["factor"] <= 1 else 0.1 * mscale * math.log(s["factor"]) + 1.0

    both = s.get("mscale") and s.get("mscale_all_dim")
    default = gain(s["mscale"]) / gain(s["mscale_all_dim"]) if both else gain(1.0)
    return s.get("attention_factor", default)


def _lengths(positions: Array) -> Array:
    """Returns [T]: the length of each position's text. A text begins wherever positions start again from 0."""
    text = jnp.cumsum(positions == 0)
    longest = jax.ops.segment_max(positions, text, num_segments=positions.shape[0] + 1)
    return longest[text] + 1


def rope_tables(config: ModelConfig, positions: Array) -> RopeTables:
    """Returns cosines and signed sines [T, rotary_dim] float32 at positions [T], once for all layers."""
    # One number per element, not per pair, so that both halves exist in memory: a CPU's compiler would otherwise fuse
    # the cosine and the sine of the second half into every rotation of every layer.
    kind = dict(config.rope_scaling or ()).get("rope_type")
    freq, gain = rope_frequencies(config, _lengths(positions) if kind in ("dynamic", "longrope") else positions)
    angles = positions[:, None].astype(jnp.float32) * freq
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if gain != 1.0:
        cos, sin = gain * cos, gain * sin
    if config.rope_interleaved:
        return jnp.repeat(cos, 2, axis=1), rearrange(jnp.stack([-sin, sin]), "two t f -> t (f two)")
    return jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)


def layer_tables(config: ModelConfig, positions: Array) -> Sequence[RopeTables | None]:
    """Returns the tables of `rope_tables` that the layers choose from (`ModelConfig.layer_kinds`)."""
    if config.position != "rope":
        return [None]
    tables = [rope_tables(config, positions)]
    if config.window_theta is not None:
        tables.append(rope_tables(config.replace(rope_theta=config.window_theta, rope_scaling=None), positions))
    if config.rotated:
        # A turn by 0: layers without rotary positions run the same program.
        tables.append((jnp.ones_like(tables[0][0]), jnp.zeros_like(tables[0][1])))
    return tables


def apply_rope(x: Array, tables: RopeTables, config: ModelConfig) -> Array:
    """Rotates the first `rotary_dim` of each head of x [T, H, K] by the tables of `rope_tables`.

    Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) where `rope_interleaved`.
    """
    cos, sin = (t[:, None] for t in tables)  # [T, 1, rotary_dim]
    dim = cos.shape[-1]
    part, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
    if config.rope_interleaved:
        pairs = rearrange(part, "t h (f two) -> t h f two", two=2)
        partner = rearrange(jnp.flip(pairs, -1), "t h f two -> t h (f two)")
    else:
        partner = jnp.roll(part, dim // 2, axis=-1)
    turned = (part * cos + partner * sin).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
