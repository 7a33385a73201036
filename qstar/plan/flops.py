"""FLOPs that the mathematics of a program needs, by the rule behind every MFU here (`train.flops`), from its sizes alone.

Nothing is counted for what is computed again (rematerialisation), for padding, or twice on two chips: those are the
compiler's or the layout's, and show as the difference to what is executed.
"""

from __future__ import annotations

from typing import Any

from qstar.models.encdec import EncDecConfig
from qstar.train.flops import count, seen

Needed = tuple[float, str]


def core(config: Any) -> float:
    """Parameters of the blocks' matrix products."""
    if isinstance(config, EncDecConfig):
        encoder, decoder = t5_parts(config)
        return encoder + decoder
    return config.matmul_params - config.vocab_size * config.hidden_size


def t5_parts(c: EncDecConfig) -> tuple[float, float]:
    """Parameters of the encoder's and of the decoder's matrix products (cross-attention's keys count as the decoder's)."""
    attention = 4 * c.hidden_size * c.num_heads * c.head_dim
    mlp = (3 if c.gated_mlp else 2) * c.hidden_size * c.intermediate_size
    return c.num_layers * (attention + mlp), c.num_decoder_layers * (2 * attention + mlp)


def pairs(config: Any, length: int, context: int = 0) -> float:
    """FLOPs of attention, forward, of a row of tokens that see each other causally, and a context before them."""
    each = 4.0 * config.num_layers * config.num_heads * config.head_dim
    return each * (seen(length, getattr(config, "sliding_window", None)) + length * context)


def forward(config: Any, rows: int, length: int, *, context: int = 0, predicted: int = 0) -> Needed:
    """A forward pass over rows of tokens, with the vocabulary's product at `predicted` of them in all."""
    vocabulary = 2.0 * config.vocab_size * config.hidden_size * predicted
    return 2.0 * core(config) * rows * length + rows * pairs(config, length, context) + vocabulary, "2 N per token"


def update(config: Any, rows: int, length: int, lora: bool = False) -> Needed:
    """A supervised update on full rows."""
    flops = count(config, rows * length, rows * seen(length, config.sliding_window), frozen=lora)
    return flops, "4 N per token (LoRA)" if lora else "6 N per token"


def quiet_star(config: Any, rows: int, length: int) -> Needed:
    """An update of a model that thinks, at `think_fraction` of the positions."""
    flops = count(config, rows * length, rows * seen(length, config.sliding_window), thinks=True)
    return flops, "6 N per token of text and threads"


def thoughts(config: Any, rows: int, length: int) -> Needed:
    """Thinking and talking at all positions, one thought each, forward: a third of what an update of it needs."""
    one = config.replace(thoughts=config.thoughts.replace(thoughts_per_position=1, think_fraction=1.0))
    return quiet_star(one, rows, length)[0] / 3, "2 N per token of text and threads"


def respond(config: Any, rows: int, prompt: int, response: int, back: bool = False) -> Needed:
    """Reading prompts and writing (or scoring) responses to them; with `back`, the gradient, too."""
    vocabulary = 2.0 * config.vocab_size * config.hidden_size * rows * response
    if isinstance(config, EncDecConfig):
        encoder, decoder = t5_parts(config)
        width = 4.0 * config.num_heads * config.head_dim
        seen = config.num_layers * prompt**2 + config.num_decoder_layers * response * (response / 2 + prompt)
        once = rows * (2.0 * (encoder * prompt + decoder * response) + width * seen) + vocabulary
    else:
        once = forward(config, rows, prompt + response)[0] + vocabulary
    return (3.0 * once, "6 N per token") if back else (once, "2 N per token")
