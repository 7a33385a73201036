"""V-STaR on GSM8K with Llama-2-7B and LoRA: the paper's settings where it prints them (2402.06457, section 4).

    qstar train --config=v_star_gsm8k:model=Llama-2-7b-hf --workdir=runs/v_star_gsm8k

Printed: LoRA throughout, 2 epochs for G_SFT, 16 samples per query in each of three iterations (48 at once for the baselines),
128 candidates at test. Ours, since the paper prints neither: LoRA rank 16, rates, beta 0.1, temperature 0.7, at most 16 pairs
per problem, one epoch of DPO. The paper's figures: about 63% best-of-64 at 7B, against 42-47% pass@1 of its generators.

`model` is a local folder in the Hugging Face layout; data come from the hub, or from `data`, a folder with train.jsonl and
test.jsonl. Not run here at that size: only `smoke`, on 260K-parameter weights and real rows, a test of the machinery.

    ...:arms=v_star+verification      any rows of the paper's table of baselines
"""

from qstar.configs.common import parse_arg, task_files, v_star_config

from qstar.errors import unknown

PRESETS = ("sft", "verification", "star", "rft", "star_dagger", "v_star_1iter", "v_star", "rpo")


def get_config(arg=None):
    """Arguments: model=DIR, data=DIR, smoke, seed=N, arms=A+B, orm (train an ORM beside the DPO verifier)."""
    arg = parse_arg(arg, model="Llama-2-7b-hf", data="", smoke=False, seed=0, arms="v_star", orm=False)
    config = v_star_config()
    config.name = "v_star_gsm8k"
    config.seed = arg.seed
    config.mesh = "data=1,fsdp=-1"
    config.task = {"name": "gsm8k", "hint": "answer", "format": "plain"}  # G_SFT has learnt the form
    config.task.update(task_files(arg, "gsm8k"))
    config.model = {"path": arg.model, "preset": "", "dtype": "bfloat16", "remat": "block"}
    config.arms = {name: arm_of(name, arg.orm) for name in arg.arms.split("+")}
    lora = {"lora_rank": 16, "lora_alpha": 32.0}
    config.sft = {"problems": None, "steps": "epochs:2:0"}
    config.loop.update(steps="epochs:2:0")
    config.sample.update(max_new_tokens=256, round_size=2048, temperature=0.7)
    config.train.update(batch_size=64, lr=1e-4, warmup=50, schedule="linear", end=0.1, row_length=1024, **lora)
    for kind in ("dpo", "rpo"):
        config[kind].update(batch_size=32, lr=2e-5, warmup=50, schedule="linear", row_length=1536, epochs=1.0, **lora)
    for kind in ("orm", "prm"):
        config[kind].update(batch_size=64, lr=5e-5, warmup=50, schedule="linear", row_length=1024, epochs=1.0, **lora)
    config.evaluate.update(split="test", hinted=False)  # settings are not chosen by it: the last iteration is reported
    config.select.update(samples=128, temperature=0.7)
    if arg.smoke:
        smoke(config, arg.model)
    return config


def arm_of(name, orm):
    """A row of the paper's table 1."""
    if name not in PRESETS:
        raise unknown(f"config argument arms: {name!r}", name, PRESETS)
    verified = name in ("verification", "v_star_1iter", "v_star")
    return {"preset": name, **({"verifiers": ("dpo", "orm")} if orm and verified else {})}


def smoke(config, model):
    """Under a minute: a model that solves nothing, so D_VER holds human solutions as the right ones and its own as wrong."""
    config.mesh = "data=-1"
    config.model = {"path": model, "preset": "", "dtype": "float32", "remat": "none"}
    config.sft = {"problems": None, "steps": "lin:6:0"}
    config.loop.update(n_iters=1, k=2, problems_per_iter=12, steps="lin:4:0")
    config.pairs.negatives = "any"  # what such a model writes ends in no answer
    config.sample.update(max_new_tokens=32, round_size=16)
    update = {"batch_size": 4, "warmup": 2, "save_every": 3, "log_every": 2, "lora_rank": 4}
    config.train.update(lr=1e-3, row_length=512, **update)
    for kind, length in (("rpo", 768), ("dpo", 768), ("orm", 512), ("prm", 512)):
        config[kind].update(lr=1e-3, row_length=length, steps=4, **update)
    config.evaluate.update(limit=8)
    config.select.update(samples=2, limit=8)
