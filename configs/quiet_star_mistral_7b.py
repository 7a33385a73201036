"""Quiet-STaR as published: Mistral-7B on web text, thoughts of 12 ahead and 4 talk tokens, two per position.

    qstar train --config=quiet_star_mistral_7b:model=Mistral-7B-v0.1 --workdir=runs/quiet_star

`model` is a local folder in the Hugging Face layout. The paper's text is OpenWebMath (official code: its first 1,000
documents, one random crop of 256 tokens each); `data` names a jsonl or parquet file or another hub set. Eight rows times two
thoughts per update: made for a v5p-8, a v4-16 or 8 GPUs of 80 GB, fully sharded. 16 rows keep a v5e-16 busy, 64 rows and
larger pieces of threads a v6e-16 (flags B16 and B64 of qstar/plan/README.md). The paper reports GSM8K zero-shot 5.9 -> 10.9
and CommonsenseQA 36.3 -> 47.2. Not run here at that size; the choices are those of `ThoughtConfig.parity`, whose values and
gradients a recorded case of the official code checks.

    ...:smoke        the same choices on a model of 0.1M parameters and generated text: the machinery alone
"""

from qstar.configs.common import parse_arg, quiet_config


def get_config(arg=None):
    """Arguments: model=DIR, data=FILE_OR_HUB_NAME, smoke, seed=N."""
    arg = parse_arg(
        arg, "smoke model data", model="Mistral-7B-v0.1", data="open-web-math/open-web-math", smoke=False, seed=0
    )
    config = quiet_config()
    config.name = "quiet_star_mistral_7b"
    config.seed = arg.seed
    config.mesh = "data=1,fsdp=-1"
    config.data = {"name": "text", "source": arg.data, "length": 256, "mode": "crop", "limit": 1000}
    config.model = {"path": arg.model, "preset": "", "dtype": "bfloat16", "remat": "block"}
    # Half of the threads of a row at a time: every piece gathers all parameters and reduces all gradients.
    config.model.piece_tokens = 4096
    config.thoughts = {"parity": True, "forbidden_ids": (), "start_text": "---"}  # n_ahead 12: 9 content tokens
    config.train.update(batch_size=8, accumulate=2, lr=1e-6, warmup=20, save_every=20, log_every=10)
    config.evaluate.update(rows=128, batch_size=8, every=10, viewer_texts=16)
    config.arms = {"quiet_star": {"steps": 100, "patience": 3}}  # longer training hurts: stop on held-out text
    if arg.smoke:
        smoke(config)
    return config


def smoke(config):
    """Under a minute."""
    config.mesh = "data=-1"
    config.data = {"name": "fold_digits", "documents": 3}
    config.model = {"path": "", "preset": "tiny", "hidden_size": 32, "num_layers": 2, "remat": "block"}
    config.thoughts.update(thought_tokens=2, talk_tokens=2, start_text="-")
    config.train.update(batch_size=4, save_every=2, log_every=2)
    config.evaluate.update(rows=8, batch_size=8, every=2, viewer_texts=4)
    config.arms = {"quiet_star": {"steps": 4, "patience": 3}}
