"""STaR on GSM8K with GPT-J-6B: the paper's settings (2203.14465, section 4.4), on a v3-8, a v4-8 or 8 GPUs.

    qstar train --config=star_gsm8k:model=gpt-j-6b --workdir=runs/star_gsm8k

`model` is a local folder in the Hugging Face layout (safetensors); data come from the hub, or from `data`, a folder
with train.jsonl and test.jsonl; `prompts` is a folder with the release's gsm_prompts.txt and gsm_prompts_answer_key.txt.

The paper reports 10.7% on the test set with rationalisation and 10.1% without (few-shot CoT: 3.1%). Not run here at
that size. What was run: the `smoke` mode, on 260K-parameter weights and real GSM8K rows, which is a test of the
machinery and not of the method (its accuracy is .000). `small` is the same at 256 problems per loop, not run yet:

    qstar train --config=star_gsm8k:small,model=stories260k,data=gsm8k --workdir=runs/star_gsm8k_small
"""

from qstar.configs.common import parse_arg, star_config, task_files


def get_config(arg=None):
    """Arguments: model=DIR, data=DIR, prompts=DIR, small (a model of a few hundred tokens of context), smoke, seed=N."""
    arg = parse_arg(arg, model="gpt-j-6b", data="", prompts="", small=False, smoke=False, seed=0)
    config = star_config()
    config.name = "star_gsm8k"
    config.seed = arg.seed
    config.mesh = "data=1,fsdp=-1"
    # The paper's few-shot form; the examples that come with qstar do not fit into a few hundred tokens.
    plain = (arg.small or arg.smoke) and not arg.prompts
    config.task = {"name": "gsm8k", "hint": "answer", "format": "plain" if plain else "few_shot"}
    config.task.update(task_files(arg, "gsm8k"))
    if arg.prompts:
        config.task.prompts = arg.prompts
    config.model = {"path": arg.model, "preset": "", "dtype": "bfloat16", "remat": "block"}
    config.loop = {
        "n_iters": 36,
        "problems_per_iter": 10_000,
        "restart": "base",
        "steps": "exp:40:1.2",
        "max_epochs": 10.0,
        "patience": 5,
    }
    config.arms = {"star": {"preset": "star"}, "star_norat": {"preset": "star_norat"}}
    config.sample.update(max_new_tokens=256, round_size=1024)
    config.train.update(batch_size=8, lr=1e-6, warmup=100, packed=True, row_length=1024)
    config.evaluate.update(split="val", hinted=False)
    if arg.small or arg.smoke:
        # Gold solutions stay in the mix: a model that solves nothing would keep nothing, and the loop would rightly stop.
        config.mesh = "data=-1"
        config.model = {"path": arg.model, "preset": "", "dtype": "float32", "remat": "none", "scan_unroll": 5}
        config.loop.update(n_iters=2, problems_per_iter=256, steps="lin:120:20", include_sft_data=True, patience=0)
        config.arms = {"star": {"preset": "star"}}
        config.sample.update(max_new_tokens=128, round_size=128)
        config.train.update(batch_size=8, lr=1e-3, warmup=10, row_length=512, save_every=20, log_every=20)
        config.evaluate.update(limit=64)
    if arg.smoke:
        config.model.scan_unroll = 1  # a few updates: what they wait for is the compiler
        config.loop.update(problems_per_iter=24, steps="lin:12:4")
        config.sample.update(max_new_tokens=32, round_size=16)
        config.train.update(batch_size=4, save_every=5, log_every=4)
        config.evaluate.update(limit=16)
    return config
