"""`ThoughtConfig`: sizes, mixing, sampling and loss terms of the thoughts that Quiet-STaR generates at every token.

Quiet-STaR (arXiv 2403.09629). Every choice in which the paper, its official code and small-scale experience differ is a
field. The plain constructor holds what worked in experiments from scratch; `ThoughtConfig.parity` is the official code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qstar.errors import require

OVERHEAD = 3  # iterations that the official `n_ahead` counts beside the content tokens: the text, the start, the end
CHOICES = {
    "mixing": ("unbounded", "sigmoid"),
    "policy_reduce": ("sum", "mean"),
    "baseline": ("passes", "base"),
    "nll_mean": ("tokens", "nonzero"),
    "think_where": ("random", "entropy"),
}


@dataclasses.dataclass(frozen=True)
class ThoughtConfig:
    """How thoughts look and how they are trained. Hashable: a part of the static `ModelConfig`.

    A thought after text position j is `[start] c_1 .. c_S [end]`; then the T true tokens x[j+1] .. x[j+T] are predicted
    from a mixture of the states with and without the thought (all but the last of them are fed in turn).
    """

    thought_tokens: int = 6  # S, sampled content tokens, start and end not counted
    talk_tokens: int = (
        1  # T, true tokens that a thought is judged by; more cost more, and gained nothing at small scale
    )
    thoughts_per_position: int = 2  # P, thoughts after every position ("passes"); 2 is the least with a baseline

    mixing: str = "unbounded"  # weight of the thought: the head's number as it is (starts at 0), or its sigmoid (at .5)
    mixing_init_std: float | None = (
        None  # of the head's first two layers; None = 1 / sqrt(inputs), as small widths need
    )
    embedding_scale: float = (
        1.0  # used start and end vectors = stored ones times this: with Adam, a larger step for them
    )
    temperature: float = 1.0  # that thoughts are sampled at in training; 0 = greedy
    forbidden_ids: tuple[int, ...] = ()  # tokens that no thought holds: padding, markers of thoughts, ids without text

    policy_weight: float = 1.0  # of REINFORCE; 1e6, the official one, wrecks a text model at usual learning rates
    policy_temperature: float = 1.0  # of the log-probability in REINFORCE; 1 = of what was sampled, hence unbiased
    policy_reduce: str = "sum"  # over the tokens of a thought: log p(thought) is a sum (paper); "mean" = that / S
    clip_negative: bool = False  # advantages below 0 become 0; without is simpler, unbiased and no slower
    baseline: str = "passes"  # reward minus the mean over passes (if P > 1), or "base": the gain over no thought
    reward_tail: bool = True  # thoughts near the row's end are rewarded, too, by as many true tokens as there are
    entropy_weight: float = 0.0  # nats of thought entropy per token that count as one of loss; 0 = off
    kl_weight: float = 0.0  # of KL(thoughts' policy, reference); needs the role `reference` in the parameters; 0 = off

    base_weight: float = 0.5  # of the loss without thoughts; that with thoughts has the rest of 1
    nll_mean: str = "tokens"  # sums over predicted tokens / their number; "nonzero": / the entries that are not 0.0

    think_fraction: float = 1.0  # of the positions that think in training; the cost is in proportion
    # Which: drawn anew every step, or "entropy": where the base model is least sure. The chosen ones stand for all of a row
    # only if drawn at random; with "entropy" NLL and reward are means over hard positions, a choice.
    think_where: str = "random"

    def __post_init__(self):
        sizes = {n: getattr(self, n) for n in ("thought_tokens", "talk_tokens", "thoughts_per_position")}
        scales = {n: getattr(self, n) for n in ("embedding_scale", "policy_temperature")}
        known = {n: getattr(self, n) for n in CHOICES}
        require(
            *(
                (isinstance(v, int) and v >= 1, f"thoughts: {n}={v!r} must be a whole number of at least 1")
                for n, v in sizes.items()
            ),
            *((v > 0, f"thoughts: {n}={v!r} must be above 0") for n, v in scales.items()),
            *(
                (v in CHOICES[n], f"thoughts: {n}={v!r} is not one of {', '.join(CHOICES[n])}")
                for n, v in known.items()
            ),
            (self.temperature >= 0, f"thoughts: temperature={self.temperature} must be 0 (greedy) or more"),
            (0 <= self.base_weight <= 1, f"thoughts: base_weight={self.base_weight} must be in [0, 1]"),
            (0 < self.think_fraction <= 1, f"thoughts: think_fraction={self.think_fraction} must be in (0, 1]"),
        )
        object.__setattr__(self, "forbidden_ids", tuple(int(i) for i in self.forbidden_ids))  # JSON has lists only

    @property
    def n_ahead(self) -> int:
        """The official code's name for the length: content tokens and 3 (the text pass, the start, the end)."""
        return self.thought_tokens + OVERHEAD

    @property
    def thread_tokens(self) -> int:
        """Tokens fed after a position: start, S content tokens, end, and all but the last of the T true ones."""
        return self.thought_tokens + self.talk_tokens + 1

    def replace(self, **changes: Any) -> ThoughtConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_n_ahead(cls, n_ahead: int, n_ahead_talk: int, n_passes: int = 2, **changes: Any) -> ThoughtConfig:
        """Returns the default config of the official code's sizes: S = n_ahead - 3, T = n_ahead_talk, P = n_passes.

        Raises:
          UserError: n_ahead below 4, which leaves no content token (the official code crashes there).
        """
        require(
            (n_ahead > OVERHEAD, f"thoughts: n_ahead={n_ahead} must be at least {OVERHEAD + 1}: it counts 3 others")
        )
        sizes = dict(thought_tokens=n_ahead - OVERHEAD, talk_tokens=n_ahead_talk, thoughts_per_position=n_passes)
        return cls(**{**sizes, **changes})

    @classmethod
    def parity(cls, **changes: Any) -> ThoughtConfig:
        """Returns the official code's choices (train script at 892446b, n_ahead 12): made for lr 1e-6 on Mistral 7B."""
        official: dict[str, Any] = dict(
            thought_tokens=9,
            talk_tokens=4,
            thoughts_per_position=2,
            mixing="unbounded",
            mixing_init_std=0.02,
            embedding_scale=100.0,
            temperature=1.0,
            policy_weight=1e6,
            policy_temperature=3.0,
            policy_reduce="mean",
            clip_negative=True,
            baseline="passes",
            reward_tail=False,
            base_weight=0.5,
            nll_mean="nonzero",
        )
        return cls(**{**official, **changes})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ThoughtConfig:
        """Returns what `dataclasses.asdict` (and JSON) made a dict of; keys that are no fields are an error."""
        known = {f.name for f in dataclasses.fields(cls)}
        strange = sorted(fields.keys() - known)
        require((not strange, f"thoughts: {', '.join(strange)} is no field of ThoughtConfig"))
        return cls(**fields)
