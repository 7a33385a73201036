"""What a run says of itself: FLOPs, recompiles, memory, traces, and that no update waits for what it did not ask for."""

from __future__ import annotations

import functools
import types

import jax
import numpy as np
import pytest

from qstar.errors import UserError
from qstar.models.config import ModelConfig
from qstar.models.thought_config import ThoughtConfig
from qstar.train import flops, optim, profile
from qstar.train.loop import fit
from qstar.train.state import create_state
from qstar.train.step import make_step
from qstar.types import Batch, Preference
from tests.train.problem import batch, loss, params

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=12, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=7
)
TX = optim.adamw()
STEP = make_step(functools.partial(loss, noise=0.5), TX)


def packed(*documents):
    """One row of documents of these lengths, with three tokens of padding."""
    ids = np.concatenate([*(np.full(n, i + 1) for i, n in enumerate(documents)), np.zeros(3)]).astype(np.int32)
    positions = np.concatenate([*(np.arange(n) for n in documents), np.zeros(3)]).astype(np.int32)
    return Batch(ids[None], np.ones((1, len(ids)), np.float32), ids[None], positions[None])


@pytest.mark.parametrize("window, mixed", [(None, ()), (4, ()), (4, (False, True, False))])
def test_the_flops_of_an_update_are_three_times_those_of_its_products(window, mixed):
    """Brute force: 2 per multiply-add of every product, forward; only pairs that see each other."""
    c, total = CONFIG.replace(sliding_window=window, windowed=mixed), 0
    for n in (9, 2):
        for t in range(n):
            kernels = 12 * 24 + 2 * 12 * 12 + 24 * 12 + 3 * 12 * 7  # q, k and v, o, gated MLP
            seen = sum(min(t + 1, window or n) if near else t + 1 for near in mixed or (True,) * 3)
            total += 3 * 2 * kernels + 2 * 2 * 4 * 6 * seen + 2 * 12 * 50
    assert flops.update_flops(c, packed(9, 2)) == pytest.approx(3 * total)
    assert flops.update_flops(c, Preference(packed(9, 2), None, None)) == pytest.approx(3 * total)
    frozen = flops.update_flops(c, packed(9, 2), frozen=True)  # no gradient of the kernels
    assert 3 * total - frozen == pytest.approx(2 * c.matmul_params * 11)


def test_a_thought_is_counted_as_its_tokens():
    c = CONFIG.replace(thoughts=ThoughtConfig(thought_tokens=2, talk_tokens=1, thoughts_per_position=3))
    text, n, q = 5, 2 + 1 + 1, 4 * 6
    threads = 0
    for j in range(text):  # after position j: a thread of n tokens, each of which sees the text up to j and the thread
        for i in range(1, n + 1):
            threads += 2 * (c.matmul_params - 12 * 50) + 3 * 4 * q * (j + 1 + i)
        threads += 3 * 2 * 12 * 50 + 6 * 12 * 12  # its predictions, and the mixing head
    expected = flops.update_flops(c, packed(text)) + 3 * 3 * threads
    assert flops.update_flops(c, packed(text), with_thoughts=True) == pytest.approx(expected)


@pytest.mark.parametrize("kind, tera", [
    ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918), ("NVIDIA H200", 989),
    ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("cpu", None),
])  # fmt: skip
def test_the_peak_is_that_of_the_device(kind, tera):
    assert flops.peak(kind) == (tera and tera * 1e12)


def run(batch_at=batch, steps=4, **options):
    state = create_state(params(), TX, seed=0)
    return list(fit(state, lambda s: STEP, batch_at, lambda s: 0.01, steps=steps, log_every=2, **options))


def test_mfu_is_needed_flops_over_what_the_devices_could_do(monkeypatch):
    monkeypatch.setattr(flops, "peak", lambda kind: 1e9)
    for at in run(watch=profile.Watch(lambda rows: 100.0)):
        assert at.metrics["mfu"] == pytest.approx(100.0 / at.metrics["seconds_per_step"] / 1e9 / jax.device_count())
    monkeypatch.undo()
    assert "mfu" not in run(watch=profile.Watch(lambda rows: 100.0))[0].metrics  # a CPU has no peak in the table


def test_a_shape_that_changes_is_counted_as_a_recompile():
    assert [at.metrics["recompiles"] for at in run()] == [0, 0]
    found = run(lambda s: batch(s, rows=8 if s < 3 else 7))
    assert [at.metrics["recompiles"] for at in found] == [0, 1]


def test_an_update_that_moves_something_unasked_is_refused_where_the_guard_says_so():
    run(watch=profile.Watch(transfer_guard="disallow"))  # batch and rate are put where they belong by name
    hidden = lambda state, rows, lr: STEP(state, rows, np.float32(0.01))  # noqa: E731
    guarded = fit(create_state(params(), TX, seed=0), lambda s: hidden, batch, lambda s: 0.01, steps=2,
                  watch=profile.Watch(transfer_guard="disallow"))  # fmt: skip
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        list(guarded)


def test_the_asked_updates_are_traced_whatever_stage_they_are_in(tmp_path):
    began = []
    with profile.tracing("3:5", tmp_path / "profile"):
        run(steps=2)  # a first stage of two updates
        for at in run(steps=4):
            began.append((at.step, (tmp_path / "profile").exists()))
    assert began == [(2, False), (4, True)] or began == [(2, True), (4, True)]
    assert len(list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))) == 1
    with profile.tracing("2:90", tmp_path / "short"):  # a run that ends before
        run(steps=2)
    assert len(list((tmp_path / "short").glob("plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize("span", ["13:10", "0:3", "a", "3:", ""])
def test_a_span_that_is_none_is_named(span, tmp_path):
    with pytest.raises(UserError, match=f"--profile={span} must be FIRST:LAST"):
        profile.Trace(span, tmp_path)


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    assert profile.memory() == {}
    device = lambda n: types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": n, "peak_bytes_in_use": 2 * n})  # noqa: E731
    monkeypatch.setattr(jax, "local_devices", lambda: [device(2**30), device(3 * 2**30)])
    assert profile.memory() == {"memory_gib": 3.0, "memory_peak_gib": 6.0}
