"""Modules of the software device: declarations, scopes, calls, and errors that say where."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest
from ptx_kernels import HEAD, DeviceError, Memory, check_module, elementwise, launch

START = ".visible .entry kernel(.param .u64 p0)\n{\n"
START += ".reg .b64 %a, %b; .reg .b32 %t, %r<9>; .reg .pred %p<4>;\n"
START += "ld.param.u64 %a, [p0]; mov.u32 %t, %tid.x; mad.wide.u32 %b, %t, 8, %a;\n"


def run(body, *, before="", dtype=np.uint64, block=32, initial=None, **options):
    """`body` stores to [%b], 8 bytes a thread; returns these."""
    memory = Memory([np.zeros(block, dtype) if initial is None else initial])
    launch(before + START + body + "\nret;\n}\n", memory, block=block, **options)
    return memory.arrays[0].copy()


def fails(pattern, body, **options):
    with pytest.raises(DeviceError, match=pattern) as caught:
        run(body, **options)
    return str(caught.value)


# -- variables -----------------------------------------------------------------------------------


def test_initial_values():
    before = """
    .visible .const .align 4 .f32 table[4] = {0f3F800000, -0f40000000, 2.5};
    .global .align 4 .b8 bytes[8] = {1, 2, 255, -1, 0x7f};
    .global .s32 negative = -7;
    .global .u64 large = 18446744073709551615;
    .global .f64 half_ = 0d3FE0000000000000;
    .global .s16 grid[2][2] = {{1, -2}, {3, 4}};
    .global .u64 pointer = generic(bytes)+4;
    """
    body = """
    .reg .b64 %v<9>; .reg .b32 %w<9>;
    ld.const.b32 %w0, [table+4]; st.global.b32 [%a], %w0;
    ld.const.b32 %w1, [table+8]; st.global.b32 [%a+4], %w1;
    ld.const.b32 %w1, [table+12]; st.global.b32 [%a+8], %w1;
    ld.global.b64 %v0, [bytes]; st.global.b64 [%a+16], %v0;
    ld.global.s32 %v1, [negative]; st.global.b64 [%a+24], %v1;
    ld.global.b64 %v2, [large]; st.global.b64 [%a+32], %v2;
    ld.global.b64 %v3, [half_]; st.global.b64 [%a+40], %v3;
    ld.global.b64 %v4, [grid]; st.global.b64 [%a+48], %v4;
    ld.global.b64 %v5, [pointer]; ld.global.u8 %v6, [%v5]; st.global.b64 [%a+56], %v6;
    mov.u64 %v7, bytes+2; ld.u8 %v7, [%v7]; st.global.b64 [%a+64], %v7;
    """
    result = run(body, before=before)
    assert result[:2].view(np.float32).tolist() == [-2.0, 2.5, 0.0, 0.0]
    assert result[2:3].view(np.uint8).tolist() == [1, 2, 255, 255, 127, 0, 0, 0]
    assert result[3:5].view(np.int64).tolist() == [-7, -1]
    assert result[5:6].view(np.float64)[0] == 0.5
    assert result[6:7].view(np.int16).tolist() == [1, -2, 3, 4]
    assert result[7:9].tolist() == [127, 255]


def test_variables_are_separate_allocations():
    before = ".global .b32 first = 1; .global .b32 second = 2;"
    run("ld.global.b32 %r0, [second]; st.global.b32 [%b], %r0;", before=before)
    fails("out of bounds", "ld.global.b32 %r0, [first+4];", before=before)


def test_shared_memory():
    before = ".shared .align 8 .b8 fixed[256]; .extern .shared .align 16 .b8 dynamic[];\n"
    body = """
    .shared .b32 own[32];
    .reg .b32 %s;
    mov.u32 %s, own; mad.lo.u32 %r0, %t, 4, %s; st.shared.u32 [%r0], %t;
    mov.u32 %s, fixed; mad.lo.u32 %r1, %t, 8, %s; add.u32 %r3, %t, 100; st.shared.u32 [%r1], %r3;
    mov.u32 %s, dynamic; mad.lo.u32 %r2, %t, 4, %s; add.u32 %r3, %t, 200; st.shared.u32 [%r2], %r3;
    bar.sync 0;
    xor.b32 %r4, %t, 1;
    mov.u32 %s, own; mad.lo.u32 %r0, %r4, 4, %s; ld.shared.u32 %r5, [%r0];
    mov.u32 %s, fixed; mad.lo.u32 %r1, %r4, 8, %s; ld.shared.u32 %r6, [%r1]; add.u32 %r5, %r5, %r6;
    mov.u32 %s, dynamic; mad.lo.u32 %r2, %r4, 4, %s; ld.shared.u32 %r6, [%r2];
    add.u32 %r5, %r5, %r6; ld.shared.u32 %r6, [dynamic+4]; mad.lo.u32 %r5, %r6, 1000, %r5;
    st.global.u32 [%b], %r5;"""
    result = run(body, before=before, shared=128)
    np.testing.assert_array_equal(result, 201000 + 300 + 3 * (np.arange(32) ^ 1))


def test_parameters():
    ptx = """
    .visible .entry kernel(.param .u64 .ptr .global .align 16 out, .param .u8 small,
                           .param .align 8 .b8 s[16], .param .f32 number)
    .maxntid 64, 1, 1 .minnctapersm 2
    {
      .reg .b64 %a, %v, %g; .reg .b32 %r, %f; .reg .b16 %h;
      ld.param.u64 %a, [out]; ld.param.u8 %h, [small]; cvt.u32.u16 %r, %h; st.global.u32 [%a], %r;
      ld.param.b64 %v, [s+8]; st.global.u64 [%a+8], %v;
      mov.b64 %v, s; cvta.param.u64 %g, %v; ld.param.b64 %v, [%v+8];
      ld.b64 %g, [%g]; add.u64 %v, %v, %g; cvta.to.global.u64 %a, %a; st.global.u64 [%a+16], %v;
      ld.param.f32 %f, [number]; st.global.f32 [%a+24], %f;
    }"""
    memory = Memory([np.zeros(4, np.uint64)])
    layout = np.dtype(
        {
            "names": ["out", "small", "s", "number"],
            "formats": ["u8", "u1", "(2,)u8", "f4"],
            "offsets": [0, 8, 16, 32],
            "itemsize": 36,
        }
    )
    values = np.array((memory.addresses[0], 200, (5, 2**40), 1.5), layout)
    launch(ptx, memory, values.tobytes(), block=1)
    assert memory.arrays[0][:3].tolist() == [200, 2**40, 2**40 + 5]
    assert memory.arrays[0][3:].view(np.float32)[0] == 1.5
    with pytest.raises(DeviceError, match="parameters of 36 bytes, not of 32"):
        launch(ptx, memory, values.tobytes()[:32], block=1)


# -- bodies --------------------------------------------------------------------------------------


def test_scopes_and_labels():
    body = """
    { .reg .b32 %t; mov.u32 %t, 5; { .reg .b32 %t; mov.u32 %t, 7; } mov.u32 %r0, %t; }
    mov.u32 %r1, 0;
    { LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 %p0, %r1, %t; @%p0 bra LOOP; }
    { LOOP: add.u32 %r1, %r1, 100; setp.lt.u32 %p0, %r1, 200; @%p0 bra LOOP; }
    mad.lo.u32 %r1, %r0, 1000, %r1; st.global.u32 [%b], %r1;"""
    t = np.arange(32)
    np.testing.assert_array_equal(
        run(body), 5000 + np.maximum(t, 1) + 200 - 100 * (np.maximum(t, 1) >= 100)
    )


@pytest.mark.parametrize("guard", ["", "@%p0 ", "@!%p0 "])
def test_branch_by_index(guard):
    body = f"""
    rem.u32 %r0, %t, 3; setp.lt.u32 %p0, %t, 20; mov.u32 %r1, 9;
    TABLE: .branchtargets
      ZERO,
      ONE, TWO;
    {guard}brx.idx %r0, TABLE;
    bra.uni END;
    ZERO: mov.u32 %r1, 100; bra.uni END;
    ONE: mov.u32 %r1, 101; bra END;
    TWO: mov.u32 %r1, 102;
    END: st.global.u32 [%b], %r1;"""
    t = np.arange(32)
    taken = (t < 20) != ("!" in guard) if guard else t >= 0
    np.testing.assert_array_equal(run(body), np.where(taken, 100 + t % 3, 9))
    fails(
        r"trap.*kernel, block \(0, 0, 0\), thread \d+, .*brx.idx %r0, TABLE;",
        body.replace("rem.u32 %r0, %t, 3;", "mov.u32 %r0, %t;"),
    )


def test_packing():
    a = np.random.default_rng(0).integers(0, 2**63, 64, dtype=np.uint64)
    body = """
      mov.b64 {%r0, %r1}, %x0; mov.b64 %y0, {%r1, %r0};
      mov.b64 {%h0, %h1, %h2, %h3}, %x0; mov.b64 %y1, {%h3, %h2, %h1, %h0};
      mov.b64 {_, %r2}, %x0; cvt.u64.u32 %y2, %r2;
      mov.b32 {%h4, %h5}, %r0; mov.b32 %r3, {%h5, %h4}; cvt.u64.u32 %y3, %r3;
      mov.b64 %y4, {%r0, 7};"""
    first, second, third, fourth, fifth = elementwise(body, [a], ["u8"] * 5)
    low, high = a & 0xFFFFFFFF, a >> np.uint64(32)
    np.testing.assert_array_equal(first, low << np.uint64(32) | high)
    np.testing.assert_array_equal(
        second.view(np.uint16).reshape(-1, 4), a.view(np.uint16).reshape(-1, 4)[:, ::-1]
    )
    np.testing.assert_array_equal(third, high)
    np.testing.assert_array_equal(
        fourth, (low << np.uint64(16) | low >> np.uint64(16)) & 0xFFFFFFFF
    )
    np.testing.assert_array_equal(fifth, low | 7 << 32)


def test_spaces_of_addresses():
    body = """
    .shared .b32 words[32]; .local .b32 mine[4]; .reg .b64 %g, %s, %l;
    mov.u64 %s, words; cvta.shared.u64 %s, %s; mov.u64 %l, mine; cvta.local.u64 %l, %l;
    mad.wide.u32 %s, %t, 4, %s;
    isspacep.global %p0, %a; selp.u32 %r0, 1, 0, %p0;
    isspacep.shared %p0, %s; selp.u32 %r1, 2, 0, %p0;
    isspacep.local %p0, %l; selp.u32 %r2, 4, 0, %p0;
    isspacep.shared %p0, %l; selp.u32 %r3, 8, 0, %p0;
    isspacep.global %p0, %s; selp.u32 %r4, 16, 0, %p0;
    or.b32 %r0, %r0, %r1; or.b32 %r0, %r0, %r2; or.b32 %r0, %r0, %r3; or.b32 %r0, %r0, %r4;
    st.u32 [%l+4], %t; ld.local.u32 %r5, [mine+4]; st.u32 [%s], %r0; cvta.to.shared.u64 %s, %s;
    ld.shared.u32 %r0, [%s]; mad.lo.u32 %r0, %r5, 100, %r0; st.global.u32 [%b], %r0;"""
    np.testing.assert_array_equal(run(body), np.arange(32) * 100 + 7)


CALL = """
.extern .func (.param .b32 result) missing (.param .b32 x);
.func (.param .align 8 .b8 result[16]) both (.param .b64 x, .param .b32 y);
.func (.param .align 8 .b8 result[16]) both (.param .b64 x, .param .b32 y)
{
  .reg .b64 %v; .reg .b32 %r<3>; .reg .pred %p; .local .align 8 .b8 scratch[8];
  ld.param.u64 %v, [x]; ld.param.u32 %r0, [y];
  st.local.u64 [scratch], %v; setp.gt.u32 %p, %r0, 9;
  @%p bra BIG;
  st.param.b64 [result+0], %v; st.param.b32 [result+8], %r0;
  ret;
BIG:
  ld.local.u64 %v, [scratch]; add.u64 %v, %v, 1000; st.param.b64 [result+0], %v; mov.u32 %r1, 1;
  st.param.b32 [result+8], %r1;
  ret;
}
.func again (.param .b32 x) { .param .b32 y; call again, (y); ret; }
"""


def test_calls():
    body = """
    .reg .b64 %v; setp.ne.u32 %p1, %t, 5; mov.u64 %v, 77; mov.u32 %r1, 3;
    { .param .b64 param0; st.param.b64 [param0+0], %a; mov.u64 %v, 0; }
    cvt.u64.u32 %v, %t;
    { .param .b64 param0; st.param.b64 [param0+0], %v; .param .b32 param1;
      st.param.b32 [param1], %t; .param .align 8 .b8 retval0[16];
      call.uni (retval0), both, (param0, param1);
      ld.param.b64 %v, [retval0]; ld.param.b32 %r1, [retval0+8]; }
    { .param .b64 param0; .param .b32 param1; .param .align 8 .b8 retval0[16];
      st.param.b64 [param0+0], %v; st.param.b32 [param1], 20; st.param.b64 [retval0], 0;
      @%p1 call (retval0), both, (param0, param1);
      ld.param.b64 %v, [retval0]; }
    mad.wide.u32 %v, %r1, 100000, %v; st.global.u64 [%b], %v;"""
    t = np.arange(32)
    once = np.where(t > 9, t + 1000, t)
    twice = np.where(t != 5, once + 1000, 0)
    np.testing.assert_array_equal(run(body, before=CALL), twice + 100000 * np.where(t > 9, 1, t))


def test_calls_that_cannot_be():
    body = "{ .param .b32 a; .param .b32 b; call (a), missing, (b); }"
    assert "calls missing" in fails("which the device does not have", body, before=CALL)
    fails("again calls itself", "{ .param .b32 a; call again, (a); }", before=CALL)
    fails("another number of parameters", "{ .param .b32 a; call both, (a); }", before=CALL)


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "body"),
    [
        (
            r"line 8: add.u64 %r0, %r0, %r1;: %r0 is not a register of 64 bits",
            "add.u64 %r0, %r0, %r1;",
        ),
        ("takes 3 operands, but has 2", "add.u32 %r0, %r0;"),
        ("%q is no variable or register", "add.u32 %r0, %q, 1;"),
        ("%p1 is not a register of 32 bits", "add.u32 %r0, %p1, 1;"),
        ("%r1 is not a predicate", "selp.u32 %r0, 1, 0, %r1;"),
        ("a literal of 64 bits", "mov.b32 %r0, 0d3FF0000000000000;"),
        ("! stands where no predicate", "add.u32 %r0, !%r1, 1;"),
        ("there is no label NOWHERE", "bra NOWHERE;"),
        ("no directive .frob", ".frob;"),
        ("no registers of type .b128", ".reg .b128 %q;"),
        ('";" must follow|"," must follow', "add.u32 %r0 %r1;"),
        ("is no operand", "add.u32 %r0, ), 1;"),
        ("%clusterid.x is no variable or register", "mov.u32 %r0, %clusterid.x;"),
    ],
)
def test_errors_name_the_instruction(pattern, body):
    fails(pattern, body)


def test_errors_of_declarations():
    for pattern, text in [
        ("too many initial values", ".global .b32 a[2] = {1, 2, 3};"),
        ("line 5: the device has no directive .frob", "\n.frob"),
        ("is no variable of this module", ".global .u64 a = nothing;"),
        ("the text ends inside", ".visible .entry k() { add"),
        ("no directive .maxfrob", ".visible .entry k() .maxfrob 3 { ret; }"),
    ]:
        with pytest.raises(DeviceError, match=pattern):
            check_module(text)


def test_the_device_is_usable_after_an_error():
    fails("trap", "setp.eq.u32 %p0, %t, 3; @%p0 trap;")
    np.testing.assert_array_equal(run("st.global.u32 [%b], %t;"), np.arange(32))


LINES = """
.file 1 "/somewhere/rows.cuh"
.section .debug_str
{
$L__info_string0:
.b8 95,90,53,116,119,105,99,101,102,0
$L__info_string1:
.b8 95,90,51,97,100,100,73,102,69,84,95,83,48,95,83,48,95,0
}
"""


def test_source_lines_with_inlined_calls():
    body = """
    .loc 1 8 28
    add.u32 %r0, %t, 1;
    .loc 1 4 18, function_name $L__info_string0, inlined_at 1 8 28
    add.u32 %r0, %t, 1;
    .loc 1 3 33, function_name $L__info_string1, inlined_at 1 4 18
    ld.global.u32 %r1, [%b+1048576];"""
    message = fails("out of bounds", body, before=LINES)
    chain = (
        "rows.cuh:3 in float add<float>(float, float), inlined at rows.cuh:4 in twice(float), "
        "inlined at rows.cuh:8"
    )
    assert message.endswith(chain), message
    assert re.search(
        r"kernel, block \(0, 0, 0\), thread 0, line 3: ld.global.u32 %r1, \[%b\+1048576\];", message
    )


def test_many_threads_load_modules():
    """Loading is safe from several threads at a time."""
    done = []

    def load():
        for _ in range(50):
            check_module(START + "ret; }")
        done.append(None)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4


def test_head_has_three_lines():
    assert HEAD.count("\n") == 3  # the line numbers above count on it
