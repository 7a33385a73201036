"""LM-Guided CoT on HotpotQA: FLAN-T5 small writes rationales, FLAN-T5 XXL answers; on a v6e-8 or 8 GPUs.

    qstar train --config=guided_cot_hotpotqa:small=flan-t5-small,large=flan-t5-xxl --workdir=runs/guided_hotpotqa
    qstar train --config=guided_cot_hotpotqa:small=flan-t5-small,url=http://host:8000/v1,name=NAME --workdir=runs/x

`small` and `large` are folders in the Hugging Face layout; with `url` the large model is behind an endpoint that speaks the
OpenAI completions format (vLLM, SGLang, TGI), where `name` is what it calls its model. `data` is a folder with train.json
and dev.json, `task` hotpotqa or 2wikimultihopqa. The models' sizes are the paper's; data sizes, weights and rates are ours.
XXL answers `guided.large.slots` prompts in parallel: the keys and values of one prompt take 0.6 GB, over all chips. Not run
here at that size, only `smoke`, with a 260K-parameter student.

`qwen05` is the run on real language models that fits two CPU cores: SmolLM2-135M-Instruct writes for the frozen
Qwen2.5-Coder-0.5B-Instruct (in bfloat16), on the paragraphs that hold the supporting facts:

    qstar train --config=guided_cot_hotpotqa:qwen05,small=SMOLLM2,large=QWEN,train=train.jsonl,test=test.jsonl \\
        --workdir=runs/guided_qwen05

Plan, written before the run (the large model in float32 at first, as still on CPUs without instructions for bfloat16:
`--config.guided.large.dtype=float32`; and a vote over 5 rationales in every evaluation, which is left out because it
takes six times as long; nothing had run). Data: 500 questions of HotpotQA's
development set, the first 300 for the test, the other 200 and 100 training questions for distillation and RL
(2WikiMultiHopQA: `task=2wikimultihopqa`, the same split of 500). Teacher: the large model's own rationales for all of
them. Arms: `kd_unfiltered` and `kd_filtered` (by exact match), 60 updates of 8 rows each; `rl_both` refines
`kd_filtered` by 20 updates of 8 questions x 4 rationales with RLOO. Reported on the 300 test questions: EM and F1 of
standard prompting, own CoT, guided by every arm, gold facts as ceiling; differences paired over questions with 95%
intervals. Success: guided (any arm that was named here) above standard *and* own CoT with intervals above 0; the
paper's claim of RL needs `rl_both` above `kd_filtered`. No arm is chosen on the test questions; all are reported.
Otherwise it is reported as failed, and up to two more settings are tried, each named.
"""

from qstar.configs.common import parse_arg, star_config, task_files

from qstar.errors import require


def get_config(arg=None):
    """Arguments: small=DIR, large=DIR, url=URL, name=MODEL, data=DIR, train=FILE, test=FILE, task=NAME,
    qwen05 (small models on two cores), smoke, seed=N."""
    models = {"small": "flan-t5-small", "large": "flan-t5-xxl", "url": "", "name": ""}
    arg = parse_arg(arg, "smoke qwen05", "url large", **models, data="", train="", test="", task="hotpotqa",
                    qwen05=False, smoke=False, seed=0)  # fmt: skip
    require((bool(arg.url) or not arg.name, "config argument name is that of a model behind url=URL; give that, too"))
    config = star_config()
    for key in ("model", "base", "loop", "sample", "evaluate"):
        del config[key]
    config.update({"method": "guided_cot", "name": "guided_cot_hotpotqa", "seed": arg.seed, "students": 1})
    config.mesh = "data=1,fsdp=-1"
    config.task = {"name": arg.task, "context": "distractor"}
    config.task.update(task_files(arg, "hotpotqa", "train.json", "dev.json"))
    config.task.update({part: arg[part] for part in ("train", "test") if arg[part]})
    large = {"url": arg.url, "model": arg.name} if arg.url else {"path": arg.large, "dtype": "bfloat16", "slots": 128}
    questions = {"teacher_questions": 15_000, "rl_questions": 15_000, "test_questions": 2000}
    config.guided = {"small": arg.small, "large": large, "votes": 10, **questions}
    config.distil = {"kind": "hard"}
    config.distil_train = {"batch_size": 64, "lr": 3e-4, "schedule": "linear", "warmup": 100, "max_new_tokens": 96,
                           "save_every": 500}  # fmt: skip
    config.rl = {"estimator": "ppo", "group": 1, "kl_weight": 0.05, "value_trunk": False}
    config.train = {"updates": 200, "prompts": 128, "batch_size": 32, "epochs": 2, "lr": 1e-5, "warmup": 10, "clip": 1.0,
                    "save_every": 10, "log_every": 1, "max_kl": 20.0}  # fmt: skip
    config.arms = {
        "kd_unfiltered": {"filter": "none", "steps": 2000},
        "kd_filtered": {"filter": "em", "steps": 2000},
        "rl_both": {"start": "kd_filtered"},
        "rl_aspects": {"start": "kd_filtered", "accuracy_weight": 0.0},
        "rl_accuracy": {"start": "kd_filtered", "aspect_weight": 0.0},
    }
    if arg.qwen05:
        qwen05(config)
    if arg.smoke:
        config.mesh = "data=-1"
        if not arg.url:
            config.guided.large.dtype = "float32"
        config.guided.update(teacher_questions=12, rl_questions=12, test_questions=8, votes=2)
        config.guided.update(small_limit=480, large_limit=480, max_new_tokens=16, cot_tokens=16, answer_tokens=6)
        config.distil_train.update(batch_size=4, max_new_tokens=16, save_every=0, log_every=2)
        config.rl.update(estimator="rloo", group=2)
        config.train.update(updates=2, prompts=4, batch_size=8, epochs=1, save_every=1)
        config.arms = {"kd_unfiltered": {"filter": "none", "steps": 4}, "rl_both": {"start": "kd_unfiltered"}}
    return config


def qwen05(config):
    """Full fine-tuning of the small model on two CPU cores, a few rows at a time."""
    config.name = f"guided_cot_{config.task.name}_qwen05"
    config.mesh = "data=-1"
    config.task.context = "supporting_only"
    if "path" in config.guided.large:
        config.guided.large.update(dtype="bfloat16", slots=32)
    config.guided.update(teacher_questions=300, rl_questions=300, test_questions=300, votes=0)
    config.guided.update(small_limit=640, large_limit=768, cot_tokens=128)
    config.distil_train.update(batch_size=8, accumulate=8, lr=5e-5, warmup=5, save_every=10, log_every=5)
    config.rl.update(estimator="rloo", group=4)
    config.train.update(updates=20, prompts=8, batch_size=16, accumulate=8, epochs=1, lr=5e-6, warmup=3, save_every=5)
    config.arms = {
        "kd_unfiltered": {"filter": "none", "steps": 60},
        "kd_filtered": {"filter": "em", "steps": 60},
        "rl_both": {"start": "kd_filtered"},
    }
