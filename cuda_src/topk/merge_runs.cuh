// Merges the sorted runs of each row's list in pairs: after it they are twice as long (topk/radix.cuh).
//
// One thread per candidate of the result finds which one it is (topk/merge_path.cuh). Block b has kThreads
// neighbouring ones of row b / ceil(wanted / kThreads). No shared memory.
#pragma once

#include <topk/merge_path.cuh>
#include <topk/radix.cuh>

template <class Candidate, class Params, int kThreads>
__global__ void __launch_bounds__(kThreads) topk_merge_runs(const __grid_constant__ RadixParams<Params> params) {
  const unsigned blocks = static_cast<unsigned>((params.wanted + kThreads - 1) / kThreads);
  const long long row = blockIdx.x / blocks;
  const long long e = static_cast<long long>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  if (e >= params.wanted) return;

  // The two runs that e is in.
  const long long begin = e / (2 * params.run) * (2 * params.run);
  const long long size = min(2 * params.run, params.wanted - begin);
  const long long size_a = min(params.run, size), size_b = size - size_a;
  const Candidate* a = params.template at<Candidate>(params.source, row * params.wanted + begin);
  const Candidate* b = a + size_a;

  const long long i = merge_path(e - begin, size_a, size_b, [&](long long i, long long j) {
    return ptx::ld_global(a + i).beats(ptx::ld_global(b + j));
  });
  const long long j = e - begin - i;
  Candidate best = i < size_a ? ptx::ld_global(a + i) : Candidate::none();
  if (j < size_b) {
    const Candidate other = ptx::ld_global(b + j);
    if (i == size_a || other.beats(best)) best = other;
  }
  ptx::st_global(params.template at<Candidate>(params.target, row * params.wanted + e), best);
}
