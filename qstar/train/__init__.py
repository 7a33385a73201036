"""Training: one state, one step maker, losses as sums and weights, a loop that is a generator."""
