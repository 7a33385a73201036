"""STaR on CommonsenseQA with GPT-J-6B: the paper's settings (2203.14465, section 4.3), on a v3-8, a v4-8 or 8 GPUs.

    qstar train --config=star_commonsense_qa:model=gpt-j-6b,prompts=prompts --workdir=runs/star_cqa

`model`, `data` and `prompts` as in star_gsm8k.py (here train_rand_split.jsonl and dev_rand_split.jsonl in `data`).
The paper reports 72.5% on the 1,221 dev questions with rationalisation and 68.8% without, at its best loop on that very
set; here loops are chosen on a validation part of train, and the dev set is read once. Not run here at that size.
"""

from qstar.configs.common import parse_arg, star_config, task_files


def get_config(arg=None):
    """Arguments: model=DIR, data=DIR, prompts=DIR, smoke, seed=N."""
    arg = parse_arg(arg, model="gpt-j-6b", data="", prompts="", smoke=False, seed=0)
    config = star_config()
    config.name = "star_commonsense_qa"
    config.seed = arg.seed
    config.mesh = "data=1,fsdp=-1"
    # The paper's few-shot form; the examples that come with qstar do not fit into the smoke run's context.
    config.task = {"name": "commonsense_qa", "format": "plain" if arg.smoke and not arg.prompts else "few_shot"}
    config.task.update(task_files(arg, "commonsense_qa", "train_rand_split.jsonl", "dev_rand_split.jsonl"))
    config.model = {"path": arg.model, "preset": "", "dtype": "bfloat16", "remat": "block"}
    config.loop = {
        "n_iters": 30,
        "problems_per_iter": 10_000,
        "restart": "base",
        "steps": "exp:40:1.2",
        "max_epochs": 10.0,
        "few_shot_in_train": True,
        "patience": 5,
    }
    config.arms = {"star": {"preset": "star"}, "star_norat": {"preset": "star_norat"}}
    config.sample.update(max_new_tokens=96, round_size=1024)
    config.train.update(batch_size=8, lr=1e-6, warmup=100, packed=True, row_length=1024)
    config.evaluate.update(split="val", hinted=False)
    if arg.smoke:
        config.mesh = "data=-1"
        config.model = {"path": arg.model, "preset": "", "dtype": "float32", "remat": "none"}
        config.task.direct = True
        config.loop.update(
            n_iters=2,
            problems_per_iter=48,
            steps="lin:40:4",
            few_shot_in_train=False,
            include_sft_data=True,
            patience=0,
        )
        config.arms = {"star": {"preset": "star"}}
        config.sample.update(max_new_tokens=16, round_size=32)
        config.train.update(batch_size=4, lr=1e-3, warmup=5, row_length=512, save_every=15, log_every=10)
        config.evaluate.update(limit=32)
    return config
