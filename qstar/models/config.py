"""Settings of a decoder of any family, and presets of models trained from scratch."""

from __future__ import annotations

import dataclasses
from typing import Any

from qstar.errors import Settings, UserError, bounded, require, unknown
from qstar.models.thought_config import ThoughtConfig

DTYPES = ("float32", "bfloat16", "float16")
SIZES = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
    *("max_positions", "scan_unroll", "piece_tokens"),
)

RUN = ("dtype", "attention", "remat", "piece_tokens", "scan_unroll", "init_std")  # fields that no file of a model holds
_NOT_IN_LLAMA = (
    *("norm", "norm_offset", "norm_place", "parallel_block", "head_bias", "qk_norm", "qk_norm_wide", "position"),
    *("rope_interleaved", "rope_scaling", "sliding_window", "windowed", "window_theta", "rotated", "relative_bias"),
    *("query_scalar", "attn_softcap", "final_softcap"),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """A decoder (the first block) and how it is run (the second). Hashable: a static argument of `jit`."""

    WHERE = "model config: "

    family: str = "llama"  # of the weight names and config.json
    vocab_size: int = bounded(512, ge=1)
    hidden_size: int = bounded(64, ge=1)
    num_layers: int = bounded(2, ge=1)
    num_heads: int = bounded(4, ge=1)
    num_kv_heads: int = bounded(4, ge=1)
    head_dim: int = bounded(16, ge=1)
    intermediate_size: int = bounded(256, ge=1)
    max_positions: int = bounded(2048, ge=1)
    trained_positions: int | None = None  # max_position_embeddings of config.json where rope_scaling reaches further
    norm: str = bounded("rms", choices=("rms", "layer"))
    # 0 and subnormal numbers make NaN of a zero vector.
    norm_eps: float = bounded(1e-5, ge=1e-38, le=1)
    norm_offset: bool = False  # Gemma: a norm multiplies by 1 + its scale
    # Of the norms of a block: before attention and MLP, after them (OLMo 2), or both (Gemma).
    norm_place: str = bounded("pre", choices=("pre", "post", "both"))
    activation: str = bounded("silu", choices=("silu", "gelu", "gelu_tanh"))  # "gelu" is exact
    gated_mlp: bool = True
    parallel_block: bool = False  # GPT-J: attention and MLP read the same normed input
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMS norm of each query and key head
    qk_norm_wide: bool = False  # OLMo 2: RMS norm of all query heads together, and of all key heads
    query_scalar: float | None = bounded(None, gt=0)  # scores are divided by its square root; None = head_dim
    attn_softcap: float | None = bounded(None, gt=0)  # c: scores s become c tanh(s / c) (Gemma 2)
    final_softcap: float | None = bounded(None, gt=0)  # likewise the logits
    position: str = bounded("rope", choices=("rope", "learned"))
    rope_theta: float = bounded(10000.0, ge=1, le=1e15)
    rotary_dim: int | None = None  # None = head_dim
    rope_interleaved: bool = False  # GPT-J rotates neighbours (2i, 2i + 1), the others (i, i + rotary_dim / 2)
    rope_scaling: tuple[tuple[str, Any], ...] | None = None  # sorted items of the Hugging Face dict
    rotated: tuple[bool, ...] = ()  # the layers with rotary positions; () = all (SmolLM3: three of four)
    sliding_window: int | None = None  # a token attends to itself and the window-1 before it
    windowed: tuple[bool, ...] = ()  # the layers with the window, if there is one; () = all
    window_theta: float | None = bounded(None, ge=1, le=1e15)  # rotary base in layers with the window (Gemma 3)
    tie_embeddings: bool = True
    relative_bias: bool = False  # each head of each layer adds a learned number per distance to its scores
    # Initial value of that number in layer 0, at distance h in head h (all heads but the last); 0 everywhere else.
    local_init: float = bounded(0.0, ge=0)
    embed_scale: bool = False  # multiply embeddings by sqrt(hidden_size)
    bos_id: int | None = None
    eos_id: int | None = None
    also_eos: tuple[int, ...] = ()  # further ids that end a text (chat models have several)
    thoughts: ThoughtConfig | None = None  # Quiet-STaR: two more trees of parameters (`models.heads`)
    value_head: str = bounded("", choices=("", "orm", "prm"))  # a verifier of outcomes or of steps: one more tree

    dtype: str = bounded("float32", choices=DTYPES)  # of the computation; parameters keep their own dtype
    # Of a text to itself (`models.flash`).
    attention: str = bounded("auto", choices=("auto", "xla", "tiles", "splash", "cudnn"))
    remat: str = bounded("none", choices=("none", "block", "dots"))  # keep all, block inputs, or matrix products
    # Tokens of threads whose activations are alive at once in the gradient of thoughts: it bounds their memory.
    piece_tokens: int = bounded(2048, ge=1)
    scan_unroll: int = bounded(1, ge=1)  # layers per iteration of the scan; on a CPU, all is fastest (bfloat16: by far)
    init_std: float = bounded(0.02, ge=0, le=1e3)

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, groups, rotated = self.num_heads, self.num_kv_heads, self.rotary_dim or self.head_dim
        fits = self.position != "rope" or rotated % 2 == 0 and rotated <= self.head_dim
        name = "rotary_dim" if self.rotary_dim else "head_dim"
        listed = {"rotated": self.rotated, "windowed": self.windowed}
        for key in (key for key, layers in listed.items() if len(layers) not in (0, self.num_layers)):
            raise UserError(f"model config: {key} has {len(listed[key])} entries, and num_layers={self.num_layers}")
        fault = "model config: {} do not go together; leave one of them out"
        require(
            (self.thoughts is None or not self.relative_bias, fault.format("thoughts and relative_bias")),
            (self.final_softcap is None or not self.head_bias, fault.format("final_softcap and head_bias")),
            (heads % groups == 0, f"model config: num_heads={heads} is not a multiple of num_kv_heads={groups}"),
            (fits, f"model config: {name}={rotated} must be even and at most head_dim: rotary positions rotate pairs"),
        )

    @property
    def required_thoughts(self) -> ThoughtConfig:
        """`thoughts`, for what only a model that has them calls."""
        assert self.thoughts is not None, "a model without thoughts"
        return self.thoughts

    @property
    def layer_kinds(self) -> tuple[tuple[bool, int], ...]:
        """Of each layer, whether it has the window, and which of `rope.layer_tables`; () where all are alike."""
        if not self.windowed and not self.rotated:
            return ()
        near = self.windowed or (self.sliding_window is not None,) * self.num_layers
        local, none = int(self.window_theta is not None), 1 + (self.window_theta is not None)
        turns = self.rotated or (True,) * self.num_layers
        return tuple((n, local * n if turned else none) for n, turned in zip(near, turns))

    @property
    def windowed_share(self) -> float:
        """Share of the layers that have the window."""
        return sum(self.windowed) / self.num_layers if self.windowed else float(self.sliding_window is not None)

    @property
    def portable_family(self) -> str:
        """The family of transformers that a `tiny` model is exported as; "" where none computes the same."""
        # Llama has one flag for the biases of q, k, v and o. A scaled embedding is exported beside its unscaled copy,
        # the head (`hf_names.copies`), so the two must be one table here.
        other = {f.name: f.default for f in dataclasses.fields(self) if f.name in _NOT_IN_LLAMA}
        other |= {"rotary_dim": self.rotary_dim and self.head_dim, "out_bias": self.qkv_bias}
        plain = self.replace(**other, tie_embeddings=self.tie_embeddings or self.embed_scale)
        same = self.family == "tiny" and self == plain and self.hidden_size % self.num_heads == 0
        return ("llama" if self.gated_mlp else "arcee") if same else ""

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
      UserError: unknown name, or a size below 1.
    """
    table = {"tiny": _tiny, "llama_20m": _llama_20m}
    if name not in table:
        raise unknown(f"model preset {name!r}", name, table)
    for key in SIZES:  # before `tiny` divides by them
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
    heads: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    base = ModelConfig(hidden_size=512, num_layers=6, **heads, intermediate_size=1376, tie_embeddings=False)
    return base.replace(**{"scan_unroll": 6, **changes})
