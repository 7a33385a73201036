"""Memory, FLOPs and communication of a config on a described TPU slice or GPUs: `qstar plan`."""
