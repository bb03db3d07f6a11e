// Softmax as frameworks computed it: three reads, one write.
//
//   m = max(x), l = sum(exp(x - m)), y = exp(x - m) / l
//
// Block i of 256 threads owns row i, thread j of it columns j, j + 256, ...
// Pass 1 finds the maximum, pass 2 adds up the exponentials, pass 3 computes them again and writes. Shared memory: one
// maximum and one sum per warp.
//
// Milakov & Gimelshein, arXiv:1805.02867, section 2, algorithm 2.
#pragma once

#include <baselines/primitives/row.cuh>

__global__ void __launch_bounds__(kThreads) safe_softmax(const __grid_constant__ RowParams params) {
  const float* x = params.x + blockIdx.x * params.cols;
  float* y = params.y + blockIdx.x * params.cols;

  MaxState largest = {-Limits<float>::infinity()};
  for (long long col = threadIdx.x; col < params.cols; col += kThreads) {
    largest.m = max_number(largest.m, ptx::ld_global(x + col));
  }
  const float m = reduce_block(largest).m;

  SumState<float> part = {0.0f};
  for (long long col = threadIdx.x; col < params.cols; col += kThreads) {
    part.sum += exp_natural(ptx::ld_global(x + col) - m);
  }
  const float factor = 1.0f / reduce_block(part).sum;

  for (long long col = threadIdx.x; col < params.cols; col += kThreads) {
    ptx::st_global(y + col, exp_natural(ptx::ld_global(x + col) - m) * factor);
  }
}
