"""Weights and configs against transformers: what it saves is read, what is saved it reads, mistakes are named."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import types
from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import qstar
from qstar.errors import UserError
from qstar.models import decoder, hf, weight_files
from qstar.models.config import ModelConfig, preset
from qstar.models.hf_config import from_hf, to_hf
from qstar.models.model import Model
from qstar.models.presets import published
from tests.models.oracle import CASES, random_tokens, torch_logits, torch_model

TOKENS = random_tokens(2, 24)
init = jax.jit(decoder.init, static_argnums=0)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A torch model, the folder that it saved, and qstar's reading of that folder."""
    model, folder = torch_model(request.param), tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    return types.SimpleNamespace(torch=model, folder=folder, model=qstar.load(folder))


def test_logits_equal_those_of_transformers(pair):
    ours = np.asarray(qstar.logits(pair.model, TOKENS))
    theirs = torch_logits(pair.torch, TOKENS)
    assert ours.dtype == np.float32 and np.abs(theirs).max() > 1  # large enough for the tolerance to mean something
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_export_loads_in_transformers_bit_for_bit(pair, tmp_path):
    qstar.save(pair.model, tmp_path / "out")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, ours = pair.torch.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys() and type(again) is type(pair.torch)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    np.testing.assert_array_equal(torch_logits(again, TOKENS), torch_logits(pair.torch, TOKENS))


def test_exported_config_means_the_same_to_transformers_and_to_us(pair, tmp_path):
    qstar.save(pair.model, tmp_path / "out")
    theirs, ours = pair.torch.config.to_dict(), transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    for key in theirs.keys() - {"transformers_version", "_name_or_path", "n_inner", "max_window_layers"}:
        assert ours[key] == theirs[key], key
    assert qstar.load(tmp_path / "out").config == pair.model.config


def test_exports_have_the_tensors_and_the_metadata_of_save_pretrained(pair, tmp_path):
    qstar.save(pair.model, tmp_path / "out")
    theirs, ours = load_file(pair.folder / weight_files.SINGLE), load_file(tmp_path / "out" / weight_files.SINGLE)
    assert theirs.keys() == ours.keys()  # a tied head is written by neither
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)
    with safe_open(tmp_path / "out" / weight_files.SINGLE, "np") as f:
        assert f.metadata() == {"format": "pt"}


# ------------------------------------------------------------------------------------------------ layouts of folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that transformers saved, by case; tests copy before they change one."""
    root = tmp_path_factory.mktemp("folders")

    def get(case: str) -> pathlib.Path:
        if not (root / case).exists():
            torch_model(case).save_pretrained(root / case)
        return root / case

    return get


def equal_trees(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def rewrite(folder: pathlib.Path, change) -> None:
    """Applies `change(dict of tensors) -> dict` to a folder's weights."""
    save_file(change(load_file(folder / weight_files.SINGLE)), folder / weight_files.SINGLE)


def edit_config(folder: pathlib.Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(source, target))


def test_shards_of_transformers_are_read(folders, tmp_path):
    torch_model("qwen2").save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert (tmp_path / "sharded" / weight_files.INDEX).exists() and not (
        tmp_path / "sharded" / weight_files.SINGLE
    ).exists()
    assert equal_trees(qstar.load(tmp_path / "sharded").params, qstar.load(folders("qwen2")).params)


def test_shards_that_we_write_are_read_by_transformers_and_by_us(folders, tmp_path):
    model, limit = qstar.load(folders("gpt2")), 20_000
    hf.write_params(tmp_path / "out", model.config, model.params, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / weight_files.INDEX).read_text())
    files = sorted(p for p in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert sum(x.nbytes for f in files for x in load_file(f).values()) == index["metadata"]["total_size"]
    assert all(sum(x.nbytes for x in load_file(f).values()) <= limit for f in files)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(x, again[k]) for k, x in torch_model("gpt2").state_dict().items())
    assert equal_trees(qstar.load(tmp_path / "out").params, model.params)


@pytest.mark.parametrize("case", ["gpt2", "qwen2"])
def test_files_of_a_bare_model_lack_the_prefix_and_are_read(folders, tmp_path, case):
    folder, prefix = copy(folders(case), tmp_path / "m"), {"gpt2": "transformer.", "qwen2": "model."}[case]
    rewrite(folder, lambda t: {k.removeprefix(prefix): x for k, x in t.items()})
    assert equal_trees(qstar.load(folder).params, qstar.load(folders(case)).params)


def test_buffers_of_old_files_and_a_redundant_tied_head_are_ignored(folders, tmp_path):
    for case, extra in {
        "gpt2": {
            "transformer.h.1.attn.bias": np.ones((1, 1, 64, 64), np.uint8),
            "transformer.h.0.attn.masked_bias": np.float32([-1e4]),
            "lm_head.weight": load_file(folders("gpt2") / weight_files.SINGLE)["transformer.wte.weight"],
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)},
    }.items():
        folder = copy(folders(case), tmp_path / case)
        rewrite(folder, lambda t, extra=extra: {**t, **extra})
        assert equal_trees(qstar.load(folder).params, qstar.load(folders(case)).params)


@pytest.mark.parametrize("place, images", [("language_model.model.", ""), ("model.language_model.", "model.")])
def test_the_text_model_of_a_gemma_3_that_reads_images_is_read_alone(folders, tmp_path, place, images):
    folder = copy(folders("gemma3"), tmp_path / "m")
    extra = {
        f"{images}{part}.x.weight": np.ones((2, 2), np.float32) for part in ("vision_tower", "multi_modal_projector")
    }
    rewrite(folder, lambda t: {**{place + k.removeprefix("model."): x for k, x in t.items()}, **extra})
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    model = qstar.load(folder)
    assert model.config == qstar.load(folders("gemma3")).config
    assert equal_trees(model.params, qstar.load(folders("gemma3")).params)


def test_a_bias_that_is_a_parameter_is_not_taken_for_a_buffer(folders):
    assert float(jnp.abs(qstar.load(folders("qwen3 biased")).params["layers"]["q"]["bias"]).min()) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_as_stored_and_computes_in_bfloat16(folders, tmp_path, dtype):
    reference = torch_model("llama").to(getattr(torch, dtype))
    reference.save_pretrained(tmp_path / "half")
    model = qstar.load(tmp_path / "half")
    assert model.config.dtype == "bfloat16"
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {dtype}
    qstar.save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(x.dtype == again[k].dtype and torch.equal(x, again[k]) for k, x in reference.state_dict().items())
    # float32 arithmetic on the very same numbers, which float32 holds exactly
    ours = qstar.logits(qstar.load(tmp_path / "half", dtype="float32"), TOKENS)
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    np.testing.assert_allclose(ours, torch_logits(wide, TOKENS), atol=1e-4)
    half = np.asarray(qstar.logits(model, TOKENS))
    assert half.dtype == np.float32 and 1e-4 < np.abs(half - ours).max() < 0.05 * np.abs(ours).max()


def test_tiny_models_and_their_runtime_options_come_back(tmp_path):
    config = preset("tiny", num_layers=2, hidden_size=32, remat="dots")
    model = qstar.Model(config, init(config, jax.random.key(0)))
    qstar.save(model, tmp_path / "tiny")
    again = qstar.load(tmp_path / "tiny")
    assert again.config == config and equal_trees(again.params, model.params) and again.tokenizer is None
    odd = config.replace(
        position="learned",
        norm="layer",
        head_bias=True,
        tie_embeddings=False,
        qk_norm=True,
        qkv_bias=True,
        gated_mlp=True,
        rope_scaling=(("factor", 2.0), ("rope_type", "linear")),
    )
    qstar.save(qstar.Model(odd, init(odd, jax.random.key(1))), tmp_path / "odd")
    assert qstar.load(tmp_path / "odd").config == odd


def test_all_the_eos_ids_of_a_chat_model_are_read_and_written(tmp_path):
    config = from_hf(OLD["gpt2"]).replace(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4,
                                          intermediate_size=8, max_positions=8, eos_id=2)  # fmt: skip
    qstar.save(Model(config, decoder.init(config, jax.random.key(0))), tmp_path)
    assert qstar.load(tmp_path).stop_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 2, 5]}')
    chat = qstar.load(tmp_path)
    assert (chat.config.eos_id, chat.config.also_eos, chat.stop_ids) == (2, (3, 5), (2, 3, 5))
    qstar.save(chat, tmp_path / "again")
    assert qstar.load(tmp_path / "again").config == chat.config
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [2, 3, 5]


def test_stories260k_comes_back_with_its_tokenizer(shared, tmp_path):
    model = qstar.load(shared("weights/stories260k"))
    qstar.save(model, tmp_path / "out")
    again = qstar.load(tmp_path / "out")
    assert equal_trees(again.params, model.params) and again.config == model.config
    text = "Lily's dog  ran, fast!\n"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids
    assert again.tokenizer.encode(text, bos=True) == model.tokenizer.encode(text, bos=True) == theirs
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


# ------------------------------------------------------------------------------------------------------ config.json

LLAMA_2 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_31 = {
    **LLAMA_2,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA_LONG = {**LLAMA_2, "rope_scaling": {"type": "linear", "factor": 8.0}}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "n_ctx": 1024,
    "vocab_size": 50257,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
}
GPTJ = {
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_layer": 28,
    "n_positions": 2048,
    "rotary_dim": 64,
    "vocab_size": 50400,
    "tie_word_embeddings": False,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
PHI3 = {
    "model_type": "phi3",
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
SMOLLM3 = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "no_rope_layer_interval": 4,
    "rope_theta": 5000000.0,
}
OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rope_theta": 500000,
}
TRAINED = "original_max_position_embeddings"
OLD = {
    "llama 2": LLAMA_2,
    "llama 3.1": LLAMA_31,
    "llama linear": LLAMA_LONG,
    "mistral": MISTRAL,
    "mistral, window by default": {k: v for k, v in MISTRAL.items() if k != "sliding_window"},
    "mistral, no window": {**MISTRAL, "sliding_window": None},
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2, window asked for but in no layer": {**QWEN2, "use_sliding_window": True},
    "qwen2, window in all layers": {**QWEN2, "use_sliding_window": True, "max_window_layers": 0},
    "qwen2, window in some layers": {**QWEN2, "use_sliding_window": True, "max_window_layers": 12},
    "gpt2": GPT2,
    "gptj": GPTJ,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "phi3, trained length by default": {k: v for k, v in PHI3.items() if k != TRAINED},
    "phi3, trained length inside": {**{k: v for k, v in PHI3.items() if k != TRAINED},
                                    "rope_scaling": {**PHI3["rope_scaling"], TRAINED: 8192}},
    "gptj, rotary width by default": {k: v for k, v in GPTJ.items() if k != "rotary_dim"},
    "gemma3_text, two layouts": {**GEMMA3, "rope_parameters": {"full_attention": {"rope_theta": 3e6},
                                                               "sliding_attention": {"rope_theta": 2e4}}},
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
}  # fmt: skip
WINDOWED = ("mistral", "mistral, window by default", "qwen2, window in all layers", "qwen2, window in some layers",
            "gemma2", "gemma3_text", "gemma3_text, two layouts", "phi3", "phi3, trained length by default",
            "phi3, trained length inside")  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_older_configs_read_like_the_same_config_rewritten_by_transformers_5(name):
    old = OLD[name]
    new = transformers.AutoConfig.for_model(**deepcopy(old)).to_dict()
    assert "rope_parameters" in new or name.startswith("gpt")
    ours, theirs = from_hf(old), from_hf(new)
    keep = {"bos_id": None, "eos_id": None, "max_positions": 1}  # their defaults fill what a short file leaves out
    assert ours.replace(**keep) == theirs.replace(**keep)
    assert from_hf(json.loads(json.dumps(to_hf(ours)))) == ours  # and what we write reads back
    assert (ours.sliding_window is not None) == (name in WINDOWED)


def test_numbers_of_known_models_are_read():
    c = from_hf(LLAMA_31)
    assert (c.head_dim, c.num_kv_heads, c.rope_theta, c.max_positions, c.eos_id) == (128, 8, 5e5, 131072, 128001)
    assert dict(c.rope_scaling)["factor"] == 8.0 and not c.tie_embeddings
    c = from_hf(GPTJ)
    assert (c.head_dim, c.rotary_dim, c.rope_interleaved, c.parallel_block, c.head_bias) == (256, 64, True, True, True)
    assert c == published("gpt-j-6b")[0]
    c = from_hf(GPT2)
    assert (c.position, c.norm, c.activation, c.intermediate_size, c.tie_embeddings) == (
        "learned",
        "layer",
        "gelu_tanh",
        3072,
        True,
    )
    c = from_hf({"model_type": "gemma3", "text_config": GEMMA3, "vision_config": {}, "eos_token_id": [1, 106]})
    assert (c.vocab_size, c.num_heads, c.num_kv_heads, c.head_dim, c.query_scalar) == (262208, 8, 4, 256, 256)
    assert (c.rope_theta, c.window_theta, dict(c.rope_scaling)["factor"], c.max_positions) == (1e6, 1e4, 8.0, 131072)
    assert c.windowed[:7] == (True,) * 5 + (False, True) and c.also_eos == (106,) and c.embed_scale
    assert from_hf({**GEMMA3, "rope_scaling": {"factor": 8.0, "type": "linear"}}) == from_hf(GEMMA3)  # a legacy name
    assert from_hf(GEMMA2).windowed[:3] == (True, False, True) and from_hf(GEMMA2).final_softcap == 30.0
    assert from_hf({**GEMMA2, "final_logit_softcapping": None}).final_softcap is None
    assert (from_hf(PHI3).rotary_dim, from_hf(PHI3).max_positions) == (96, 131072)
    assert from_hf(SMOLLM3).rotated == (True, True, True, False) * 9
    assert from_hf(QWEN3).head_dim == 128 and from_hf(QWEN2).qkv_bias and not from_hf(QWEN2).out_bias


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "falcon"}, "model_type 'falcon'"),
        ({"hidden_act": "relu6"}, "activation 'relu6'"),
        ({"rope_scaling": {"rope_type": "su", "factor": 4.0}}, "rope_type 'su'"),
        ({"num_key_value_heads": 5}, "num_kv_heads=5"),
        ({**MISTRAL, "layer_types": ["full_attention", "sliding_attention"] * 16}, "layer_types mixes .* 'ministral'"),
        ({**QWEN2, "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types must have 24 entries"),
        ({**QWEN2, "layer_types": ["chunked_attention"] * 24}, r"layer_types=.* must be a list of full_attention"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({**GEMMA3, "attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0 must be a number"),
        (
            {**GEMMA3, "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "only the default is supported in layers with sliding_attention",
        ),
        ({**PHI3, "partial_rotary_factor": 7}, "partial_rotary_factor=7 must be a number from 0.001 to 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 must be 1, unless the model is a phi3"),
        ({"model_type": "gemma3n"}, "model_type 'gemma3n' is not one of .*gemma3"),
    ],
)
def test_configs_that_are_not_implemented_are_refused_by_name(change, says):
    with pytest.raises(UserError, match=says):
        from_hf({**LLAMA_2, **change})


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="place/config.json: key 'hidden_size' is missing"):
        from_hf({k: v for k, v in LLAMA_2.items() if k != "hidden_size"}, where="place/config.json")


def test_configs_that_a_family_cannot_express_are_not_exported(tmp_path):
    config = ModelConfig(embed_scale=True)  # no Llama scales its embeddings: transformers would compute other logits
    with pytest.raises(UserError, match="embed_scale=True cannot be written as a 'llama'"):
        qstar.save(qstar.Model(config, init(config, jax.random.key(0))), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- mistakes


def truncate(path: pathlib.Path, size: int) -> None:
    os.truncate(path, size)


def drop(name):
    return lambda folder: rewrite(folder, lambda t: {k: x for k, x in t.items() if k != name})


def put(name, x):
    return lambda folder: rewrite(folder, lambda t: {**t, name: x})


def pickled(folder):
    (folder / weight_files.SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def index_only(text):
    def change(folder):
        (folder / weight_files.SINGLE).unlink()
        (folder / weight_files.INDEX).write_text(text)

    return change


MISTAKES = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda f: (f / "config.json").write_text('{\n"a": 1,\n'), r"config.json:3: broken JSON"),
    "config of another kind": (lambda f: (f / "config.json").write_text("[1]"), "expected a JSON object, found a list"),
    "no weights": (lambda f: (f / weight_files.SINGLE).unlink(), "no weights found"),
    "pickle": (pickled, r"pickle \(pytorch_model.bin\).*convert"),
    "empty file": (lambda f: truncate(f / weight_files.SINGLE, 0), "model.safetensors: truncated"),
    "truncated header": (lambda f: truncate(f / weight_files.SINGLE, 100), "model.safetensors: truncated"),
    "truncated data": (
        lambda f: truncate(f / weight_files.SINGLE, (f / weight_files.SINGLE).stat().st_size - 1),
        "truncated",
    ),
    "a web page": (
        lambda f: (f / weight_files.SINGLE).write_text("<html>rate limit exceeded</html>"),
        "no safetensors file",
    ),
    "missing tensor": (drop("model.norm.weight"), "tensor 'model.norm.weight' .*missing"),
    "missing head": (drop("lm_head.weight"), "tensor 'lm_head.weight' .*missing"),
    "missing layer": (lambda f: edit_config(f, num_hidden_layers=3), r"tensor 'model.layers.2.*and 8 more.* missing"),
    "leftover layer": (lambda f: edit_config(f, num_hidden_layers=1), r"unexpected .*'model.layers.1.*and 6 more"),
    "leftover": (put("model.layers.0.extra", np.ones(3, np.float32)), "unexpected tensors 'model.layers.0.extra'"),
    "wrong shape": (put("model.norm.weight", np.ones(31, np.float32)), r"'model.norm.weight' .*\(31,\).*\(32,\)"),
    "transposed": (put("model.layers.1.mlp.up_proj.weight", np.ones((32, 40), np.float32)), r"\(32, 40\).*\(40, 32\)"),
    "other vocabulary": (lambda f: edit_config(f, vocab_size=51), r"\(50, 32\), but config.json asks for \(51, 32\)"),
    "wrong dtype": (put("model.norm.weight", np.ones(32, np.int8)), "dtype I8"),
    "empty index": (index_only("{}"), "weight_map is missing"),
    "broken index": (index_only("{"), "index.json:1: broken JSON"),
    "missing shard": (index_only('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'), "00001-of.* missing"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_line_that_names_the_culprit(name, folders, tmp_path):
    spoil, says = MISTAKES[name]
    folder = copy(folders("llama"), tmp_path / "m")
    spoil(folder)
    with pytest.raises(UserError, match=says) as e:
        qstar.load(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


def test_unknown_compute_dtype_is_named(folders):
    for dtype in ("int8", "fp8", "float64"):
        with pytest.raises(UserError, match=f"'{dtype}' is not one of float32"):
            qstar.load(folders("llama"), dtype=dtype)


def test_parameters_unlike_the_config_are_not_exported(folders, tmp_path):
    model = qstar.load(folders("llama"))
    for change, says in [
        ({"lora": jnp.zeros(3)}, "lora is not one of this config"),
        ({"head": {"kernel": model.params["head"]["kernel"].T}}, r"head/kernel has shape \(50, 32\)"),
        ({"head": {"kernel": model.params["head"]["kernel"].astype(jnp.int32)}}, "dtype int32"),
    ]:
        with pytest.raises(UserError, match=says):
            qstar.save(model.replace(params={**model.params, **change}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- all or nothing


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_failed_export_leaves_what_was_there(folders, tmp_path):
    model = qstar.load(folders("llama"))
    qstar.save(model, tmp_path / "out")
    before = snapshot(tmp_path)

    def fail(folder):
        assert (folder / weight_files.SINGLE).exists()  # at the last moment
        raise RuntimeError("power cut")

    other = jax.tree.map(lambda x: x + 1, model.params)
    with pytest.raises(RuntimeError, match="power cut"):
        hf.write_params(tmp_path / "out", model.config, other, extras=fail)
    assert snapshot(tmp_path) == before
    with pytest.raises(RuntimeError, match="power cut"):
        hf.write_params(tmp_path / "fresh", model.config, other, extras=fail)
    assert snapshot(tmp_path) == before and {p.name for p in tmp_path.iterdir()} == {"out"}


def test_an_earlier_export_is_replaced_as_a_whole(folders, tmp_path):
    model = qstar.load(folders("gpt2"))
    hf.write_params(tmp_path / "out", model.config, model.params, max_shard_bytes=20_000)
    other = model.replace(params=jax.tree.map(lambda x: x + 1, model.params))
    qstar.save(other, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        weight_files.SINGLE,
    }
    assert equal_trees(qstar.load(tmp_path / "out").params, other.params)
    qstar.save(model, copy(folders("gpt2"), tmp_path / "theirs"))  # transformers' folders are exports, too


def test_exported_files_can_be_read_by_others(folders, tmp_path):
    previous = os.umask(0o022)
    try:
        qstar.save(qstar.load(folders("gpt2")), tmp_path / "deep" / "er")
    finally:
        os.umask(previous)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "deep" / "er").iterdir()} == {0o644}


@pytest.mark.parametrize(
    "files, says",
    [
        ({"config.json": '{"seed": 1}', "metrics.jsonl": ""}, "holds 'metrics.jsonl', which is no part"),
        ({"config.json": '{"model_type": "llama"}', "checkpoints/1": "x"}, "holds 'checkpoints'"),
        (
            {"config.json": '{"model_type": "llama"}', "additional_chat_templates/my.md": "x"},
            "'additional_chat_templates/my.md'",
        ),
        ({"config.json": '{"seed": 1}'}, "not empty and no model export"),
        ({"vocab.txt": "my words"}, "not empty and no model export"),
    ],
)
def test_folders_that_hold_something_else_are_refused_untouched(files, says, folders, tmp_path):
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=says):
        qstar.save(qstar.load(folders("gpt2")), tmp_path / "out")
    assert snapshot(tmp_path) == before and {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_file_where_the_folder_should_be_is_a_user_error(folders, tmp_path):
    (tmp_path / "file").write_text("x")
    model = qstar.load(folders("gpt2"))
    with pytest.raises(UserError, match="is a file"):
        qstar.save(model, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        qstar.save(model, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"
