// Zeroes the histograms and counters of a radix selection (topk/radix.cuh), 16 bytes per thread. No shared memory.
#pragma once

#include <topk/radix.cuh>

template <class Params, int kThreads>
__global__ void __launch_bounds__(kThreads) topk_clear(const __grid_constant__ RadixParams<Params> params) {
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i * 16 < params.cleared) ptx::st_global(params.template at<uint4>(0, i), uint4{0, 0, 0, 0});
}
