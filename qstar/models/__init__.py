"""Decoders as pure functions, and their weights in the Hugging Face layout."""
