"""Settings of an encoder-decoder (T5, T5 v1.1, FLAN-T5, mT5, umT5), to and from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from qstar.errors import UserError, require
from qstar.models import fields

DTYPES = ("float32", "bfloat16")
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
# Rows of the embedding -> ids that have a text: the rest pads the table to a round size.
SENTINEL_VOCAB = {32128: 32100, 250112: 250100}
CLASSES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
_NEEDS = {
    **dict.fromkeys(("vocab_size", "d_model", "num_heads", "d_kv", "d_ff"), fields.WIDTH),
    "num_layers": fields.DEPTH,
}
_ALLOWS: dict[str, fields.Field] = {
    "num_decoder_layers": fields.DEPTH,
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), fields.WIDTH),
    "layer_norm_epsilon": fields.EPSILON,
    "feed_forward_proj": fields.Text(),
    **dict.fromkeys(("tie_word_embeddings", "scale_decoder_outputs", "qstar_tied"), fields.Flag()),
    **dict.fromkeys(("decoder_start_token_id", "pad_token_id"), fields.ID),
    "eos_token_id": fields.Ids(),
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "head_dim",
    "intermediate_size",
    "buckets",
    "max_distance",
    "scan_unroll",
)


@dataclasses.dataclass(frozen=True)
class EncDecConfig:
    """What an encoder-decoder is (the first block) and how it is run here (the second). Hashable: static under `jit`."""

    family: str = "t5"  # "mt5" is v1.1 with other words; in "umt5" every layer has relative positions of its own
    vocab_size: int = 32128
    hidden_size: int = 512
    num_layers: int = 8  # of the encoder
    num_decoder_layers: int = 8
    num_heads: int = 6
    head_dim: int = 64  # heads * head_dim need not be the width: 384 in FLAN-T5 small
    intermediate_size: int = 1024
    buckets: int = 32  # of relative positions
    max_distance: int = 128  # beyond it all positions share a bucket
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"
    gated_mlp: bool = True  # v1.1 and FLAN; the first T5 has a plain ReLU
    tie_embeddings: bool = False
    scale_outputs: bool = False  # decoder outputs times 1 / sqrt(width) before the head: the first T5 only
    start_id: int = 0  # what decoding begins with: the id of padding, so masks come from lengths and never from ids
    eos_id: int | None = 1  # after every text that the encoder reads
    also_eos: tuple[int, ...] = ()  # further ids that end a response
    bos_id: int | None = None
    max_positions: int = 16_384  # T5 has no limit of its own; this one keeps a mistake from filling the memory

    dtype: str = "float32"  # of the computation; parameters keep their own dtype
    remat: str = "none"  # "none" | "block" | "dots"
    scan_unroll: int = 1

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in SIZES}
        kinds = tuple(ACTIVATIONS.values())
        half = "float16 overflows in T5's MLP (65,504); use bfloat16"
        require(
            *(
                (isinstance(v, int) and v >= 1, f"model config: {n}={v!r} must be a whole number of at least 1")
                for n, v in sizes.items()
            ),
            (self.family in CLASSES, f"model config: family={self.family!r} is not one of {', '.join(CLASSES)}"),
            (self.activation in kinds, f"model config: activation={self.activation!r} is not one of {', '.join(kinds)}"),
            (self.remat in ("none", "block", "dots"), f"model config: remat={self.remat!r} is not one of none, block, dots"),
            (self.dtype != "float16", f"model config: dtype='float16': {half}"),
            (self.dtype in DTYPES, f"model config: dtype={self.dtype!r} is not one of {', '.join(DTYPES)}"),
            (self.buckets % 4 == 0, f"model config: buckets={self.buckets} must be a multiple of 4"),
            (self.max_distance > self.buckets // 2, f"model config: max_distance={self.max_distance} is too near"),
        )  # fmt: skip

    def replace(self, **changes: Any) -> EncDecConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    thoughts = None  # it does not think before it speaks: that is for decoders
    value_head = ""  # nor is one trained as a verifier
    sliding_window = None

    @property
    def num_kv_heads(self) -> int:
        """Every query head has its own keys."""
        return self.num_heads

    @property
    def text_ids(self) -> int:
        """Ids from here on have no text (32,100 of the published models' 32,128) and are never drawn."""
        return SENTINEL_VOCAB.get(self.vocab_size, self.vocab_size)


def flan_t5(size: str, **changes: Any) -> EncDecConfig:
    """Returns the shape of FLAN-T5 `small` (77M), `base` (248M), `large` (783M), `xl` (2.85B) or `xxl` (11.1B).

    Raises:
      UserError: unknown size.
    """
    shapes = {
        "small": (512, 1024, 8, 6),
        "base": (768, 2048, 12, 12),
        "large": (1024, 2816, 24, 16),
        "xl": (2048, 5120, 24, 32),
        "xxl": (4096, 10240, 24, 64),
    }
    require((size in shapes, f"FLAN-T5 size {size!r} is not one of {', '.join(shapes)}"))
    width, mlp, layers, heads = shapes[size]
    base = EncDecConfig(
        hidden_size=width, intermediate_size=mlp, num_layers=layers, num_decoder_layers=layers, num_heads=heads
    )
    return base.replace(**changes)


def from_hf(c: dict[str, Any], where: str) -> EncDecConfig:
    """Reads the config.json of a T5.

    What `tie_word_embeddings` says of the head is not to be trusted: transformers 5 writes true for every T5. Whoever
    reads the weights compares the tensors (`models.hf.settle_head`). Of the scaling it tells the truth in files of older
    versions; newer ones have `scale_decoder_outputs`.

    Raises:
      UserError: an activation that is not implemented. KeyError: a key is missing (the caller names the file).
    """
    fields.check(c, where, _NEEDS, _ALLOWS)
    family = c["model_type"]
    kind = c.get("feed_forward_proj") or ("relu" if family == "t5" else "gated-gelu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    name = "gelu_new" if kind == "gated-gelu" else name  # as transformers does: the tanh approximation
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: feed_forward_proj {kind!r} is not supported; only {', '.join(ACTIVATIONS)}")
    tied = c.get("tie_word_embeddings", True) is not False
    start = c.get("decoder_start_token_id")
    eos = c.get("eos_token_id", 1)
    eos, *more = eos if isinstance(eos, list) and eos else [eos]
    return EncDecConfig(
        family=family,
        vocab_size=c["vocab_size"],
        hidden_size=c["d_model"],
        num_layers=c["num_layers"],
        num_decoder_layers=c.get("num_decoder_layers") or c["num_layers"],
        num_heads=c["num_heads"],
        head_dim=c["d_kv"],
        intermediate_size=c["d_ff"],
        buckets=c.get("relative_attention_num_buckets", 32),
        max_distance=c.get("relative_attention_max_distance", 128),
        norm_eps=c.get("layer_norm_epsilon", 1e-6),
        activation=ACTIVATIONS[name],
        gated_mlp=gated,
        tie_embeddings=bool(c.get("qstar_tied", tied)),
        scale_outputs=family != "mt5" and bool(c.get("scale_decoder_outputs", tied)),  # mT5 never does
        start_id=c.get("pad_token_id", 0) if start is None else start,
        eos_id=eos,
        also_eos=tuple(more),
    )


def to_hf(c: EncDecConfig) -> dict[str, Any]:
    """Writes a config.json that `from_hf` and transformers read back.

    `tie_word_embeddings` holds what transformers derives from it, the scaling; whether the head is tied it sees from the
    weights, as we do.

    Raises:
      UserError: an activation that the file cannot express.
    """
    name = {v: k for k, v in ACTIVATIONS.items()}[c.activation]
    if c.gated_mlp and name == "gelu":
        raise UserError(
            "model config: a gated MLP with exact GELU cannot be written as a T5: it reads back as gelu_tanh"
        )
    kind = ("gated-gelu" if name == "gelu_new" else f"gated-{name}") if c.gated_mlp else name
    return {
        "architectures": [CLASSES[c.family] + "ForConditionalGeneration"],
        "model_type": c.family,
        "is_encoder_decoder": True,
        "vocab_size": c.vocab_size,
        "d_model": c.hidden_size,
        "d_kv": c.head_dim,
        "d_ff": c.intermediate_size,
        "num_layers": c.num_layers,
        "num_decoder_layers": c.num_decoder_layers,
        "num_heads": c.num_heads,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.norm_eps,
        "feed_forward_proj": kind,
        "tie_word_embeddings": c.scale_outputs,
        "scale_decoder_outputs": c.scale_outputs,
        "qstar_tied": c.tie_embeddings,
        "decoder_start_token_id": c.start_id,
        "pad_token_id": c.start_id,
        "eos_token_id": [c.eos_id, *c.also_eos] if c.also_eos else c.eos_id,
        "torch_dtype": c.dtype,
    }
