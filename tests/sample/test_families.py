"""Greedy completions of every family, token for token those of transformers' `generate`, and the real Gemma 3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from conftest import real_model

import qstar
from tests.models.oracle import random_tokens, torch_model

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
    assert found.tokens == continued and "Paris" in found.text
