"""Fine-tuning on rows of your own: prompts with completions, or conversations.

    qstar train --config=sft:data=pairs.jsonl,model=Qwen/Qwen3-0.6B --workdir=runs/sft
    qstar train --config=sft:data=pairs.jsonl,model=Qwen/Qwen3-0.6B,lora=16 --workdir=runs/sft

A line of `data` is {"prompt": ..., "completion": ...} or {"messages": [{"role": "user", "content": ...}, ...]}; JSON,
CSV and parquet files, folders, and data sets of the hub are read, too. A prompt may be a list of messages. Texts are
unchanged, messages are in the model's chat template, the loss is on what the assistant says. 5% of the rows are held out
(`--config.data.held_out`, or `--config.data.validation=FILE`): the report shows the loss on them, and completions before and
after. `lora=RANK` trains adapters, at 20 times the rate. One pass over the rows, unless `steps` or `epochs` says otherwise.
"""

from qstar.configs.common import pairs_config, parse_arg, sums


def get_config(arg=None):
    """Arguments: data=FILE, model=DIR or NAME, lora=RANK, epochs=X, steps=N, smoke, seed=N."""
    arg = parse_arg(
        arg, "smoke epochs", "steps epochs", data="", model="", lora=0, epochs=1.0, steps=0, smoke=False, seed=0
    )
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in sums()]
    return pairs_config("sft", arg, rows, lr=2e-4 if arg.lora else 1e-5, lora_rank=arg.lora)
