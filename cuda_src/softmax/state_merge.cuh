// Element by element, state_a + state_b of n independent rows (softmax_state.cuh); arrays are contiguous.
// Grid: ceil(n / kThreads) blocks. No shared memory.
#pragma once

#include <primitives/softmax_state.cuh>
#include <ptx/memory.cuh>

struct StateMergeParams {
  const void* m_a;
  const void* l_a;
  const void* m_b;
  const void* l_b;
  void* m;
  void* l;
  long long n;
};

template <class Acc, int kThreads>
__global__ void __launch_bounds__(kThreads) softmax_state_merge(const __grid_constant__ StateMergeParams params) {
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.n) return;
  const SoftmaxState<Acc> a = {ptx::ld_global(static_cast<const Acc*>(params.m_a) + i),
                               ptx::ld_global(static_cast<const Acc*>(params.l_a) + i)};
  const SoftmaxState<Acc> b = {ptx::ld_global(static_cast<const Acc*>(params.m_b) + i),
                               ptx::ld_global(static_cast<const Acc*>(params.l_b) + i)};
  const SoftmaxState<Acc> both = a.merge(b, Acc(1));
  const Acc m = both.l == both.l ? both.m : both.l;  // a NaN in either shows in both
  ptx::st_global(static_cast<Acc*>(params.m) + i, m);
  ptx::st_global(static_cast<Acc*>(params.l) + i, both.l);
}
