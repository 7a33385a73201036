"""V-STaR on MBPP with Code Llama and LoRA: solutions are labelled by running their tests (2402.06457, section 4).

    qstar train --config=v_star_mbpp:model=CodeLlama-7b-hf --workdir=runs/v_star_mbpp

Printed: LoRA throughout, 3 epochs for G_SFT, 16 samples per query in each of three iterations, the first of them from the
pretrained model with three shots (here from G_SFT, as on GSM8K), 128 candidates at test. What it does not print stands as in
v_star_gsm8k.py. The paper's figures at 7B: about 53% best-of-64 and 46% pass@1 on MBPP.

Not run here at that size: only `smoke`, on 260K-parameter weights that write no Python, a test of the machinery. `data` is a
folder with all 974 tasks in mbpp.jsonl; without it they come from the hub.
"""

from qstar.configs.common import parse_arg
from qstar.configs.v_star_gsm8k import get_config as gsm8k


def get_config(arg=None):
    """Arguments: model=DIR, data=DIR, smoke, seed=N, arms=A+B, orm."""
    arg = parse_arg(arg, model="CodeLlama-7b-hf", data="", smoke=False, seed=0, arms="v_star", orm=False)
    config = gsm8k(f"model={arg.model},seed={arg.seed},arms={arg.arms},smoke={int(arg.smoke)},orm={int(arg.orm)}")
    config.name = "v_star_mbpp"
    config.task = {"name": "mbpp", "shots": (), "format": "plain"}  # G_SFT has learnt the format
    if arg.data or arg.smoke:
        config.task.data = f"{arg.data}/mbpp.jsonl" if arg.data else "built-in:mbpp"
    if arg.smoke:  # the problems whose prompts fit into 512 tokens of a vocabulary of 512
        config.loop.problems_per_iter = 7
        config.evaluate.limit = 2
        config.select.limit = 2
    else:
        config.sft.steps = "epochs:3:0"
        config.loop.steps = "epochs:3:0"
        config.sample.max_new_tokens = 384
    return config
