"""Alias of `qstar.tasks.sandbox` under its first public name."""

from qstar.tasks.sandbox import Job, Sandbox, Verdict, run_python

Verifier = Sandbox

__all__ = ["Job", "Verdict", "Verifier", "run_python"]
