"""Settings of a decoder of any family, and presets of models trained from scratch."""

from __future__ import annotations

import dataclasses
from typing import Any

from qstar.errors import UserError, require, unknown
from qstar.models.fields import EPSILON, Number
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
    trained_positions: int | None = None  # max_position_embeddings of config.json where rope_scaling reaches further
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
        for name, field in {"norm_eps": EPSILON, "rope_theta": Number(1, 1e15), "init_std": Number(0, 1e3)}.items():
            if fault := field.fault(getattr(self, name)):
                raise UserError(f"model config: {name}={getattr(self, name)!r} must be {fault}")
        turned = self.rotary_dim or self.head_dim
        fits = self.position != "rope" or turned % 2 == 0 and turned <= self.head_dim
        what = f"rotary_dim={turned}" if self.rotary_dim else f"head_dim={turned}"
        require(
            (fits, f"model config: {what} must be even and at most head_dim: rotary positions turn pairs of a head")
        )

    def replace(self, **changes: Any) -> ModelConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def portable_family(self) -> str:
        """The family of transformers that a `tiny` model is exported as; or nothing, where none computes the same."""
        plain = self.replace(
            norm="rms", parallel_block=False, head_bias=False, qk_norm=False, position="rope", rotary_dim=self.rotary_dim and
            self.head_dim, rope_interleaved=False, rope_scaling=None, sliding_window=None, relative_bias=False,
            out_bias=self.qkv_bias, tie_embeddings=self.tie_embeddings or self.embed_scale,
        )  # fmt: skip
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
      UserError: unknown name.
    """
    table = {"tiny": _tiny, "llama_20m": _llama_20m}
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
