"""GRPO on GSM8K with a pretrained model: RL with verifiable rewards, on a v4-8 or 8 GPUs.

    qstar train --config=grpo_gsm8k:model=Qwen3-1.7B --workdir=runs/grpo_gsm8k

An instruction-tuned model answers better in its chat template: --config.task.format=chat. On little memory adapters alone
are trained: --config.train.lora_rank=16 --config.train.lr=1e-5. Rewards of one's own: --config.rl.reward, see
qstar/methods/README.md.
`model`, `data` and `prompts` as in star_gsm8k.py. Rates and sizes are those of TRL's and DeepSeekMath's defaults (learning
rate 1e-6, groups of 8, clipping at 0.2, divergence in the loss); not run here at that size. What was run is `smoke`, on
260K-parameter weights: a test of the machinery, in which no answer is right and no score differs.
"""

from qstar.configs.common import parse_arg, rl_config, task_files


def get_config(arg=None):
    """Arguments: model=DIR, data=DIR, prompts=DIR, smoke, seed=N."""
    arg = parse_arg(arg, model="Qwen3-1.7B", data="", prompts="", smoke=False, seed=0)
    config = rl_config()
    config.name = "grpo_gsm8k"
    config.seed = arg.seed
    config.mesh = "data=1,fsdp=-1"
    config.task = {"name": "gsm8k", "format": "few_shot" if arg.prompts else "plain"}
    config.task.update(task_files(arg, "gsm8k"))
    if arg.prompts:
        config.task.prompts = arg.prompts
    config.model = {"path": arg.model, "preset": "", "dtype": "bfloat16", "remat": "block"}
    config.rl.update(group=8, kl_weight=0.04)
    config.train.update(
        updates=500, prompts=64, batch_size=128, max_new_tokens=256, lr=1e-6, warmup=20, max_approx_kl=0.1
    )
    config.sample.update(max_new_tokens=256)
    config.evaluate.update(split="val")
    if arg.smoke:
        config.mesh = "data=-1"
        config.model = {"path": arg.model, "preset": "", "dtype": "float32", "remat": "none"}
        config.loop.update(rounds=1, problems_per_iter=16)
        config.rl.group = 2
        config.train.update(updates=2, prompts=4, batch_size=8, max_new_tokens=16, save_every=1)
        config.sample.update(max_new_tokens=16, round_size=16)
        config.evaluate.update(limit=8)
    return config
