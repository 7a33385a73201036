"""One frozen description for every decoder-only family, with presets, to and from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from qstar.errors import UserError, unknown
from qstar.models import encdec_config
from qstar.models.encdec_config import EncDecConfig
from qstar.models.thought_config import ThoughtConfig

DTYPES = ("float32", "bfloat16", "float16")
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "max_positions",
    "scan_unroll",
    "piece_tokens",
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gptj", "t5")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder is (the first block) and how it is run here (the second). Hashable: a static argument of `jit`."""

    family: str = "llama"  # whose weight names and config.json it speaks
    vocab_size: int = 512
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 16
    intermediate_size: int = 256
    max_positions: int = 2048
    norm: str = "rms"  # "rms" | "layer"
    norm_eps: float = 1e-5
    activation: str = "silu"  # "silu" | "gelu" (exact) | "gelu_tanh"
    gated_mlp: bool = True
    parallel_block: bool = False  # GPT-J: attention and MLP read the same normed input
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMS norm of each query and key head
    position: str = "rope"  # "rope" | "learned"
    rope_theta: float = 10000.0
    rotary_dim: int | None = None  # None = head_dim
    rope_interleaved: bool = False  # GPT-J rotates neighbours, everyone else halves
    rope_scaling: tuple[tuple[str, Any], ...] | None = None  # sorted items of the Hugging Face dict
    sliding_window: int | None = None  # a token sees itself and the window-1 before it
    tie_embeddings: bool = True
    relative_bias: bool = False  # each head of each layer adds a learned number per distance to its scores
    local_init: float = 0.0  # of it, in layer 0: head h begins by looking h tokens back (all heads but the last)
    embed_scale: bool = False  # multiply embeddings by sqrt(hidden_size)
    bos_id: int | None = None
    eos_id: int | None = None
    also_eos: tuple[int, ...] = ()  # further ids that end a text (chat models have several)
    thoughts: ThoughtConfig | None = None  # it thinks before it speaks (Quiet-STaR): two more trees of parameters
    value_head: str = ""  # "orm" or "prm": it judges solutions (a verifier); one more tree of parameters

    dtype: str = "float32"  # of the computation; parameters keep their own dtype
    attention: str = "auto"  # of a text with itself: "xla" | "splash" (TPU) | "cudnn" (GPU): `models.flash`
    remat: str = "none"  # "none" | "block" (keep block inputs) | "dots" (keep matrix products)
    piece_tokens: int = 2048  # of threads whose activations a device holds at once in the gradient of thoughts
    scan_unroll: int = 1  # layers per iteration of the scan; on a CPU, all of them is fastest
    init_std: float = 0.02

    def __post_init__(self):
        for name, allowed in (
            ("norm", ("rms", "layer")),
            ("activation", ("silu", "gelu", "gelu_tanh")),
            ("position", ("rope", "learned")),
            ("attention", ("auto", "xla", "splash", "cudnn")),
            ("remat", ("none", "block", "dots")),
            ("value_head", ("", "orm", "prm")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"model config: {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in SIZES:
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise UserError(f"model config: {name}={size!r} must be a whole number of at least 1")
        if self.dtype not in DTYPES:
            raise UserError(f"model config: dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.thoughts is not None and self.relative_bias:
            raise UserError("model config: thoughts and relative_bias do not go together; leave one of them out")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model config: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )

    def replace(self, **changes: Any) -> ModelConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def matmul_params(self) -> int:
        """Parameters that take part in a matrix product per token (the vocabulary projection included)."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        return self.num_layers * (self.hidden_size * (2 * q + 2 * kv) + mlp) + self.vocab_size * self.hidden_size


def preset(name: str, **changes: Any) -> ModelConfig:
    """Returns a named configuration, with changes.

    `tiny` is the from-scratch model of the arithmetic job (0.33M parameters): RMS norm, rotary positions of base 1000,
    plain GELU MLP, tied embedding scaled by sqrt(d). `llama_20m` is the size of the benchmarks.

    Raises:
      UserError: unknown name.
    """
    table = {"tiny": _tiny, "llama_20m": _llama_20m, "gptj_6b": _gptj_6b}
    if name not in table:
        raise unknown(f"model preset {name!r}", name, table)
    for key in SIZES:
        if not isinstance(changes.get(key, 1), int) or changes.get(key, 1) < 1:
            raise UserError(f"model preset {name!r}: {key}={changes[key]!r} must be a whole number of at least 1")
    return table[name](**changes)


def _tiny(hidden_size: int = 96, num_layers: int = 3, num_heads: int = 4, **changes: Any) -> ModelConfig:
    base = ModelConfig(
        family="tiny",
        vocab_size=20,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        max_positions=1024,
        activation="gelu_tanh",
        gated_mlp=False,
        rope_theta=1000.0,
        embed_scale=True,
        scan_unroll=num_layers,
        init_std=hidden_size**-0.5 / 1.5,
    )
    return base.replace(**changes)


def _llama_20m(**changes: Any) -> ModelConfig:
    base = ModelConfig(
        vocab_size=512,
        hidden_size=512,
        num_layers=6,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        intermediate_size=1376,
        tie_embeddings=False,
        scan_unroll=6,
    )
    return base.replace(**changes)


def _gptj_6b(**changes: Any) -> ModelConfig:
    base = ModelConfig(
        family="gptj",
        vocab_size=50400,
        hidden_size=4096,
        num_layers=28,
        num_heads=16,
        num_kv_heads=16,
        head_dim=256,
        intermediate_size=16384,
        max_positions=2048,
        norm="layer",
        activation="gelu_tanh",
        gated_mlp=False,
        parallel_block=True,
        mlp_bias=True,
        head_bias=True,
        rotary_dim=64,
        rope_interleaved=True,
        tie_embeddings=False,
        bos_id=50256,
        eos_id=50256,
        dtype="bfloat16",
        remat="block",
    )
    return base.replace(**changes)


# ------------------------------------------------------------------------------------------ Hugging Face config.json


def from_hf(config: dict[str, Any], where: str = "config.json") -> ModelConfig | EncDecConfig:
    """Reads a Hugging Face `config.json`, of a decoder or of a T5.

    Raises:
      UserError: a family, activation or option that is not implemented, or a missing key; the line names it.
    """
    family = config.get("model_type")
    readers = {
        "gpt2": _from_gpt2,
        "gptj": _from_gptj,
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _from_llama),
        "t5": encdec_config.from_hf,
    }
    if config.get("qstar_family") == "tiny":
        return _thinking(_from_tiny(config), config)
    if family not in readers:
        raise UserError(f"{where}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
    try:
        return _thinking(readers[family](config, where), config)
    except KeyError as e:
        raise UserError(f"{where}: key {e} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as e:
        raise UserError(f"{where}: a value has the wrong type or size ({e}); copy the file again") from None
    except UserError as e:
        raise e if str(e).startswith(where) else UserError(f"{where}: {e}") from None


def _thinking(config: ModelConfig, raw: dict[str, Any]) -> ModelConfig:
    fields = raw.get("qstar_thoughts")
    if raw.get("qstar_value_head"):
        config = config.replace(value_head=raw["qstar_value_head"])
    return config if fields is None else config.replace(thoughts=ThoughtConfig.from_dict(fields))


def official_thoughts(raw: dict[str, Any]) -> ThoughtConfig:
    """Returns what the official Quiet-STaR code says of a checkpoint's thoughts in its config.json, which is little.

    It writes `max_thoughts` = n_ahead + n_ahead_talk + 1, where n_ahead_talk is 4 in all its scripts; without it the
    sizes are those of the release, n_ahead 8. Its two new ids, start and end of a thought, are the last of the vocabulary.
    """
    ahead = raw.get("max_thoughts", 13) - 5
    new = (raw["vocab_size"] - 2, raw["vocab_size"] - 1)
    return ThoughtConfig.parity(thought_tokens=max(1, ahead - 3), forbidden_ids=new)


_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _activation(name: str, where: str) -> str:
    if name not in _ACTIVATIONS:
        raise UserError(f"{where}: activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _ids(c: dict[str, Any]) -> dict[str, Any]:
    eos = c.get("eos_token_id")
    first, *rest = eos if isinstance(eos, list) and eos else [eos]
    return {"bos_id": c.get("bos_token_id"), "eos_id": first, "also_eos": tuple(rest)}


def _from_llama(c: dict[str, Any], where: str) -> ModelConfig:
    family = c["model_type"]
    rope = c.get("rope_parameters") or {}  # transformers 5; older files hold rope_theta and rope_scaling
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"} or c.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{where}: rope_type {kind!r} is not one of default, linear, llama3")
    scaling = {
        **{k: v for k, v in scaling.items() if k not in ("type", "rope_theta")},
        "rope_type": kind,
    }  # one spelling
    heads = c["num_attention_heads"]
    return ModelConfig(
        family=family,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or (128 if family == "qwen3" else c["hidden_size"] // heads),
        intermediate_size=c["intermediate_size"],
        max_positions=c.get("max_position_embeddings", 2048),
        norm_eps=c.get("rms_norm_eps", 1e-6),
        activation=_activation(c.get("hidden_act", "silu"), where),
        qkv_bias=family == "qwen2" or bool(c.get("attention_bias")),
        out_bias=family != "qwen2" and bool(c.get("attention_bias")),
        mlp_bias=bool(c.get("mlp_bias")),
        qk_norm=family == "qwen3",
        rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
        rope_scaling=None if kind == "default" else tuple(sorted(scaling.items())),
        sliding_window=_window(c, where),
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        **_ids(c),
    )


def _window(c: dict[str, Any], where: str) -> int | None:
    """Returns the sliding window that all layers share, or None; absent keys mean what transformers' defaults mean."""
    if c["model_type"] == "mistral":
        return c.get("sliding_window", 4096)
    if not c["model_type"].startswith("qwen") or not c.get("use_sliding_window"):
        return None
    kinds = c.get("layer_types")
    if kinds is None:  # older files: full attention in the first max_window_layers layers, the window in the rest
        first, layers = c.get("max_window_layers", 28), c["num_hidden_layers"]
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if len(set(kinds)) > 1:
        raise UserError(
            f"{where}: layers mix {' and '.join(sorted(set(kinds)))} (layer_types, max_window_layers); "
            "only one kind of attention in all layers is supported"
        )
    return c.get("sliding_window", 4096) if "sliding_attention" in kinds else None


def _from_gpt2(c: dict[str, Any], where: str) -> ModelConfig:
    for key, need in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if c.get(key, need) != need:
            raise UserError(f"{where}: {key}={c[key]} is not supported")
    tied = bool(c.get("tie_word_embeddings", True))
    return _gpt(c, where, 1024, qkv_bias=True, out_bias=True, position="learned", tie_embeddings=tied)


def _from_gptj(c: dict[str, Any], where: str) -> ModelConfig:
    return _gpt(
        c,
        where,
        2048,
        parallel_block=True,
        head_bias=True,
        rotary_dim=c.get("rotary_dim") or c["n_embd"] // c["n_head"],
        rope_interleaved=True,
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
    )


def _gpt(c: dict[str, Any], where: str, positions: int, **own: Any) -> ModelConfig:
    """What GPT-2 and GPT-J write alike; `own` is what tells them apart."""
    width, heads = c["n_embd"], c["n_head"]
    return ModelConfig(
        family=c["model_type"],
        vocab_size=c["vocab_size"],
        hidden_size=width,
        num_layers=c["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        intermediate_size=c.get("n_inner") or 4 * width,
        max_positions=c.get("n_positions", positions),
        norm="layer",
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=_activation(c.get("activation_function", "gelu_new"), where),
        gated_mlp=False,
        mlp_bias=True,
        **own,
        **_ids(c),
    )


def _from_tiny(c: dict[str, Any]) -> ModelConfig:
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    fields -= {"thoughts", "value_head"}
    own = {k: v for k, v in c.items() if k in fields}
    scaling = c.get("rope_scaling")  # json turned tuples into lists, which do not hash
    own |= {"rope_scaling": scaling and tuple(map(tuple, scaling)), "also_eos": tuple(c.get("also_eos", ()))}
    return ModelConfig(**own)


def to_hf(config: ModelConfig | EncDecConfig) -> dict[str, Any]:
    """Writes a Hugging Face `config.json` that `from_hf` and transformers read back.

    A model that thinks adds the key `qstar_thoughts`, a verifier with a head `qstar_value_head`; transformers ignores
    both. The `tiny` preset is no Hugging Face architecture: its file carries this class' own fields and only qstar loads
    it.
    """
    if isinstance(config, EncDecConfig):
        return encdec_config.to_hf(config)
    out = _to_hf(config)
    if config.value_head:
        out["qstar_value_head"] = config.value_head
    return out if config.thoughts is None else {**out, "qstar_thoughts": dataclasses.asdict(config.thoughts)}


def _to_hf(c: ModelConfig) -> dict[str, Any]:
    if c.family == "tiny":
        return {
            "qstar_family": "tiny",
            "model_type": "qstar_tiny",
            **dataclasses.asdict(c.replace(thoughts=None, value_head="")),
        }
    activation = {v: k for k, v in _ACTIVATIONS.items() if k != "gelu_pytorch_tanh"}[c.activation]
    common = {
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_id,
        "eos_token_id": [c.eos_id, *c.also_eos] if c.also_eos else c.eos_id,
        "torch_dtype": c.dtype,
    }
    if c.family in ("gpt2", "gptj"):
        out = {
            "architectures": ["GPT2LMHeadModel" if c.family == "gpt2" else "GPTJForCausalLM"],
            "n_embd": c.hidden_size,
            "n_layer": c.num_layers,
            "n_head": c.num_heads,
            "n_inner": c.intermediate_size,
            "n_positions": c.max_positions,
            "layer_norm_epsilon": c.norm_eps,
            "activation_function": activation,
            **common,
        }
        return out if c.family == "gpt2" else {**out, "rotary_dim": c.rotary_dim or c.head_dim}
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    out = {
        "architectures": [names[c.family] + "ForCausalLM"],
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": activation,
        "rope_theta": c.rope_theta,
        **common,
    }
    if c.rope_scaling:
        out["rope_scaling"] = dict(c.rope_scaling)
    if c.family in ("llama", "qwen3"):
        out["attention_bias"] = c.qkv_bias
    if c.family == "llama":
        out["mlp_bias"] = c.mlp_bias
    if c.family == "mistral":
        out["sliding_window"] = c.sliding_window
    elif c.family.startswith("qwen"):  # all layers alike: "from layer 0 on, use the window"
        out.update(
            use_sliding_window=c.sliding_window is not None, sliding_window=c.sliding_window, max_window_layers=0
        )
    return out
