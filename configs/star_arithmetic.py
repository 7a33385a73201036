"""STaR on addition: a small transformer teaches itself 3-digit addition, with and without rationalisation.

    bash launch/local.sh                                       # this config, into runs/star_arithmetic
    qstar train --config=star_arithmetic --workdir=runs/star_arithmetic
    qstar train --config=star_arithmetic:seed=1 --workdir=runs/star_arithmetic_1

Two CPU cores, about six minutes. Measured with seed 0: 3-digit sums .000 -> .432 -> .984 -> .988 with rationalisation over
three loops, and .004, .000, .000 without (250 held-out problems); RESULTS.md has three seeds and the arms that failed.

    ...:digits=4                               sums of up to 4 digits (5 likewise)
    ...:arms=rationalisation+restart_base      any arms of ARMS, side by side from one base
    ...:direct,digits=5                        the baseline without scratchpad: answers only, no loops

Deviations from the paper, because the model is small and from scratch: a base trained on seed rows stands in for a
pretrained model and its few-shot prompt, hinted seed rows are in every batch of both arms, and each loop continues from the
previous loop's model (arm `restart_base` is the paper's restart).
"""

from qstar.configs.common import chosen_arms, parse_arg, star_config

from qstar.errors import unknown

ARMS = {
    "rationalisation": {"preset": "star"},
    "no_rationalisation": {"preset": "star_norat"},
    "restart_base": {"preset": "star", "restart": "base"},
    "exact_filter": {"preset": "star", "exact_filter": True},  # an oracle: only rationales whose every line is right
    "accumulate": {"preset": "star", "accumulate": True},
    "keep_hint": {"preset": "star", "p_keep_hint": 1.0},  # the hint stays in the training prompt
    "temperature": {"preset": "star", "temperature": 0.7},
    "no_rationalisation_t07": {"preset": "star_norat", "temperature": 0.7},
    "star_dagger": {"preset": "star_dagger", "k": 4, "include_sft_data": False},
}
POOL = {"1": 60, "2": 800, "3": 2400, "4": 2000, "5": 2000}  # problems drawn per loop
SEEDS = {"1": (60, 60), "2": (500, 500), "3": (10, 150), "4": (10, 150), "5": (10, 150)}  # gold rows (plain, hinted)
ROW = {2: 46, 3: 62, 4: 84, 5: 100}  # tokens of the longest row, prompt and hint included
NEW = {2: 38, 3: 52, 4: 68, 5: 84}  # tokens of the longest completion


def get_config(arg=None):
    """Arguments: smoke, seed=N, digits=N, steps=N (of the base), loops=N, arms=A+B, direct."""
    arms, fixed = "rationalisation+no_rationalisation", ("smoke digits steps loops direct", "direct loops arms")
    arg = parse_arg(arg, *fixed, smoke=False, seed=0, digits=3, steps=0, loops=0, arms=arms, direct=False)
    n = arg.digits
    config = star_config()
    config.name = "star_arithmetic"
    config.seed = arg.seed
    config.task = additions(n, arg.seed)
    config.model = {"path": "", "preset": "tiny"}
    optimiser = {"batch_size": 32, "schedule": "linear", "warmup": 50, "end": 0.05, "b1": 0.9, "b2": 0.98, "clip": 1.0}
    rows = {"packed": False, "row_length": ROW[n], "save_every": 200, "log_every": 50}
    config.base = {"steps": arg.steps or 600 + 300 * n, "lr": 2e-3, **optimiser, **rows}
    config.train.update(lr=1.5e-3, **optimiser, **rows)
    config.loop = {
        "n_iters": arg.loops or n,
        "problems_per_iter": 10_000,
        "restart": "previous",
        "steps": "lin:400:20",
        "max_epochs": 1000.0,
        "seed_share": 0.15,
    }
    config.arms = chosen_arms(arg.arms, ARMS)
    config.sample.update(max_new_tokens=NEW[n], round_size=4096)
    config.evaluate.update(split="test", hinted=True)
    config.gates = gates(n)
    if arg.direct:
        direct(config, n, arg.steps or 2760)
    if arg.smoke:
        smoke(config)
    return config


def additions(digits, seed):
    """The task: sums of 1 to `digits` digits."""
    if digits not in ROW:
        raise unknown(f"config argument digits={digits}", str(digits), [str(d) for d in ROW])
    lengths = [str(d) for d in range(1, digits + 1)]
    drawn = {"pool": {d: POOL[d] for d in lengths}, "seeds": {d: SEEDS[d] for d in lengths}}
    return {"name": "arithmetic", "format": "compact", **drawn, "eval_per_length": 250, "seed": seed}


def gates(n):
    """What must hold of the base before any loop is paid for, measured on validation sums."""
    return {
        "unsolved": {
            "metric": f"accuracy/{n}",
            "max": 0.05,
            "why": "the base solves the longest sums already, so the arms cannot differ",
        },
        "hint works": {
            "metric": f"hinted_accuracy/{n}",
            "min": 0.3,
            "why": "without a working hint there is nothing to rationalise; train the base for longer",
        },
        "hint works below": {
            "metric": f"hinted_accuracy/{n - 1}",
            "min": 0.8,
            "why": "the base has not learnt to use a hint; train it for longer",
        },
        "rationales are valid": {
            "metric": f"hinted_valid/{n}",
            "min": 0.6,
            "stop": False,
            "why": "many hinted rationales copy the hint past a wrong step",
        },
    }


def direct(config, n, steps):
    """The paper's baseline: gold answers without rationales, as many problems as n loops draw, no loops."""
    per_length = {d: (POOL[d] * n if d != "1" else 65, 0) for d in config.task.pool}
    config.task.update(format="direct")
    config.task.seeds = per_length
    config.base.update(steps=steps, row_length=22)
    config.loop.update(n_iters=0)
    config.arms = {"direct": {"preset": "star_norat"}}
    config.sample.update(max_new_tokens=n + 3)
    config.evaluate.update(hinted=False)
    config.gates = {}


def smoke(config):
    """Under a minute: one digit can be learnt by heart in 150 steps, so something is kept and every stage runs."""
    config.model.update(hidden_size=64, num_layers=2)
    config.task.pool = {"1": 40, "2": 24}
    config.task.seeds = {"1": (30, 60), "2": (0, 30)}
    config.task.eval_per_length = 20
    config.base.update(steps=150, row_length=48, save_every=60, log_every=50)
    config.train.update(row_length=48, save_every=8, log_every=10)
    config.loop.update(n_iters=2, steps="lin:20:4")
    config.sample.update(max_new_tokens=34, round_size=32)
    config.gates = {}
