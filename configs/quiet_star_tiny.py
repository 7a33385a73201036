"""Quiet-STaR on generated documents: a model of 0.1M parameters learns to write thoughts that lower its loss.

    qstar train --config=quiet_star_tiny --workdir=runs/quiet_star_tiny
    qstar train --config=quiet_star_tiny:seed=1 --workdir=runs/quiet_star_tiny_1

One base model, then the method and its controls side by side, 250 steps each. Documents such as `e64539=7;` end in a fold of
their digits that the model cannot compute in one step; its base text shows the steps in a fifth of the documents, the
Quiet-STaR text never does (`qstar/tasks/fold_digits.py`).

    ...:arms=quiet_star+pause         any arms of ARMS
    ...:lengths                       thoughts of 1 to 8 tokens, one arm each
    ...:official                      the official code's choices, one by one and all at once
    ...:fast                          Fast Quiet-STaR: 6, 4, 2 tokens, then a student without thoughts
    ...:documents=2                   two problems per row
"""

from typing import Any

from qstar.configs.common import chosen_arms, parse_arg, quiet_config

FROZEN = "thoughts|mixing"
TRANSFORMER = "layers|embed|head|norm|positions"
ARMS: dict[str, dict[str, Any]] = {
    "quiet_star": {},
    "no_policy": {"thoughts": {"policy_weight": 0.0}},
    "no_policy_frozen": {"thoughts": {"policy_weight": 0.0}, "trainable": FROZEN},
    "pause": {"thought_source": "pause"},
    "random": {"thought_source": "random"},
    "same_text": {"thought_source": "none"},
    "same_compute": {"thought_source": "none", "steps": 24},  # times the steps of the others: 24 times the text
    "sampled_lengths": {"thought_lengths": (1, 2, 3, 4, 5, 6, 7, 8), "thoughts": {"thought_tokens": 6}},
    "long": {"steps": 3},
    "no_policy_long": {"steps": 3, "thoughts": {"policy_weight": 0.0}},
    "pause_long": {"steps": 12, "thought_source": "pause"},
}
DEFAULT = "quiet_star+no_policy+no_policy_frozen+pause+random+same_text+same_compute"
OFFICIAL: dict[str, dict[str, Any]] = {  # one of the official code's choices each, see ThoughtConfig
    "clip": {"clip_negative": True},
    "temperature_3": {"policy_temperature": 3.0},
    "mean": {"policy_reduce": "mean"},
    "sigmoid": {"mixing": "sigmoid"},
    "policy_tenth": {"policy_weight": 0.1},
    "policy_10": {"policy_weight": 10.0},
    "policy_1e6": {"policy_weight": 1e6},
    "scale_10": {"embedding_scale": 10.0},
    "scale_100": {"embedding_scale": 100.0},
    "talk_2": {"talk_tokens": 2},
    "talk_4": {"talk_tokens": 4},
    "weak": {"clip_negative": True, "policy_temperature": 3.0, "policy_reduce": "mean"},
}
OFFICIAL["weak_scale_100"] = {**OFFICIAL["weak"], "embedding_scale": 100.0}
OFFICIAL["weak_scale_100_policy_10"] = {**OFFICIAL["weak_scale_100"], "policy_weight": 10.0}
OFFICIAL["weak_1e6"] = {**OFFICIAL["weak"], "policy_weight": 1e6}
OFFICIAL["all"] = {**OFFICIAL["weak_scale_100"], "policy_weight": 1e6}


def get_config(arg=None):
    """Arguments: smoke, seed=N, steps=N, arms=A+B, lengths, official, fast, documents=N, worked=SHARE."""
    arg = parse_arg(
        arg,
        *("smoke steps", "lengths official fast arms", "official fast arms", "fast arms"),
        smoke=False,
        seed=0,
        steps=250,
        arms=DEFAULT,
        lengths=False,
        official=False,
        fast=False,
        documents=1,
        worked=0.2,
    )
    config = quiet_config()
    config.name = "quiet_star_tiny"
    config.seed = arg.seed
    config.data = {"name": "fold_digits", "documents": arg.documents, "worked": arg.worked}
    config.model = {
        "path": "",
        "preset": "tiny",
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "position": "learned",
        "max_positions": 19 * arg.documents + 21,
        "tie_embeddings": False,
        "embed_scale": False,
    }
    base = {"steps": 3000, "batch_size": 128, "schedule": "cosine", "end": 0.1, "warmup": 100}
    config.base.update(lr=2e-3, b2=0.98, weight_decay=0.01, **base)
    config.thoughts = {"thought_tokens": 6, "talk_tokens": 1, "thoughts_per_position": 2, "start_text": "-"}
    config.train.update(batch_size=32, lr=1e-3, b2=0.98, weight_decay=0.001, log_every=25)
    config.evaluate.update(rows=1200, batch_size=200, viewer_texts=40)
    config.gates = gates()
    if arg.lengths:
        arms: dict[str, dict[str, Any]] = {f"length_{n}": {"thoughts": {"thought_tokens": n}} for n in range(1, 9)}
    elif arg.official:
        arms = {name: {"thoughts": changes} for name, changes in OFFICIAL.items()}
        # Frozen start and end vectors: tests whether it is their movement that loses the thoughts.
        arms["weak_scale_100_still"] = {"thoughts": OFFICIAL["weak_scale_100"], "trainable": TRANSFORMER + "|mixing"}
    elif arg.fast:
        arms = fast()
    else:
        arms = chosen_arms(arg.arms, ARMS)
    for arm in arms.values():
        arm["steps"] = arg.steps * arm.get("steps", 1)
        arm["evaluate_every"] = arm["steps"] // 5
    config.arms = arms
    if arg.smoke:
        smoke(config)
    return config


def fast():
    """A curriculum from six tokens to two, beside training at two from the start; then students of either teacher."""
    out: dict[str, dict[str, Any]] = {"six": {}}
    for before, name, n in (("six", "six_to_four", 4), ("six_to_four", "four_to_two", 2)):
        out[name] = {"start": before, "thoughts": {"thought_tokens": n}}
    out["two"] = {"thoughts": {"thought_tokens": 2}, "steps": 3}
    out["student"] = {"thought_source": "none", "start": "six", "teacher": "six", "steps": 4}
    out["plain"] = {"thought_source": "none", "start": "six", "steps": 4}
    return out


def gates():
    """What must hold of the base before any arm is paid for (held-out documents)."""
    return {
        "hard without steps": {
            "metric": "direct_nll",
            "min": 2.2,
            "why": "the base answers hard folds directly: the controls will creep up, too",
        },
        "steps lead to the answer": {
            "metric": "worked_accuracy",
            "min": 0.9,
            "why": "the base cannot read an answer off its steps; train it for longer",
        },
        "steps are known": {
            "metric": "step_nll",
            "max": 0.2,
            "why": "the base cannot write the steps; train it for longer, or show it more of them",
        },
        "some thoughts are right": {
            "metric": "thought_accuracy",
            "min": 0.05,
            "max": 0.6,
            "stop": False,
            "why": "at 0 there is nothing to reinforce; far above, the controls will look as good",
        },
        "greedy thoughts are not": {
            "metric": "thought_accuracy_greedy",
            "max": 0.1,
            "stop": False,
            "why": "the greedy column would flatter the arm without policy gradient",
        },
    }


def smoke(config):
    """Under a minute: every stage runs, nothing is learnt."""
    config.base.steps = 60
    config.thoughts.thought_tokens = 2
    config.evaluate.update(rows=40, batch_size=40, every=6, viewer_texts=8)
    config.train.update(log_every=3, save_every=5, batch_size=8)
    config.gates = {}
    for arm in config.arms.values():
        arm.steps, arm.evaluate_every = 12 if arm.steps < 1000 else 24, 6
