"""LoRA against W + (alpha / r) B A written out, and its files against PEFT's names."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qstar
from qstar import tree
from qstar.errors import UserError
from qstar.models import decoder, lora
from qstar.models.config import ModelConfig
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model
from qstar.runs.stages import Stage, TrainSettings, check_trainable, fine_tune
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.packing import Example
from qstar.text.tokenizer import char_tokenizer

CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    init_std=0.2,
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


@pytest.mark.parametrize(
    "base, name, revision",
    [
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name", "owner/name", None),
        ("/a@b/c", "/a@b/c", None),
        ("", None, None),
    ],
)
def test_peft_finds_the_base_of_a_revision(base, name, revision, adapters, tmp_path):
    peft = pytest.importorskip("peft")
    found = peft.PeftConfig.from_pretrained(lora.save_adapters(CONFIG, adapters, SETTINGS, tmp_path, base=base))
    assert (found.base_model_name_or_path, found.revision) == (name, revision)


def test_the_files_have_pefts_names_and_shapes(params, adapters, tmp_path):
    lora.save_adapters(CONFIG, adapters, SETTINGS, tmp_path, base="some/llama")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["task_type"]) == (
        "LORA",
        3,
        6.0,
        "CAUSAL_LM",
    )
    assert (
        config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
        and config["base_model_name_or_path"] == "some/llama"
    )
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

        def flush(self):
            pass

    start = Model(CONFIG, params, char_tokenizer(ALPHABET, pad=PAD, eos=EOS))
    adapted = dict(lora_rank=3, lora_alpha=6.0, lora_targets=("q", "v", "down"))
    settings = TrainSettings(batch_size=2, lr=1e-2, warmup=1, row_length=12, packed=False, log_every=5, **adapted)
    rows = [Example([3, 4], [5, 6, 7, 1]), Example([8], [9, 10, 1])]
    stage = Stage(tmp_path / "m", settings, 40, 0, Writer())
    model, summary = fine_tune(start, rows, stage)
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
    loaded, _ = fine_tune(start, rows, stage)  # finished: only read
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
    with pytest.raises(UserError, match="adapters are for decoders, and this model is a T5"):
        lora.load_adapters(EncDecConfig(), tmp_path)


SCORE, Q = "base_model.model.score", "base_model.model.model.layers.1.self_attn.q_proj.lora_B"


@pytest.mark.parametrize("change, says", [
    ({f"{SCORE}.weight": np.zeros((1, 16), np.float32)}, "score must be one output with a bias"),
    ({f"{SCORE}.weight": np.zeros((2, 16), np.float32), f"{SCORE}.bias": np.zeros(2, np.float32)}, r"\(1, 16\) and \(1,\)"),
    ({f"{Q}.weight": np.full((16, 3), np.nan, np.float32)}, f"tensor '{Q}.weight' holds NaN or infinity; copy"),
    ({f"{Q}.weight": np.zeros((16, 3), np.int8)}, f"tensor '{Q}.weight' has dtype I8; only F32, F16, BF16"),
])  # fmt: skip
def test_adapter_tensors_that_cannot_be_used_are_named(change, says, adapters, tmp_path):
    lora.save_adapters(CONFIG, adapters, SETTINGS, tmp_path)
    save_file({**load_file(tmp_path / lora.WEIGHTS), **change}, tmp_path / lora.WEIGHTS)
    with pytest.raises(UserError, match=says) as e:
        lora.load_adapters(CONFIG, tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path / lora.WEIGHTS) in str(e.value)


# -------------------------------------------------------------------------------- PEFT as the reference, per family

FAMILIES = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["k_proj", "o_proj", "gate_proj", "up_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gptj": ["q_proj", "out_proj", "fc_in", "fc_out"],
    "gpt2": ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"],
}
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha pattern": {"alpha_pattern": {"q_proj": 64, "fc_in": 3, "c_attn": 64, r"layers\.1\..*up_proj": 50}},
    "rank pattern": {"rank_pattern": {"v_proj": 7, r"(layers|h)\.1\..*(down_proj|o_proj|c_fc|fc_out)": 2}},
    "both, rslora": {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"1.self_attn.q_proj": 5}, "use_rslora": True},
    "gaussian start, one layer": {"init_lora_weights": "gaussian", "layers_to_transform": [1]},
    "one layer as a number": {"layers_to_transform": 0},
}


def peft_model(case, options, folder):
    """Saves a random model with random adapters; returns PEFT's logits."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from tests.models.oracle import torch_model

    base = torch_model(case)
    base.save_pretrained(folder / "base")
    how = dict(r=4, lora_alpha=16, target_modules=FAMILIES[case], task_type="CAUSAL_LM") | options
    made = peft.get_peft_model(base, peft.LoraConfig(**how))
    torch.manual_seed(0)
    with torch.no_grad():
        for key, p in made.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn_like(p) * 0.1)
        made.eval().save_pretrained(folder / "adapter")
        return made(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", FAMILIES)
def test_adapters_of_peft_compute_the_same_logits(case, options, tmp_path):
    expected = peft_model(case, OPTIONS[options], tmp_path)
    model = qstar.load(tmp_path / "base")
    plain = np.asarray(qstar.logits(model, TOKENS))
    assert np.abs(expected - plain).max() > 0.05
    adapters, settings = lora.load_adapters(model.config, tmp_path / "adapter")
    for put in (lora.merge, lora.attach):
        ours = qstar.logits(model.replace(params=put(model.params, adapters, settings.scale)), TOKENS)
        np.testing.assert_allclose(ours, expected, atol=2e-5 * max(10, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_kept_in_half_precision_compute_the_same_logits(dtype, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers
    from safetensors import torch as files

    wide, file = peft_model("llama", {}, tmp_path), tmp_path / "adapter" / lora.WEIGHTS
    files.save_file({k: x.to(getattr(torch, dtype)) for k, x in files.load_file(file).items()}, file)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(torch.tensor(TOKENS)).logits.numpy()
    model = qstar.load(tmp_path / "base")
    adapters, read = lora.load_adapters(model.config, tmp_path / "adapter")
    ours = np.asarray(qstar.logits(model.replace(params=lora.merge(model.params, adapters, read.scale)), TOKENS))
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(10, np.abs(theirs).max()))
    assert np.abs(ours - wide).max() > 2e-4  # rounding is above the tolerance


@pytest.mark.parametrize("options, says", [
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weights"),
    ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights"), ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"use_dora": True}, "use_dora=True is more than plain LoRA; merge it"), ({"bias": "all"}, "bias='all'"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    *(({"modules_to_save": [name]}, rf"{name}\.weight is no LoRA of a kernel .*; merge it") for name in ("lm_head", "embed_tokens", "norm")),
    *(({"target_modules": ["q_proj", name]}, rf"{name}\..* is no LoRA of a kernel .*; merge it") for name in ("lm_head", "embed_tokens")),
])  # fmt: skip
def test_adapters_that_are_more_than_plain_lora_are_refused_in_one_line(options, says, tmp_path):
    peft_model("llama", options, tmp_path)
    with pytest.raises(UserError, match=says) as e:
        lora.load_adapters(qstar.load(tmp_path / "base").config, tmp_path / "adapter")
    assert "\n" not in str(e.value) and str(tmp_path / "adapter") in str(e.value)


def test_names_of_wrappers_are_read_and_pickles_and_other_names_refused(adapters, tmp_path):
    lora.save_adapters(CONFIG, adapters, SETTINGS, tmp_path)
    tensors, config = load_file(tmp_path / lora.WEIGHTS), json.loads((tmp_path / lora.CONFIG).read_text())

    def read(*change, **settings):
        save_file({name.replace(*change): x for name, x in tensors.items()}, tmp_path / lora.WEIGHTS)
        (tmp_path / lora.CONFIG).write_text(json.dumps({**config, **settings}))
        return lora.load_adapters(CONFIG, tmp_path)

    for wrapped in ("_orig_mod.base_model.model.", "module.base_model.model.", "base_model.model.module._orig_mod."):
        jax.tree.map(np.testing.assert_array_equal, read("base_model.model.", wrapped), (adapters, SETTINGS))
    back, _ = read("model.layers", "model._orig_mod.layers", alpha_pattern={"_orig_mod.layers.0.*q_proj": 12.0})
    ratio = back["layers"]["q"]["lora_b"] / adapters["layers"]["q"]["lora_b"]
    np.testing.assert_allclose(ratio[:, 0, 0], [2.0, 1.0], rtol=1e-6)
    with pytest.raises(UserError, match=r"language_model\.layers\..* is no LoRA of a kernel .*; merge it"):
        read("model.layers", "model.language_model.layers")
    (tmp_path / lora.WEIGHTS).rename(tmp_path / lora.PICKLE)
    with pytest.raises(UserError, match="adapter_model.bin: a pickle can run code and is not read; load it in PEFT"):
        lora.load_adapters(CONFIG, tmp_path)


@pytest.mark.parametrize("change, says", [
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not LORA"), ({"r": 0}, "r=0"), ({"lora_alpha": "16"}, "lora_alpha='16'"),
    ({"r": None}, "'r' is missing"), ({"use_rslora": "yes"}, "use_rslora"), ({"rank_pattern": [4]}, "rank_pattern must be"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj=0"), ({"alpha_pattern": {"(": 4}}, "no regular expression"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern: q_proj=nan"),
    ({"target_modules": 3}, "target_modules=3 must be"), ({"target_modules": True}, "target_modules=True must be"),
    ({"target_modules": ["q_proj", 3]}, "target_modules=.* must be"),
    ({"rank_pattern": {"q_proj": 9}}, "another model"), ({"layer_replication": [[0, 2]]}, "layer_replication"),
])  # fmt: skip
def test_adapter_settings_out_of_range_are_named(change, says, params, adapters, tmp_path):
    lora.save_adapters(CONFIG, adapters, SETTINGS, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(UserError, match=says):
        lora.load_adapters(CONFIG, tmp_path)


@pytest.mark.parametrize("case, targets", [
    *((case, targets) for case in ("gpt2", "gptj") for targets in (lora.KERNELS, ("q", "v"), ("k",), ("o",))),
    ("qwen2", lora.KERNELS), ("phi3", lora.KERNELS), ("phi3", ("k", "up")), ("gemma3", lora.KERNELS),
])  # fmt: skip
def test_adapters_of_every_family_are_saved_for_peft(case, targets, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    from tests.models.oracle import torch_model

    torch_model(case).save_pretrained(tmp_path / "base")
    model, settings = qstar.load(tmp_path / "base"), lora.Lora(3, 6.0, targets)
    made = lora.init(model.config, settings, jax.random.key(1))
    made = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), made)
    lora.save_adapters(model.config, made, settings, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(torch.tensor(TOKENS)).logits.numpy()
    ours = np.asarray(qstar.logits(model.replace(params=lora.attach(model.params, made, settings.scale)), TOKENS))
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(10, np.abs(theirs).max()))
    back, read = lora.load_adapters(model.config, tmp_path / "adapter")
    again = qstar.logits(model.replace(params=lora.merge(model.params, back, read.scale)), TOKENS)
    np.testing.assert_allclose(again, theirs, atol=2e-5 * max(10, np.abs(theirs).max()))


def test_targets_that_a_family_lacks_are_refused_before_training():
    gpt2 = CONFIG.replace(family="gpt2", gated_mlp=False)
    lora.check_targets(gpt2, lora.Lora(4))  # the default names all kernels: those that the model has
    settings = TrainSettings(lora_rank=4, lora_targets=("q", "gate"))
    with pytest.raises(UserError, match="lora_targets: 'gate' is no kernel of this gpt2; it has q, k, v, o, up, down"):
        check_trainable(gpt2, settings)
    with pytest.raises(UserError, match="lora_rank=4 is for decoders"):
        settings.check_targets(EncDecConfig())


def test_a_tiny_change_is_not_rounded_away_beside_a_bfloat16_kernel(params, adapters):
    """W + A B in bfloat16 leaves nearly all of W as it is; x W + (x A) B does not."""
    half = tree.cast(params, jnp.bfloat16)
    pairs = {n: {"lora_a": p["lora_a"], "lora_b": 1e-4 * p["lora_b"]} for n, p in adapters["layers"].items()}
    tiny = {"layers": pairs}
    base = np.asarray(qstar.logits(Model(CONFIG, half), TOKENS))  # float32 products of the numbers that bfloat16 holds
    change = np.asarray(qstar.logits(Model(CONFIG, lora.attach(half, tiny, 2.0)), TOKENS)) - base
    wide = lora.merge(tree.cast(half, jnp.float32), tiny, 2.0)
    expected = np.asarray(qstar.logits(Model(CONFIG, wide), TOKENS)) - base
    assert np.abs(change - expected).max() < 0.05 * np.abs(expected).max()
    merged = np.asarray(qstar.logits(Model(CONFIG, lora.merge(half, tiny, 2.0)), TOKENS)) - base
    assert np.abs(merged - expected).max() > 0.5 * np.abs(expected).max()  # what adding to the kernel makes of it


def test_a_training_step_forms_no_gradient_of_a_kernel():
    """4 N and not 6 N per token: of the frozen kernels only the products with activations and their gradients."""

    config = CONFIG.replace(hidden_size=64, head_dim=32, intermediate_size=256)
    made = lora.init(config, lora.Lora(3), jax.random.key(0))
    policy = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))

    def loss(p):
        return jnp.sum(qstar.logits(Model(config, p["policy"]), jnp.zeros((4, 16), jnp.int32)) ** 2)

    def flops(f, *args):
        return jax.jit(jax.grad(f)).lower(*args).compile().cost_analysis()["flops"]

    def adapted(adapters, base):
        frozen = lora.through(lambda p, batch, rng: loss(p), SETTINGS.scale)
        return frozen({"policy": adapters, "base": base}, None, None)

    assert flops(adapted, made, policy) < 0.8 * flops(loss, {"policy": policy})
