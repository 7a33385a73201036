"""Quiet-STaR on real text with a small model: NLL with and without thoughts, by the difficulty of the tokens.

    qstar train --config=quiet_star_text:model=stories260k,data=tinystories.jsonl --workdir=runs/quiet_star_text

`model` is a folder in the Hugging Face layout, `data` a jsonl or parquet file. `scratch` trains a new model of 1.3M
parameters on the text first, with the tokenizer of `model`. Controls: plain training on the same text, and for 16 times
the steps (`same_compute`; a thinking step needs 15 times the FLOPs of a plain one, 20 with its rollout, by
`train.flops`). A token's difficulty is its NLL under the base. There is one set of held-out rows: a setting selected on
them must not be reported on them.

`smollm2` is the run on a real language model, SmolLM2-135M-Instruct, on two CPU cores in float32:

    qstar train --config=configs/quiet_star_text.py:smollm2,model=SmolLM2-135M-Instruct,data=openstax_algebra.jsonl \\
        --workdir=runs/quiet_star_smollm2

Plan, written before the run (amended since, before any arm with thoughts had ended: one text per update instead of two,
a quarter of its positions instead of a half, no arm `no_policy`; an update took 20 seconds; then every eighth document
held out instead of every fiftieth, which were 5, and intervals over documents instead of rows). Text: OpenStax algebra,
rows of 128 tokens, 233 documents. Five arms of 300 updates on the same text in the same order (`same_compute`: 6 texts
per update, the FLOPs of one with thoughts and their rollout), seed 0, no setting tried on the held-out rows: the rate
is a tenth of the config's for models from scratch, the start and end vectors move 10 times as fast.
Measured: NLL with thoughts of `quiet_star` against the NLL of every other arm on 192 held-out rows (comparison.jsonl,
95% over documents), of all tokens and by difficulty for the base; then GSM8K and CommonsenseQA, 200 test problems each, by
`qstar evaluate --metric=expected`, before and after. A gain is an interval below 0 against `same_text` *and*
`same_compute`; "thoughts matter" is an interval below 0 against `random`. Anything else counts as a failure and is
reported as one. The paper's gains are of Mistral 7B after 100 updates of 8 texts of 256 tokens, with 8 to 12 tokens of
thought; this is a model 50 times smaller with 4.
"""

from qstar.configs.common import SMOKE_MODEL, parse_arg, quiet_config

from qstar.errors import require


def get_config(arg=None):
    """Arguments: model=DIR, data=FILE, scratch, smollm2, steps=N, smoke, seed=N."""
    arg = parse_arg(arg, "smoke steps", model="", data="", scratch=False, smollm2=False, steps=0, smoke=False, seed=0)
    given = next((key for key in ("model", "scratch", "smollm2") if arg[key] not in (False, "", SMOKE_MODEL)), "")
    line = f"config argument {given} has no effect with smoke on generated text; give data=FILE, too"
    require((not (arg.smoke and given) or bool(arg.data), line))
    arg.steps = arg.steps or (300 if arg.smollm2 else 200)
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
    if arg.smollm2:
        smollm2(config, arg.steps)
    if arg.smoke:
        smoke(config)
    return config


def smollm2(config, steps):
    """One text of 128 tokens per update, a quarter of whose positions think."""
    config.name = "quiet_star_smollm2"
    config.data.held_out = 8
    config.model.scan_unroll = 30  # a quarter less time on a CPU than the layers in a scan
    # 16 is <empty_output>, which no text holds: `pause` learns it. 0 to 2 mark turns and the end of a text.
    config.thoughts.update(forbidden_ids=(16, 0, 1, 2), start_text="---", think_fraction=0.25, embedding_scale=10.0)
    config.train.update(batch_size=1, lr=1e-5, warmup=20, save_every=50, log_every=10)
    del config.arms["no_policy"]
    config.arms.same_compute = {"steps": steps, "thought_source": "none", "train": {"batch_size": 6}}
    config.evaluate.update(rows=192, batch_size=4, every=0, viewer_texts=24)


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
