"""Model folders as other programs write them: read as transformers reads them, or refused in a line that says why."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import qstar
from qstar.errors import UserError
from qstar.models import weight_files
from qstar.models.hf_config import from_hf
from qstar.models.presets import NAMES, published
from tests.models.oracle import CASES, random_tokens, torch_logits, torch_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns a fresh copy of what transformers saved of a case."""
    root = tmp_path_factory.mktemp("folders")

    def get(case: str, target: pathlib.Path) -> pathlib.Path:
        if not (root / case).exists():
            torch_model(case).save_pretrained(root / case)
        return pathlib.Path(shutil.copytree(root / case, target / "m"))

    return get


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    raw |= changes
    (folder / "config.json").write_text(json.dumps(raw))


def rename(folder, change):
    save_file({change(k): x for k, x in load_file(folder / weight_files.SINGLE).items()}, folder / weight_files.SINGLE)


def equal_trees(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


# ---------------------------------------------------------------------------------------------------- tied heads


@pytest.mark.parametrize("case", ["llama", "qwen3 biased", "gpt2 untied", "gptj"])
def test_tied_head_differs(folders, tmp_path, case):
    """config.json says tied, the tensors say otherwise: transformers 5 uses the head."""
    folder = folders(case, tmp_path)
    edit_config(folder, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head.weight differs from .*tie_word_embeddings to false"):
        model = qstar.load(folder)
    tokens = random_tokens(2, 24)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    np.testing.assert_allclose(np.asarray(qstar.logits(model, tokens)), torch_logits(theirs, tokens), atol=1e-4)
    qstar.save(model, tmp_path / "out")  # and the export needs no warning
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_tied_embedding_kept_as_the_head_alone(folders, tmp_path):
    folder = folders("qwen2", tmp_path)
    want = qstar.load(folder).params
    rename(folder, lambda n: "lm_head.weight" if n == "model.embed_tokens.weight" else n)
    assert equal_trees(qstar.load(folder).params, want)


# ------------------------------------------------------------------------------------------------ rotary positions


@pytest.mark.parametrize("length", [12, 16, 17, 40])
@pytest.mark.parametrize("case", [c for c in CASES if "rope" in c])
def test_rope_kinds_within_and_beyond_the_trained_length(case, length, folders, tmp_path):
    model, tokens = qstar.load(folders(case, tmp_path)), random_tokens(2, length, seed=length)
    np.testing.assert_allclose(
        np.asarray(qstar.logits(model, tokens)), torch_logits(torch_model(case), tokens), atol=1e-4
    )


def test_packed_texts_have_the_frequencies_of_their_own_length(folders, tmp_path):
    from qstar.models.rope import rope_tables

    config = qstar.load(folders("llama rope dynamic", tmp_path)).config
    apart = [rope_tables(config, jnp.arange(n)) for n in (30, 5, 20)]
    packed = rope_tables(config, jnp.concatenate([jnp.arange(n) for n in (30, 5, 20)]))
    for k in (0, 1):
        np.testing.assert_array_equal(packed[k], np.concatenate([turns[k] for turns in apart]))


@pytest.mark.parametrize("kind, context, trained", [
    ({"type": "linear", "factor": 2.0}, 8192, 4096), ({"type": "dynamic", "factor": 4.0}, 16384, 4096),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192, 4096),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}, 4096, None),
    ({"rope_type": "linear", "factor": 0.5}, 4096, None), ({"rope_type": "default"}, 4096, None),
])  # fmt: skip
def test_scalings_that_reach_further_have_a_longer_context(kind, context, trained):
    config = from_hf({**RAW, "rope_scaling": kind})
    assert (config.max_positions, config.trained_positions) == (context, trained)


def test_linear_rope_generates_beyond_the_trained_length(folders, tmp_path):
    model = qstar.load(folders("llama rope linear", tmp_path))
    ((completion,),) = qstar.generate(model, [[5] * 100], max_new_tokens=4, temperature=0)
    assert len(completion.tokens) >= 1


RAW = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 4096,
       "num_attention_heads": 4, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "vocab_size": 500}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize("rope, says", [
    ({"type": "linear"}, "rope_scaling: key 'factor' is missing"),
    ({"type": "linear", "factor": "2"}, "factor='2' must be a number"),
    ({"type": "linear", "factor": 0}, "factor=0 must be a number from"),
    ({"type": "dynamic", "factor": float("nan")}, "factor=nan"),
    ({"type": "dynamic", "factor": True}, "factor=True"),
    ({"rope_type": "llama3", "factor": 8.0}, "'low_freq_factor' is missing"),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2, "high_freq_factor": 2}, "high_freq_factor=2 must be above"),
    ({"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}, "beta_fast='32'"),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0.5}, "original_max_position_embeddings=0.5"),
    ({**LONGROPE, "long_factor": [2.0] * 7}, "long_factor has 7 entries; half of the rotated width is 8"),
    ({**LONGROPE, "short_factor": [0.0] * 8}, "short_factor=.*must be a list, each entry a number"),
    ({**LONGROPE, "short_factor": 1.0}, "short_factor=1.0 must be a list"),
    ({"rope_type": ["linear"]}, "rope_type .'linear'. is not one of default, linear"),
    ({"rope_type": "ntk"}, "rope_type 'ntk' is not one of"),
    ("linear", "rope_scaling='linear' must be one object"), ([1], "must be one object"), (2.0, "must be one object"),
    ({"full_attention": {"rope_type": "default"}}, "must be one object for all layers"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 must be 1, unless the model is a phi3"),
])  # fmt: skip
def test_malformed_rope_dictionaries_are_refused_in_one_line(rope, says):
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(UserError, match=says.replace("rope_scaling", key)) as e:
            from_hf({**RAW, key: rope}, "m/config.json")
        assert str(e.value).startswith("m/config.json") and "\n" not in str(e.value)


# ------------------------------------------------------------------------------ models that can only compute NaN

NAN = float("nan")
BAD_VALUES = [
    *(("rope_theta", v) for v in (0, NAN, -1.0, float("inf"), "10000", True)),
    *(("rms_norm_eps", v) for v in (NAN, "1e-5", -1e-5, 0, [1e-5])),
    *(("head_dim", v) for v in (7, 0, 16.0, "16", 10**9)),
    *(("num_hidden_layers", v) for v in (10**9, 0, 2.0, "2", -1)),
    *(("num_attention_heads", v) for v in (3, 0, None)),
    *(("num_key_value_heads", v) for v in ("4", 0)),
    *(
        (key, v)
        for key in ("vocab_size", "hidden_size", "intermediate_size")
        for v in (0, -5, "64", 1.5, None, 10**30, [64])
    ),
    *(("max_position_embeddings", v) for v in (0, "4096", 10**30)),
    *(("eos_token_id", v) for v in (-1, "2", [2, -1], 1.0, True, {})),
    *(("bos_token_id", v) for v in (-1, "<s>", [1], [])),
    *(("tie_word_embeddings", v) for v in ("maybe", 1, [])),
    *(("attention_bias", v) for v in ("no", 0)),
    *(("hidden_act", v) for v in (5, "relu6", ["silu"])),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("compression_config", {"format": "int-quantized"}),
]


@pytest.mark.parametrize("key, value", BAD_VALUES)
def test_models_that_can_only_compute_nan_are_refused_by_key(key, value):
    with pytest.raises(UserError, match=f"^m/config.json: .*{key}") as e:
        from_hf({**RAW, key: value}, "m/config.json")
    assert "\n" not in str(e.value) and len(str(e.value)) < 250


@pytest.mark.parametrize("raw", [
    {"model_type": "gpt2", "vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4},
    {"model_type": "gptj", "vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    {"model_type": "t5", "vocab_size": 50, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 40},
    {"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4},
    {**RAW, "model_type": "smollm3", "use_sliding_window": True, "no_rope_layers": [1, 0]},
    RAW,
])  # fmt: skip
def test_no_value_of_any_key_makes_a_traceback(raw):
    values = (None, True, -1, 0, 7, 10**30, 0.5, NAN, "", "x", [], [1], {}, {"a": 1})
    from_hf(raw)
    extra = ("rope_theta", "rope_scaling", "rope_parameters", "eos_token_id", "bos_token_id", "layer_norm_epsilon", "qstar_thoughts",
             "qstar_value_head", "sliding_window", "tie_word_embeddings", "feed_forward_proj", "n_inner",
             "layer_types", "no_rope_layer_interval", "rope_local_base_freq", "use_bidirectional_attention")  # fmt: skip
    for key in {*raw, *extra}:
        for value in values:
            try:
                hash(from_hf({**raw, key: value}, "m/config.json"))  # configs are static arguments
            except UserError as e:
                assert str(e).startswith("m/config.json") and "\n" not in str(e)


def test_published_configs_pass_all_checks():
    assert all(published(name)[0].vocab_size > 1000 for name in NAMES)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_weights_that_hold_nan_are_refused_by_name(folders, tmp_path, dtype, bad):
    folder, name = folders("gpt2", tmp_path), "transformer.h.1.attn.c_attn.weight"
    tensors = {k: x.astype(jnp.dtype(dtype)) for k, x in load_file(folder / weight_files.SINGLE).items()}
    tensors[name][3, 40] = 65504 if dtype == "float16" else 3e38  # the largest finite numbers are fine
    save_file(tensors, folder / weight_files.SINGLE)
    qstar.load(folder)
    tensors[name][3, 40] = bad
    save_file(tensors, folder / weight_files.SINGLE)
    with pytest.raises(UserError, match=f"tensor '{name}' holds NaN or infinity"):
        qstar.load(folder)


# ---------------------------------------------------------------------------------- layouts and kinds of folders


@pytest.mark.parametrize("case", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("change", [
    lambda n: "_orig_mod." + n, lambda n: "module." + n, lambda n: "module._orig_mod." + n, lambda n: "model." + n,
    lambda n: n.replace("layers.", "layers._orig_mod.").replace(".h.", ".h._fsdp_wrapped_module."),
    lambda n: "policy.backbone." + n,
])  # fmt: skip
def test_prefixed_tensor_names_are_read(case, change, folders, tmp_path):
    folder = folders(case, tmp_path)
    want = qstar.load(folder).params
    rename(folder, change)
    assert equal_trees(qstar.load(folder).params, want)


def emptied(folder, *files):
    shutil.rmtree(folder)
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")


def adapter_alone(folder):
    (folder / weight_files.SINGLE).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))


ADAPTER = {"base_model_name_or_path": "some/llama", "peft_type": "LORA"}
KINDS = {
    "bitsandbytes": (lambda f: add(f, "model.layers.0.self_attn.q_proj.weight.absmax"), "'model.*absmax': .*quantised"),
    "gptq": (lambda f: add(f, "model.layers.0.self_attn.q_proj.qweight"), "quantised.*before quantisation"),
    "fp8": (lambda f: add(f, "model.layers.0.self_attn.q_proj.weight_scale_inv"), "quantised"),
    "adapters beside weights": (lambda f: add(f, "model.layers.0.self_attn.q_proj.lora_A.weight"), "merge them first"),
    "other names": (lambda f: rename(f, lambda n: n.replace(".", "/")), "asks for is missing; there are others, such as"),
    "adapter folder": (lambda f: (emptied(f), (f / "adapter_config.json").write_text(json.dumps(ADAPTER))),
                       "PEFT adapter .of some/llama.*merge"),
    "adapter beside a config": (lambda f: (adapter_alone(f), (f / "training_args.bin").write_text("")),
                                "PEFT adapter .of some/llama.*merge"),
    "gguf folder": (lambda f: emptied(f, "m-Q4_K_M.gguf"), "m-Q4_K_M.gguf: GGUF is the format of llama.cpp"),
    "gguf beside a config": (lambda f: emptied(f, "config.json", "m.gguf"), "model_type None|GGUF"),
    "flax": (lambda f: ((f / weight_files.SINGLE).unlink(), (f / "flax_model.msgpack").write_text("")), "flax_model.msgpack: Flax"),
    "makers": (lambda f: emptied(f, "params.json", "tokenizer.model"), "layout of the model's makers"),
    "own name": (lambda f: (f / weight_files.SINGLE).rename(f / "step9.safetensors"), "step9.safetensors is not named"),
}  # fmt: skip


def add(folder, name):
    save_file({**load_file(folder / weight_files.SINGLE), name: np.zeros(4, np.float32)}, folder / weight_files.SINGLE)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_other_kinds_are_named(kind, folders, tmp_path):
    spoil, says = KINDS[kind]
    folder = folders("llama", tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=says) as e:
        qstar.load(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


@pytest.mark.parametrize("name, says", [("m.gguf", "GGUF"), ("model.safetensors", "one file"), ("p.bin", "pickle")])
def test_a_file_in_place_of_a_folder_is_named(name, says, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"{name}: .*{says}.*give the folder"):
        qstar.load(tmp_path / name)
