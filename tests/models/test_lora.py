"""LoRA against W + (alpha / r) B A written out, and its files against PEFT's names."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qstar
from qstar.errors import UserError
from qstar.methods.supervised import TrainSettings, fine_tune
from qstar.models import decoder, lora
from qstar.models.config import ModelConfig
from qstar.models.model import Model
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.packing import Example
from qstar.text.tokenizer import char_tokenizer

CONFIG = ModelConfig(
    vocab_size=20, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24, init_std=0.2
)
SETTINGS = lora.Lora(3, 6.0, ("q", "v", "down"))
TOKENS = np.random.default_rng(0).integers(0, 20, (2, 9))


@pytest.fixture(scope="module")
def params():
    return decoder.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def adapters():
    made = lora.init(CONFIG, SETTINGS, jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), made)


def by_hand(params, adapters):
    """numpy, layer by layer: PyTorch's weight is [out, in], and PEFT adds scale * B @ A to it."""
    layers = {k: dict(v) for k, v in params["layers"].items()}
    for name, pair in adapters["layers"].items():
        kernels = []
        for W, a, b in zip(layers[name]["kernel"], pair["lora_a"], pair["lora_b"]):
            A, B = np.asarray(a, np.float64).T, np.asarray(b, np.float64).T  # [r, in], [out, r]
            kernels.append((np.asarray(W, np.float64).T + 6.0 / 3 * B @ A).T)
        layers[name]["kernel"] = jnp.asarray(np.stack(kernels), jnp.float32)
    return {**params, "layers": layers}


def test_merged_and_attached_adapters_are_the_explicit_formula(params, adapters):
    expected = qstar.logits(Model(CONFIG, by_hand(params, adapters)), TOKENS)
    assert np.abs(expected - qstar.logits(Model(CONFIG, params), TOKENS)).max() > 0.05
    merged = lora.merge(params, adapters, SETTINGS.scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, by_hand(params, adapters))
    attached = lora.attach(params, adapters, SETTINGS.scale)
    np.testing.assert_allclose(qstar.logits(Model(CONFIG, attached), TOKENS), expected, atol=1e-5)


def test_fresh_adapters_change_nothing_and_gradients_reach_b_alone(params):
    fresh = lora.init(CONFIG, SETTINGS, jax.random.key(1))
    merged = lora.merge(params, fresh, SETTINGS.scale)
    jax.tree.map(np.testing.assert_array_equal, merged, params)

    def loss(p, batch, rng):
        return jnp.sum(qstar.logits(Model(CONFIG, p["policy"]), batch) ** 2)

    f = lora.through(loss, SETTINGS.scale)
    grads = jax.grad(lambda p: f(p, jnp.asarray(TOKENS), None))({"policy": fresh, "base": params})
    for pair in grads["policy"]["layers"].values():
        assert (pair["lora_a"] == 0).all() and (pair["lora_b"] != 0).any()
    assert all((g == 0).all() for g in jax.tree.leaves(grads["base"]))


def test_the_files_have_pefts_names_and_shapes(params, adapters, tmp_path):
    lora.save_adapters(CONFIG, adapters, SETTINGS, tmp_path, base="some/llama")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["task_type"]) == ("LORA", 3, 6.0, "CAUSAL_LM")
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"] and config["base_model_name_or_path"] == "some/llama"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 3 * 2 * 2
    stem = "base_model.model.model.layers.1"
    assert tensors[f"{stem}.self_attn.q_proj.lora_A.weight"].shape == (3, 16)
    assert tensors[f"{stem}.self_attn.v_proj.lora_B.weight"].shape == (8, 3)
    np.testing.assert_array_equal(
        tensors[f"{stem}.mlp.down_proj.lora_B.weight"], adapters["layers"]["down"]["lora_b"][1].T
    )
    back, settings = lora.load_adapters(CONFIG, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    assert settings == SETTINGS


def test_peft_loads_them_and_computes_the_same_logits(params, adapters, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    qstar.save(Model(CONFIG, params), tmp_path / "base")
    lora.save_adapters(CONFIG, adapters, SETTINGS, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    ours = qstar.logits(Model(CONFIG, lora.merge(params, adapters, SETTINGS.scale)), TOKENS)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_training_through_adapters_moves_them_alone_and_leaves_them_for_peft(params, tmp_path):
    told = []

    class Writer:
        def write(self, *, loss, **_):
            told.append(loss)

    start = Model(CONFIG, params, char_tokenizer(ALPHABET, pad=PAD, eos=EOS))
    adapted = dict(lora_rank=3, lora_alpha=6.0, lora_targets=("q", "v", "down"))
    settings = TrainSettings(batch_size=2, lr=1e-2, warmup=1, row_length=12, packed=False, log_every=5, **adapted)
    rows = [Example([3, 4], [5, 6, 7, 1]), Example([8], [9, 10, 1])]
    how = dict(steps=40, seed=0, writer=Writer(), label={})
    model, summary = fine_tune(start, rows, settings, folder=tmp_path / "m", **how)
    changed = {
        name for name in params["layers"] for a, b in [(params["layers"][name], model.params["layers"][name])]
        if "kernel" in a and (a["kernel"] != b["kernel"]).any()
    }  # fmt: skip
    assert changed == {"q", "v", "down"} and told[-1] < 0.8 * told[0]
    assert summary["adapter_parameters"] == 2 * 3 * ((16 + 16) + (16 + 8) + (24 + 16))
    np.testing.assert_array_equal(model.params["embed"]["table"], params["embed"]["table"])
    left, read = lora.load_adapters(CONFIG, tmp_path / "m" / "adapter")
    again = lora.merge(params, left, read.scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, model.params)
    loaded, _ = fine_tune(start, rows, settings, folder=tmp_path / "m", **how)  # finished: only read
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


@pytest.mark.parametrize(
    "change, word",
    [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"targets": ()}, "targets"), ({"targets": ("x",)}, "targets")],
)
def test_settings_that_make_no_sense_are_named(change, word):
    with pytest.raises(UserError, match=word):
        lora.Lora(**change)


def test_files_that_do_not_fit_are_named(params, adapters, tmp_path):
    with pytest.raises(UserError, match="adapter_config.json"):
        lora.load_adapters(CONFIG, tmp_path)
    lora.save_adapters(CONFIG, adapters, SETTINGS, tmp_path)
    with pytest.raises(UserError, match="another model"):
        lora.load_adapters(CONFIG.replace(hidden_size=32), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": np.zeros((3, 16), np.float32)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="lm_head"):
        lora.load_adapters(CONFIG, tmp_path)
    with pytest.raises(UserError, match="fused"):
        lora.peft_name(CONFIG.replace(family="gpt2"), "q")
