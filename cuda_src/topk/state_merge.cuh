// The k best of two sorted lists of k elements per row, and the merged states of the rows (softmax_state.cuh).
//
// Numbers come first, the largest at the head, of equal ones that with the lower index; then NaN, all alike, by index;
// then missing entries, which have a negative index. Of equal entries a's come first. Values keep their bits. Draws
// (topk/sample.cuh) are merged in the same way, and dropped where the row turns out to have no probabilities.
//
// One thread per result finds which element it is (topk/merge_path.cuh). Lists that are not sorted give results
// without meaning, but every one of them is written, and nothing outside the lists is read. Grid: ceil(rows * k /
// kThreads) blocks. No shared memory.
#pragma once

#include <topk/merge_path.cuh>
#include <primitives/candidate.cuh>
#include <primitives/softmax_state.cuh>
#include <ptx/memory.cuh>

// All arrays are contiguous.
struct TopKStateMergeParams {
  const void* m_a;  // Acc [rows]
  const void* l_a;
  const void* values_a;   // Value [rows, k]: double of draws, else Acc
  const void* logits_a;   // Acc [rows, k], of draws; else null
  const void* indices_a;  // long long [rows, k]
  const void* m_b;
  const void* l_b;
  const void* values_b;
  const void* logits_b;
  const void* indices_b;
  void* m;
  void* l;
  void* values;
  void* logits;
  void* indices;
  long long rows;
  long long k;
};

// One list of a row.
template <class Value>
struct SortedList {
  const Value* values;
  const long long* indices;

  __device__ __forceinline__ SortedList(const void* values, const void* indices, long long offset)
      : values(static_cast<const Value*>(values) + offset), indices(static_cast<const long long*>(indices) + offset) {}
  __device__ __forceinline__ WideCandidate candidate(long long e) const {
    const long long index = ptx::ld_global(indices + e);
    return index < 0 ? WideCandidate::none()
                     : WideCandidate::make(sort_key(ptx::ld_global(values + e), Value(1)), index);
  }
};

template <class Acc, class Value, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) topk_state_merge(const __grid_constant__ TopKStateMergeParams params) {
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.rows * params.k) return;
  const long long row = i / params.k, place = i - row * params.k;

  const SortedList<Value> a(params.values_a, params.indices_a, row * params.k);
  const SortedList<Value> b(params.values_b, params.indices_b, row * params.k);
  const auto a_first = [&](long long of_a, long long of_b) { return !b.candidate(of_b).beats(a.candidate(of_a)); };
  const long long of_a = merge_path(place, params.k, params.k, a_first), of_b = place - of_a;
  const bool takes_a = a_first(of_a, of_b);  // both lists are longer than what was taken of them
  Value value = ptx::ld_global(takes_a ? a.values + of_a : b.values + of_b);
  long long index = ptx::ld_global(takes_a ? a.indices + of_a : b.indices + of_b);

  SoftmaxState<Acc> both;
  if (place == 0 || params.logits) {
    const auto of_row = [&](const void* stat) { return ptx::ld_global(static_cast<const Acc*>(stat) + row); };
    const SoftmaxState<Acc> state_a = {of_row(params.m_a), of_row(params.l_a)};
    const SoftmaxState<Acc> state_b = {of_row(params.m_b), of_row(params.l_b)};
    both = state_a.merge(state_b, Acc(1));
    if (both.l != both.l) both.m = both.l;  // NaN in either shows in both
  }
  if (params.logits) {
    const Acc* logits = static_cast<const Acc*>(takes_a ? params.logits_a : params.logits_b);
    Acc logit = ptx::ld_global(logits + row * params.k + (takes_a ? of_a : of_b));
    if (!(both.m < Limits<Acc>::infinity())) {  // no draw of a row without probabilities
      value = -Limits<Value>::infinity();
      logit = -Limits<Acc>::infinity();
      index = -1;
    }
    ptx::st_global(static_cast<Acc*>(params.logits) + i, logit);
  }
  ptx::st_global(static_cast<Value*>(params.values) + i, value);
  ptx::st_global(static_cast<long long*>(params.indices) + i, index);
  if (place == 0) {
    ptx::st_global(static_cast<Acc*>(params.m) + row, both.m);
    ptx::st_global(static_cast<Acc*>(params.l) + row, both.l);
  }
}
