"""`qstar.generate`: completions of prompts, by a model that answers at once or by one that thinks before every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qstar.models.model import Model
from qstar.models.thought_config import ThoughtConfig
from qstar.sample import batching
from qstar.types import Completion


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    thoughts: ThoughtConfig | bool | None = None,
    **sampling: Any,
) -> list[list[Completion]]:
    """Samples n completions of every prompt.

    Args:
      model: from `qstar.load`.
      prompts: texts, or lists of token ids taken as they are.
      thoughts: None answers at once. True, or a ThoughtConfig, thinks before every token (Quiet-STaR), and its completions
        hold the thoughts, too.
      sampling: max_new_tokens, temperature, top_k, top_p, n, stop, seed, prefix, slots, weights: see
        `sample.batching.generate`.

    Returns:
      Per prompt, a list of n `Completion(text, tokens, logprobs, sample_logprobs, stopped)`.

    Raises:
      UserError: see `sample.batching.generate`; a model that cannot think.
    """
    if not thoughts:
        return batching.generate(model, prompts, **sampling)
    from qstar.thoughts import text  # who does not think need not wait for it

    return text.generate(model, prompts, thoughts=thoughts, **sampling)
