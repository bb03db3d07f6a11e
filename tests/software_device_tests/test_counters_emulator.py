"""The device counts what the emulator counts: of one call for each family of kernels.

Not equal are the instructions that reach shared memory, more where lanes of NVRTC's code do it
apart; collectives of 64 bits, which are two of PTX; and float64's exponential, which is none.
"""

from __future__ import annotations

import dataclasses

import emulator
import numpy as np
import pytest
import synthetic_results
from driver_kernels import cupy, device
from small_kernels import compile_with_headers, run

import cuattn
from bench.counted import counters as bench_counters
from bench.counted import instructions
from bench.report import schema


def rows(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def heads(seqlen_q, seqlen_k, dtype=np.float16):
    return rows(1, seqlen_q, 64, dtype=dtype), *2 * [rows(1, seqlen_k, 64, dtype=dtype)]


CALLS = {
    "softmax_rows": (cuattn.softmax, rows(5, 1000)),
    "softmax_rows of two operands": (cuattn.softmax_backward, rows(3, 500), rows(3, 500)),
    "softmax_split": (cuattn.softmax, rows(1, 300_000)),
    "softmax_strided": (lambda x: cuattn.softmax(x, axis=0), rows(100, 40)),
    "topk_rows": (lambda x: cuattn.top_k(x, 5), rows(3, 4096)),
    "topk_rows of long rows": (lambda x: cuattn.softmax_topk(x, 64), rows(2, 30_000)),
    "attention_forward": (cuattn.attention, *heads(100, 200)),
    "attention_forward of float32": (cuattn.attention, *heads(40, 100, np.float32)),
    "attention_forward of float64": (cuattn.attention, *heads(40, 100, np.float64)),
}


@pytest.mark.parametrize("name", CALLS)
def test_counts_are_the_emulators(name):
    function, *arrays = CALLS[name]
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    arch = f"sm_{properties['major']}{properties['minor']}"
    with emulator.activate(arch, properties["multiProcessorCount"], seed=0) as runtime:
        function(*arrays)
    assert runtime.kernels[0].name.startswith(name.split()[0])
    operands = [cupy.asarray(array) for array in arrays]
    with device.counters() as found:
        function(*operands)
    expected = dataclasses.asdict(runtime.total())
    del expected["cost"]  # of the emulator's own code
    counted = {key: getattr(found, key) for key in expected}
    collectives, conflicts = [], []
    for counts in (expected, counted):
        collectives.append(counts.pop("warp_collectives"))
        passes, ideal = counts.pop("shared_wavefronts"), counts.pop("shared_wavefronts_ideal")
        conflicts.append(passes - ideal)
    if arrays[0].dtype == np.float64:  # its exponential is no instruction
        assert expected.pop("exps") > counted.pop("exps") == 0
    assert counted == expected
    assert conflicts[1] == conflicts[0]
    assert collectives[0] <= collectives[1] <= 2 * collectives[0]
    assert found.lane_instructions > sum(array.size for array in arrays)


def test_instructions_of_a_result():
    """They are of the kernels that the emulator ran for the same call."""
    cases = bench_counters.row_cases(((3, 4096),))[:1]
    cases += bench_counters.attention_cases(bench_counters.ATTENTION[3:4])
    rows = instructions.count_cases(device, cases)
    for case, row in zip(cases, rows, strict=True):
        with emulator.activate(row["arch"]) as runtime:
            case.call(np.asarray)
        assert row["kernels"] == [kernel.name for kernel in runtime.kernels]
        assert sum(row["kinds"].values()) == pytest.approx(row["instructions"])
        assert {"float", "mufu", "shuffle"} <= row["kinds"].keys()
    result = {**synthetic_results.full(), "instructions": rows}
    assert schema.validate(result) is True
    assert instructions.count_cases(device, cases, until=0) == []


ARRIVALS = """#include <ptx/atomic.cuh>
#include <ptx/memory.cuh>
struct Params { unsigned int* counters; float4* parts; float4* y; };
extern "C" __global__ void k(const __grid_constant__ Params p) {
  const int t = threadIdx.x;
  const float x = blockIdx.x + 4 * t;
  ptx::st_global(p.parts + 64 * blockIdx.x + t, float4{x, x + 1, x + 2, x + 3});
  if (!ptx::arrive_is_last(p.counters, gridDim.x)) return;
  float4 sum = {};
  for (int part = 0; part < gridDim.x; ++part) {
    const float4* const from = p.parts + 64 * part + t;
    const float4 a = ptx::ld_global_cg(from + (t < 63));
    const float2 b = ptx::ld_global_cg(reinterpret_cast<const float2*>(from) + 1);
    const float c = ptx::ld_global_cg(reinterpret_cast<const float*>(from) + 3);
    sum = float4{sum.x + a.x, sum.y + a.w, sum.z + b.x, sum.w + c};
  }
  ptx::st_global(p.y + t, sum);
}"""


def test_wrappers_of_arrivals_are_their_twins():
    """Results and counts: atomics are no requests on either."""
    arrays = [np.zeros(n, np.float32) for n in (1, 3 * 256, 256)]
    ours = [array.copy() for array in arrays]
    with device.counters() as found:
        assert run(compile_with_headers(ARRIVALS), *arrays, grid=3, block=64) is None
    expected = dataclasses.asdict(
        emulator.launch_source(ARRIVALS, "k", 3, 64, emulator.pack(*ours), ours, ours)
    )
    for array, twin in zip(arrays, ours, strict=True):
        assert np.array_equal(array, twin)
    del expected["cost"]
    assert {key: getattr(found, key) for key in expected} == expected
    assert expected["barriers"] == 6 and expected["loads_by_size"][16] == 6
