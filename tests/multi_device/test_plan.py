"""Plans of a small config on 8 simulated devices, and what its compiled programs send to each other."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs.star_arithmetic import get_config
from qstar.__main__ import main
from qstar.mesh import make_mesh
from qstar.plan import hlo, run, search
from qstar.plan.cases import programs
from qstar.plan.program import Plan, compile_program, local_bytes
from qstar.plan.steps import Assumed
from qstar.plan.topology import open_topology
from tests.plan.collectives import collectives

V, E, ROWS, T = 512, 64, 16, 24
MODEL = dict(preset="tiny", hidden_size=E, num_layers=2, num_heads=8, scan_unroll=1, vocab_size=V)


def config() -> ConfigDict:
    c = get_config("smoke").unlock()
    c.mesh, c.model = "fsdp=-1", ConfigDict(MODEL)
    c.train.update(batch_size=ROWS, row_length=T)
    c.sample.update(max_new_tokens=8, round_size=64)
    return c


@functools.cache
def planned(name):
    """(plan, compiled text taken apart) of the program whose name begins so."""
    topology, kept = open_topology("cpu:8"), []
    program = next(p for p in programs(config(), topology.devices, Assumed(prompt=8)) if p.name.startswith(name))
    plan = compile_program(program, topology, kept.append)
    return plan, hlo.Program(kept[0], program.steps), program


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    mesh = make_mesh("fsdp=8", jax.devices()[:8])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(None, "fsdp"), out_specs=P(), check_vma=False)
    def f(x):
        def turn(s, x):
            return s + jax.lax.psum(x, "fsdp") + jnp.sum(jax.lax.all_gather(x, "fsdp"), 0), None

        return jax.lax.scan(turn, jnp.zeros(100), x[:, 0])[0]

    text = jax.jit(f).lower(jax.ShapeDtypeStruct((5, 8, 100), jnp.float32)).compile().as_text()
    found = hlo.Program(text).costs().collectives
    assert {k: (c.count, c.bytes) for k, c in found.items()} == {
        "all-reduce": (5, 5 * 2 * 7 / 8 * 400), "all-gather": (5, 5 * 7 / 8 * 3200),
    }  # fmt: skip


def test_a_training_step_is_planned_without_weights():
    plan, _, program = planned("fine-tuning")
    assert plan.fits and plan.compiled
    whole = sum(x.size for x in jax.tree.leaves(program.parts["parameters"])) * 4
    assert whole / 8 <= plan.parts["parameters"] < whole / 8 + 20_000  # norms are whole
    assert plan.parts["optimiser"] == pytest.approx(2 * plan.parts["parameters"], rel=0.01)
    assert plan.peak == pytest.approx(
        sum(plan.parts.values()) + sum(plan.resident.values()) + plan.activations, rel=0.01
    )
    assert 0.9 * plan.needed < plan.flops < 1.5 * plan.needed  # a mask of attention is needed in half, computed in full


def test_under_fsdp_rows_stay_where_they_are_and_parameters_are_gathered():
    """XLA's CPU compiler writes a reduce-scatter as all-reduce and slice: that is checked in a TPU's text, in tests/plan."""
    _, text, program = planned("fine-tuning")
    shapes = {x.shape[-2:] for x in jax.tree.leaves(program.parts["parameters"]) if x.ndim >= 2}
    shapes |= {s[::-1] for s in shapes}
    moved = [
        (kind, a) for i, _, kind in collectives(text) for a in i.arrays if len(a.shape) > 1 and a.bytes > 4 * ROWS * T
    ]
    assert moved
    for kind, a in moved:
        if kind in ("all-gather", "all-reduce"):
            assert a.shape[-2:] in shapes, (kind, a.shape)  # neither [rows, tokens, width] nor [tokens, vocabulary]


def test_gathered_matrices_are_gathered_again_and_not_kept_for_the_backward_pass():
    _, text, program = planned("fine-tuning")
    stacks = {x.shape for x in jax.tree.leaves(program.parts["parameters"]) if x.ndim == 3}
    found = {a.shape for body in text.computations.values() for i in body for a in i.arrays}
    assert stacks and not stacks & found  # no [layers, in, out] in whole: neither parameters nor what the scan keeps


def test_sampling_gathers_neither_logits_nor_cache():
    plan, text, program = planned("sampling: 8 tokens")
    state, _ = program.parts["cache"]
    slots, (_, heads, new, width) = state.active.shape[0], state.ring[0][0].shape
    assert local_bytes(state.ring) * 8 == sum(x.size * 4 for x in jax.tree.leaves(state.ring))
    for i, times, kind in collectives(text):
        if kind == "all-gather":
            assert max(a.bytes for a in i.arrays) < 4 * min(slots * V, slots * heads * new * width) / 4, i
            assert times == 1 or max(a.bytes for a in i.arrays) <= 4 * slots * E * 2, i
    assert plan.fits


def test_what_is_too_large_is_refused_with_its_culprit_and_what_would_help(capsys):
    command = ["plan", "--config=configs/star_gsm8k.py", "--topology=cpu:8", "--hbm=6", "--only=fine"]
    assert main([*command, "--config.mesh=data=-1"]) == 1
    out = capsys.readouterr().out
    assert "optimiser state 48.4 GB of 6.44 GB per chip" in out and "fsdp=8 would hold" in out
    assert "lora_rank" in out and "compiled in" not in out  # what cannot fit is not compiled


@pytest.mark.parametrize("name", ["v9:4x4", "v5e:4x4x4", "v5p:4x4", "cpu:x", "gpu:0", "gpu", "cpu:0", "cpu:", "cpu:99999",
                                  "cpu:1,cpu:x", "cpu:1,cpu:9", ","])  # fmt: skip
def test_a_slice_that_is_unknown_or_not_here_is_a_users_mistake(name, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # put back afterwards
    monkeypatch.setattr(run, "compile_program", lambda *a: pytest.fail("compiled before all slices were read"))
    assert main(["plan", "--config=configs/star_gsm8k.py", f"--topology={name}"]) == 2
    out = capsys.readouterr()
    assert f"--topology={name.rpartition('1,')[2]}" in out.err and not out.out
    assert name in ("cpu:1,cpu:9", "gpu") or "give one like" in out.err


def test_texts_of_several_slices_stand_side_by_side(tmp_path, capsys, monkeypatch):
    def compiled(program, topology, keep):
        keep(topology.name)
        return Plan(program.name, True, {}, {}, 0, 0, 1)

    monkeypatch.setattr(run, "compile_program", compiled)
    command = ["plan", "--config=star_arithmetic:smoke", "--topology=cpu:1,cpu:2", "--only=fine"]
    assert main([*command, f"--hlo={tmp_path}/a/b"]) == 0
    assert {p.name: p.read_text() for p in (tmp_path / "a" / "b").iterdir()} == {
        "cpu_1_program_0.txt": "cpu:1", "cpu_2_program_0.txt": "cpu:2"
    }  # fmt: skip
    assert main([*command, f"--hlo={tmp_path}/a/b/cpu_1_program_0.txt"]) == 2
    assert "--hlo=" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize("slices", ["cpu:1", "cpu:1,cpu:2"])
def test_a_search_without_a_result_has_an_entry_for_each_slice(slices, capsys, monkeypatch):
    monkeypatch.setattr(search, "tried", lambda *a: iter(()))
    assert main(["plan", "--config=star_arithmetic:smoke", f"--topology={slices}", "--search", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    found = found if "," in slices else [found]
    assert [(x["topology"], x["fits"]) for x in found] == [(name, False) for name in slices.split(",")]


@pytest.mark.parametrize("flag", ["--hlo=texts", "--rows-per-chip=1"])
def test_a_search_refuses_flags_that_it_does_not_read(flag, capsys):
    assert main(["plan", "--config=star_arithmetic:smoke", "--topology=cpu:1", "--search", flag]) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


def test_a_program_that_is_not_there_is_a_users_mistake(capsys):
    assert main(["plan", "--config=configs/star_gsm8k.py", "--topology=cpu:8", "--only=DPO"]) == 2
    assert "--only=DPO" in (said := capsys.readouterr().err) and "fine-tuning; sampling: prefill" in said


def test_layouts_come_cheapest_first_and_cover_the_chips():
    from qstar.plan.search import layouts, same_but_larger

    found = layouts(config(), 8)
    sizes = [dict(part.split("=") for part in found_.mesh.split(",")) for found_ in found]
    assert all(int(s["data"]) * int(s["fsdp"]) * int(s["tensor"]) == 8 for s in sizes)
    assert found[0].mesh == "data=8,fsdp=1,tensor=1" and found[0].accumulate == 1
    wasteful = [ROWS // one.accumulate % (8 // int(s["tensor"])) != 0 for one, s in zip(found, sizes)]
    assert wasteful == sorted(wasteful) and any(wasteful)
    first, second = (found[0]._replace(accumulate=a) for a in (1, 4))
    assert same_but_larger(first, second) and not same_but_larger(second, first)


def test_a_search_skips_what_cannot_fit_and_names_the_first_that_does(monkeypatch):
    from qstar.plan import search

    def compiled(program, topology):  # as if only two rows per chip went in
        good = program.parts["batch"][0].tokens.sharding.shard_shape((ROWS, T))[0] <= 2
        return search.Plan(program.name, good, {}, {}, 0, 0, 1)

    monkeypatch.setattr(search, "compile_program", compiled)
    topology = open_topology("cpu:8", hbm=1.7e-3)  # whole parameters and moments take more, halves do not
    seen = list(search.tried(config(), topology, Assumed(prompt=8), "fine"))
    assert not seen[0][1]  # ruled out by arithmetic
    found = [(layout, plans[-1].fits) for layout, plans in seen if plans]
    assert found[-1][1] and not any(good for _, good in found[:-1])
    assert "data=8" not in found[-1][0].mesh
