"""The software device counts what a launch costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_kernels import COPY, LIBRARY, compile_c, ptx_kernel, run
from software_device import counters

OPCODES = (Path(__file__).parent / "opcodes.txt").read_text().split()


def copy():
    x, y = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    assert run(compile_c(COPY), x, y, 100, grid=4) is None


def test_counters_of_a_copy():
    with counters.counting(LIBRARY) as counted:
        copy()
    assert (counted.global_bytes_read, counted.global_bytes_written) == (400, 400)
    assert (counted.global_sectors_read, counted.global_sectors_written) == (13, 13)
    assert counted.loads_by_size == {1: 0, 2: 0, 4: 4, 8: 0, 16: 0}
    assert counted.global_requests == 8
    assert counted.opcodes["ld.global.f32"] == counted.opcodes["st.global.f32"] == (4, 100)
    assert counted.kinds["global_load"] == (4, 100) and counted.opcodes["ret"] == (4, 128)
    assert counted.lane_instructions == sum(lanes for _, lanes in counted.opcodes.values())
    assert counted.warp_instructions == sum(warps for warps, _ in counted.kinds.values())


def test_a_block_counts_what_runs_in_it():
    """Not what ran before; and it may stand in another one."""
    copy()
    with counters.counting(LIBRARY) as outer:
        copy()
        with counters.counting(LIBRARY) as inner:
            copy()
        copy()
    assert (inner.global_bytes_read, outer.global_bytes_read) == (400, 1200)
    assert (inner.opcodes["ret"], outer.opcodes["ret"]) == ((4, 128), (12, 384))


def test_every_opcode_is_of_a_kind():
    assert [opcode for opcode in OPCODES if counters.kind(opcode) == "other"] == []


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("ld.relaxed.cta.shared.u32", "shared_load"),
        ("ld.param.v2.f64", "parameter"),
        ("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32", "async_copy"),
        ("mbarrier.init.shared::cta.b64", "barrier"),
        ("rcp.approx.ftz.f64", "mufu"),
        ("rcp.rn.f64", "float64"),
        ("cvt.rn.f32.f64", "conversion"),
        ("setp.lt.f32", "float"),
    ],
)
def test_kinds(opcode, kind):
    assert counters.kind(opcode) == kind


@pytest.mark.parametrize("stride, wavefronts", [(1, 1), (2, 2), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts(stride, wavefronts):
    body = f"""
mul.lo.u32 %r1, %r0, {4 * stride};
mov.u32 %r2, dynamic;
add.u32 %r1, %r2, %r1;
st.shared.u32 [%r1], %r0;
"""
    with counters.counting(LIBRARY) as counted:
        assert run(ptx_kernel(body), np.zeros(1, np.int32), smem=8192) is None
    assert (counted.shared_wavefronts, counted.shared_wavefronts_ideal) == (wavefronts, 1)


def test_exponentials_barriers_and_collectives():
    """A barrier with a number is not one of the block, a __syncwarp no collective."""
    source = r"""__global__ void k(float* x) {
      x[threadIdx.x] = exp2f(x[threadIdx.x]);
      __syncthreads();
      asm volatile("barrier.cta.sync.aligned 1, 64;");
      x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
      __syncwarp();
    }"""
    with counters.counting(LIBRARY) as counted:
        assert run(compile_c(source), np.ones(64, np.float32), block=64) is None
    assert (counted.exps, counted.barriers, counted.named_barriers) == (64, 1, 1)
    assert counted.warp_collectives == 2
