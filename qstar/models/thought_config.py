"""`ThoughtConfig`: sizes, mixing, sampling and loss terms of the thoughts that Quiet-STaR generates at every token.

Quiet-STaR (arXiv 2403.09629). Every choice in which the paper, its official code and small-scale experience differ is a
field. The defaults worked in experiments from scratch; `ThoughtConfig.parity` is the official code.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from qstar.errors import Settings, bounded, require


@dataclasses.dataclass(frozen=True)
class ThoughtConfig(Settings):
    """Shape and training of thoughts. Hashable: a part of the static `ModelConfig`.

    A thought after text position n is `[start] c_1 .. c_S [end]`; then the A true tokens x[n+1] .. x[n+A] are predicted
    from a mixture of the states with and without the thought (all but the last of them are fed in turn).
    """

    WHERE = "thoughts: "

    thought_tokens: int = bounded(6, ge=1)  # S, sampled content tokens, start and end not counted
    talk_tokens: int = bounded(1, ge=1)  # A, true tokens that reward a thought; more gained nothing at small scale
    thoughts_per_position: int = bounded(2, ge=1)  # P, "passes"; 2 is the least with a baseline

    mixing: str = bounded("unbounded", choices=("unbounded", "sigmoid"))  # the mixer's output, or its sigmoid
    # Of the mixer's first two layers; None = 1 / sqrt(inputs), for small widths.
    mixing_init_std: float | None = bounded(None, ge=0)
    # Of the stored start and end vectors: Adam's steps have one size, which the factor makes larger for them.
    embedding_scale: float = bounded(1.0, gt=0)
    temperature: float = bounded(1.0, ge=0)  # of sampling thoughts in training; 0 = greedy
    forbidden_ids: tuple[int, ...] = ()  # tokens that no thought holds: padding, markers of thoughts, ids without text

    # Of REINFORCE; the official 1e6 ruins a text model at usual learning rates.
    policy_weight: float = bounded(1.0, ge=0)
    policy_temperature: float = bounded(1.0, gt=0)  # of REINFORCE's log-probabilities; 1 = as sampled, hence unbiased
    policy_reduce: str = bounded("sum", choices=("sum", "mean"))  # over a thought's tokens: log p is a sum (paper)
    clip_negative: bool = False  # advantages below 0 become 0; without is simpler, unbiased and no slower
    # Reward minus the mean over passes (if P > 1), or "base": the gain over no thought.
    baseline: str = bounded("passes", choices=("passes", "base"))
    reward_tail: bool = True  # thoughts near the row's end are rewarded, too, by as many true tokens as there are

    base_weight: float = bounded(0.5, ge=0, le=1)  # of the loss without thoughts; the loss with thoughts has the rest
    # Over predicted tokens, or (official code) over entries that are not 0.0.
    nll_mean: str = bounded("tokens", choices=("tokens", "nonzero"))

    # Of the positions that think in training: the cost is in proportion.
    think_fraction: float = bounded(1.0, gt=0, le=1)
    # Drawn anew every step, or "entropy": where the base model is least sure. With "entropy" NLL and reward are means
    # over hard positions and do not stand for all of a row.
    think_where: str = bounded("random", choices=("random", "entropy"))

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.forbidden_ids
        # As an index, -1 would be the last word of the vocabulary.
        fits = all(isinstance(i, numbers.Integral) and not isinstance(i, bool) and i >= 0 for i in ids)
        require((fits, f"{self.WHERE}forbidden_ids={ids!r} must be token ids, whole numbers of 0 or more"))
        # JSON has lists only, which do not hash.
        object.__setattr__(self, "forbidden_ids", tuple(map(int, ids)))

    @classmethod
    def parity(cls, **changes: Any) -> ThoughtConfig:
        """Returns the official code's choices (train script at 892446b, n_ahead 12 = S + 3; lr 1e-6, Mistral 7B)."""
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

    def check_trained(self, own: ThoughtConfig | None) -> None:
        """Raises UserError where start and end vectors and a mixing head, trained with `own`, would be read otherwise."""
        for name in ("embedding_scale", "mixing") if own is not None else ():
            mine, trained = getattr(self, name), getattr(own, name)
            require(
                (mine == trained, f"thoughts: {name}={mine!r}, but the model was trained with {trained!r}; use that")
            )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ThoughtConfig:
        """Returns the config of a dict that `dataclasses.asdict` (and JSON) made; an unknown key is an error."""
        # Models of earlier versions hold weights of two terms of the training loss, which are gone.
        fields = {k: v for k, v in fields.items() if k not in ("entropy_weight", "kl_weight")}
        known = {f.name for f in dataclasses.fields(cls)}
        strange = sorted(fields.keys() - known)
        require((not strange, f"thoughts: {', '.join(strange)} is no field of ThoughtConfig"))
        return cls(**fields)
