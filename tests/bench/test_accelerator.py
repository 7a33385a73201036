"""The rows of `qstar bench accelerator`, measured here in one process instead of one each."""

import json

import numpy as np

from qstar.bench import accelerator
from qstar.bench.common import our_model


def in_process(side, maker, repeats, device="auto", **settings):
    made = maker(**settings)
    made = made if isinstance(made, dict) else {"run": made}
    results = [made.pop("run")() for _ in range(repeats)]
    return {"seconds": [2.0] * repeats, "results": results, "recompiles": 0, **{k: f() for k, f in made.items()}}


def test_each_row_is_a_share_of_what_the_device_does(monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "measure", in_process)
    accelerator.main(as_json=True, quick=True, device="cpu")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [row["row"].split(",")[0] for row in found["rows"]]
    assert names == ["SFT", "decoding", "Quiet-STaR"] and found["device"] == "cpu"
    assert all(row["share of limit"] == row["at limit s"] / 2 > 0 for row in found["rows"])
    (difference,) = [v for k, v in found.items() if k.startswith("attention by")]  # a CPU runs only the tiles
    assert 0 < difference < 0.02  # of bfloat16 sums in another order


def test_a_step_of_decoding_reads_the_weights_and_the_cache_once():
    changes = accelerator.LLAMA_1B | accelerator.SMALL
    model = our_model("", changes)
    c, (batch, new) = model.config, (3, 4)
    tokens = batch * (new + new / 2)  # the prompt's, and half of the new ones on average
    cache = 2 * tokens * c.num_layers * c.num_kv_heads * c.head_dim
    weights = sum(x.size for k, x in model.params.items() if k == "head" for x in x.values())
    weights += sum(x["kernel"].size for x in model.params["layers"].values() if "kernel" in x)
    found = accelerator.decoding("", changes, batch, new)()
    np.testing.assert_allclose(found, 2 * (weights + cache))
