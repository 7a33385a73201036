"""Sampling: one jitted prefill, one `while_loop` decode, and the queue that keeps its slots full."""
