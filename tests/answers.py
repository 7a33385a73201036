"""What models say, on however many processes and devices there are: the first process prints it as JSON.

QSTAR_COORDINATOR=... python tests/answers.py DECODER ENCDEC      (folders; the decoder can think)
"""

import json
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
    for name, model, more in ((" of T5", b, {"n": 2}), (" with thoughts", a, {"thoughts": True})):
        found = qstar.generate(model, PROMPTS, **greedy, **more)
        said |= {f"tokens{name}": [c.tokens for row in found for c in row]}
        said |= {f"their logprobs{name}": [c.logprobs for row in found for c in row]}
    return {k: [np.asarray(x).tolist() for x in v] for k, v in said.items()}


if __name__ == "__main__":
    start_jax(several=True)
    from qstar.mesh import make_mesh

    said = answers(*sys.argv[1:], mesh=make_mesh("data=2,tensor=-1"))
    if distributed.is_first():
        print(json.dumps(said))
