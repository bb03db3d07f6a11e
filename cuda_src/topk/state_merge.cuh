// The k best of two sorted lists of k elements per row, and the merged states of the rows (softmax_state.cuh).
//
// Numbers come first, the largest at the head, of equal ones that with the lower index; then NaN, all alike, by index;
// then missing entries, which have a negative index. Of equal entries a's come first. Values keep their bits.
//
// One thread per result finds which element it is (topk/merge_path.cuh). Lists that are not sorted give results
// without meaning, but every one of them is written, and nothing outside the lists is read. Grid: ceil(rows * k /
// kThreads) blocks. No shared memory.
#pragma once

#include <topk/candidate.cuh>
#include <topk/merge_path.cuh>
#include <primitives/softmax_state.cuh>
#include <ptx/memory.cuh>

// All arrays are contiguous.
struct TopKStateMergeParams {
  const void* m_a;  // Acc [rows]
  const void* l_a;
  const void* values_a;   // Acc [rows, k]
  const void* indices_a;  // long long [rows, k]
  const void* m_b;
  const void* l_b;
  const void* values_b;
  const void* indices_b;
  void* m;
  void* l;
  void* values;
  void* indices;
  long long rows;
  long long k;
};

// One list of a row.
template <class Acc>
struct SortedList {
  const Acc* values;
  const long long* indices;

  __device__ __forceinline__ SortedList(const void* values, const void* indices, long long offset)
      : values(static_cast<const Acc*>(values) + offset), indices(static_cast<const long long*>(indices) + offset) {}
  __device__ __forceinline__ WideCandidate candidate(long long e) const {
    const long long index = ptx::ld_global(indices + e);
    return index < 0 ? WideCandidate::none() : WideCandidate::make(sort_key(ptx::ld_global(values + e), Acc(1)), index);
  }
};

template <class Acc, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) topk_state_merge(const __grid_constant__ TopKStateMergeParams params) {
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.rows * params.k) return;
  const long long row = i / params.k, place = i - row * params.k;

  const SortedList<Acc> a(params.values_a, params.indices_a, row * params.k);
  const SortedList<Acc> b(params.values_b, params.indices_b, row * params.k);
  const auto a_first = [&](long long of_a, long long of_b) { return !b.candidate(of_b).beats(a.candidate(of_a)); };
  const long long of_a = merge_path(place, params.k, params.k, a_first);
  const bool takes_a = a_first(of_a, place - of_a);  // both lists are longer than what was taken of them
  const Acc* value = takes_a ? a.values + of_a : b.values + (place - of_a);
  const long long* index = takes_a ? a.indices + of_a : b.indices + (place - of_a);
  ptx::st_global(static_cast<Acc*>(params.values) + i, ptx::ld_global(value));
  ptx::st_global(static_cast<long long*>(params.indices) + i, ptx::ld_global(index));

  if (place == 0) {
    const SoftmaxState<Acc> state_a = {ptx::ld_global(static_cast<const Acc*>(params.m_a) + row),
                                       ptx::ld_global(static_cast<const Acc*>(params.l_a) + row)};
    const SoftmaxState<Acc> state_b = {ptx::ld_global(static_cast<const Acc*>(params.m_b) + row),
                                       ptx::ld_global(static_cast<const Acc*>(params.l_b) + row)};
    const SoftmaxState<Acc> both = state_a.merge(state_b, Acc(1));
    ptx::st_global(static_cast<Acc*>(params.m) + row,
                   both.l == both.l ? both.m : both.l);  // NaN in either shows in both
    ptx::st_global(static_cast<Acc*>(params.l) + row, both.l);
  }
}
