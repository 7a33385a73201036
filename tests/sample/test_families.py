"""Greedy completions of every family, token for token those of transformers' `generate`, and the real Gemma 3."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import real_model

import qstar
from qstar.models import heads
from qstar.runs.stages import Stage, TrainSettings, fine_tune
from qstar.text.packing import Example
from qstar.text.tokenizer import char_tokenizer
from tests.models.oracle import random_tokens, torch_logits, torch_model

NEW = 12
PROMPTS = random_tokens(2, 9)  # longer than the windows, which are 4 or 5


@pytest.mark.parametrize("case", [
    "qwen3 mixed", "ministral", "gemma2", "gemma3", "phi3", "phi3 longrope, partly rotated", "olmo2", "smollm3 window",
])  # fmt: skip
def test_greedy_completions_are_those_of_transformers_past_the_window(case, tmp_path):
    theirs = torch_model(case)
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor(PROMPTS, dtype=torch.long)
    options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    # Without a cache for longrope: transformers computes the keys again when a text reaches the longer frequencies.
    options |= dict(attention_mask=torch.ones_like(ids), use_cache="longrope" not in case)
    expected = theirs.generate(ids, **options)
    model = qstar.load(tmp_path)
    model = model.replace(config=model.config.replace(eos_id=None))
    found = qstar.generate(model, PROMPTS.tolist(), max_new_tokens=NEW, temperature=0)
    assert [c.tokens for (c,) in found] == expected[:, PROMPTS.shape[1] :].tolist()
    assert all(len(set(row.tokens)) > 2 for (row,) in found)


def test_a_gemma_trains_adapters_scores_and_reloads_in_peft_and_transformers(tmp_path):
    torch_model("gemma2").save_pretrained(tmp_path / "base")
    start = qstar.load(tmp_path / "base").replace(tokenizer=char_tokenizer("_.abcdefghijklm", pad="_", eos="."))
    losses = types.SimpleNamespace(all=[], write=lambda *, loss, **_: losses.all.append(loss), flush=lambda: None)
    settings = TrainSettings(batch_size=2, lr=1e-2, warmup=1, row_length=12, packed=False, log_every=5, lora_rank=3)
    rows = [Example([3, 4], [5, 6, 7, 1]), Example([8], [9, 10, 1])]
    tuned, _ = fine_tune(start, rows, Stage(tmp_path / "stage", settings, 30, 0, losses))
    assert losses.all[-1] < 0.8 * losses.all[0]
    ours = np.asarray(qstar.logits(tuned, PROMPTS))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "stage" / "adapter").eval()
    # The adapter names its base, the trained model none.
    named = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "stage" / "adapter").eval()
    np.testing.assert_array_equal(torch_logits(named, PROMPTS), torch_logits(adapted, PROMPTS))
    assert start.source == str(tmp_path / "base") and tuned.source == ""
    np.testing.assert_allclose(torch_logits(adapted, PROMPTS), ours, atol=1e-4)
    qstar.save(tuned, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(torch_logits(again, PROMPTS), ours, atol=1e-4)
    verifier = heads.add_value_head(tuned, "orm")
    kernel = jax.random.normal(jax.random.key(0), verifier.params["value"]["kernel"].shape)
    verifier = verifier.replace(params={**verifier.params, "value": {"kernel": kernel, "bias": jnp.zeros(1)}})
    qstar.save(verifier, tmp_path / "verifier")
    options = [["a", "bc"]]
    scores = [qstar.score(model, ["ab"], options) for model in (verifier, qstar.load(tmp_path / "verifier"))]
    np.testing.assert_array_equal(*scores)
    assert scores[0][0][0] != scores[0][0][1]


def test_the_real_gemma_3_has_the_logits_and_the_completions_of_transformers():
    """Both sides in float32, on the numbers that its bfloat16 files hold; the text is longer than the window of 512."""
    folder = real_model("gemma-3-270m")
    model = qstar.load(folder, dtype="float32")
    assert (model.config.dtype, qstar.load(folder).config.dtype) == ("float32", "bfloat16")  # the files' own by default
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "The capital of France is"
    ids = model.tokenizer.encode(text, bos=True)
    assert ids == transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    long = np.asarray([ids + np.random.default_rng(0).integers(5, 200_000, 540).tolist()], np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(long, dtype=torch.long)).logits[0, [4, 200, -1]].numpy()
        continued = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    logits = np.asarray(qstar.logits(model, long))[0, [4, 200, -1]]
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    ((found,),) = qstar.generate(model, [text], max_new_tokens=12, temperature=0)
    assert found.tokens == continued and "the capital of" in found.text
