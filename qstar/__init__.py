"""qstar: language models that learn to reason from their own rationales, in JAX.

    model = qstar.load("owner/name")  # on the hub, or a local folder in the Hugging Face layout
    qstar.generate(model, ["Once upon a time"], max_new_tokens=64)

The names below are imported when they are first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qstar.errors import UserError
    from qstar.methods.api import distil, evaluate, fine_tune, prefer
    from qstar.methods.prompt_rl import reinforce
    from qstar.methods.verifier import Verifier, score
    from qstar.models.model import Model, load, save
    from qstar.models.scoring import logits, logprobs
    from qstar.models.thought_config import ThoughtConfig
    from qstar.report.frames import load_run, plot
    from qstar.runs.rollouts import generate
    from qstar.types import Completion

__version__ = "0.1.0"

_HOME = {
    "Completion": "qstar.types",
    "UserError": "qstar.errors",
    "ThoughtConfig": "qstar.models.thought_config",
    "generate": "qstar.runs.rollouts",
    "reinforce": "qstar.methods.prompt_rl",
    **dict.fromkeys(("Model", "load", "save"), "qstar.models.model"),
    **dict.fromkeys(("logits", "logprobs"), "qstar.models.scoring"),
    **dict.fromkeys(("distil", "evaluate", "fine_tune", "prefer"), "qstar.methods.api"),
    **dict.fromkeys(("Verifier", "score"), "qstar.methods.verifier"),
    **dict.fromkeys(("load_run", "plot"), "qstar.report.frames"),
}

__all__ = [
    "Completion",
    "Model",
    "ThoughtConfig",
    "UserError",
    "Verifier",
    "__version__",
    "distil",
    "evaluate",
    "fine_tune",
    "generate",
    "load",
    "load_run",
    "logits",
    "logprobs",
    "plot",
    "prefer",
    "reinforce",
    "save",
    "score",
]


# Lazy, so that `import qstar` and the parts that read and score text (`qstar.text`, `qstar.data`, `qstar.tasks`) do not
# start JAX: they also run in worker processes.
def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qstar' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # later accesses bypass __getattr__
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
