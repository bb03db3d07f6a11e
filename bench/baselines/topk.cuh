// The kCount largest elements of each row and their columns, largest first: one read.
//
// Equal elements in the order of their columns. A NaN is never chosen; NaN and column -1 stand where nothing is left.
// Block i of 256 threads owns row i, thread j of it columns j, j + 256, ...
// Each thread keeps a sorted list in registers, and the block merges the lists. Shared memory: one list per warp.
//
// After safe_softmax this is the unfused baseline of Milakov & Gimelshein, arXiv:1805.02867, section 4.
#pragma once

#include <baselines/primitives/top_list.cuh>

template <int kCount>
__global__ void __launch_bounds__(kThreads) topk(const __grid_constant__ RowParams params) {
  const float* x = params.x + blockIdx.x * params.cols;

  auto best = TopList<kCount>::none();
  for (long long col = threadIdx.x; col < params.cols; col += kThreads) {
    best.insert({ptx::ld_global(x + col), static_cast<int>(col)});
  }
  best.merge_block();

  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const long long place = static_cast<long long>(blockIdx.x) * kCount + i;
    ptx::st_global(params.y + place, best.entry[i].value);
    ptx::st_global(params.index + place, best.entry[i].index);
  }
}
