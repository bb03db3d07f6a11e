// Softmax with the online normaliser, as published: two reads, one write.
//
//   (m, l) <- (m', l exp(m - m') + exp(x - m')), m' = max(m, x)        for each x of the row
//   y = exp(x - m) / l
//
// Block i of 256 threads owns row i, thread j of it columns j, j + 256, ...
// Pass 1 updates the thread's own (m, l) at every element, two exponentials each, and the block merges them; pass 2
// computes the exponentials again and writes. Shared memory: one (m, l) per warp.
//
// Milakov & Gimelshein, arXiv:1805.02867, section 3, algorithm 3; the merge of the threads is section 3.1.
#pragma once

#include <baselines/primitives/row.cuh>

__global__ void __launch_bounds__(kThreads) online_softmax(const __grid_constant__ RowParams params) {
  const float* x = params.x + blockIdx.x * params.cols;
  float* y = params.y + blockIdx.x * params.cols;

  auto part = SoftmaxState<float>::identity();
  for (long long col = threadIdx.x; col < params.cols; col += kThreads) {
    part = part.merge({ptx::ld_global(x + col), 1.0f}, kUnit);
  }
  const auto total = reduce_block(part);
  const float factor = 1.0f / total.l;

  for (long long col = threadIdx.x; col < params.cols; col += kThreads) {
    ptx::st_global(y + col, exp_natural(ptx::ld_global(x + col) - total.m) * factor);
  }
}
