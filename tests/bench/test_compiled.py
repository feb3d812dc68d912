"""Traffic and exchanges of compiled programs, read from their text."""

from unittest import mock

import jax
import numpy as np
import pytest

from vitssl.bench import case, compiled, plain
from vitssl.methods import base
from vitssl.models import vit

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%moved (p: f32[100,10]) -> bf16[10,100] {
  %p = f32[100,10]{1,0} parameter(0)
  %half = bf16[100,10]{1,0} convert(%p)
  ROOT %t = bf16[10,100]{1,0} transpose(%half), dimensions={1,0}
}

%halved (p: f32[100,10]) -> bf16[100,10] {
  %p = f32[100,10]{1,0} parameter(0)
  %two = f32[100,10]{1,0} add(%p, %p)
  ROOT %half = bf16[100,10]{1,0} convert(%two)
}

%body (c: (s32[], f32[50])) -> (s32[], f32[50]) {
  %c = (s32[], f32[50]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %v = f32[50]{0} get-tuple-element(%c), index=1
  %w = f32[50]{0} negate(%v)
  ROOT %out = (s32[], f32[50]{0}) tuple(%i, %w)
}

%condition (c: (s32[], f32[50])) -> pred[] {
  %c = (s32[], f32[50]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[100,10], b: f32[50], q: bf16[2,8,3,16]) -> f32[100,10] {
  %a = f32[100,10]{1,0} parameter(0), sharding={replicated}
  %b = f32[50]{0} parameter(1)
  %q = bf16[2,8,3,16]{3,2,1,0} parameter(2)
  %turn = bf16[10,100]{1,0} fusion(%a), kind=kInput, calls=%moved, metadata={op_name="jit(step)/turn" stack_frame_id=3}
  %double = bf16[100,10]{1,0} fusion(%a), kind=kLoop, calls=%halved
  %mm = (bf16[100,100]{1,0}, s8[33554432]{0}) custom-call(%double, %turn), custom_call_target="__cublas$lt$matmul", backend_config={"x":"y(z"}
  %fmha = (bf16[2,8,3,16]{3,2,1,0}, u8[64]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  %init = (s32[], f32[50]{0}) tuple(%b)
  %loop = (s32[], f32[50]{0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %start = f32[100,10]{1,0} all-reduce-start(%a), replica_groups={{0,1}}, to_apply=%add
  %reduced = f32[100,10]{1,0} all-reduce-done(%start)
  %gather = (f32[50]{0}, /*index=1*/f32[100]{0}) all-gather-start(%b), dimensions={0}
  %gathered = f32[100]{0} all-gather-done(%gather)
  %near = f32[50]{0:T(128)S(1)} copy(%b)
  ROOT %last = f32[100,10]{1,0} copy(%reduced)
}
"""  # noqa: E501


def test_traffic_is_what_kernels_read_and_write_by_kind():
    found = compiled.by_kind(compiled.kernels(TEXT))
    assert found == {
        "move": 4000 + 2000 + 2 * 200 + 2 * 4000,
        # Room for scratch is not counted; a loop as often as it runs.
        "product": 2000 + 2000 + 20_000,
        "attention": 4 * 2 * 768,
        "other": 4000 + 2000 + 7 * 2 * 200,
    }


def test_a_loop_that_does_not_say_how_often_it_runs_has_a_bound():
    said = ', backend_config={"known_trip_count":{"n":"7"}}'
    bound = TEXT.replace(said, "").replace(
        "ROOT %less = pred[] constant(true)",
        "%most = s32[] constant(7)\n  ROOT %less = pred[] compare(%i, %most)",
    )
    assert bound != TEXT.replace(said, "")
    kinds = compiled.by_kind(compiled.kernels(TEXT))
    assert compiled.by_kind(compiled.kernels(bound)) == kinds


def test_what_devices_exchange_is_counted_where_it_starts():
    found = compiled.collectives(compiled.kernels(TEXT))
    assert found == {"all-reduce": (1, 4000.0), "all-gather": (1, 400.0)}


def test_arrays_inside_the_chip_are_no_traffic():
    found = {k.name: k.size for k in compiled.kernels(TEXT, inside=r"S\([1-9]")}
    assert found["near"] == 200 and found["last"] == 8000


def test_the_largest_moves_come_first_with_where_they_are_from():
    found = compiled.moves(compiled.kernels(TEXT), 2)
    assert [k.name for k in found] == ["last", "turn"]
    assert (found[1].result, found[1].source) == ("bf16[10,100]", "jit(step)/turn")


def _exchanged(count):
    """Return what so many devices exchange in a step, and its parameters."""
    devices = np.array(jax.devices()[:count])

    def make_mesh(shape, names, *, axis_types):
        return jax.sharding.Mesh(devices.reshape(shape), names, axis_types=axis_types)

    facts = base.Run(100, 10, 4 * count, 10, 3, (0.5,) * 3, (0.5,) * 3, "bfloat16")
    net = vit.ViT(width=64, depth=1, heads=2, patch=8, image_size=16, dtype="bfloat16")
    method = plain.Plain(facts, net)
    batch = case.shapes(case.random_images(4 * count, 16, 0))
    with (
        mock.patch.object(jax, "device_count", lambda: count),
        mock.patch.object(jax, "make_mesh", make_mesh),
    ):
        of = case.Case("", method, case.adamw(method, batch), batch)
        program = of.compiled.program(of.phase())
        state = of.compiled.abstract(of.phase())
        made = program.lower(state, batch).compile()
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    return compiled.collectives(compiled.kernels(made.as_text())), sum(sizes)


@pytest.mark.parametrize("count", (2, 4))
def test_devices_exchange_one_float32_gradient_however_many_they_are(count):
    found, parameters = _exchanged(count)
    assert list(found) == ["all-reduce"]
    assert found["all-reduce"][1] == pytest.approx(4 * parameters, rel=0.01)


SLICED = """\
HloModule jit_step, is_scheduled=true

%row (stack: f32[12,100], i: s32[], x: f32[1,100]) -> f32[1,100] {
  %stack = f32[12,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[1,100]{1,0} parameter(2)
  %flat = f32[12,100]{1,0} bitcast(%stack)
  %part = f32[1,100]{1,0} dynamic-slice(%flat, %i, %i), dynamic_slice_sizes={1,100}
  ROOT %sum = f32[1,100]{1,0} add(%part, %x)
}

%store (stack: f32[12,100], i: s32[], x: f32[1,100]) -> (f32[12,100], f32[1,100]) {
  %stack = f32[12,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[1,100]{1,0} parameter(2)
  %new = f32[12,100]{1,0} dynamic-update-slice(%stack, %x, %i, %i)
  %view = f32[12,100]{1,0} bitcast(%new)
  %twice = f32[1,100]{1,0} add(%x, %x)
  ROOT %both = (f32[12,100]{1,0}, f32[1,100]{1,0}) tuple(%view, %twice)
}

%all (stack: f32[12,100]) -> f32[12,100] {
  %stack = f32[12,100]{1,0} parameter(0)
  %part = f32[1,100]{1,0} slice(%stack), slice={[0:1], [0:100]}
  ROOT %sum = f32[12,100]{1,0} add(%stack, %part)
}

%outer (stack: f32[12,100], i: s32[], x: f32[1,100]) -> f32[1,1] {
  %stack = f32[12,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[1,100]{1,0} parameter(2)
  %inner = f32[1,100]{1,0} fusion(%stack, %i, %x), kind=kLoop, calls=%row
  ROOT %dot = f32[1,1]{1,0} convolution(%inner, %x), dim_labels=bf_oi->bf
}

ENTRY %main (s: f32[12,100], i: s32[], x: f32[1,100]) -> f32[12,100] {
  %s = f32[12,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[1,100]{1,0} parameter(2)
  %a = f32[1,100]{1,0} fusion(%s, %i, %x), kind=kLoop, calls=%row
  %b = (f32[12,100]{1,0}, f32[1,100]{1,0}) fusion(%s, %i, %a), kind=kLoop, calls=%store
  %c = f32[12,100]{1,0} fusion(%s), kind=kLoop, calls=%all
  %d = f32[12,100]{1,0} dynamic-update-slice(%s, %x, %i, %i)
  %f = f32[1,1]{1,0} fusion(%s, %i, %x), kind=kOutput, calls=%outer
  %g = ((f32[12,100]{1,0}), f32[2,100]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%s)
  %h = f32[2,100]{1,0:S(1)} slice-done(%g)
  %k = f32[2,100]{1,0:S(1)} all-reduce(%h), to_apply=%add
  ROOT %e = f32[1,100]{1,0} dynamic-slice(%d, %i, %i), dynamic_slice_sizes={1,100}
}
"""


def test_of_what_is_sliced_the_slice_is_read_and_written():
    kernels = compiled.kernels(SLICED, inside=r"S\([1-9]")
    found = {k.name: k.size for k in kernels}
    row, index, stack = 400, 4, 4800
    assert found == {
        "a": row + index + row + row,
        "b": index + row + row + row,
        "c": 2 * stack,  # It is read whole too.
        "d": row + index + row,
        "e": row + index + row,
        "f": row + index + row + 4,  # Fusions of a TPU are within each other.
        "g": 2 * row,  # Into the chip,
        "k": 2 * row,  # from where it crosses the links.
    }
    assert {k.kind for k in kernels if k.name == "f"} == {"product"}
