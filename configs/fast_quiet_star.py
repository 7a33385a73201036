"""Fast Quiet-STaR (arXiv 2505.17746): shorter and shorter thoughts, then a student without thoughts.

    qstar train --config=fast_quiet_star:model=Mistral-7B-v0.1 --workdir=runs/fast_quiet_star

The paper's curriculum of (n_ahead, talk tokens) is (16, 8) -> (12, 4) -> (8, 4), each from the weights before, at most
150 steps at 2e-6, then 1e-6; its student trains for at most 300 steps. The student here learns the teacher's mixed
prediction (`qstar/thoughts/distil.py` says what the paper does there). Not run here at that size. On generated documents,
with a model of 0.1M parameters: `quiet_star_tiny:fast`.
"""

from qstar.configs.common import parse_arg
from qstar.configs.quiet_star_mistral_7b import get_config as published

CURRICULUM = (
    ("ahead_16", "base", 13, 8, 2e-6),
    ("ahead_12", "ahead_16", 9, 4, 1e-6),
    ("ahead_8", "ahead_12", 5, 4, 1e-6),
)


def get_config(arg=None):
    """Arguments: model=DIR, data=FILE_OR_HUB_NAME, smoke, seed=N."""
    own = parse_arg(
        arg, "smoke model data", model="Mistral-7B-v0.1", data="open-web-math/open-web-math", smoke=False, seed=0
    )
    config = published(arg)
    config.name = "fast_quiet_star"
    steps, last = (4, 4) if own.smoke else (150, 300)
    shrink = 6 if own.smoke else 1
    config.arms = {
        name: {
            "start": before,
            "steps": steps,
            "patience": 5,
            "thoughts": {
                "thought_tokens": max(1, n // shrink),
                "talk_tokens": max(1, talk // 2 if own.smoke else talk),
            },
            "train": {"lr": lr},
        }
        for name, before, n, talk, lr in CURRICULUM
    }
    config.arms["student"] = {
        "thought_source": "none",
        "start": "ahead_8",
        "teacher": "ahead_8",
        "steps": last,
        "train": {"lr": 1e-6},
    }
    return config
