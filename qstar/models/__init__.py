"""Decoders and encoder-decoders as pure functions, and their weights in the Hugging Face layout."""
