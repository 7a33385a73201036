"""Distillation from a teacher on prompts of your own (sequence-level, or on-policy as GKD, arXiv 2306.13649).

    qstar train --config=distil:data=prompts.jsonl,model=Qwen/Qwen3-0.6B,teacher=Qwen/Qwen3-1.7B --workdir=runs/distil

A line of `data` is {"prompt": ...}, with a "completion" or not: where it has none the teacher writes one first, as `sample`
says. The student learns the teacher's distribution at every token (`kind=forward_kl`, `reverse_kl` or `jsd`; both need one
vocabulary), or with `kind=hard` the text alone. `--config.distil.on_policy=0.5` takes half of the batches from what the
student itself writes. See sft.py for other formats and held-out rows.
"""

from qstar.configs.common import pairs_config, parse_arg, sums


def get_config(arg=None):
    """Arguments: data=FILE, model=DIR or NAME, teacher=DIR or NAME, kind=KIND, epochs=X, steps=N, smoke, seed=N."""
    apart = ("smoke epochs", "steps epochs")
    arg = parse_arg(
        arg, *apart, data="", model="", teacher="", kind="forward_kl", epochs=1.0, steps=0, smoke=False, seed=0
    )
    config = pairs_config(
        "distil", arg, [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in sums()], lr=1e-5
    )
    config.teacher = {"path": arg.teacher}
    config.distil = {"kind": arg.kind, "on_policy": 0.0, "temperature": 1.0}
    config.sample = {"max_new_tokens": 256, "temperature": 0.0}
    return config
