// Softmax as it is defined: two reads, one write.
//
//   y = exp(x) / sum(exp(x))
//
// Block i of 256 threads owns row i, thread j of it columns j, j + 256, ...
// Pass 1 adds up the exponentials, pass 2 computes them again and writes. exp(x) overflows in float32 from x = 89 on,
// and sums to 0 where all x are below -88. Shared memory: one sum per warp.
//
// Milakov & Gimelshein, arXiv:1805.02867, section 2, algorithm 1.
#pragma once

#include <baselines/primitives/row.cuh>

__global__ void __launch_bounds__(kThreads) naive_softmax(const __grid_constant__ RowParams params) {
  const float* x = params.x + blockIdx.x * params.cols;
  float* y = params.y + blockIdx.x * params.cols;

  SumState<float> part = {0.0f};
  for (long long col = threadIdx.x; col < params.cols; col += kThreads) {
    part.sum += exp_natural(ptx::ld_global(x + col));
  }
  const float sum = reduce_block(part).sum;

  for (long long col = threadIdx.x; col < params.cols; col += kThreads) {
    ptx::st_global(y + col, exp_natural(ptx::ld_global(x + col)) / sum);  // 1 / sum might be 0
  }
}
