"""Alias of `qstar.runs.rollouts`, for programs written before the engine had a package of its own."""

from qstar.runs.rollouts import sample_rollouts, select, to_example

__all__ = ["sample_rollouts", "select", "to_example"]
