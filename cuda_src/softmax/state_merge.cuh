// Element by element, state_a + state_b of n independent rows (softmax_state.cuh); arrays are contiguous.
// Grid: ceil(n / kThreads) blocks. No shared memory.
#pragma once

#include <primitives/softmax_state.cuh>
#include <ptx/memory.cuh>

struct StateMergeParams {
  const void* m_a;
  const void* l_a;
  const void* t_a;  // kLogits, as all t and logits
  const void* logit_a;
  const void* m_b;
  const void* l_b;
  const void* t_b;
  const void* logit_b;
  void* m;
  void* l;
  void* t;
  void* logit;
  long long n;
};

template <class Acc, bool kLogits, int kThreads>
__global__ void __launch_bounds__(kThreads) softmax_state_merge(const __grid_constant__ StateMergeParams params) {
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.n) return;
  const auto load = [i](const void* part) { return ptx::ld_global(static_cast<const Acc*>(part) + i); };
  const auto store = [i](void* whole, Acc value) { ptx::st_global(static_cast<Acc*>(whole) + i, value); };
  const SoftmaxState<Acc> a = {load(params.m_a), load(params.l_a)};
  const SoftmaxState<Acc> b = {load(params.m_b), load(params.l_b)};
  const SoftmaxState<Acc> both = a.merge(b, Acc(1));
  const Acc m = both.l == both.l ? both.m : both.l;  // a NaN in either shows in all
  if constexpr (kLogits) {
    using Tilted = TiltedState<SoftmaxState<Acc>>;
    const Acc t = Tilted{a, load(params.t_a)}.rescaled_t(m, Acc(1)) + Tilted{b, load(params.t_b)}.rescaled_t(m, Acc(1));
    const Acc logit_a = load(params.logit_a), logit_b = load(params.logit_b);
    store(params.t, m - m == 0 ? t : both.l);
    store(params.logit, logit_a == logit_a && !(logit_b > logit_a) ? logit_a : logit_b);  // NaN gives way
  }
  store(params.m, m);
  store(params.l, both.l);
}
