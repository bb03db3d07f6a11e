// How often each value of the first 11 bits of a rank occurs in a row (topk/radix.cuh): the first read of x.
//
// Block b has slice b % splits of row b / splits. It counts in shared memory (kBins words) and adds its counts to the
// row's histogram.
#pragma once

#include <topk/radix.cuh>

template <class Op, int kThreads, int kVec, int kFragments>
__global__ void __launch_bounds__(kThreads, 1)
    topk_histogram(const __grid_constant__ RadixParams<typename Op::Params> params) {
  using Order = RadixOrder<Op>;
  using Count = typename Order::Count;
  const unsigned splits = static_cast<unsigned>(params.splits);
  const long long row = blockIdx.x / splits;
  const Op op(params.topk, params.first_row + row);

  unsigned int* bins = ptx::static_smem<unsigned int, kBins>();
  clear_bins<kThreads>(bins);

  BinCounter<unsigned int> counter{bins};
  walk_slice<false, kThreads, kVec, kFragments>(
      op, blockIdx.x % splits * params.slice, params.slice,
      [&](const auto& items, long long first_col, int from, int to) {
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            const int at = j * kThreads * kVec + e;
            if (at >= from && at < to) counter.add(Order::first_bin(op.candidate(items[j], e, first_col + at)));
          }
        }
      });
  counter.flush();
  __syncthreads();  // everything is counted before it is read

  // Each warp adds 32 bins at a time, and their sum.
  Count* histogram = params.template at<Count>(0, row * (kBins + kBinGroups));
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    const unsigned int count = ptx::ld_shared(bins + b);
    const unsigned int sum = group_sum<32>(count);
    if (count > 0) atomicAdd(histogram + b, Count(count));
    if (b % 32 == 0 && sum > 0) atomicAdd(histogram + kBins + b / 32, Count(sum));
  }
}
