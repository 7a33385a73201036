"""GRPO on GSM8K with a pretrained model: RL with verifiable rewards, on a v4-8 or 8 GPUs.

    qstar train --config=grpo_gsm8k:model=Qwen3-1.7B --workdir=runs/grpo_gsm8k

An instruction-tuned model answers better in its chat template: --config.task.format=chat. On little memory adapters alone
are trained: --config.train.lora_rank=16 --config.train.lr=1e-5. Rewards of one's own: --config.rl.reward, see
qstar/methods/README.md.
`model`, `data` and `prompts` as in star_gsm8k.py. Rates and sizes are those of TRL's and DeepSeekMath's defaults (learning
rate 1e-6, groups of 8, clipping at 0.2, divergence in the loss); not run here at that size. What was run is `smoke`, on
260K-parameter weights: a test of the machinery, in which no answer is right and no score differs.

`qwen05` is the run on a real language model that fits two CPU cores, Qwen2.5-Coder-0.5B-Instruct in bfloat16 with LoRA
of rank 16, prompts in its chat template without examples:

    qstar train --config=grpo_gsm8k:qwen05,model=Qwen2.5-Coder-0.5B-Instruct,data=gsm8k --workdir=runs/grpo_qwen05

Plan, written before the run (bfloat16 instead of float32 since, for speed; nothing had run). 40 updates of 8 problems x
8 responses, evaluated greedily on 150 validation problems after 0, 20 and 40; the better of the two is answered on the
first 300 test problems. Compared with `rft` of star_gsm8k:qwen05, whose 1,200 samples are half of these 2,560: RFT is
also run with 4 samples per problem (2,400). Reported: mean reward and share of groups without signal per update, test
accuracy against the base and RFT, paired over problems with 95% intervals. Success: an interval above 0 against the
base. Otherwise it is reported as failed, and up to two more settings are tried (rate, SVAMP as the task), each named.

The first of these was named before either had run, because two cores of 110 GFLOP/s take half a day for the above: `svamp`,
where the base solves .39 of the test problems with shorter answers, and RFT gained .090 (.040 to .140) from 600 samples:

    qstar train --config=grpo_gsm8k:svamp,model=Qwen2.5-Coder-0.5B-Instruct,data=SVAMP.json --workdir=runs/grpo_svamp

8 updates of 8 problems x 4 responses, which are 256 samples, at a rate of 1e-4; float32. The data are those of
star_gsm8k:svamp. Base and last model answer the 300 test problems, greedily; none is chosen. Reported and judged as above.
20 updates at 5e-5 were planned first. A run of 10 was ended after its first update: the base solved .400 of the test
problems, and responses have 200 tokens. On two cores of 115 GFLOP/s 32 of them take 165 s; the log-probabilities of 8 under
one model take 31 s, a gradient step on 8 takes 65 s: 11 minutes for an update.
"""

from qstar.configs.common import parse_arg, rl_config, svamp_task, task_files


def get_config(arg=None):
    """Arguments: model=DIR, data=DIR, prompts=DIR, qwen05 (0.5B parameters on two cores), svamp (the same on SVAMP), smoke,
    seed=N."""
    modes = {"qwen05": False, "svamp": False, "smoke": False}
    apart = ("smoke qwen05 svamp", "qwen05 svamp", "svamp prompts")
    arg = parse_arg(arg, *apart, model="Qwen3-1.7B", data="", prompts="", **modes, seed=0)
    config = rl_config()
    config.name = "grpo_gsm8k"
    config.seed = arg.seed
    config.mesh = "data=1,fsdp=-1"
    config.task = {"name": "gsm8k", "format": "few_shot" if arg.prompts else "plain"}
    config.task.update(task_files(arg, "gsm8k"))
    config.model = {"path": arg.model, "preset": "", "dtype": "bfloat16", "remat": "block"}
    config.rl.update(group=8, kl_weight=0.04)
    config.train.update(
        updates=500, prompts=64, batch_size=128, max_new_tokens=256, lr=1e-6, warmup=20, max_approx_kl=0.1
    )
    config.sample.update(max_new_tokens=256)
    config.evaluate.update(split="val")
    if arg.qwen05 or arg.svamp:
        qwen05(config)
    if arg.svamp:
        svamp(config, arg.data)
    if arg.smoke:
        config.mesh = "data=-1"
        config.model = {"path": arg.model, "preset": "", "dtype": "float32", "remat": "none"}
        config.loop.update(rounds=1, problems_per_iter=16)
        config.rl.group = 2
        config.train.update(updates=2, prompts=4, batch_size=8, max_new_tokens=16, save_every=1)
        config.sample.update(max_new_tokens=16, round_size=16)
        config.evaluate.update(limit=8)
    return config


def qwen05(config):
    """LoRA on two CPU cores, 64 responses per update."""
    config.name = "grpo_gsm8k_qwen05"
    config.mesh = "data=-1"
    config.task.format = "chat"
    config.model.update(dtype="bfloat16", remat="none", scan_unroll=24)
    config.loop.rounds = 2
    # No penalty for responses at the token limit: they are wrong already.
    config.rl.update(group=8, no_eos_penalty=0.0)
    config.train.update(
        updates=40, prompts=8, batch_size=16, accumulate=8, max_new_tokens=320, lr=2e-5, warmup=4, save_every=5
    )
    config.train.update(lora_rank=16, lora_alpha=32.0)
    config.sample.update(max_new_tokens=400, slots=64, round_size=320)
    config.evaluate.update(split="val", limit=150)


def svamp(config, data):
    """The same on SVAMP: 32 responses per update."""
    config.name = "grpo_svamp_qwen05"
    config.task = svamp_task(data)
    config.model.dtype = "float32"
    config.loop.rounds = 1
    config.rl.group = 4
    config.train.update(updates=8, max_new_tokens=256, lr=1e-4)
    config.sample.update(max_new_tokens=256)
    config.evaluate.update(split="test", limit=300)
