"""The check of wgmma's registers, on a small kernel; test_compile.py has the shipped ones."""

from __future__ import annotations

import pytest
import wgmma_registers

KERNEL = """
.visible .entry kernel(
	.param .u64 kernel_param_0
)
.maxntid 128, 1, 1
{
	.reg .pred 	%p<3>;
	.reg .f32 	%f<9>;

	ld.param.u64 	%rd1, [kernel_param_0];
	mov.f32 	%f1, 0f00000000;
	mov.u32 	%r1, %tid.x; // not a register of wgmma
$L__BB0_1:
	// begin inline asm
	wgmma.fence.sync.aligned;
	// end inline asm
	{
 .reg .pred p;
 .reg .b64 a, b;
 setp.ne.b32 p, %r2, 0;
 wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2}, a, b, p, 1, 1, 0, 0;
}
	{
 wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2}, a, b, p, 1, 1, 0, 0;
}
	wgmma.commit_group.sync.aligned;
	add.s32 	%r1, %r1, 1;
	{
 wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%f3, %f4}, {%r5, %r6}, b, p, 1, 1, 1;
}
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 1;
	mul.f32 	%f7, %f1, %f2;
	wgmma.wait_group.sync.aligned 0;
	mul.f32 	%f3, %f3, %f7;
	mov.b32 	%r5, %f7;
	setp.lt.s32 	%p1, %r1, 5;
	@%p1 bra 	$L__BB0_1;
	@%p2 bra 	$L__BB0_3;
	st.global.f32 	[%rd1], %f1;
$L__BB0_3:
	ret;
}
"""


def faults(ptx):
    (found,) = map(wgmma_registers.faults, wgmma_registers.kernels(ptx).values())
    return found


def test_what_is_right():
    (code,) = wgmma_registers.kernels(KERNEL).values()
    kinds = [now.kind for now in code]
    assert [kinds.count(kind) for kind in ("mma", "commit", "wait", "fence")] == [3, 2, 2, 1]
    assert [kinds.count(kind) for kind in ("label", "branch", "end", "other")] == [2, 2, 1, 5]
    assert wgmma_registers.faults(code) == []


COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned"
EARLY = "{} is in flight"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (f"{WAIT} 1;", f"{WAIT} 2;", EARLY.format("%f1")),
        (f"{WAIT} 1;", "", EARLY.format("%f1")),
        (f"{WAIT} 0;", "", EARLY.format("%f3")),
        (f"{WAIT} 0;", f"{WAIT} 1;", EARLY.format("%f3")),
        (f"{WAIT} 1;", f"|{WAIT} 0;|", EARLY.format("%f1")),  # more groups each time round
        (COMMIT, "", EARLY.format("%f1")),  # of both: nothing is waited for
        ("add.s32 	%r1, %r1, 1;", "mov.f32 %f8, %f2;", EARLY.format("%f2")),
        ("add.s32 	%r1, %r1, 1;", "mov.f32 %f2, %f8;", EARLY.format("%f2")),
        ("add.s32 	%r1, %r1, 1;", "@%p2 st.global.f32 [%rd1], %f2;", EARLY.format("%f2")),
        ("add.s32 	%r1, %r1, 1;", "{ .reg .b32 x; mov.b32 x, %f2; }", EARLY.format("%f2")),
        (f"{WAIT} 1;", f"mov.b32 %r5, %r1; {WAIT} 1;", EARLY.format("%r5")),  # A
        (f"{WAIT} 1;", f"mov.b32 %r1, %r5; {WAIT} 1;", EARLY.format("%r5")),
        # On one way only: into the loop again, out of it, over the wait.
        (f"{WAIT} 0;", f"@%p1 bra $L__BB0_1; {WAIT} 0;", None),  # the same accumulators go on
        (f"{WAIT} 0;", f"@%p2 bra $L__BB0_4; {WAIT} 0;\n$L__BB0_4:", EARLY.format("%f3")),
        (f"{WAIT} 0;", f"@%p1 bra $L__BB0_3; {WAIT} 0;", "the end"),
        ("$L__BB0_1:", "$L__BB0_1: mov.b32 %r8, %r6;", None),
        (
            f"{WAIT} 0;",
            f"@%p1 bra $L__BB0_1; {WAIT} 0;|$L__BB0_1:|$L__BB0_1: mov.b32 %r8, %r6;",
            EARLY.format("%r6"),
        ),
        ("wgmma.fence.sync.aligned;", "", "no fence after %f1"),
        ("	{\n .reg .pred p;", "mov.f32 %f1, %f8;\n{ .reg .pred p;", "no fence after %f1"),
        ("	wgmma.fence.sync.aligned;", "@%p1 bra $L__BB0_5; wgmma.fence; $L__BB0_5:", "no fence"),
        ("{%r5, %r6}, b", "{%f1, %r6}, b", "becomes, an accumulator"),
        ("{%f3, %f4}, {%r5", "{%r5, %f4}, {%f1", "becomes, an accumulator"),
    ],
)  # fmt: skip
def test_what_is_not(old, new, fault):
    new, *more = new.split("|")
    ptx = KERNEL
    for before, after in ((old, new), *zip(more[::2], more[1::2], strict=True)):
        assert before in ptx
        ptx = ptx.replace(before, after)
    found = faults(ptx)
    assert not found if fault is None else any(fault in each for each in found)


def test_control_flow_that_is_not_understood():
    with pytest.raises(ValueError, match="not understood: call"):
        faults(KERNEL.replace("ret;", "call.uni f, (); ret;"))
