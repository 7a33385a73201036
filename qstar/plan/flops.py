"""FLOPs that the mathematics of a step needs: the rule behind every MFU here.

    2 per parameter of a matrix product and token going forward, and 4 going back (2 where the parameter is frozen);
    attention: 4 per layer, head width and pair of tokens that see each other, forward, and 8 back;
    the vocabulary's product only where a prediction is looked at.

Nothing is counted for what is computed again (rematerialisation), for padding, or twice on two chips: those are the
compiler's or the layout's, and show as the difference to what is executed.
"""

from __future__ import annotations

from typing import Any

from qstar.models.encdec_config import EncDecConfig

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
    seen = length * (length + 1) / 2 + length * context
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * seen


def forward(config: Any, rows: int, length: int, *, context: int = 0, predicted: int = 0) -> Needed:
    """A forward pass over rows of tokens, with the vocabulary's product at `predicted` of them in all."""
    vocabulary = 2.0 * config.vocab_size * config.hidden_size * predicted
    return 2.0 * core(config) * rows * length + rows * pairs(config, length, context) + vocabulary, "2 N per token"


def update(config: Any, rows: int, length: int, lora: bool = False) -> Needed:
    """A supervised update on full rows."""
    tokens, factor = rows * length, 2.0 if lora else 3.0
    matrices = 2.0 * (core(config) + config.vocab_size * config.hidden_size) * tokens
    return factor * matrices + 3.0 * rows * pairs(config, length), f"{2 * factor:.0f} N per token" + (
        " (LoRA)" if lora else ""
    )


def thoughts(config: Any, rows: int, length: int) -> Needed:
    """Thinking and talking at all positions but the last, one thought each, forward."""
    t = config.thoughts
    threads = rows * (length - 1)
    text, _ = forward(config, rows, length, predicted=rows * length)
    own = pairs(config, t.thread_tokens, 0) + 4.0 * config.num_layers * config.num_heads * config.head_dim * (
        t.thread_tokens * length / 2
    )
    each = 2.0 * core(config) * t.thread_tokens + own
    words = 2.0 * config.vocab_size * config.hidden_size * (t.thought_tokens + t.talk_tokens)
    return text + threads * (each + words), "2 N per token of text and threads"


def quiet_star(config: Any, rows: int, length: int) -> Needed:
    """An update: text and threads forward (the rollout) and back, thoughts at `think_fraction` of the positions."""
    t = config.thoughts
    text, _ = update(config, rows, length)
    one, _ = thoughts(config, rows, length)
    once, _ = forward(config, rows, length, predicted=rows * length)
    return text + 3.0 * t.thoughts_per_position * t.think_fraction * (one - once), "6 N per token of text and threads"


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
