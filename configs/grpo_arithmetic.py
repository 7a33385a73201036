"""GRPO, RLOO and PPO on addition, from the base model of star_arithmetic.py.

    qstar train --config=grpo_arithmetic --workdir=runs/grpo_arithmetic

The base is trained on gold scratchpads of 1- and 2-digit sums and few of 3 digits. It solves part of the 2-digit sums, so
that some responses are rewarded; of the 3-digit sums it solves next to none.

Two CPU cores, about five minutes an arm, beside other work. Measured with seed 0, 120 updates, 262 held-out sums of 1 and 2
digits: base .760; GRPO .748, .828, .927, .950 after 30, 60, 90, 120 updates; RLOO .714, .832, .943, .958;
PPO (there with groups of 4 and 64 problems per update) .828, .912, .950, .966.

    ...:arms=grpo+rloo+ppo      the estimators side by side from one base
    ...:updates=200,seed=1
"""

from qstar.configs.common import chosen_arms, parse_arg, rl_config
from qstar.configs.star_arithmetic import NEW, ROW, additions

ARMS = {
    "grpo": {"estimator": "grpo"},
    "dr_grpo": {"estimator": "grpo", "divide_by_std": False},
    "rloo": {"estimator": "rloo"},
    "ppo": {"estimator": "ppo"},
}


def get_config(arg=None):
    """Arguments: smoke, seed=N, updates=N, arms=A+B, digits=N (2 or more)."""
    arg = parse_arg(arg, "smoke digits updates", smoke=False, seed=0, updates=120, arms="grpo", digits=2)
    n = arg.digits
    config = rl_config()
    config.name = "grpo_arithmetic"
    config.seed = arg.seed
    config.task = additions(n, arg.seed)
    config.model = {"path": "", "preset": "tiny"}
    config.base = {"steps": 1200, "lr": 2e-3, "batch_size": 32, "schedule": "linear", "warmup": 50, "end": 0.05,
                   "b1": 0.9, "b2": 0.98, "packed": False, "row_length": ROW[n], "save_every": 200}  # fmt: skip
    config.arms = chosen_arms(arg.arms, ARMS)
    config.rl.update(group=8, kl_weight=0.02, no_eos_penalty=0.0)
    config.train.update(
        updates=arg.updates,
        prompts=32,
        batch_size=128,
        max_new_tokens=NEW[n],
        lr=5e-4,
        schedule="linear",
        warmup=0,
        end=0.1,
        b2=0.95,
    )
    config.sample.update(max_new_tokens=NEW[n], round_size=4096)
    if arg.smoke:
        config.model.update(hidden_size=64, num_layers=2)
        config.task.pool, config.task.seeds, config.task.eval_per_length = {"1": 40}, {"1": (60, 0)}, 20
        config.base.update(steps=150, save_every=0)
        config.loop.rounds = 2
        config.train.update(updates=4, prompts=8, batch_size=32, max_new_tokens=24, save_every=2)
        config.sample.update(max_new_tokens=24)
    return config
