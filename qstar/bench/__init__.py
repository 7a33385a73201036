"""Benchmarks beside transformers and PyTorch: `qstar bench generate | train | rl | distil | quiet_star`."""
