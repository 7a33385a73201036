"""Common interface of decoders and encoder-decoders: parameters, and the states that predict a response to a prompt.

Training on responses (RL, distillation) is written once, for both: a prompt [P] and a response [R] go in, a state [E] per
response token comes out, and `decoder.unembed` makes logits of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.errors import require
from qstar.mesh import map_rows
from qstar.models import decoder, encdec
from qstar.models.attention import NEG, causal_mask
from qstar.models.config import ModelConfig
from qstar.models.encdec_config import EncDecConfig
from qstar.types import Params

AnyConfig = ModelConfig | EncDecConfig
CHUNK_LOGITS = 2**22  # most logits alive at once (16 MiB)
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
MIN_CHUNK = 64  # tokens, however large the vocabulary is


def init(config: AnyConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters: `encdec.init` or `decoder.init`."""
    return (encdec if isinstance(config, EncDecConfig) else decoder).init(config, key, dtype)


def response_states(
    params: Params, config: AnyConfig, prompt: jax.Array, prompt_mask: jax.Array, response: jax.Array
) -> jax.Array:
    """Returns final states [B, R, E]: row t predicts response token t from the prompt and the response before it.

    Args:
      prompt: [B, P] int32. prompt_mask: [B, P], 1 for real tokens. A decoder's prompts are padded on the LEFT, so that all
        responses begin in one column; an encoder-decoder's on the right (its positions count from the first column).
      response: [B, R] int32, padded on the right with anything: what stands after a token never reaches its state.
    """
    if isinstance(config, EncDecConfig):

        def one(tokens: jax.Array, real: jax.Array, out: jax.Array) -> jax.Array:
            states = encdec.encode(params, config, tokens, real)
            fed = jnp.concatenate(
                [jnp.full((1,), config.start_id, out.dtype), out[:-1]]
            )  # y[t-1] stands at t: no offset
            return encdec.decode(params, config, fed, states, real)

        return map_rows(one)(prompt, prompt_mask, response)

    P, R = prompt.shape[1], response.shape[1]
    tokens = jnp.concatenate([prompt, response[:, :-1]], axis=1)  # the last token predicts nothing
    real = jnp.concatenate([prompt_mask.astype(jnp.int32), jnp.ones_like(response[:, :-1])], axis=1)

    def row(tokens: jax.Array, real: jax.Array) -> jax.Array:
        positions = jnp.maximum(jnp.cumsum(real) - 1, 0)
        return decoder.forward(params, config, tokens, positions, causal_mask(config, real))[0][P - 1 : P - 1 + R]

    return map_rows(row)(tokens, real)


def response_scores(
    params: Params,
    config: AnyConfig,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    response: jax.Array,
    *,
    temperature: float = 1.0,
    limit: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of every response token and the entropy there (nats), both float32 [B, R].

    Args:
      temperature, limit: of the distribution that the response was drawn from (ids from `limit` on cannot be drawn): what
        is scored must be what was sampled.
    """
    states = response_states(params, config, prompt, prompt_mask, response)
    return token_scores(params, config, states, response, temperature=temperature, limit=limit)


def token_scores(
    params: Params,
    config: AnyConfig,
    states: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    limit: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Like `response_scores`, from the states [B, R, E]. No array [B, R, V] exists where it would be large."""

    def score(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logp = log_distribution(params, config, block[0], temperature=temperature, limit=limit)
        chosen = jnp.take_along_axis(logp, block[1][:, None], axis=-1)[:, 0]
        return chosen, -jnp.sum(jnp.where(logp > NEG / 2, jnp.exp(logp) * logp, 0.0), axis=-1)

    N = targets.size
    n = min(N, max(MIN_CHUNK, CHUNK_LOGITS // config.vocab_size))
    count = -(-N // n)
    flat = (states.reshape(N, -1), targets.reshape(N))
    if count == 1:
        found = score(flat)
    else:  # a block's logits are made again for the gradient, not kept
        cut = [jnp.pad(x, [(0, count * n - N)] + [(0, 0)] * (x.ndim - 1)).reshape(count, n, *x.shape[1:]) for x in flat]
        found = [x.reshape(-1)[:N] for x in jax.lax.map(jax.checkpoint(score), tuple(cut))]
    return tuple(x.reshape(targets.shape) for x in found)


def log_distribution(
    params: Params, config: AnyConfig, states: jax.Array, *, temperature: float = 1.0, limit: int | None = None
) -> jax.Array:
    """Returns log-probabilities [..., V] float32 of states [..., E] at a temperature, over the ids below `limit`."""
    logits = decoder.unembed(params, config, states) / temperature
    if limit is not None and limit < config.vocab_size:
        logits = jnp.where(jnp.arange(config.vocab_size) < limit, logits, NEG)
    return jax.nn.log_softmax(logits)


def text_limit(config: AnyConfig, tokenizer: Any = None) -> int:
    """Returns the first id that has no text and is never drawn (a padded vocabulary), or the vocabulary's size."""
    own = config.text_ids if isinstance(config, EncDecConfig) else config.vocab_size
    return own if tokenizer is None else min(own, tokenizer.vocab_size)


def check_vocabulary(config: AnyConfig, tokenizer: Any, where: str) -> None:
    """Compares what a tokenizer and a model call special with the rows of the embedding; an id beyond them computes NaN.

    Further tokens may be beyond, as in models whose tokenizer is shared with larger ones; `encode` refuses their text.

    Raises:
      UserError: the id of a special token is beyond the model's vocabulary.
    """
    size = config.vocab_size
    ids = [(f"{role}_id", getattr(tokenizer.hf, f"{role}_id")) for role in ROLES]
    ids += [("eos_token_id", i) for i in (config.eos_id, *config.also_eos)]
    bad = next((f"{name}={i}" for name, i in ids if i is not None and i >= size), "")
    fault = f"{where}: {bad} is beyond the model's vocabulary of {size}"
    require((not bad, f"{fault}; resize the embedding to the tokenizer, or use the tokenizer of these weights"))
    tokenizer.limit = size


def pad_prompts(config: AnyConfig, rows: list[list[int]], length: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as arrays (tokens, mask), each [B, length] int32, padded on the side that `response_states` wants."""
    tokens, mask = np.full((len(rows), length), fill, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if isinstance(config, EncDecConfig) else slice(length - len(row), length)
        tokens[i, part], mask[i, part] = row, 1
    return tokens, mask
