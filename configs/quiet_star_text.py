"""Quiet-STaR on real text with a small model: where, if anywhere, does thinking lower the loss?

    qstar train --config=quiet_star_text:model=stories260k,data=tinystories.jsonl --workdir=runs/quiet_star_text

`model` is a folder in the Hugging Face layout, `data` a jsonl or parquet file. `scratch` trains a new model of 1.3M
parameters on the text first, with the tokenizer of `model`. Controls: plain training on the same text, and for 16 times
the steps (`same_compute`; a thinking step needs 15 times the FLOPs of a plain one, 20 with its rollout, by
`train.flops`); NLL by how hard a token is for the base. The held-out rows are the only ones: a setting chosen on them
must not be reported on them.
"""

from qstar.configs.common import parse_arg, quiet_config


def get_config(arg=None):
    """Arguments: model=DIR, data=FILE, scratch, steps=N, smoke, seed=N."""
    arg = parse_arg(arg, model="", data="", scratch=False, steps=200, smoke=False, seed=0)
    config = quiet_config()
    config.name = "quiet_star_text"
    config.seed = arg.seed
    config.data = {"name": "text", "source": arg.data, "tokenizer": arg.model, "length": 128, "mode": "crop"}
    config.model = {"path": arg.model, "preset": "", "dtype": "float32", "scan_unroll": 5}
    if arg.scratch:
        config.model = {"path": "", "preset": "tiny", "hidden_size": 128, "num_layers": 4, "max_positions": 512}
        config.base.update(steps=2000, batch_size=32, lr=1e-3, schedule="cosine", end=0.1, b2=0.98, log_every=100)
    config.thoughts = {"thought_tokens": 4, "talk_tokens": 2, "thoughts_per_position": 2, "start_text": "\n"}
    config.train.update(batch_size=8, lr=1e-4, b2=0.98, log_every=20, save_every=100)
    config.evaluate.update(rows=128, batch_size=16, every=100, viewer_texts=24)
    config.arms = {
        "quiet_star": {"steps": arg.steps},
        "no_policy": {"steps": arg.steps, "thoughts": {"policy_weight": 0.0}},
        "pause": {"steps": arg.steps, "thought_source": "pause"},
        "random": {"steps": arg.steps, "thought_source": "random"},
        "same_text": {"steps": arg.steps, "thought_source": "none"},
        "same_compute": {"steps": 16 * arg.steps, "thought_source": "none"},
    }
    if arg.smoke:
        smoke(config)
    return config


def smoke(config):
    """Under a minute; without `model` and `data` on generated text."""
    if not config.data.source:
        config.data = {"name": "fold_digits", "documents": 3}
        config.model = {"path": "", "preset": "tiny", "hidden_size": 32, "num_layers": 2}
        config.thoughts.start_text = "-"
        config.base.update(steps=0)
    config.thoughts.update(thought_tokens=2)
    config.train.update(batch_size=4, save_every=2, log_every=2)
    config.evaluate.update(rows=8, batch_size=8, every=2, viewer_texts=4)
    config.arms = {name: {**config.arms[name].to_dict(), "steps": 4} for name in ("quiet_star", "same_text")}
