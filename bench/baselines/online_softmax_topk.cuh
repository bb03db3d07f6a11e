// Softmax of each row, keeping only the kCount largest probabilities and their columns: one read.
//
//   (m, l) and the list of the kCount largest x, both updated at each x of the row; y = exp(x - m) / l of the list
//
// Equal elements in the order of their columns. A NaN is never chosen; NaN and column -1 stand where nothing is left.
// Block i of 256 threads owns row i, thread j of it columns j, j + 256, ...
// Each thread keeps (m, l) and a sorted list in registers, and the block merges them. Shared memory: both, once per
// warp.
//
// Milakov & Gimelshein, arXiv:1805.02867, section 4, algorithm 4.
#pragma once

#include <baselines/primitives/top_list.cuh>

template <int kCount>
__global__ void __launch_bounds__(kThreads) online_softmax_topk(const __grid_constant__ RowParams params) {
  const float* x = params.x + blockIdx.x * params.cols;

  auto part = SoftmaxState<float>::identity();
  auto best = TopList<kCount>::none();
  for (long long col = threadIdx.x; col < params.cols; col += kThreads) {
    const float value = ptx::ld_global(x + col);
    part = part.merge({value, 1.0f}, kUnit);
    best.insert({value, static_cast<int>(col)});
  }
  const auto total = reduce_block(part);
  best.merge_block();

  if (threadIdx.x != 0) return;
  const float factor = 1.0f / total.l;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const long long place = static_cast<long long>(blockIdx.x) * kCount + i;
    ptx::st_global(params.y + place, exp_natural(best.entry[i].value - total.m) * factor);
    ptx::st_global(params.index + place, best.entry[i].index);
  }
}
