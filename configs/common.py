"""Base configs that the others change, and the reader of their argument, a comma list: `smoke`, `arms=star+star_norat`."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from qstar.errors import UserError, unknown

# Stands for models that a smoke run does not name: random weights over bytes.
SMOKE_MODEL = "random-tiny"
_SWITCH = {"": True, "1": True, "true": True, "0": False, "false": False}


def parse_arg(arg: str | None, *excluded: str, **defaults: Any) -> ConfigDict:
    """Reads e.g. "smoke,seed=3" into typed values; a bare word means True.

    With `smoke`, models that the argument does not name are a random tiny one.

    Args:
      excluded: "smoke arms steps": with the first key, the others would have no effect.

    Raises:
      UserError: a key that has no default, an empty value or one of another type, keys that exclude each other.
    """
    out, named = dict(defaults), set()
    for part in filter(None, (arg or "").split(",")):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise unknown(f"config argument {key!r}", key, defaults)
        # An unset variable of the shell leaves `data=`: the rows that ship would be taken in its place.
        if equals and not text:
            raise UserError(f"config argument {key}= is empty; give a value, or leave it out")
        kind = type(defaults[key])
        try:
            out[key] = _SWITCH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise UserError(f"config argument {key}={text!r} must be of type {kind.__name__}") from None
        # 0 stands for the default of these, which depends on other arguments.
        if key in ("steps", "loops") and out[key] < 1:
            raise UserError(f"config argument {key}={text} must be 1 or more; leave it out for the default")
        named.discard(key) if out[key] is False else named.add(key)
    for first, *others in map(str.split, excluded):
        if (other := next((key for key in others if key in named), "")) and first in named:
            raise UserError(f"config argument {other} has no effect with {first}; leave one of them out")
    if out.get("smoke"):
        models = {"model", "teacher", "small", "large"} & defaults.keys()
        out.update(dict.fromkeys(models - named, SMOKE_MODEL))
    return ConfigDict(out)


def chosen_arms(names: str, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the settings of the named arms, e.g. "a+b"; raises UserError for a name that `arms` lacks."""
    for name in names.split("+"):
        if name not in arms:
            raise unknown(f"config argument arms: {name!r}", name, arms)
    return {name: dict(arms[name]) for name in names.split("+")}


def task_files(arg: ConfigDict, name: str, train: str = "train.jsonl", test: str = "test.jsonl") -> dict[str, str]:
    """Returns a task's files: those in the folder `data`, for smoke runs without one rows that ship; {}: the hub's.

    And the folder `prompts`, where the argument names one.
    """
    prompts = {"prompts": arg.prompts} if arg.get("prompts") else {}
    if arg.data:
        return {"train": f"{arg.data}/{train}", "test": f"{arg.data}/{test}", **prompts}
    return {part: f"built-in:{name}" for part in ("train", "test") if arg.smoke} | prompts


def svamp_task(data: str) -> dict[str, str]:
    """Returns SVAMP in the chat format, of the hub or of the file `data`, whose first 300 problems are the test set."""
    # Variants of one problem stand side by side in the file, so that slices keep them on one side.
    parts = {"train": data, "train_split": "[300:]", "test": data, "test_split": "[:300]"} if data else {}
    return {"name": "svamp", "format": "chat", **parts}


def star_config() -> ConfigDict:
    """Returns the STaR config that all others change: the paper's loop, no task and no model yet."""
    return ConfigDict(
        {
            "method": "star",
            "name": "star",
            "seed": 0,
            "mesh": "data=-1",
            "task": {},
            "model": {"path": "", "preset": ""},
            "base": {"steps": 0},
            "gates": {},
            "loop": {},
            "arms": {"star": {"preset": "star"}},
            "sample": {"max_new_tokens": 96, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "round_size": 1024},
            "train": {
                "batch_size": 8,
                "accumulate": 1,
                "lr": 1e-6,
                "schedule": "constant",
                "warmup": 100,
                "end": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 0.0,
                "clip": 1.0,
                "z_loss": 0.0,
                "loss_on_prompt": False,
                "packed": True,
                "row_length": 1024,
                "save_every": 100,
                "log_every": 50,
            },
            "evaluate": {"split": "test", "limit": 0, "hinted": False},
            "log": {"wandb": {}},
        }
    )


def v_star_config() -> ConfigDict:
    """Returns the V-STaR config that all others change: STaR's sections and the verifiers' (the paper prints no rates)."""
    config = star_config()
    config.method = "v_star"
    config.name = "v_star"
    config.loop = {"n_iters": 3, "k": 16, "temperature": 0.7}
    config.arms = {"v_star": {"preset": "v_star"}}
    config.sft = {"problems": None, "steps": "epochs:2:0"}
    config.pairs = {"per_problem": 16, "negatives": "parsed"}
    update = {k: config.train[k] for k in ("batch_size", "accumulate", "lr", "schedule", "warmup", "b1", "b2", "clip")}
    update |= {"epochs": 1.0, "steps": 0, "packed": True, "row_length": 1024, "save_every": 100, "log_every": 50}
    config.dpo = {**update, "beta": 0.1}
    config.rpo = {**update, "beta": 0.1, "alpha": 1.0}
    config.orm = {**update, "lm_weight": 0.1, "dropout": 0.2}
    config.prm = {**update, "lm_weight": 0.1, "dropout": 0.2, "rollouts": 0}
    config.select = {"samples": 128, "temperature": 0.7, "limit": 0, "m": 4}
    return config


def quiet_config() -> ConfigDict:
    """Returns the Quiet-STaR config that all others change: the official optimiser, no text and no model yet."""
    update = {
        "batch_size": 8,
        "accumulate": 1,
        "lr": 1e-6,
        "schedule": "constant",
        "warmup": 20,
        "end": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "weight_decay": 0.001,
        "clip": 1.0,
        "save_every": 100,
        "log_every": 50,
    }
    return ConfigDict(
        {
            "method": "quiet_star",
            "name": "quiet_star",
            "seed": 0,
            "mesh": "data=-1",
            "data": {},
            "model": {"path": "", "preset": ""},
            "base": {"steps": 0, **update},
            "gates": {},
            "thoughts": {},
            "arms": {"quiet_star": {}},
            "train": dict(update),
            "evaluate": {"rows": 256, "batch_size": 8, "every": 0, "viewer_texts": 40, "thoughts_per_position": 1},
            "log": {"wandb": {}},
        }
    )


def rl_config() -> ConfigDict:
    """Returns the config that all configs of RL with verifiable rewards change: GRPO, no task and no model yet."""
    config = star_config()
    for key in ("z_loss", "loss_on_prompt", "packed", "row_length"):
        del config.train[key]
    config.update({"method": "rl", "name": "rl", "loop": {"rounds": 4}})
    # Not by `update`, which would keep the arm that is there.
    config.arms = {"grpo": {"estimator": "grpo"}}
    # `reward`: built-in names, functions of files and weights, see qstar/methods/rewards.py.
    config.rl = {"group": 8, "kl_weight": 0.05, "clip": 0.2, "temperature": 1.0, "reward": "correct"}
    config.train.update(updates=100, prompts=64, epochs=1, max_new_tokens=96, save_every=20, log_every=1)
    config.train.update(log_completions=32, lora_rank=0, lora_alpha=32.0)
    return config


def pairs_config(method: str, arg: ConfigDict, rows: list[dict[str, str]], **train: Any) -> ConfigDict:
    """Returns the config of `sft`, `dpo` or `distil`. `rows`: of the smoke run, where `arg.data` names none."""
    config = ConfigDict(
        {
            "method": method,
            "name": method,
            "seed": arg.seed,
            "mesh": "data=1,fsdp=-1",
            "model": {"path": arg.model, "remat": "block"},
            "data": {"source": arg.data, "validation": "", "held_out": 0.05},
            "train": {"epochs": arg.epochs, "steps": arg.steps, "batch_size": 8, "save_every": 200, **train},
            "evaluate": {"examples": 8, "max_new_tokens": 128},
            "arms": {method: {}},
            "log": {"wandb": {}},
        }
    )
    if arg.smoke:
        config.mesh = "data=-1"
        del config.model.remat
        config.data.held_out = 0.25
        if not arg.data:
            config.data.rows = rows
        config.train.update(steps=arg.steps or 6, lr=1e-3, save_every=4, log_every=2)
        config.evaluate.update(examples=2, max_new_tokens=4)
    return config


def sums() -> list[tuple[int, int]]:
    """Returns the numbers of the smoke runs' rows."""
    return [(a, b) for a in range(4, 9) for b in range(1, 5)]
