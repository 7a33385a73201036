"""STaR on GSM8K with GPT-J-6B: the paper's settings (2203.14465, section 4.4), on a v3-8, a v4-8 or 8 GPUs.

    qstar train --config=star_gsm8k:model=gpt-j-6b --workdir=runs/star_gsm8k

`model` is a local folder in the Hugging Face layout (safetensors); data come from the hub, or from `data`, a folder
with train.jsonl and test.jsonl; `prompts` is a folder with the release's gsm_prompts.txt and gsm_prompts_answer_key.txt.

The paper reports 10.7% on the test set with rationalisation and 10.1% without (few-shot CoT: 3.1%). Not run here at
that size. What was run: the `smoke` mode, on 260K-parameter weights and real GSM8K rows, which is a test of the
machinery and not of the method (its accuracy is .000). `small` is the same at 256 problems per loop, not run yet:

    qstar train --config=star_gsm8k:small,model=stories260k,data=gsm8k --workdir=runs/star_gsm8k_small

`qwen05` is the run on a real language model that fits two CPU cores, Qwen2.5-Coder-0.5B-Instruct in float32 with LoRA
of rank 16, prompts in its chat template without examples:

    qstar train --config=star_gsm8k:qwen05,model=Qwen2.5-Coder-0.5B-Instruct,data=gsm8k --workdir=runs/star_qwen05

Plan, written before the run. Two loops of 300 training problems, one greedy sample each; arms `star`, `star_norat`
(without rationalisation), `rft` (600 problems x 2 samples at temperature .7: as many samples as `star` draws when it
fails on 5 of 6 problems) and `sft` (gold solutions of 300 problems). Every arm starts from the base, 2 passes over what
it keeps. Reported: greedy accuracy on the first 300 test problems after the last loop (no loop is picked, no setting is
chosen on them), differences to the base and between arms paired over problems with 95% intervals; then majority of 8
samples at temperature .7 for the base and the best arm, and the base few-shot (`qstar evaluate`). Success: `star` or
`rft` above the base with an interval above 0; rationalisation helps if `star` - `star_norat` has one. Otherwise the
arms are reported as failed, and up to two more settings are tried (samples per problem, SVAMP as the task), each named.

The first of these, named after `qwen05` had shown no gain beyond its interval (RESULTS.md) and before it ran: `svamp`,
where the base solves .48 of 48 training problems (bfloat16, greedy) and fails on problems within its ability, so that a
round keeps more rows. The same model and LoRA, computed in bfloat16; `data` is SVAMP.json, whose first 300 problems are
the test set (variants of one problem stand side by side there) and the other 700 the training set:

    qstar train --config=star_gsm8k:svamp,model=Qwen2.5-Coder-0.5B-Instruct,data=SVAMP.json --workdir=runs/svamp_qwen05

Arms: `rft` (600 problems, one sample each at temperature .7, one pass over what is kept) and `star` (two loops of 300
problems, one greedy sample each and a hinted one where it is wrong, one pass). Reported and judged as above. `rft` ran:
.483 against the base's .393, a gain of .090 (.040 to .140); 1.3 hours, 6.8 GB. `star` has not.
"""

from qstar.configs.common import parse_arg, star_config, svamp_task, task_files


def get_config(arg=None):
    """Arguments: model=DIR, data=DIR, prompts=DIR, qwen05 (0.5B parameters on two cores), svamp (the same on SVAMP), small
    (a model of a few hundred tokens of context), smoke, seed=N."""
    modes = {"qwen05": False, "svamp": False, "small": False, "smoke": False}
    apart = ("smoke qwen05 svamp small", "small qwen05 svamp", "svamp prompts")
    arg = parse_arg(arg, *apart, model="gpt-j-6b", data="", prompts="", **modes, seed=0)
    config = star_config()
    config.name = "star_gsm8k"
    config.seed = arg.seed
    config.mesh = "data=1,fsdp=-1"
    # The paper's few-shot form; the examples that come with qstar do not fit into a few hundred tokens.
    plain = (arg.small or arg.smoke) and not arg.prompts
    config.task = {"name": "gsm8k", "hint": "answer", "format": "plain" if plain else "few_shot"}
    config.task.update(task_files(arg, "gsm8k"))
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
    if arg.qwen05 or arg.svamp:
        qwen05(config)
    if arg.svamp:
        svamp(config, arg.data)
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


def qwen05(config):
    """LoRA on two CPU cores. An update has 4 rows of 640 tokens, one at a time: all at once need 24 GB."""
    config.name = "star_gsm8k_qwen05"
    config.mesh = "data=-1"
    config.task.format = "chat"
    config.model.update(dtype="float32", remat="none")
    config.loop = {"n_iters": 2, "problems_per_iter": 300, "restart": "base", "steps": "epochs:2:0"}
    config.arms = {
        "star": {"preset": "star"},
        "star_norat": {"preset": "star_norat"},
        "rft": {"preset": "rft", "k": 2, "problems_per_iter": 600, "include_sft_data": False, "steps": "epochs:2:0"},
        "sft": {"preset": "sft", "steps": "epochs:2:0"},
    }
    # At 256 tokens two of three replies are cut off, at 400 one of ten (32 problems).
    config.sample.update(max_new_tokens=400, slots=64, round_size=320)
    lora = {"lora_rank": 16, "lora_alpha": 32.0}
    config.train.update(
        batch_size=4, accumulate=4, lr=1e-4, warmup=5, row_length=640, save_every=5, log_every=5, **lora
    )
    config.evaluate.update(split="test", limit=300, hinted=False)


def svamp(config, data):
    """The same on SVAMP, whose answers are shorter: 256 tokens cut off one of ten of the base's."""
    config.name = "star_svamp_qwen05"
    config.task = svamp_task(data)
    config.model.update(dtype="bfloat16", scan_unroll=24)
    config.arms = {
        "rft": {"preset": "rft", "k": 1, "problems_per_iter": 600, "include_sft_data": False, "steps": "epochs:1:0"},
        "star": {"preset": "star", "steps": "epochs:1:0"},
    }
    # Draws do not depend on the slots; 128 take two thirds of the time of 64 per row.
    config.sample.update(max_new_tokens=256, slots=128)
