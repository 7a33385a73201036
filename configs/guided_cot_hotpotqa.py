"""LM-Guided CoT on HotpotQA: FLAN-T5 small writes rationales, FLAN-T5 XXL answers; on a v6e-8 or 8 GPUs.

    qstar train --config=guided_cot_hotpotqa:small=flan-t5-small,large=flan-t5-xxl --workdir=runs/guided_hotpotqa
    qstar train --config=guided_cot_hotpotqa:small=flan-t5-small,url=http://host:8000/v1,name=NAME --workdir=runs/x

`small` and `large` are folders in the Hugging Face layout; with `url` the large model is behind an endpoint that speaks the
OpenAI completions format (vLLM, SGLang, TGI), where `name` is what it calls its model. `data` is a folder with train.json
and dev.json, `task` hotpotqa or 2wikimultihopqa. Sizes of models as the paper's; its data sizes, weights and rates are
not, so those here are ours. XXL answers `guided.large.slots` prompts side by side: the keys and values that it reads of one
take 0.6 GB, over all chips. Not run here at that size; what was run is `smoke`, with a 260K-parameter student.
"""

from qstar.configs.common import parse_arg, star_config, task_files


def get_config(arg=None):
    """Arguments: small=DIR, large=DIR, url=URL, name=MODEL, data=DIR, train=FILE, test=FILE, task=NAME, smoke, seed=N."""
    arg = parse_arg(arg, small="flan-t5-small", large="flan-t5-xxl", url="", name="", data="", train="", test="",
                    task="hotpotqa", smoke=False, seed=0)  # fmt: skip
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
