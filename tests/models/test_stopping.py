"""Where a text ends, against `generate` of transformers, and token ids that the model has no embedding of."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import real_model

import qstar
from qstar.__main__ import main
from qstar.errors import UserError
from qstar.models.hf import read_config
from tests.text.kinds import REAL

FORMS = [(426, None), ([426], None), (None, 426), (None, [426]), (2, 426), (2, [2, 426]), ([2, 426], None), (426, 2)]


@pytest.fixture
def copy(shared, tmp_path):
    """Copies stories260k with other entries in config.json and generation_config.json."""

    def make(config, generation):
        folder = shutil.copytree(shared("weights/stories260k"), tmp_path / "model")
        read = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**read, **config}))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, **generation}))
        return folder

    return make


def greedy(folder, ids, length):
    """What transformers adds to the ids, and the ids that it would stop at."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    row = model.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False, pad_token_id=0)
    return row[0, len(ids) :].tolist(), {ends} if isinstance(ends, int) else set(ends or ())


@pytest.mark.parametrize("config, generation", FORMS)
def test_end_ids_are_read_as_a_number_or_a_list_from_both_files(copy, config, generation):
    """The text has 426 after 12 tokens. (Where generation_config.json names other ids, transformers ignores the config's.)"""
    folder = copy({} if config is None else {"eos_token_id": config}, generation and {"eos_token_id": generation})
    model = qstar.load(folder, dtype="float32")
    ids = model.tokenizer.encode("Once upon a", bos=True)
    expected, ends = greedy(folder, ids, 60)
    assert ends <= set(model.stop_ids) == {2, 426}
    ((c,),) = qstar.generate(model, [ids], max_new_tokens=60, temperature=0.0)
    assert c.tokens == expected[:12] and (c.stopped, c.tokens[-1]) == (True, 426)
    assert "Once upon a" + c.text == model.tokenizer.decode([*ids, *c.tokens[:-1]])  # the end is no part of the text
    qstar.save(model, folder.parent / "again")
    assert set(qstar.load(folder.parent / "again").stop_ids) == {2, 426}
    assert set(transformers.GenerationConfig.from_pretrained(folder.parent / "again").eos_token_id) == {2, 426}


def test_an_encoder_decoder_has_several_ends_too(tmp_path):
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, eos_token_id=1
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "generation_config.json").write_text('{"eos_token_id": [1, 9], "decoder_start_token_id": 0}')
    model = qstar.load(tmp_path / "t5")
    assert model.stop_ids == (1, 9)
    qstar.save(model, tmp_path / "again")
    assert qstar.load(tmp_path / "again").config == model.config


# Gemma's completion is compared in tests/sample/test_families.py.
@pytest.mark.parametrize("name", [name for name in REAL if not name.startswith("gemma")])
def test_real_models_end_where_transformers_ends_them(name):
    folder = real_model(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    try:
        model = qstar.load(folder, dtype="float32")
    except UserError as e:
        pytest.skip(str(e))
    messages = [{"role": "user", "content": "Name a colour. Answer with one word."}]
    prompt = messages[0]["content"]
    if tokenizer.chat_template:  # a base model has none
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = model.tokenizer.encode(prompt, bos=True)
    expected, ends = greedy(folder, ids, 24)
    assert ends <= set(model.stop_ids) and tokenizer.eos_token_id in model.stop_ids
    ((c,),) = qstar.generate(model, [prompt], max_new_tokens=24, temperature=0.0)
    assert c.tokens == expected and c.stopped == (expected[-1] in ends)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", -1, [2, None], True, 2.0, {"id": 2}], ids=str)
def test_an_end_id_that_is_none_is_refused_by_name(copy, file, value):
    entry = {"eos_token_id": value}
    folder = copy(entry if file == "config.json" else {}, entry if file != "config.json" else None)
    with pytest.raises(UserError, match=rf"/{file}: eos_token_id=") as caught:
        read_config(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token", "unk_token"])
def test_a_special_token_beyond_the_vocabulary_is_refused(copy, role):
    folder = copy({}, None)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({role: "<|new|>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        UserError, match=rf"model: {role}_id=512 is beyond the model's vocabulary of 512; resize"
    ) as caught:
        qstar.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [512, [2, 600]], ids=str)
def test_an_end_id_beyond_the_vocabulary_is_refused(copy, file, value):
    entry = {"eos_token_id": value}
    with pytest.raises(UserError, match="eos_token_id=(512|600) is beyond the model's vocabulary of 512"):
        qstar.load(copy(entry if file == "config.json" else {}, entry if file != "config.json" else None))


def test_a_run_with_a_token_beyond_the_vocabulary_does_not_start(copy, shared, tmp_path, capsys):
    folder = copy({}, None)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "Once upon a time {n}"}}\n' for n in range(30)))
    runs = {
        "star_gsm8k.py": f"smoke,model={folder},data={shared('data/gsm8k')}",
        "v_star_gsm8k.py": f"smoke,model={folder},data={shared('data/gsm8k')}",
        "quiet_star_mistral_7b.py": f"model={folder},data={text}",
    }
    for name, options in runs.items():
        assert main(["train", f"--config=configs/{name}:{options}", f"--workdir={tmp_path / 'run'}"]) == 2, name
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "eos_token_id=512 is beyond" in said and not (tmp_path / "run").exists()
