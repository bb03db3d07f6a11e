"""The shared pieces of the kernels by themselves: reductions, the monoid, vectors, conversions."""

from __future__ import annotations

import emulator
import ml_dtypes
import numpy as np
import pytest

from cuattn import reference
from cuattn._arrays.results import SoftmaxState

THREADS = 64


def run(source, name, params, reads, writes, grid=1):
    return emulator.launch_source(source, name, grid, THREADS, params, reads=reads, writes=writes)


REDUCE = """
#include <primitives/warp.cuh>
#include <ptx/memory.cuh>
struct Params { const float* x; float* max; float* sum; };
template <int kGroup, int kStride>
__global__ void reduce(const Params p) {
  const float x = ptx::ld_global(p.x + threadIdx.x);
  ptx::st_global(p.max + threadIdx.x, group_max<kGroup, kStride>(x));
  ptx::st_global(p.sum + threadIdx.x, group_sum<kGroup, kStride>(x));
}
"""


@pytest.mark.parametrize(
    ("group", "stride"), [(1, 1), (2, 1), (8, 1), (32, 1), (4, 8), (16, 2), (2, 16)]
)
def test_group_reductions(rng, group, stride):
    x = rng.integers(-1000, 1000, THREADS).astype(np.float32)  # sums are exact
    top, total = (emulator.empty(THREADS, np.float32) for _ in range(2))
    run(REDUCE, f"reduce<{group}, {stride}>", emulator.pack(x, top, total), [x], [top, total])
    for lane in range(THREADS):
        base = lane - lane // stride % group * stride
        members = x[base + stride * np.arange(group)]
        assert top[lane] == members.max()
        assert total[lane] == members.sum()


MERGE = """
#include <primitives/softmax_state.cuh>
#include <ptx/memory.cuh>
struct Params {
  const void* a;
  const void* b;
  void* merged;
  void* group;
  void* all;
  void* extended;
};
template <class Acc>
__global__ void merge(const Params p) {
  using State = SoftmaxState<Acc>;
  const State a = ptx::ld_global(static_cast<const State*>(p.a) + threadIdx.x);
  const State b = ptx::ld_global(static_cast<const State*>(p.b) + threadIdx.x);
  const State both = a.merge(b, Acc(1));
  ptx::st_global(static_cast<State*>(p.merged) + threadIdx.x, both);
  ptx::st_global(static_cast<State*>(p.group) + threadIdx.x, a.template merge_group<32>(Acc(1)));
  const State three[3] = {a, b, State::identity()};
  ptx::st_global(static_cast<State*>(p.all) + threadIdx.x, State::merge_all(three, Acc(1)));
  const State extended = a.m <= b.m ? a.extend(b, Acc(1)) : b.extend(a, Acc(1));
  ptx::st_global(static_cast<State*>(p.extended) + threadIdx.x, extended);
}
"""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merge(rng, dtype):
    """Every pair of special states, and the rest random, against the reference's merge."""
    inf = np.inf
    special = [(-inf, 0), (inf, inf), (0, 1), (-1000, 3), (1000, 2), (5, np.nan), (-5, 0)]
    pairs = [(a, b) for a in special for b in special]
    a = rng.normal(size=(THREADS, 2)) ** 2
    b = rng.normal(size=(THREADS, 2)) ** 2
    a[: len(pairs)], b[: len(pairs)] = zip(*pairs, strict=True)
    a, b = a.astype(dtype), b.astype(dtype)
    made = [emulator.empty((THREADS, 2), dtype) for _ in range(4)]
    name = f"merge<{'float' if dtype == np.float32 else 'double'}>"
    run(MERGE, name, emulator.pack(a, b, *made), [a, b], made)
    merged, group, merged_all, extended = made
    expected = reference.merge(SoftmaxState(*a.T.astype(float)), SoftmaxState(*b.T.astype(float)))
    close = {"rtol": 4 * np.finfo(dtype).eps, "atol": np.finfo(dtype).tiny}
    for got in (merged, merged_all, extended):
        np.testing.assert_array_equal(got[:, 0], expected.m)
        np.testing.assert_allclose(got[:, 1], expected.l, **close)
    for warp in range(THREADS // 32):
        whole = SoftmaxState(-inf, 0.0)
        for m, l in a[32 * warp : 32 * warp + 32].astype(float):  # noqa: E741
            whole = reference.merge(whole, SoftmaxState(m, l))
        rows = group[32 * warp : 32 * warp + 32]
        assert (rows[:, 0] == whole.m).all()
        np.testing.assert_allclose(rows[:, 1], whole.l, rtol=32 * np.finfo(dtype).eps)


COPY = """
#include <primitives/vector.cuh>
struct Params { const void* x; void* y; void* outside; long long begin; long long end; };
template <class In, class Out, int kCount, bool kWholeWarps>
__global__ void copy(const Params p) {
  const In* x = static_cast<const In*>(p.x);
  Out* y = static_cast<Out*>(p.y);
  const int col = static_cast<int>(threadIdx.x) * kCount - elements_past_boundary<In, kCount>(x);
  const Packed<In, kCount> loaded = load_fragment<true, kCount>(x, col, int(p.begin), int(p.end));
  float value[kCount];
  for (int i = 0; i < kCount; ++i) {
    value[i] = to_acc<float>(loaded.element(i));
    const bool outside = col + i < p.begin || col + i >= p.end;
    if (outside) ptx::st_global(static_cast<float*>(p.outside) + threadIdx.x, value[i]);
  }
  store_fragment<kWholeWarps>(y, col, int(p.begin), int(p.end), value);
}
"""

TYPES = {
    "__half": np.float16,
    "__nv_bfloat16": ml_dtypes.bfloat16,
    "float": np.float32,
    "signed char": np.int8,
}


@pytest.mark.parametrize("whole_warps", ["true", "false"])
@pytest.mark.parametrize(
    ("x_type", "y_type", "count"),
    [
        ("float", "float", 4),
        ("__half", "__half", 8),
        ("__nv_bfloat16", "float", 4),
        ("float", "__half", 4),
        ("signed char", "float", 4),
    ],
)
def test_fragments_move_any_row(rng, x_type, y_type, count, whole_warps):
    """Every alignment of input and output; bytes beside the row stay as they were, and are not
    read: the elements there count as zeros."""
    room = THREADS * count
    for x_past in range(count):
        for y_past in range(count):
            n = int(rng.integers(1, room - count + 1))
            x = rng.integers(-100, 100, room + count).astype(TYPES[x_type])
            y = np.full(room + count, 77, TYPES[y_type])
            row, out = x[x_past : x_past + n], y[y_past : y_past + n]
            outside = np.zeros(THREADS, np.float32)
            params = emulator.pack(row, out, outside, 0, n)
            name = f"copy<{x_type}, {y_type}, {count}, {whole_warps}>"
            run(COPY, name, params, [row], [out, outside])
            assert not outside.any()
            np.testing.assert_array_equal(out.astype(float), row.astype(float))
            assert (y[:y_past] == 77).all() and (y[y_past + n :] == 77).all()


CONVERT = """
#include <primitives/numeric.cuh>
#include <ptx/memory.cuh>
struct Params { const void* x; void* y; };
template <class T, class Acc>
__global__ void convert(const Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const Acc x = ptx::ld_global(static_cast<const Acc*>(p.x) + i);
  const T y = from_acc<T>(x);
  ptx::st_global(static_cast<T*>(p.y) + i, y);
}
"""


@pytest.mark.parametrize("kind", ["__half", "__nv_bfloat16"])
@pytest.mark.parametrize("acc", [np.float32, np.float64])
def test_results_are_rounded_once(rng, kind, acc):
    """Ties, values just beside ties that only float64 tells apart, overflow, inf and NaN."""
    grid, dtype = 16, TYPES[kind]
    even = rng.normal(size=grid * THREADS).astype(dtype).astype(np.float64)
    ulp = abs(np.nextafter(even.astype(dtype), dtype(100)).astype(np.float64) - even)
    x = even + ulp / 2 * rng.choice([0, 1, 1 - 1e-12, 1 + 1e-12], size=even.size)
    x[:6] = [np.inf, -np.inf, np.nan, 1e30, -1e30, 0]
    x = x.astype(acc)
    y = emulator.empty(x.shape, dtype)
    name = f"convert<{kind}, {'float' if acc == np.float32 else 'double'}>"
    run(CONVERT, name, emulator.pack(x, y), [x], [y], grid)
    np.testing.assert_array_equal(y.astype(float), nearest(x, dtype).astype(float))


@np.errstate(all="ignore")
def nearest(x, dtype):
    """`x` rounded once, to nearest even; ml_dtypes rounds float64 twice, through float32."""
    expected = x.astype(dtype)
    if dtype == ml_dtypes.bfloat16 and x.dtype == np.float64:
        candidates = np.stack([np.nextafter(expected, dtype(s * 1e38)) for s in (-1, 1)])
        distance = abs(candidates.astype(float) - x)
        nearer = np.isfinite(x) & (distance.min(axis=0) < abs(expected.astype(float) - x))
        expected = np.where(nearer, candidates[distance.argmin(axis=0), range(x.size)], expected)
    return expected


WALK = """
#include <topk/radix.cuh>
struct Params { const {candidate}* candidates; long long count; int* seen; };
__global__ void walk(const Params p) {
  int* slot = p.seen + threadIdx.x;
  const unsigned char count = p.count;
  walk_candidates<64>(p.candidates, count, [&]({candidate} candidate) {
    ptx::st_global(slot, candidate.is_none() ? 0 : static_cast<int>(candidate.index()) + 1);
    slot += 64;
  });
}
"""


@pytest.mark.parametrize("candidate", ["NarrowCandidate", "WideCandidate"])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 191, 192, 193, 255])
def test_walk_to_the_last_candidate_that_a_count_can_tell(candidate, count):
    """Counts of 8 bits: with the usual ones it would take 2^32 candidates."""
    words = 1 if candidate == "NarrowCandidate" else 2
    candidates = np.zeros((count, words), np.uint64)
    index = np.arange(count, dtype=np.uint64)
    candidates[:, -1] = ~index & np.uint64(2**32 - 1 if words == 1 else 2**64 - 1)
    seen = emulator.empty((-(-count // THREADS), THREADS), np.int32)
    params = emulator.pack(candidates, count, seen)
    run(WALK.replace("{candidate}", candidate), "walk", params, [candidates], [seen])
    assert sorted(seen[seen > 0]) == list(range(1, count + 1))
