"""Quiet-STaR (arXiv 2403.09629): parallel thoughts at the positions of a text, their loss, generation."""
