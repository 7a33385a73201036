"""One tokenizer of every kind at hand, by name."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

from conftest import real_model, shared

from qstar.text import char_tokenizer, load_tokenizer

REAL = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma-3-270m")
KINDS = ("characters", "gpt2", "mistral", "stories260k", *REAL)
CHARACTERS = "\0\1" + "".join(map(chr, range(32, 127))) + "\n\t"


def tokenizer(kind):
    """Returns the tokenizer of a kind; skips the test where its files are absent."""
    if kind == "characters":
        return char_tokenizer(CHARACTERS, pad="\0", eos="\1")
    if kind in ("gpt2", "mistral"):
        return _converted(kind)
    return load_tokenizer(shared(f"weights/{kind}") if kind == "stories260k" else real_model(kind))


@functools.cache
def _converted(kind):
    files, name = {
        "gpt2": ({"vocab.json": "gpt2/encoder.json", "merges.txt": "gpt2/vocab.bpe"}, "GPT2Tokenizer"),
        "mistral": ({"tokenizer.model": "mistral_v1/tokenizer.model"}, "LlamaTokenizer"),
    }[kind]
    with tempfile.TemporaryDirectory() as folder:
        for to, source in files.items():
            shutil.copyfile(shared(f"data/tokenizers/{source}"), Path(folder) / to)
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        return load_tokenizer(folder)
