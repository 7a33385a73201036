"""Quiet-STaR (arXiv 2403.09629): thoughts after every position of a text, exact, and never a copied key."""
