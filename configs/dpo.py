"""DPO (arXiv 2305.18290) on preferences of your own, from any model; the reference is the model before training.

    qstar train --config=dpo:data=preferences.jsonl,model=Qwen/Qwen3-0.6B --workdir=runs/dpo

A line of `data` is {"prompt": ..., "chosen": ..., "rejected": ...}; a prompt is a text or a list of messages, and `chosen`
and `rejected` may be whole conversations. See sft.py for other formats, held-out rows and `lora`.
"""

from qstar.configs.common import pairs_config, parse_arg, sums


def get_config(arg=None):
    """Arguments: data=FILE, model=DIR or NAME, lora=RANK, beta=X, epochs=X, steps=N, smoke, seed=N."""
    apart = ("smoke epochs", "steps epochs")
    arg = parse_arg(arg, *apart, data="", model="", lora=0, beta=0.1, epochs=1.0, steps=0, smoke=False, seed=0)
    rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a - b)} for a, b in sums()]
    return pairs_config("dpo", arg, rows, lr=2e-5 if arg.lora else 1e-6, lora_rank=arg.lora, beta=arg.beta)
