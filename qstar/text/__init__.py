"""Tokenizers, chat templates, and packing of token ids into training rows. No jax here."""

from qstar.text.chat import chat_example
from qstar.text.packing import Example, pack
from qstar.text.tokenizer import Tokenizer, char_tokenizer, load_tokenizer

__all__ = ["Example", "Tokenizer", "char_tokenizer", "chat_example", "load_tokenizer", "pack"]
