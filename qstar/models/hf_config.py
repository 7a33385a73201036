"""Model configs to and from Hugging Face's config.json: the tables of `hf_families`, read both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qstar.errors import UserError, require
from qstar.models import fields, rope
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.fields import Field
from qstar.models.hf_families import ACTIVATIONS, KINDS, ONE_KIND, SWITCHED, T5_ACTIVATIONS, TABLE, TOKENS, WINDOWS, Key
from qstar.models.thought_config import ThoughtConfig

FAMILIES = tuple(name for name in TABLE if name != "arcee")  # that are read

# ---------------------------------------------------------------------------------------------------- reading


def from_hf(config: dict[str, Any], where: str = "config.json") -> ModelConfig | EncDecConfig:
    """Reads a Hugging Face `config.json`, of a decoder or of a T5.

    Raises:
      UserError: names what is not implemented, or an entry that is missing, of another type or out of range.
    """
    for key in ("quantization_config", "compression_config"):
        if found := config.get(key):
            method = found.get("quant_method", "") if isinstance(found, dict) else found
            fault = "the weights are quantised, which are not read here"
            raise UserError(f"{where}: {key} ({method}): {fault}; give the folder of the model before quantisation")
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), dict):
        # The text model of one that reads images, too, whose other weights are left out.
        ids = {k: v for k, v in config.items() if k in TOKENS}
        config = {**config["text_config"], **ids, "model_type": "gemma3_text"}
    try:
        family = config.get("model_type")
        if config.get("qstar_family") == "tiny":
            read = _from_tiny(config)
        elif family not in FAMILIES:
            raise UserError(f"{where}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
        elif family.endswith("t5"):
            return _from_t5(config, where)
        else:
            read = _from_decoder(config, where)
        if head := config.get("qstar_value_head"):
            read = read.replace(value_head=head)
        thoughts = config.get("qstar_thoughts")
        return read if thoughts is None else read.replace(thoughts=ThoughtConfig.from_dict(thoughts))
    except KeyError as e:
        raise UserError(f"{where}: key {e} is missing") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as e:
        raise UserError(f"{where}: a value has the wrong type or size ({e}); copy the file again") from None
    except UserError as e:
        raise e if str(e).startswith(where) else UserError(f"{where}: {e}") from None


def _read(c: dict[str, Any], where: str, keys: Sequence[Key], checked: Mapping[str, Field]) -> dict[str, Any]:
    """Returns the fields of a table's keys after checking all entries."""
    required = {k.name: k.kind for k in keys if k.default is ...}
    fields.check(c, where, required, {**{k.name: k.kind for k in keys}, **checked})
    chosen = {k: c.get(k.name) is not None or k.null and k.name in c for k in keys}
    return {k.field: c[k.name] if given else k.default for k, given in chosen.items()}


def _from_decoder(c: dict[str, Any], where: str) -> ModelConfig:
    name = c["model_type"]
    family = TABLE[name]
    found = {**family.fixed, **_read(c, where, family.keys, family.checked)}
    key = next(k.name for k in family.keys if k.field == "activation")
    if found["activation"] not in ACTIVATIONS:
        raise UserError(f"{where}: {key}: activation {found['activation']!r} is not one of {', '.join(ACTIVATIONS)}")
    found["activation"] = ACTIVATIONS[found["activation"]]
    width, heads = found["hidden_size"], found["num_heads"]
    found["intermediate_size"] = found["intermediate_size"] or 4 * width
    found["num_kv_heads"] = found.get("num_kv_heads") or heads
    if not found.get("head_dim"):
        gpt = name.startswith("gpt")
        names = ("n_embd", "n_head") if gpt else ("hidden_size", "num_attention_heads")
        sizes = f"{names[0]}={width} is not a multiple of {names[1]}={heads}"
        require((width % heads == 0, f"{where}: {sizes}{'' if gpt else ', and head_dim is not given'}"))
        found["head_dim"] = width // heads
    for option, need in family.needs.items():
        require((bool(c.get(option, need)) == need, f"{where}: {option}={c.get(option)} is not supported"))
    if name == "gptj":
        found["rotary_dim"] = found["rotary_dim"] or found["head_dim"]
    elif name != "gpt2":
        found |= _layers(c, where, found["num_layers"])
        found |= _rotary(c, where, found)
        # `attention_bias` covers q, k, v and o; Qwen2 has no bias at o.
        found["out_bias"] = name != "qwen2" and found.get("qkv_bias", False)
    return ModelConfig(family=name, **found, bos_id=c.get("bos_token_id"), **_end_ids(c.get("eos_token_id")))


def _end_ids(eos: int | list[int] | None) -> dict[str, Any]:
    ids: list[Any] = eos if isinstance(eos, list) else [eos]
    return {"eos_id": ids[0] if ids else None, "also_eos": tuple(ids[1:])}


def _layers(c: dict[str, Any], where: str, layers: int) -> dict[str, Any]:
    """Returns the sliding window and the layers that have it, and those with rotary positions (`ModelConfig`).

    Absent keys mean what transformers' defaults mean.
    """
    name, kinds = c["model_type"], c.get("layer_types")
    turns = [True] * layers
    if name == "smollm3":
        every, given = c.get("no_rope_layer_interval") or 4, c.get("no_rope_layers")
        turns = [bool(i % every) for i in range(1, layers + 1)] if given is None else [*map(bool, given)][:layers]
    rotated = {} if all(turns) else {"rotated": tuple(turns)}
    width = c.get("sliding_window", WINDOWS.get(name))
    if name not in WINDOWS or width is None or name in SWITCHED and not c.get("use_sliding_window"):
        return rotated
    one = name not in ONE_KIND or kinds is None or len(set(kinds)) == 1
    mixes = f"{where}: layer_types mixes {' and '.join(KINDS)}, which a {name!r} cannot; 'ministral' is one that can"
    count = f"{where}: layer_types must have {layers} entries, one per layer"
    require((one, mixes), (kinds is None or len(kinds) == layers, count))
    if kinds is not None and name not in ONE_KIND:
        near = tuple(kind == "sliding_attention" for kind in kinds)
    elif name.startswith("qwen"):  # older files: full attention in the first max_window_layers layers
        first = c.get("max_window_layers", 28)
        near = tuple(i >= first for i in range(layers))
    elif name.startswith("gemma"):  # every second or sixth layer is full
        every = 2 if name == "gemma2" else c.get("sliding_window_pattern") or 6
        near = tuple(bool(i % every) for i in range(1, layers + 1))
    else:
        near = tuple(not turn for turn in turns) if name == "smollm3" else (True,) * layers
    if any(near):
        rotated |= {"sliding_window": width, "windowed": () if all(near) else near}
    return rotated


def _rotary(c: dict[str, Any], where: str, found: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of rotary positions; those of Gemma 3 have a base for each kind of layers."""
    family = TABLE[c["model_type"]]
    c = {"max_position_embeddings": family.positions, **c}
    head_dim, both = found["head_dim"], c.get("rope_parameters") or {}
    if c["model_type"] != "gemma3_text":
        return rope.read_scaling(c, where, head_dim, family.theta)
    nested = isinstance(both, dict) and any(isinstance(v, dict) for v in both.values())
    c |= {} if nested else {"rope_parameters": None}
    full, near = (both.get(kind) if nested else None for kind in KINDS)
    # As in transformers, the older entry updates the newer one. Its legacy `type` scales, as it did in transformers 4; 5
    # keeps rope_type "default" there and leaves the factor unused.
    older = c.get("rope_scaling") or {}
    full = {**(full or {}), **({"rope_type": older["type"]} if "type" in older else {}), **older}
    full = rope.read_scaling({**c, "rope_scaling": None, "rope_parameters": full}, where, head_dim, family.theta)
    c |= {"rope_theta": c.get("rope_local_base_freq"), "rope_scaling": None, "rope_parameters": near}
    near = rope.read_scaling(c, where, head_dim, 10000.0)
    # Unlike elsewhere, the context of the files is that after scaling.
    full |= {"max_positions": near["max_positions"], "trained_positions": None}
    if found.get("sliding_window") is None:
        return full
    scaled = near["rope_scaling"] is None
    require((scaled, f"{where}: rope_parameters: only the default is supported in layers with sliding_attention"))
    return {**full, "window_theta": near["rope_theta"]} if found["windowed"] else near


def _from_tiny(c: dict[str, Any]) -> ModelConfig:
    names = {f.name for f in dataclasses.fields(ModelConfig)} - {"thoughts", "value_head"}
    scaling = c.get("rope_scaling")  # tuples that JSON turned into lists, which do not hash
    tuples: dict[str, Any] = {key: tuple(c.get(key, ())) for key in ("also_eos", "rotated", "windowed")}
    tuples["rope_scaling"] = scaling and tuple(map(tuple, scaling))
    return ModelConfig(**{k: v for k, v in c.items() if k in names} | tuples)


def _from_t5(c: dict[str, Any], where: str) -> EncDecConfig:
    family = c["model_type"]
    found = _read(c, where, TABLE[family].keys, TABLE[family].checked)
    kind = c.get("feed_forward_proj") or ("relu" if family == "t5" else "gated-gelu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    name = "gelu_new" if kind == "gated-gelu" else name  # as transformers does: the tanh approximation
    if name not in T5_ACTIVATIONS:
        raise UserError(f"{where}: feed_forward_proj {kind!r} is not supported; only {', '.join(T5_ACTIVATIONS)}")
    found["num_decoder_layers"] = found["num_decoder_layers"] or found["num_layers"]
    # It does not say whether the head is tied (transformers 5 writes true for every T5; `hf.settle_head` compares the
    # tensors). In older files it says whether outputs are scaled; newer ones have `scale_decoder_outputs`.
    tied = c.get("tie_word_embeddings", True) is not False
    start = c.get("decoder_start_token_id")
    return EncDecConfig(
        family=family,
        **found,
        activation=T5_ACTIVATIONS[name],
        gated_mlp=gated,
        tie_embeddings=bool(c.get("qstar_tied", tied)),
        scale_outputs=family != "mt5" and bool(c.get("scale_decoder_outputs", tied)),  # mT5 never does
        start_id=c.get("pad_token_id", 0) if start is None else start,
        **_end_ids(c.get("eos_token_id", 1)),
    )


def official_thoughts(raw: dict[str, Any]) -> ThoughtConfig:
    """Returns the thought config of a checkpoint of the official Quiet-STaR code."""
    # `max_thoughts` = n_ahead + n_ahead_talk + 1; n_ahead_talk is 4 in all of its scripts. The release has n_ahead 8.
    ahead = raw.get("max_thoughts", 13) - 5
    # The ids of its start and end tokens are the last of the vocabulary.
    new = (raw["vocab_size"] - 2, raw["vocab_size"] - 1)
    return ThoughtConfig.parity(thought_tokens=max(1, ahead - 3), forbidden_ids=new)


# ---------------------------------------------------------------------------------------------------- writing


def to_hf(config: ModelConfig | EncDecConfig) -> dict[str, Any]:
    """Writes a Hugging Face `config.json` that `from_hf` and transformers read back.

    A model with thoughts adds the key `qstar_thoughts`, a verifier with a head `qstar_value_head`; transformers ignores
    both. The file of family `tiny` has the fields of `ModelConfig`, beside the entries of the family of transformers
    that computes the same; where there is none, only qstar loads it.

    Raises:
      UserError: an activation that a T5's file cannot express.
    """
    if isinstance(config, EncDecConfig):
        return _to_t5(config)
    out = _to_decoder(config)
    if config.value_head:
        out["qstar_value_head"] = config.value_head
    return out if config.thoughts is None else {**out, "qstar_thoughts": dataclasses.asdict(config.thoughts)}


def _written(c: ModelConfig | EncDecConfig) -> dict[str, Any]:
    family = TABLE[c.family]
    return {
        "architectures": [family.architecture],
        "model_type": c.family,
        **{k.name: getattr(c, k.field) for k in family.keys},
        "eos_token_id": [c.eos_id, *c.also_eos] if c.also_eos else c.eos_id,
        "torch_dtype": c.dtype,
        **family.written,
    }


def _to_decoder(c: ModelConfig) -> dict[str, Any]:
    if c.family == "tiny":
        own = {"qstar_family": "tiny", **dataclasses.asdict(c.replace(thoughts=None, value_head=""))}
        if not c.portable_family:
            return {**own, "model_type": "qstar_tiny"}
        # The scaled copy of the embedding is another tensor than the head, so the pair is not tied in transformers.
        tied = c.tie_embeddings and not c.embed_scale
        theirs = c.replace(family=c.portable_family, embed_scale=False, tie_embeddings=tied)
        return {**_to_decoder(theirs), **own}  # no key has two meanings
    # Of two names for one function, the family's own is written.
    key = next(k for k in TABLE[c.family].keys if k.field == "activation")
    names = {ours: theirs for theirs, ours in reversed([(key.default, ACTIVATIONS[key.default]), *ACTIVATIONS.items()])}
    out = {**_written(c), "bos_token_id": c.bos_id, key.name: names[c.activation]}
    if c.family == "gpt2":
        return out
    if c.family == "gptj":
        return {**out, "rotary_dim": c.rotary_dim or c.head_dim}
    out |= {"max_position_embeddings": c.trained_positions or c.max_positions, "rope_theta": c.rope_theta}
    if c.rope_scaling:
        out["rope_scaling"] = dict(c.rope_scaling)
    used = c.sliding_window is not None
    if c.family in WINDOWS:
        out["sliding_window"] = c.sliding_window
    if c.family in SWITCHED:
        out["use_sliding_window"] = used
    if c.family.startswith("qwen"):
        # max_window_layers=0: the window, if any, begins at layer 0 instead of transformers' default of 28.
        out["max_window_layers"] = 0
    if c.windowed or c.family in ("ministral", "smollm3", "gemma2", "gemma3_text"):
        near = c.windowed or (used,) * c.num_layers
        out["layer_types"] = [KINDS[n] for n in near]
    if c.family == "smollm3":
        out["no_rope_layers"] = [int(turn) for turn in c.rotated or (True,) * c.num_layers]
    elif c.family == "gemma3_text":
        out["rope_local_base_freq"] = c.rope_theta if c.window_theta is None else c.window_theta
    elif c.family == "phi3":
        out["partial_rotary_factor"] = (c.rotary_dim or c.head_dim) / c.head_dim
        if trained := dict(c.rope_scaling or ()).get("original_max_position_embeddings"):
            out["original_max_position_embeddings"] = trained
    return out


def _to_t5(c: EncDecConfig) -> dict[str, Any]:
    name = {ours: theirs for theirs, ours in T5_ACTIVATIONS.items()}[c.activation]
    if c.gated_mlp and name == "gelu":
        raise UserError("model config: a T5 cannot have a gated MLP with exact GELU: it reads back as gelu_tanh")
    kind = ("gated-gelu" if name == "gelu_new" else f"gated-{name}") if c.gated_mlp else name
    return {
        **_written(c),
        "is_encoder_decoder": True,
        "feed_forward_proj": kind,
        # transformers derives the scaling from it, and the tying from the weights.
        "tie_word_embeddings": c.scale_outputs,
        "scale_decoder_outputs": c.scale_outputs,
        "qstar_tied": c.tie_embeddings,
        "decoder_start_token_id": c.start_id,
        "pad_token_id": c.start_id,
    }
