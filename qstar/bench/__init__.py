"""Benchmarks beside transformers and PyTorch: `qstar bench generate | train | rl | quiet_star | accelerator`."""
