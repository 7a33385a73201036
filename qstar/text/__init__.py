"""Text in and out of token ids, and rows of tokens made from documents. No jax here."""

from qstar.text.packing import Example, pack
from qstar.text.tokenizer import Tokenizer, char_tokenizer, load_tokenizer

__all__ = ["Example", "Tokenizer", "char_tokenizer", "load_tokenizer", "pack"]
