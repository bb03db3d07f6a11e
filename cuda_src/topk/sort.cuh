// Sorts runs of kRun candidates, the best first, in shared memory; a run that is a whole row is stored at once.
//
//   kWholeRow    the elements of a row of at most kRun, read from x: no list, no other kernel
//   kWholeList   a row's list of at most kRun candidates
//   kPartOfList  every run of longer lists, for topk_merge_runs
//
// Batcher's bitonic network; one block per run. Shared memory: kRun candidates; with renormalize one state per warp.
#pragma once

#include <topk/radix.cuh>

enum SortedRun { kWholeRow, kWholeList, kPartOfList };

template <class Op, SortedRun kWhat, int kThreads, int kRun>
__global__ void __launch_bounds__(kThreads, 1)
    topk_sort(const __grid_constant__ RadixParams<typename Op::Params> params) {
  using Candidate = typename Op::Candidate;
  const unsigned runs = kWhat == kPartOfList ? static_cast<unsigned>((params.wanted + kRun - 1) / kRun) : 1;
  const long long row = blockIdx.x / runs;
  const long long begin = static_cast<long long>(blockIdx.x % runs) * kRun;
  const Op op(params.topk, params.first_row + row);
  Candidate* run = ptx::static_smem<Candidate, kRun>();

  // Load; what is missing sorts behind everything.
  const Candidate* source = params.template at<Candidate>(params.source, row * params.wanted);
  const long long count = kWhat == kWholeRow ? params.topk.row.cols : params.wanted;
#pragma unroll
  for (int i = 0; i < kRun / kThreads; ++i) {
    const int slot = i * kThreads + static_cast<int>(threadIdx.x);
    const long long e = begin + slot;
    Candidate candidate = Candidate::none();
    if constexpr (kWhat == kWholeRow) {
      typename Op::template Loaded<1> loaded;
      typename Op::template Items<1> item;
      op.template load<true>(loaded, e, 0LL, count);
      op.unpack(item, loaded, e, 0LL, count);
      op.add_noise(item, e);
      if (e < count) candidate = op.candidate(item, 0, e);
    } else if (e < count) {
      candidate = ptx::ld_global(source + e);
    }
    ptx::st_shared(run + slot, candidate);
  }

  // Sort. A pair always belongs to the same thread; with strides up to 32 a warp stays within 64 candidates of its own.
  int stride_before = kRun;
  for (int size = 2; size <= kRun; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      if (stride > 32 || stride_before > 32) {
        __syncthreads();  // the step before is done: its pairs lie across warps, or this one's do
      } else {
        __syncwarp();  // the same within a warp
      }
      stride_before = stride;
#pragma unroll
      for (int i = 0; i < kRun / 2 / kThreads; ++i) {
        const int pair = i * kThreads + static_cast<int>(threadIdx.x);
        const int first = 2 * pair - (pair & (stride - 1));
        const Candidate a = ptx::ld_shared(run + first), b = ptx::ld_shared(run + first + stride);
        if (b.beats(a) == ((first & size) == 0)) {
          ptx::st_shared(run + first, b);
          ptx::st_shared(run + first + stride, a);
        }
      }
    }
  }
  __syncthreads();  // all pairs are in order before any thread reads others' candidates

  if constexpr (kWhat == kPartOfList) {
    Candidate* target = params.template at<Candidate>(params.target, row * params.wanted);
    for (int slot = threadIdx.x; slot < kRun && begin + slot < count; slot += kThreads) {
      ptx::st_global(target + begin + slot, ptx::ld_shared(run + slot));
    }
  } else {
    const auto sorted = [&](long long e) { return e < params.wanted ? ptx::ld_shared(run + e) : Candidate::none(); };
    store_sorted<kThreads>(op, params, params.first_row + row, sorted, 0, params.topk.k);
  }
}
