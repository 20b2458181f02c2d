"""The compiled program as text: instructions, loops, collectives and traffic."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.planning import hlo
from slm_jax.planning.collectives import find_collectives
from slm_jax.planning.traffic import traffic_bytes

MATRIX = 64 * 64 * 4

# A loop of 5 rounds, as a TPU's compiler prints it: without a known trip count, layouts with the memory space S(1).
LOOP = """HloModule jit_f, is_scheduled=true

%fused (param_0.1: f32[5,64,64], param_1: s32[]) -> f32[64,64] {
  %param_0.1 = f32[5,64,64]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,64,64]{2,1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %bitcast = f32[64,64]{1,0:T(8,128)} bitcast(%slice)
}

%body (p: (s32[], f32[5,64,64], f32[64,64])) -> (s32[], f32[5,64,64], f32[64,64]) {
  %p = (s32[]{:T(128)}, f32[5,64,64]{2,1,0:T(8,128)}, /*index=2*/f32[64,64]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %stack = f32[5,64,64]{2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %layer = f32[64,64]{1,0:T(8,128)} fusion(%stack, %i), kind=kLoop, calls=%fused
  %ag = f32[128,64]{1,0:T(8,128)} all-gather(%layer), replica_groups={{0,1}}, dimensions={0}
  %fast = f32[64,64]{1,0:T(8,128)S(1)} negate(%layer)
  ROOT %t = (s32[]{:T(128)}, f32[5,64,64]{2,1,0:T(8,128)}, f32[64,64]{1,0:T(8,128)S(1)}) tuple(%i, %stack, %fast)
}

%condition (p.1: (s32[], f32[5,64,64], f32[64,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p.1 = (s32[]{:T(128)}, f32[5,64,64]{2,1,0:T(8,128)}, f32[64,64]{1,0:T(8,128)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[5,64,64], f32[64,64])) -> f32[64,64] {
  %a = (s32[]{:T(128)}, f32[5,64,64]{2,1,0:T(8,128)}, f32[64,64]{1,0:T(8,128)S(1)}) parameter(0)
  %loop = (s32[], f32[5,64,64]{2,1,0}, f32[64,64]{1,0}) while(%a), condition=%condition, body=%body
  ROOT %out = f32[64,64]{1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""


def test_instructions_of_a_computation():
    module = hlo.parse(LOOP)
    assert module.entry == "main"
    assert list(module.computations) == ["fused", "body", "condition", "main"]
    parameter = module.computations["body"]["p"]
    assert [array.dims for array in parameter.arrays] == [(), (5, 64, 64), (64, 64)]
    assert [array.on_chip for array in parameter.arrays] == [False, False, True]
    assert module.computations["fused"]["slice"].operands == ("param_0.1", "param_1", "zero", "zero")
    assert module.computations["body"]["layer"].called == ["fused"]
    assert module.computations["body"]["t"].is_root


def test_bodies_of_loops_are_counted_as_often_as_they_run():
    module = hlo.parse(LOOP)
    assert hlo.run_counts(module) == {"main": 1, "body": 5, "condition": 5, "fused": 5}
    (gather,) = find_collectives(module)
    assert (gather.kind, gather.dtype, gather.dims, gather.times) == ("all-gather", "f32", (128, 64), 5)
    assert gather.total_bytes == 5 * 2 * MATRIX


def test_traffic_counts_slices_and_leaves_out_what_stays_on_the_chip():
    fusion = 2 * MATRIX + 4  # reads one slice of the stack and the index, writes the layer
    gather = 3 * MATRIX
    negate = MATRIX  # its result is in vector memory
    compare = 4 + 4 + 1
    module = hlo.parse(LOOP)
    assert traffic_bytes(module) == 5 * (fusion + gather + negate + compare)
    assert traffic_bytes(module, loops=False) == fusion + gather + negate + compare


def test_traffic_counts_slices_in_fusions_of_fusions():
    """A TPU's compiler puts the slice of a stack, and the update of one, into fusions inside of a product's fusion."""
    text = """
%inner (p.1: f32[5,64,64], i.1: s32[]) -> f32[64,64] {
  %p.1 = f32[5,64,64]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %slice = f32[1,64,64]{2,1,0} dynamic-slice(%p.1, %i.1), dynamic_slice_sizes={1,64,64}
  ROOT %bitcast.1 = f32[64,64]{1,0} bitcast(%slice)
}

%outer (p: f32[5,64,64], i: s32[], x: f32[64,64], stack: f32[5,64,64]) -> f32[5,64,64] {
  %p = f32[5,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[64,64]{1,0} parameter(2)
  %stack = f32[5,64,64]{2,1,0} parameter(3)
  %layer = f32[64,64]{1,0} fusion(%p, %i), kind=kLoop, calls=%inner
  %product = f32[64,64]{1,0} dot(%layer, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %row = f32[1,64,64]{2,1,0} bitcast(%product)
  ROOT %updated = f32[5,64,64]{2,1,0} dynamic-update-slice(%stack, %row, %i)
}

ENTRY %main (a: f32[5,64,64], j: s32[], b: f32[64,64], c: f32[5,64,64]) -> f32[5,64,64] {
  %a = f32[5,64,64]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %b = f32[64,64]{1,0} parameter(2)
  %c = f32[5,64,64]{2,1,0} parameter(3)
  ROOT %f = f32[5,64,64]{2,1,0} fusion(%a, %j, %b, %c), kind=kOutput, calls=%outer
}
"""
    assert traffic_bytes(hlo.parse(text)) == 3 * MATRIX + 4  # a layer and x read, a layer written; the index


def test_traffic_leaves_out_the_scratch_memory_of_cublas():
    text = """
ENTRY %main (a: f32[64,64], b: f32[64,64]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  %b = f32[64,64]{1,0} parameter(1)
  %gemm = (f32[64,64]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
  ROOT %product = f32[64,64]{1,0} get-tuple-element(%gemm), index=0
}
"""
    assert traffic_bytes(hlo.parse(text)) == 3 * MATRIX


def test_a_scanned_program_moves_as_much_as_the_unrolled_one():
    """The oracle is the unrolled program, in which there is nothing to multiply."""

    def program(unroll):
        def f(weights, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, unroll=unroll)[0]

        shapes = jax.ShapeDtypeStruct((6, 256, 256), jnp.float32), jax.ShapeDtypeStruct((256, 256), jnp.float32)
        return hlo.parse(jax.jit(f).lower(*shapes).compile().as_text())

    scanned, unrolled = program(1), program(6)
    assert max(hlo.run_counts(scanned).values()) == 6
    assert traffic_bytes(scanned) == pytest.approx(traffic_bytes(unrolled), rel=0.1)
    assert traffic_bytes(scanned) > 3 * traffic_bytes(scanned, loops=False)


def test_collectives_of_a_compiled_program():
    mesh = jax.make_mesh((8,), ("x",))

    def compiled(spec_in, spec_out):
        x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=NamedSharding(mesh, spec_in))
        f = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, spec_out))
        return find_collectives(hlo.parse(f.lower(x).compile().as_text()))

    (gather,) = compiled(PartitionSpec("x"), PartitionSpec())
    assert (gather.kind, gather.dims, gather.times) == ("all-gather", (64, 256), 1)
    (moved,) = compiled(PartitionSpec("x"), PartitionSpec(None, "x"))
    assert moved.kind == "all-to-all"
    assert compiled(PartitionSpec("x"), PartitionSpec("x")) == []


def test_asynchronous_and_fused_collectives():
    text = """
%sum.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter (p: f32[32,128]) -> f32[4,128] {
  %p = f32[32,128]{1,0} parameter(0)
  ROOT %reduce = f32[32,128]{1,0} all-reduce(%p), replica_groups={}, to_apply=%sum.1
}

%start (q: bf16[4,8]) -> bf16[32,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %gather.1 = bf16[32,8]{1,0} all-gather(%q), dimensions={0}
}

%async_collective_fusion.7 (r: bf16[4,8]) -> bf16[32,8] {
  %r = bf16[4,8]{1,0} parameter(0)
  ROOT %gather.2 = bf16[32,8]{1,0} all-gather(%r), dimensions={0}
}

ENTRY %main (x: f32[32,128], y: f32[256,2048], z: bf16[4,8]) -> f32[2048,2048] {
  %x = f32[32,128]{1,0} parameter(0)
  %y = f32[256,2048]{1,0} parameter(1)
  %z = bf16[4,8]{1,0} parameter(2)
  %scattered = f32[4,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %async-collective-start = bf16[32,8]{1,0} fusion(%z), kind=kCustom, calls=%start
  %fusion.7 = bf16[32,8]{1,0} fusion(%z), kind=kCustom, calls=%async_collective_fusion.7
  %ag = (f32[256,2048]{1,0}, f32[2048,2048]{1,0}) all-gather-start(%y), dimensions={0}
  ROOT %ag.1 = f32[2048,2048]{1,0} all-gather-done(%ag)
}
"""
    found = {(each.kind, each.dtype, each.dims, each.times) for each in find_collectives(hlo.parse(text))}
    assert found == {
        ("all-gather", "f32", (2048, 2048), 1),
        ("reduce-scatter", "f32", (32, 128), 1),
        ("all-gather", "bf16", (32, 8), 1),
    }
