"""Costs are read from a program's text: loops count as often as they run, whoever compiled it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from qstar.plan import hlo


def text_of(f, *shapes):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_products_in_nested_loops_count_as_often_as_they_run():
    def step(x, w):
        inner = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, w)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=5)[0]

    assert hlo.Program(text_of(step, (8, 16), (3, 16, 16))).costs().flops == 5 * 3 * 2 * 8 * 16 * 16


def test_a_loop_that_its_data_end_runs_as_often_as_assumed():
    def decode(x, w):
        return jax.lax.while_loop(lambda s: jnp.sum(s) < 7.0, lambda s: jnp.tanh(s @ w), x)

    costs = hlo.Program(text_of(decode, (8, 16), (16, 16)), assumed=11).costs()
    assert costs.flops == 11 * 2 * 8 * 16 * 16


def test_a_scan_reads_a_slice_of_its_weights_in_each_turn_and_not_all_of_them():
    L, B, E = 50, 4, 64
    scan = lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]  # noqa: E731
    moved = hlo.Program(text_of(scan, (B, E), (L, E, E))).costs().bytes
    assert 4 * L * E * E <= moved < 4 * 4 * L * E * E  # all weights once, not L times


# What a TPU compiler writes (names shortened). Batch axes are spatial ones, in which one tap in n meets data.
TPU = """HloModule jit_step, is_scheduled=true

%cond (p: (s32[], bf16[8,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(28)
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (x: f32[16,1024]) -> f32[2,1024] {
  %x = f32[16,1024]{1,0:T(8,128)} parameter(0)
  %sum = f32[16,1024]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %part = f32[2,1024]{1,0:T(8,128)} dynamic-slice(%sum, %z, %z), dynamic_slice_sizes={2,1024}
}

%body (p.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %q = bf16[16,32,256]{2,1,0:T(8,128)(2,1)S(1)} fusion(%p.1), kind=kLoop, calls=%nothing
  %k = bf16[16,64,256]{2,1,0:T(8,128)(2,1)} fusion(%p.1), kind=kLoop, calls=%nothing
  %scores = f32[16,32,64]{1,2,0} convolution(%q, %k), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0oi->0bf
  %w = bf16[512,128]{1,0:T(8,128)(2,1)} fusion(%p.1), kind=kLoop, calls=%nothing
  %all = bf16[4096,128]{1,0:T(8,128)(2,1)} all-gather(%w), replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}
  %g = f32[16,1024]{1,0:T(8,128)} fusion(%all), kind=kLoop, calls=%nothing
  %one = f32[16,1024]{1,0:T(8,128)} all-reduce(%g), replica_groups=mesh['a'=1,'b'=8] {'a'}, to_apply=%add
  %room = f32[4096,1024]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %part.1 = f32[2,1024]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%i, %x)
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) while(%a), condition=%cond, body=%body
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_that_counts_down_runs_as_often_as_one_that_counts_up():
    text = """HloModule down

%cond (p: (s32[])) -> pred[] {
  %n = s32[] constant(4)
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %gt = pred[] compare(%i, %n), direction=GT
}

%body (p.1: (s32[])) -> (s32[]) {
  %p.1 = (s32[]) parameter(0)
  %q = s32[] get-tuple-element(%p.1), index=0
  %one = s32[] constant(2)
  %i.1 = s32[] subtract(%q, %one)
  ROOT %t = (s32[]) tuple(%i.1)
}

ENTRY %main () -> (s32[]) {
  %start = s32[] constant(20)
  %first = (s32[]) tuple(%start)
  ROOT %loop = (s32[]) while(%first), condition=%cond, body=%body
}
"""
    program = hlo.Program(text)
    loop = program.computations["main"][-1]
    assert program.trips(loop, "main") == 8  # 20, 18, ... 6


def test_a_tpus_text_is_read_alike():
    costs = hlo.Program(TPU).costs()
    assert costs.flops == 28 * 2 * 16 * 32 * 64 * 256  # 16 products of [32, 256] and [256, 64]
    assert costs.collectives["all-gather"].bytes == pytest.approx(28 * 7 / 8 * 4096 * 128 * 2)
    assert costs.collectives["reduce-scatter"].bytes == pytest.approx(28 * 7 / 8 * 16 * 1024 * 4)
    assert {k: c.count for k, c in costs.collectives.items()} == {"all-gather": 28, "reduce-scatter": 28}


def test_an_asynchronous_prefetch_moves_its_destination_and_not_the_array_that_it_slices():
    text = """HloModule prefetch

ENTRY %main (w: s8[1024,4096]) -> s8[4096] {
  %w = s8[1024,4096]{1,0:T(8,128)(4,1)} parameter(0)
  %s = (s8[1024,4096]{1,0:T(8,128)(4,1)}, s8[128,4096]{1,0:T(8,128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:128], [0:4096]}
  %d = s8[128,4096]{1,0:T(8,128)(4,1)S(1)} slice-done(%s)
  %c = (s8[1024,4096]{1,0:T(8,128)(4,1)}, s8[1024,4096]{1,0:T(8,128)(4,1)}, u32[]{:S(2)}) copy-start(%w)
  ROOT %e = s8[1024,4096]{1,0:T(8,128)(4,1)} copy-done(%c)
}
"""
    # The slice is read from main memory; the copy is read there and written there.
    assert hlo.Program(text).costs().bytes == 128 * 4096 + 2 * 1024 * 4096


def test_a_fusion_inside_of_a_fusion_reads_its_slice_and_writes_its_update():
    text = """HloModule nested

%slice (p: bf16[32,64,128], l: s32[]) -> bf16[64,128] {
  %p = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %l = s32[] parameter(1)
  %s = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p, %l, %z, %z), dynamic_slice_sizes={1,64,128}
  ROOT %b = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%s)
}

%product (q: bf16[16,128], p.1: bf16[32,64,128], l.1: s32[]) -> f32[16,64] {
  %q = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %l.1 = s32[] parameter(2)
  %keys = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%p.1, %l.1), kind=kLoop, calls=%slice
  ROOT %scores = f32[16,64]{1,0:T(8,128)} convolution(%q, %keys), dim_labels=bf_oi->bf
}

%write (c: bf16[32,64,128], u: bf16[1,1,128], l.2: s32[]) -> (bf16[32,64,128], bf16[1,128]) {
  %c = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %u = bf16[1,1,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %l.2 = s32[] parameter(2)
  %d = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%c, %u, %l.2, %z, %z)
  %e = bf16[1,128]{1,0:T(8,128)(2,1)} bitcast(%u)
  ROOT %both = (bf16[32,64,128]{2,1,0:T(8,128)(2,1)}, bf16[1,128]{1,0:T(8,128)(2,1)}) tuple(%d, %e)
}

ENTRY %main (q.1: bf16[16,128], p.2: bf16[32,64,128], u.1: bf16[1,1,128]) -> f32[16,64] {
  %q.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %u.1 = bf16[1,1,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %l.3 = s32[]{:S(1)} constant(3)
  %w = (bf16[32,64,128]{2,1,0:T(8,128)(2,1)}, bf16[1,128]{1,0:T(8,128)(2,1)}) fusion(%p.2, %u.1, %l.3), kind=kLoop, calls=%write
  ROOT %out = f32[16,64]{1,0:T(8,128)} fusion(%q.1, %p.2, %l.3), kind=kOutput, calls=%product
}
"""
    product, write = 2 * 16 * 128 + 2 * 64 * 128 + 4 * 16 * 64, 2 * 128 + 2 * 128
    assert hlo.Program(text).costs().bytes == product + write


def test_a_kernels_products_are_those_of_its_cost_estimate():
    text = """HloModule kernel

ENTRY %main (a: bf16[8,128]) -> f32[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %k = f32[8,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234","transcendentals":"5","bytes_accessed":"6"}}}
}
"""
    costs = hlo.Program(text).costs()
    assert costs.flops == 1234 and costs.bytes == 8 * 128 * (2 + 4)
