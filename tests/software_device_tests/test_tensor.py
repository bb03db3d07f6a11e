"""The software device copies boxes of tensors (TMA)."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
from small_kernels import LIBRARY, compile_c, run, unwritten

TENSOR = """struct __align__(64) Map { char bytes[128]; };
extern "C" __global__ void k(int* x, const __grid_constant__ Map map, int c0, int c1,
                             int expected) {
  extern __shared__ __align__(1024) unsigned char s[];
  __shared__ unsigned long long bar;
  const unsigned mine = (unsigned)__cvta_generic_to_shared(&bar);
  const unsigned to = (unsigned)__cvta_generic_to_shared(s);
  unsigned done = 0;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(mine) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(mine), "r"(expected) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];"
                 :: "r"(to), "l"(&map), "r"(mine), "r"(c0), "r"(c1) : "memory");
  }
  __syncthreads();
  /*wait*/ while (!done) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;"
                 " selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(mine) : "memory");
  }
  for (int i = threadIdx.x; i < 32; i += 32) x[i] = ((int*)s)[i];
  /*store*/
}"""
STORE = """
  ((int*)s)[threadIdx.x] = 100 + threadIdx.x;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
                 :: "l"(&map), "r"(to), "r"(c0), "r"(c1) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
"""


def tensor_map(columns, rows, pitch, swizzle=0):
    """Of int32, with boxes of 4 rows of 8 columns, on the buffer before it."""

    def make(buffer):
        words = (ctypes.c_uint64 * 24)()
        where = (ctypes.addressof(words) + 63) // 64 * 64
        arrays = [
            (kind * len(values))(*values)
            for kind, values in (
                (ctypes.c_uint64, (columns, rows)),
                (ctypes.c_uint64, (pitch * 4,)),
                (ctypes.c_uint32, (8, 4)),
                (ctypes.c_uint32, (1, 1)),
            )
        ]
        LIBRARY.cudaSetDevice(0)
        result = LIBRARY.cuTensorMapEncodeTiled(
            ctypes.c_void_p(where), 3, 2, ctypes.c_void_p(buffer.address), *arrays, 0, swizzle, 0, 0
        )
        assert result == 0
        return ctypes.string_at(where, 128)

    return make


def run_tensor(source, c0, c1, expected=128, swizzle=0, columns=10, x=None):
    if x is None:
        x = np.arange(1, 97, dtype=np.int32)  # 8 rows of 12, of which the tensor has `columns`
    error = run(
        compile_c(source, "compute_90a"),
        x,
        tensor_map(columns, 8, 12, swizzle),
        c0,
        c1,
        expected,
        smem=1024,
    )
    return x, error


def box(c0, c1):
    rows, columns = np.arange(c1, c1 + 4)[:, None], np.arange(c0, c0 + 8)
    inside = (rows >= 0) & (rows < 8) & (columns >= 0) & (columns < 10)
    return np.where(inside, 12 * rows + columns + 1, 0)


@pytest.mark.parametrize("c0, c1", [(0, 0), (4, 2), (-3, 6), (8, -2), (20, 0)])
def test_tensor_load(c0, c1):
    x, error = run_tensor(TENSOR, c0, c1)
    assert error is None
    assert np.array_equal(x[:32].reshape(4, 8), box(c0, c1))


def test_tensor_load_swizzled():
    x, error = run_tensor(
        TENSOR, 0, 0, swizzle=1
    )  # chunk 0 and 1 of every second four rows change places
    assert error is None
    at = np.arange(32) * 4
    assert np.array_equal(x[:32], box(0, 0).ravel()[(at ^ (at >> 7 & 1) << 4) // 4])


def test_tensor_store_writes_chunks_whole():
    x, error = run_tensor(TENSOR.replace("/*store*/", STORE), 4, 4)
    assert error is None
    x, stored = x.reshape(8, 12), 100 + np.arange(32).reshape(4, 8)
    # The tensor ends in the chunk of columns 8 to 11, which is written to its end.
    assert np.array_equal(x[4:, 4:12], stored)
    assert np.array_equal(x[4:, :4], np.arange(1, 97).reshape(8, 12)[4:, :4])


def test_a_load_of_what_nobody_wrote():
    _, error = run_tensor(TENSOR, 4, 2, x=unwritten(96))
    words = r"reads byte 112 of an allocation of 384 bytes, which nobody has written: .*cp\.async"
    assert re.search(words, error), error


@pytest.mark.parametrize("read, message", [(37, None), (44, "reads byte 176 of an allocation")])
def test_what_a_store_writes_has_a_value(read, message):
    store = STORE.replace('"r"(c0), "r"(c1)', '"r"(0), "r"(0)') + f"x[90] = x[{read}];"
    nothing = 20  # the load reads no element of the tensor
    _, error = run_tensor(TENSOR.replace("/*store*/", store), nothing, 0, x=unwritten(96))
    assert error is None if message is None else message in error, error


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("/*wait*/", "if (0)", "to which a bulk load of warp 0 is still in flight"),
        (
            '"r"(expected) : ',
            '"r"(expected - 4) : ',
            "mbarrier gets 128 bytes in a phase that expects 124",
        ),
        (
            '"r"(expected) : ',
            '"r"(expected + 4) : ',
            r"deadlock(.|\n)*0 of 1 arrivals and 4 of 132 bytes are missing",
        ),
        (
            '"r"(to), "l"(&map)',
            '"r"(to + 64), "l"(&map)',
            "a box misaligned: at shared offset 1088",
        ),
        (
            "__align__(1024)",
            "__align__(64)",  # what the hardware gives to an array that asks for no more
            "a box misaligned: at shared offset 64",
        ),
        (
            '"r"(to), "l"(&map)',
            '"r"(to + 1024), "l"(&map)',
            "128 bytes of shared memory out of bounds",
        ),
        (
            'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");',
            "",
            "with no fence.mbarrier_init since",
        ),
        (
            "/*wait*/",
            "((int*)s)[40] = x[0]; x[0] = 5; while (!done && threadIdx.x > 40)",
            "never waited for|still in flight|overwritten",
        ),
    ],
)
def test_tensor_load_faults(old, new, message):
    assert old in TENSOR
    _, error = run_tensor(TENSOR.replace(old, new), 0, 0)
    assert error and re.search(message, error), error


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");',
            "",
            "a bulk store reads byte 1024, .* with no fence.proxy.async between",
        ),
        (
            'asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");',
            "",
            "a bulk store that it never waited for",
        ),
        (
            'asm volatile("cp.async.bulk.commit_group;" ::: "memory");',
            "",
            "a bulk store that it never committed",
        ),
        ('"r"(c0), "r"(c1)', '"r"(c0 + 1), "r"(c1)', "a bulk store from column 5 on"),
    ],
)
def test_tensor_store_faults(old, new, message):
    assert old in STORE
    _, error = run_tensor(TENSOR.replace("/*store*/", STORE.replace(old, new)), 4, 4)
    assert error and re.search(message, error), error
