"""STaR on sums: a small transformer teaches itself 3-digit addition, with and without rationalisation.

    bash launch/local.sh                                       # this config, into runs/star_arithmetic
    qstar train --config=configs/star_arithmetic.py --workdir=runs/star_arithmetic
    qstar train --config=configs/star_arithmetic.py:seed=1 --workdir=runs/star_arithmetic_1
"""

from configs.common import parse_arg, star_config


def get_config(arg=None):
    """Arguments: smoke, seed=N."""
    arg = parse_arg(arg, smoke=False, seed=0)
    config = star_config()
    config.name = "star_arithmetic"
    config.seed = arg.seed
    config.task = {
        "name": "arithmetic",
        "format": "compact",
        "pool": {"1": 60, "2": 800, "3": 2400},
        "seeds": {"1": (60, 60), "2": (500, 500), "3": (20, 150)},
        "eval_per_length": 250,
        "seed": arg.seed,
    }
    config.model = {"path": "", "preset": "tiny"}
    optimiser = {"batch_size": 32, "schedule": "linear", "warmup": 50, "end": 0.05, "b1": 0.9, "b2": 0.98, "clip": 1.0}
    rows = {"packed": False, "row_length": 62, "save_every": 200, "log_every": 50}
    config.base = {"steps": 1500, "lr": 2e-3, **optimiser, **rows}
    config.train.update(lr=1.5e-3, **optimiser, **rows)
    config.loop = {
        "n_iters": 4, "problems_per_iter": 10_000, "restart": "previous", "steps": "lin:400:20", "max_epochs": 1000.0,
        "seed_share": 0.15,
    }
    config.arms = {"rationalisation": {"preset": "star"}, "no_rationalisation": {"preset": "star_norat"}}
    config.sample.update(max_new_tokens=52, round_size=4096)
    config.evaluate.update(split="test", hinted=True)
    config.gates = {
        "unsolved": {"metric": "accuracy/3", "max": 0.05, "why": "the base solves the longest sums already, so the arms cannot differ"},
        "hint works": {"metric": "hinted_accuracy/3", "min": 0.3, "why": "without a working hint there is nothing to rationalise; train the base for longer"},
        "hint works below": {"metric": "hinted_accuracy/2", "min": 0.9, "why": "the base has not learnt to use a hint; train it for longer"},
        "short sums": {"metric": "accuracy/2", "min": 0.2, "why": "the base has not learnt to add without a hint; train it for longer", "stop": False},
        "rationales are valid": {"metric": "hinted_valid/3", "min": 0.8, "why": "many hinted rationales copy the hint past a wrong step", "stop": False},
    }
    if arg.smoke:
        config.model.update(hidden_size=64, num_layers=2)
        config.task.pool = {"1": 20, "2": 60}
        config.task.seeds = {"1": (30, 30), "2": (60, 60)}
        config.task.eval_per_length = 20
        config.base.update(steps=60, row_length=48, save_every=25, log_every=20)
        config.train.update(row_length=48, save_every=8, log_every=10)
        config.loop.update(n_iters=2, steps="lin:20:4")
        config.sample.update(max_new_tokens=40, round_size=64)
        config.gates = {}
    return config
