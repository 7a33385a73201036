"""What models say, on however many processes and devices there are: the first process prints it as JSON.

QSTAR_COORDINATOR=... python tests/answers.py DECODER ENCDEC      (folders; the decoder can think)
"""

import json
import pathlib
import sys

import numpy as np

from qstar import distributed
from qstar.distributed import start_jax

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]


def answers(decoder, encdec, mesh=None):
    import qstar
    from qstar.mesh import to_host

    a, b = (qstar.load(folder, mesh=mesh) for folder in (decoder, encdec))
    rows = np.arange(2, 34).reshape(4, 8) % 27 + 2
    said = {
        "logits": to_host(qstar.logits(a, rows)).sum(axis=(0, 1)),
        "logprobs": qstar.logprobs(a, PROMPTS, PROMPTS[::-1]),
        "logprobs of T5": qstar.logprobs(b, PROMPTS, PROMPTS[::-1]),
    }
    greedy = {"max_new_tokens": 5, "temperature": 0.0}
    said["adapters"] = adapters(pathlib.Path(decoder), several=mesh is not None)
    for name, model, more in ((" of T5", b, {"n": 2}), (" with thoughts", a, {"thoughts": True})):
        found = qstar.generate(model, PROMPTS, **greedy, **more)
        said |= {f"tokens{name}": [c.tokens for row in found for c in row]}
        said |= {f"their logprobs{name}": [c.logprobs for row in found for c in row]}
    return {k: [np.asarray(x).tolist() for x in v] for k, v in said.items()}


def adapters(decoder, several):
    """A kernel with the adapters of a stage, which are split over the processes; and what the stage wrote of them."""
    import jax
    import optax

    import qstar
    from qstar.mesh import make_mesh, to_host
    from qstar.models import lora
    from qstar.models.decoder import PARAM_AXES
    from qstar.runs.stages import merge_adapters
    from qstar.train.state import create_state

    model = qstar.load(decoder, mesh=make_mesh("fsdp=-1") if several else None)
    folder = decoder.parent / ("together" if several else "alone")
    settings = lora.Lora(2, targets=("q", "down"))
    made = jax.tree.map(lambda x: x + 0.1, lora.init(model.config, settings, jax.random.key(1)))
    state = create_state({"policy": made}, optax.sgd(0.1), seed=0, mesh=model.mesh, table=PARAM_AXES)
    merged = merge_adapters(model, state.params["policy"], settings, folder)
    found = [to_host(merged["layers"]["down"]["kernel"].sum((0, 1)))]
    return found + (
        jax.tree.leaves(lora.load_adapters(model.config, folder / "adapter")[0]) if distributed.is_first() else []
    )


if __name__ == "__main__":
    start_jax(several=True)
    from qstar.mesh import make_mesh

    said = answers(*sys.argv[1:], mesh=make_mesh("data=2,tensor=-1"))
    if distributed.is_first():
        print(json.dumps(said))
