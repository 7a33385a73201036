"""What is measured, and against what: `qstar bench generate | train`."""
