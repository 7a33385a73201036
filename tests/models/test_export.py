"""Exports in other programs: tokenizer files, from-scratch models, and (opt-in) transformers 4.57 and 5 in environments
of their own: QSTAR_LONG_TESTS=1 QSTAR_TRANSFORMERS=venv4:venv5, each with torch and transformers."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest
import torch
import transformers

import qstar
from qstar.errors import QstarWarning, UserError
from qstar.models import decoder
from qstar.models.config import preset
from qstar.models.model import Model
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.tokenizer import char_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 20, (2, 24))
SETTINGS = {
    "tokenizer_class": "LlamaTokenizerFast", "additional_special_tokens": ["<s>"], "bos_token": "<s>", "eos_token": "</s>",
    "chat_template": "{{ messages[0]['content'] }}", "model_max_length": 512, "add_bos_token": True,
}  # fmt: skip


def arithmetic(**changes):
    config = preset("tiny", num_layers=2, hidden_size=32, eos_id=1, **changes)
    params = decoder.init(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    return Model(config, params, char_tokenizer(ALPHABET, pad=PAD, eos=EOS))


def source(shared, folder, settings, **files):
    shutil.copytree(shared("weights/stories260k"), folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return qstar.load(folder)


def test_settings_of_the_source_tokenizer_are_kept(shared, tmp_path):
    special = json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    named = "additional_chat_templates/tool_use.jinja"
    files = {"chat_template.jinja": "{{ 1 }}", "special_tokens_map.json": special, named: "{{ 2 }}"}
    model = source(shared, tmp_path / "m", SETTINGS, **files)
    qstar.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == SETTINGS
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ 1 }}"
    assert (tmp_path / "out/special_tokens_map.json").read_text() == special
    qstar.save(qstar.load(tmp_path / "out"), tmp_path / "out")  # in place
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == SETTINGS
    assert (tmp_path / "out" / named).read_text() == "{{ 2 }}"
    text = "Once upon a time"
    assert qstar.load(tmp_path / "out").tokenizer.encode(text) == model.tokenizer.encode(text)


@pytest.mark.parametrize("settings, want", [
    ({"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True, "extra_special_tokens": ["<s>"]},
     {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<s>"]}),
    ({"extra_special_tokens": {"image_token": "<s>"}},
     {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": "<s>"}}),
    ({"tokenizer_class": "Qwen2Tokenizer"}, {"tokenizer_class": "Qwen2Tokenizer"}),
])  # fmt: skip
def test_what_only_transformers_5_understands_is_rewritten(settings, want, shared, tmp_path):
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    qstar.save(source(shared, tmp_path / "m", {**settings, **ends}), tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {**want, **ends}


def test_character_tokenizers_name_a_class_that_all_versions_have(tmp_path):
    qstar.save(arithmetic(), tmp_path)
    raw = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert raw["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in raw


def test_byt5_is_named(tmp_path):
    from qstar.text.tokenizer import load_tokenizer

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UserError, match="ByT5Tokenizer works on bytes"):
        load_tokenizer(tmp_path)


PORTABLE = {
    "arithmetic": ({}, "arcee"), "gated": (dict(gated_mlp=True), "llama"), "biased": (dict(mlp_bias=True), "arcee"),
    "untied": (dict(tie_embeddings=False, embed_scale=False), "arcee"), "plain tied": (dict(embed_scale=False), "arcee"),
}  # fmt: skip


@pytest.mark.parametrize("case", PORTABLE)
def test_models_from_scratch_are_exported_as_a_family_of_transformers(case, tmp_path):
    changes, family = PORTABLE[case]
    model = arithmetic(**changes)
    qstar.save(model, tmp_path / "out")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert theirs.config.model_type == family
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(qstar.logits(model, TOKENS), expected, atol=1e-4)
    back = qstar.load(tmp_path / "out")  # and qstar reads the very same bits
    assert back.config == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, back.params, model.params))


@pytest.mark.parametrize("changes", [dict(position="learned"), dict(relative_bias=True), dict(norm="layer"),
                                     dict(tie_embeddings=False)])  # fmt: skip
def test_models_that_no_other_program_can_load_say_so_in_one_line(changes, tmp_path):
    with pytest.warns(QstarWarning, match="no other program can load this model"):
        qstar.save(arithmetic(**changes), tmp_path / "out")
    assert qstar.load(tmp_path / "out").config == arithmetic(**changes).config


READ = """
import sys, json, torch, transformers
from transformers import AutoTokenizer, AutoModelForCausalLM
folder, text = sys.argv[1], sys.argv[3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
out = model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()
ids = tokenizer(text, add_special_tokens=False).input_ids
print(json.dumps([transformers.__version__, ids, tokenizer.eos_token_id, out]))
"""
ENVIRONMENTS = [p for p in os.environ.get("QSTAR_TRANSFORMERS", "").split(":") if p]


@pytest.mark.skipif(
    not (os.environ.get("QSTAR_LONG_TESTS") and ENVIRONMENTS), reason="opt-in: see the top of this file"
)
@pytest.mark.parametrize("which", ["arithmetic", "stories", "v5 settings"])
@pytest.mark.parametrize("venv", ENVIRONMENTS or ["none"])
def test_exports_load_in_other_versions_of_transformers(venv, which, shared, tmp_path):
    if which == "arithmetic":
        model, text = arithmetic(), "12+3"
    else:
        settings = SETTINGS | ({"tokenizer_class": "PreTrainedTokenizerFast"})
        if which == "v5 settings":
            settings = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<s>"],
                        "bos_token": "<s>", "eos_token": "</s>", "is_local": True}  # fmt: skip
        model, text = source(shared, tmp_path / "m", settings), "Once upon a time"
    qstar.save(model, tmp_path / "out")
    call = [pathlib.Path(venv) / "bin/python", "-c", READ, tmp_path / "out", json.dumps(TOKENS.tolist()), text]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(call, capture_output=True, text=True, env=clean)
    assert found.returncode == 0, found.stderr[-2000:]
    _, ids, eos, logits = json.loads(found.stdout.splitlines()[-1])
    assert (ids, eos) == (model.tokenizer.encode(text), model.tokenizer.eos_id)
    np.testing.assert_allclose(qstar.logits(model, TOKENS), logits, atol=1e-4)
