"""Tokenizer files of an exported model: those of the source folder, in a form that transformers 4 and 5 both read."""

from __future__ import annotations

import json
import pathlib
from typing import Any

CONFIG = "tokenizer_config.json"
KEPT = (
    *(CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
)
# What transformers 5 writes of its own loading, and 4 would take for settings.
_OF_LOADING = ("backend", "is_local", "local_files_only")


def read_kept(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the files beside tokenizer.json that an export repeats."""
    return {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}


def write(hf: Any, kept: dict[str, bytes], folder: pathlib.Path) -> None:
    """Writes tokenizer.json and the kept files; what transformers 5 alone understands in the settings is rewritten.

    Args:
      hf: a `transformers.PreTrainedTokenizerFast`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if CONFIG in kept:
        hf.backend_tokenizer.save(str(folder / "tokenizer.json"))
    else:
        hf.save_pretrained(str(folder))
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    plain = {k: v for k, v in settings.items() if k not in _OF_LOADING}
    # A class like LlamaTokenizer knows its special tokens without settings, and tokenizer.json alone does not.
    elsewhere = json.loads(kept.get("special_tokens_map.json", b"{}"))
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if name not in plain and name not in elsewhere and getattr(hf, name) is not None:
            plain[name] = str(getattr(hf, name))
    if plain.get("tokenizer_class") in (None, "TokenizersBackend"):  # the name that both versions know it by
        plain["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(plain.get("extra_special_tokens"), list):  # 4 wants a map there
        plain["additional_special_tokens"] = plain.pop("extra_special_tokens")
    if plain != settings:
        (folder / CONFIG).write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
