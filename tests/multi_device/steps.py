"""Two updates of each method's train step, on any mesh; as a program, in one of several processes.

QSTAR_COORDINATOR=... QSTAR_NUM_PROCESSES=2 QSTAR_PROCESS_ID=0 python -m tests.multi_device.steps MESH OUT.npz METHOD ...
"""

from __future__ import annotations

import functools
import sys

import jax
import numpy as np

from qstar import distributed, tree
from qstar.mesh import make_mesh, put_global_batch, replicated, shardings
from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.models.thought_config import ThoughtConfig
from qstar.text.packing import Example, pack, pack_groups
from qstar.thoughts import loss as thought_loss
from qstar.train import losses, optim
from qstar.train.preference import dpo_loss, value_loss
from qstar.train.state import create_state
from qstar.train.step import make_step
from qstar.types import Batch, Graded, Preference
from tests.multi_device import test_rl_sharded

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=24,
    max_positions=64,
    init_std=0.2,
    tie_embeddings=False,
    thoughts=ThoughtConfig(thought_tokens=2, talk_tokens=2, forbidden_ids=(0,)),
    value_head="orm",
)
TX = optim.adamw(weight_decay=0.1, clip=1.0, eps=0.1)  # a large eps, or the sign of a tiny gradient decides
ROWS = 8


def batches(seed):
    """A batch for each method: rows with very unequal numbers of tokens that count."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(1, 64, n).tolist()  # noqa: E731
    texts = Batch(**pack([Example(ids(2), ids(1 + 2 * i)) for i in range(ROWS)], 20, packed=False))
    two = [[Example(ids(2), ids(1 + i)), Example(ids(2), ids(9 - i))] for i in range(ROWS)]
    pairs, chosen = pack_groups(two, 20, packed=False)
    preferences = Preference(
        Batch(**pairs), rng.normal(-8, 1, (ROWS, 1, 2)).astype(np.float32), (chosen >= 0).astype(np.float32)
    )
    graded = Graded(texts, (rng.random(texts.mask.shape) < 0.5).astype(np.float32), texts.mask)
    found = {"star": texts, "quiet_star": texts, "dpo": preferences, "orm": graded}
    return found | {QUICK: {k: found[k] for k in THREE}}


def together(params, batch, rng, *, config):
    """The losses of STaR and V-STaR added up: one program to compile instead of three."""
    found = {k: LOSSES[k](params, batch[k], rng, config=config) for k in THREE}
    sums = [sum(x[0][i] for x in found.values()) for i in (0, 1)]
    return tuple(sums), {f"{k}/{name}": m for k, (_, metrics) in found.items() for name, m in metrics.items()}


GUIDED = ("RL", "distillation")  # of LM-Guided CoT: PPO of a T5 with a critic, a T5 taught by a decoder
THREE, QUICK = ("star", "dpo", "orm"), "star, dpo and orm"
LOSSES = {"star": losses.sft_loss, "quiet_star": thought_loss.loss, "dpo": dpo_loss, "orm": value_loss, QUICK: together}


@functools.cache
def alone():
    """Parameters on one device; norms are not 1, heads are not 0."""
    params = jax.jit(decoder.init, static_argnums=0)(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: np.asarray(p) + np.float32(0.2) * rng.normal(size=p.shape).astype(np.float32), params)


@functools.cache
def step(method):
    if method in GUIDED:
        return make_step(test_rl_sharded.case(method)[2], TX)
    return make_step(functools.partial(LOSSES[method], config=CONFIG), TX)


def start(method):
    """The parameters of all roles, on one device."""
    return test_rl_sharded.case(method)[0] if method in GUIDED else {"policy": alone()}


def two_updates(method, mesh):
    """The new parameters and the metrics of both updates, as {name: array}."""
    params = start(method)
    if mesh is not None:
        where = shardings(params, decoder.PARAM_AXES, mesh)
        host = jax.tree.map(np.asarray, params)
        params = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), host, where)
    state, out = create_state(params, TX, seed=0, mesh=mesh, table=decoder.PARAM_AXES), {}
    for i in range(2):
        batch = test_rl_sharded.case(method)[1] if method in GUIDED else batches(i)[method]
        if mesh is not None:
            batch = put_global_batch(batch, mesh)
        state, metrics = step(method)(state, batch, np.float32(1e-2))
        out |= {f"{method}/{i}/{k}": np.asarray(v) for k, v in metrics.items()}  # and wait: few cores
    params = state.params
    if jax.process_count() > 1:  # no process holds all of it
        params = jax.jit(lambda x: x, out_shardings=replicated(mesh))(params)
    return out | {f"{method}/{n}": x for n, x in tree.named_leaves(jax.device_get(params))}


if __name__ == "__main__":
    distributed.join(distributed.process_info())
    found = {k: v for m in sys.argv[3:] for k, v in two_updates(m, make_mesh(sys.argv[1])).items()}
    if distributed.is_first():
        np.savez(sys.argv[2], **found)
    distributed.leave()
