// The online-softmax monoid (Milakov & Gimelshein, arXiv:1805.02867, section 3.1), natural base.
//
//   m = max of t_i                          l = sum of exp(t_i - shift(m)),  shift(m) = m if finite, else 0
//   (m_a, l_a) + (m_b, l_b) = (m, l_a exp(m_a - shift(m)) + l_b exp(m_b - shift(m))),  m = max(m_a, m_b)
//
// l is d in that paper and the l of FlashAttention. The shift keeps (-inf) - (-inf) and inf - inf out of the exponent:
// a row of -inf keeps l = 0, a +inf gives l = inf. A NaN never enters m (max_number drops it) but always enters l,
// which no merge can mend.
#pragma once

#include <primitives/numeric.cuh>
#include <primitives/warp.cuh>

template <class Acc>
__device__ __forceinline__ Acc shift_of(Acc m) {
  return m == Limits<Acc>::infinity() || m == -Limits<Acc>::infinity() ? Acc(0) : m;
}

template <class Acc>
struct alignas(2 * sizeof(Acc)) SoftmaxState {
  Acc m;
  Acc l;

  static __device__ __forceinline__ SoftmaxState identity() { return {-Limits<Acc>::infinity(), Acc(0)}; }

  // l as it counts towards a sum whose maximum is m_new >= m.
  __device__ __forceinline__ Acc rescaled(Acc m_new) const { return l * exp_natural(m - shift_of(m_new)); }

  __device__ __forceinline__ SoftmaxState merge(SoftmaxState other) const {
    const Acc m_new = max_number(m, other.m);
    return {m_new, rescaled(m_new) + other.rescaled(m_new)};
  }

  // Adds a state whose m is at least this one's: one exponential.
  __device__ __forceinline__ SoftmaxState extend(SoftmaxState later) const {
    return {later.m, rescaled(later.m) + later.l};
  }

  template <int kCount>
  static __device__ __forceinline__ SoftmaxState merge_all(const SoftmaxState (&state)[kCount]) {
    SoftmaxState total = identity();
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.m = max_number(total.m, state[i].m);
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.l += state[i].rescaled(total.m);
    return total;
  }

  // Merges the states of a group of lanes (warp.cuh).
  template <int kGroup, int kStride = 1>
  __device__ __forceinline__ SoftmaxState merge_group() const {
    if constexpr (kGroup == 1) return *this;
    const Acc m_new = group_max<kGroup, kStride>(m);
    return {m_new, group_sum<kGroup, kStride>(rescaled(m_new))};
  }

  // The same where all lanes of the group hold one m already: no exponential.
  template <int kGroup>
  __device__ __forceinline__ SoftmaxState add_group() const {
    return {m, group_sum<kGroup>(l)};
  }

  __device__ __forceinline__ Acc lse() const { return m + log_natural(l); }
};

// The backward pass needs one plain sum per row; the same interface lets the kernels serve both.
template <class Acc>
struct SumState {
  Acc sum;

  static __device__ __forceinline__ SumState identity() { return {Acc(0)}; }
  __device__ __forceinline__ SumState merge(SumState other) const { return {sum + other.sum}; }
  template <int kCount>
  static __device__ __forceinline__ SumState merge_all(const SumState (&state)[kCount]) {
    SumState total = identity();
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.sum += state[i].sum;
    return total;
  }
  __device__ __forceinline__ SumState extend(SumState later) const { return merge(later); }
  template <int kGroup, int kStride = 1>
  __device__ __forceinline__ SumState merge_group() const {
    return {group_sum<kGroup, kStride>(sum)};
  }
  template <int kGroup>
  __device__ __forceinline__ SumState add_group() const {
    return {group_sum<kGroup>(sum)};
  }
};
