"""Attention kernels say the same as XLA's products; which one runs follows from the platform and the shape."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar.errors import UserError
from qstar.models import flash, prefix_attention
from qstar.models.attention import attend, causal_mask, text_mask, text_segment
from qstar.models.config import ModelConfig
from qstar.types import Segment

T, H, G, K = 256, 4, 2, 8
CONFIG = ModelConfig(num_heads=H, num_kv_heads=G, head_dim=K)
PACKED = np.repeat([[1, 2, 3, 0], [1, 1, 1, 1]], [100, 60, 90, 6], axis=1).astype(np.int32)  # the last six: padding
ALONE = (np.arange(T) < np.asarray([[T], [30]])).astype(np.int32)


@functools.cache
def arrays(dtype="float32"):
    draw = np.random.default_rng(0).normal
    shapes = (2, T, H, K), (2, G, T, K), (2, G, T, K), (2, T, H, K)
    return [jnp.asarray(draw(size=shape), dtype) for shape in shapes]


def run(sight, ids, real):
    """The weighed sum of attention over rows, and its gradients; padding counts for nothing."""
    *moved, weights = arrays()

    def total(q, k, v):
        one = lambda q, k, v, ids: attend(q, [text_segment(k, v, sight(ids))], scale=0.4)  # noqa: E731
        return jnp.sum(jnp.where(real[..., None, None], weights * jax.vmap(one)(q, k, v, ids), 0))

    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*moved)


def plain(ids, window):
    """The mask of `text_mask`, by its definition."""
    i = np.arange(T)
    seen = (i <= i[:, None]) & (ids[:, None] == ids)
    return seen if window is None else seen & (i[:, None] - i < window)


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max())), found, expected)


@pytest.mark.parametrize("window", [None, 40])
def test_tiles_are_softmax_attention_in_packed_rows_with_its_gradients(monkeypatch, window):
    monkeypatch.setattr(prefix_attention, "PLAIN_SCORES", 0)
    monkeypatch.setattr(prefix_attention, "TILE_BYTES", 4 * 2 * 50 * H * T)  # 6 tiles, the last repeats some rows
    config = CONFIG.replace(sliding_window=window, attention="tiles")
    found = run(lambda ids: causal_mask(config, ids), PACKED, PACKED > 0)
    same(found, run(lambda ids: plain(ids, window), PACKED, PACKED > 0))


def test_a_long_text_takes_tiles_on_a_cpu_and_a_short_one_plain_products():
    ids = jnp.ones(flash.AUTO_LENGTH["tiles"], jnp.int32)
    assert causal_mask(CONFIG, ids).shape == (len(ids), 2)
    assert causal_mask(CONFIG, ids[:-1]).dtype == bool
    assert causal_mask(CONFIG.replace(relative_bias=True), ids).dtype == bool


def test_splash_is_softmax_attention_in_packed_rows_with_its_gradients(monkeypatch, window=40):
    """(Without a window, and on a mesh: see tests/multi_device.)"""
    monkeypatch.setattr(flash, "BLOCK", 128)  # two tiles
    config = CONFIG.replace(attention="splash", sliding_window=window)
    assert causal_mask(config, PACKED[0]).impl == "splash"
    found = run(lambda ids: causal_mask(config, ids), PACKED, PACKED > 0)
    same(found, run(lambda ids: text_mask(ids, T, config), PACKED, PACKED > 0))


@pytest.mark.parametrize("window", [None, 40])
def test_cudnn_is_told_of_causes_lengths_and_windows_alone(window, monkeypatch):
    """There is no GPU here: XLA's form of the same call says what these arguments mean."""
    ask = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **how: ask(*a, **how))
    found = run(lambda ids: flash.KernelMask(ids, "cudnn", window), ALONE, ALONE > 0)
    same(found, run(lambda ids: text_mask(ids, T, CONFIG.replace(sliding_window=window)), ALONE, ALONE > 0))


def test_cudnn_is_lowered_without_a_mask_of_text_by_text(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda c: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda c: False)
    *moved, _ = arrays("bfloat16")
    one = lambda q, k, v, ids: attend(q, [Segment(k, v, flash.KernelMask(ids, "cudnn", None))], scale=0.4)  # noqa: E731
    total = lambda *moved: jnp.sum(jax.vmap(one)(*moved, ALONE).astype(jnp.float32))  # noqa: E731
    text = jax.jit(jax.grad(total, (0, 1, 2))).trace(*moved).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text and f"{T}x{T}" not in text


@pytest.mark.parametrize("changes, platform, length, one_text, runs", [
    ({}, "cpu", 4096, True, "tiles"),
    ({"attn_softcap": 50.0, "windowed": (True, False), "sliding_window": 9}, "cpu", 4096, True, "tiles"),
    ({"dtype": "bfloat16", "head_dim": 128}, "tpu", 2048, False, "splash"),
    ({"dtype": "bfloat16", "head_dim": 128}, "tpu", 512, False, "xla"),  # too short to gain
    ({"dtype": "bfloat16", "head_dim": 128}, "tpu", 2000, False, "xla"),
    ({"head_dim": 128}, "tpu", 2048, False, "xla"),  # float32 means float32
    ({"dtype": "bfloat16", "head_dim": 128}, "gpu", 2048, True, "cudnn"),
    ({"dtype": "bfloat16", "head_dim": 128}, "gpu", 2048, False, "xla"),  # packed
    ({"dtype": "bfloat16", "head_dim": 256}, "gpu", 2048, True, "xla"),
    ({"dtype": "bfloat16", "head_dim": 128, "relative_bias": True}, "tpu", 2048, False, "xla"),
    ({"dtype": "bfloat16", "head_dim": 128, "attention": "xla"}, "tpu", 2048, False, "xla"),
])  # fmt: skip
def test_auto_takes_the_kernel_of_the_platform_where_it_fits(changes, platform, length, one_text, runs, monkeypatch):
    monkeypatch.setattr(flash, "platform_of", lambda x: platform)
    config = CONFIG.replace(**changes)
    assert flash.choose(config, np.ones(length, np.int32), one_text=one_text, must=True) == runs


@pytest.mark.parametrize("changes, platform, length, culprit", [
    ({"attention": "splash"}, "gpu", 2048, "splash: it is a kernel for TPUs"),
    ({"attention": "splash"}, "cpu", 200, "rows of 200 tokens are no multiple of 128"),
    ({"attention": "splash"}, "tpu", 256, "dtype is float32"),
    ({"attention": "splash", "relative_bias": True}, "cpu", 256, "relative_bias is set"),
    ({"attention": "splash", "attn_softcap": 50.0}, "cpu", 256, "it has no soft cap on scores, and attn_softcap is 50;"),
    ({"attention": "splash", "windowed": (True, False), "sliding_window": 9}, "cpu", 256, "only some have the sliding win"),
    ({"attention": "cudnn"}, "tpu", 256, "runs on tpu"),
    ({"attention": "cudnn", "dtype": "bfloat16"}, "gpu", 256, "train.packed=False"),
])  # fmt: skip
def test_a_kernel_that_cannot_take_the_shape_says_why(changes, platform, length, culprit, monkeypatch):
    monkeypatch.setattr(flash, "platform_of", lambda x: platform)
    config, ids = CONFIG.replace(**changes), np.ones(length, np.int32)
    with pytest.raises(UserError, match=culprit):
        flash.choose(config, ids, one_text=False, must=True)
    assert flash.choose(config, ids, one_text=False, must=False) == "xla"  # scoring goes on


def test_an_unknown_kind_of_attention_is_named():
    with pytest.raises(UserError, match="attention='flash' is not one of auto, xla, tiles, splash, cudnn"):
        ModelConfig(attention="flash")


FOR_TPU = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from qstar.mesh import make_mesh
from qstar.models.attention import attend, causal_mask
from qstar.models.config import ModelConfig
from qstar.types import Segment, Shared
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = make_mesh("fsdp=2,tensor=2", topology.devices)
at = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("fsdp")))
c = ModelConfig(dtype="bfloat16", head_dim=128)
one = lambda q, k, v, i: attend(q, [Segment(k, v, causal_mask(c, i))], scale=1.0)
total = lambda q, k, v, i: jnp.sum(jax.vmap(one)(q, k, v, i).astype(jnp.float32))
kv = at(jnp.bfloat16, 4, 2, 1024, 128)
arrays = at(jnp.bfloat16, 4, 1024, 4, 128), kv, kv, at(jnp.int32, 4, 1024)
program = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile()
print(program.as_text().count("tpu_custom_call"), "kernels")
# Threads of 3 tokens that share their text's 200 keys: 5 of them in each of 4 texts, or 4 in one, over the devices.
threads = jax.vmap(lambda q, k, v, r: attend(q, [Shared(k, v, r)], scale=1.0), (0, None, None, 0))
total = lambda *args: jnp.sum(jax.vmap(threads)(*args).astype(jnp.float32))
for texts, count, split in ((4, 5, P("fsdp")), (1, 4, P(None, "fsdp"))):
    at = lambda dtype, *shape, at=P(): jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, at))
    kv = at(jnp.bfloat16, texts, 2, 200, 64, at=split if texts > 1 else P())
    arrays = at(jnp.bfloat16, texts, count, 3, 4, 64, at=split), kv, kv, at(jnp.int32, texts, count, 3, 2, at=split)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile()
    print(program.as_text().count("tpu_custom_call"), "kernels")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'qstar-jax[tpu]'"
)
def test_kernels_compile_for_a_described_tpu_slice_on_a_mesh():
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", FOR_TPU], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    splash, *shared = map(int, done.stdout.split()[::2])
    assert splash >= 3  # forward, and the gradients of queries and of keys and values
    assert shared == [2, 2]  # forward, and all gradients
