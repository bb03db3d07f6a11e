// The online-softmax monoid (Milakov & Gimelshein, arXiv:1805.02867, section 3.1), natural base.
//
//   m = max of t_i                          l = sum of exp(t_i - shift(m)),  shift(m) = m if finite, else 0
//   (m_a, l_a) + (m_b, l_b) = (m, l_a exp(m_a - shift(m)) + l_b exp(m_b - shift(m))),  m = max(m_a, m_b)
//
// l is d in that paper and the l of FlashAttention. The shift keeps (-inf) - (-inf) and inf - inf out of the exponent:
// a row of -inf keeps l = 0, a +inf gives l = inf. A NaN never enters m (max_number drops it) but always enters l,
// which no merge can mend.
//
// Scores t are kept in units of a power of two (ScaleParts), which every exponent is multiplied by: `unit` below.
//
// Three forms of it, and a plain sum for the backward pass, have the same members:
//   SoftmaxState   m, l
//   RestState      m, l - 1: the logarithm of a sum near 1 keeps its digits. One element that equals m is left out.
//   WeightedState  the same where elements have weights
// What a tile gives is a Part: the state itself, but for RestState.
#pragma once

#include <primitives/numeric.cuh>
#include <primitives/warp.cuh>
#include <ptx/memory.cuh>

template <class Acc>
__device__ __forceinline__ Acc shift_of(Acc m) {
  return m == Limits<Acc>::infinity() || m == -Limits<Acc>::infinity() ? Acc(0) : m;
}

// `sum` relative to a maximum of m_new >= m instead of m. Rounded product by product, so that a + b = b + a in all
// bits.
template <class Acc>
__device__ __forceinline__ Acc rescaled_sum(Acc sum, Acc m, Acc m_new, Acc unit) {
  return times_from_root(sum, exp_root(m - shift_of(m_new), unit));
}

template <class Acc>
struct alignas(2 * sizeof(Acc)) SoftmaxState {
  using Part = SoftmaxState;
  Acc m;
  Acc l;

  static __device__ __forceinline__ SoftmaxState identity() { return {-Limits<Acc>::infinity(), Acc(0)}; }
  static __device__ __forceinline__ SoftmaxState of(SoftmaxState part) { return part; }

  // l as it counts towards a sum whose maximum is m_new >= m.
  __device__ __forceinline__ Acc rescaled(Acc m_new, Acc unit) const { return rescaled_sum(l, m, m_new, unit); }

  __device__ __forceinline__ SoftmaxState merge(SoftmaxState other, Acc unit) const {
    const Acc m_new = max_number(m, other.m);
    return {m_new, rescaled(m_new, unit) + other.rescaled(m_new, unit)};
  }

  // Adds a part whose m is at least this one's: one exponential.
  __device__ __forceinline__ SoftmaxState extend(SoftmaxState later, Acc unit) const {
    return {later.m, rescaled(later.m, unit) + later.l};
  }

  template <int kCount>
  static __device__ __forceinline__ SoftmaxState merge_all(const SoftmaxState (&state)[kCount], Acc unit) {
    SoftmaxState total = identity();
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.m = max_number(total.m, state[i].m);
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.l += state[i].rescaled(total.m, unit);
    return total;
  }

  // Merges the states of a group of lanes (warp.cuh).
  template <int kGroup, int kStride = 1>
  __device__ __forceinline__ SoftmaxState merge_group(Acc unit) const {
    if constexpr (kGroup == 1) return *this;
    const Acc m_new = group_max<kGroup, kStride>(m);
    return {m_new, group_sum<kGroup, kStride>(rescaled(m_new, unit))};
  }

  // The same where all lanes of the group hold one m already: no exponential.
  template <int kGroup>
  __device__ __forceinline__ SoftmaxState add_group() const {
    return {m, group_sum<kGroup>(l)};
  }

  __device__ __forceinline__ Acc sum() const { return l; }
  __device__ __forceinline__ Acc lse(Acc unit) const { return mul_rn(m, unit) + log_natural(l); }
};

template <class Acc>
struct RestPart;

// r = l - 1 where m is finite. Elsewhere r says only whether there was a NaN.
template <class Acc>
struct alignas(2 * sizeof(Acc)) RestState {
  using Part = RestPart<Acc>;
  Acc m;
  Acc r;

  static __device__ __forceinline__ RestState identity() { return {-Limits<Acc>::infinity(), Acc(0)}; }
  template <class Part_>
  static __device__ __forceinline__ RestState of(Part_ part) {
    return {part.m, part.r + static_cast<Acc>(part.left_out - 1)};
  }

  // r as it counts towards that of a state whose maximum is m_new >= m; where they are equal, one element more is left
  // out, and the caller adds it.
  __device__ __forceinline__ Acc rescaled(Acc m_new, Acc unit) const {
    return m == m_new ? r : rescaled_sum(Acc(1) + r, m, m_new, unit);
  }

  __device__ __forceinline__ RestState merge(RestState other, Acc unit) const {
    const Acc m_new = max_number(m, other.m);
    const Acc both = rescaled(m_new, unit) + other.rescaled(m_new, unit);
    return {m_new, m == other.m ? both + Acc(1) : both};
  }

  __device__ __forceinline__ RestState extend(Part later, Acc unit) const {
    if (later.left_out == 0) return {later.m, r + later.r};  // m came before: it is this one's
    return {later.m, rescaled_sum(Acc(1) + r, m, later.m, unit) + (later.r + static_cast<Acc>(later.left_out - 1))};
  }

  template <int kCount>
  static __device__ __forceinline__ RestState merge_all(const RestState (&state)[kCount], Acc unit) {
    RestState total = identity();
    int left_out = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.m = max_number(total.m, state[i].m);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      total.r += state[i].rescaled(total.m, unit);
      left_out += state[i].m == total.m;
    }
    total.r += static_cast<Acc>(left_out - 1);
    return total;
  }

  template <int kGroup, int kStride = 1>
  __device__ __forceinline__ RestState merge_group(Acc unit) const {
    if constexpr (kGroup == 1) return *this;
    const Acc m_new = group_max<kGroup, kStride>(m);
    const int left_out = group_count<kGroup, kStride>(m == m_new);
    return {m_new, group_sum<kGroup, kStride>(rescaled(m_new, unit)) + static_cast<Acc>(left_out - 1)};
  }

  __device__ __forceinline__ Acc sum() const { return Acc(1) + r; }
  __device__ __forceinline__ Acc lse(Acc unit) const { return mul_rn(m, unit) + log1p_natural(r); }
};

// The sum of a tile without the elements that equal m, and how many they are.
template <class Acc>
struct RestPart {
  Acc m;
  Acc r;
  int left_out;

  template <int kGroup>
  __device__ __forceinline__ RestState<Acc> add_group() const {
    return {m, group_sum<kGroup>(r) + (group_sum<kGroup>(static_cast<Acc>(left_out)) - Acc(1))};
  }
};

// w: the weights of all elements that equal m; r: the weighted sum of the others. Weights may be negative, and cancel.
template <class Acc>
struct alignas(4 * sizeof(Acc) > 16 ? 16 : 4 * sizeof(Acc)) WeightedState {
  using Part = WeightedState;
  Acc m;
  Acc w;
  Acc r;

  static __device__ __forceinline__ WeightedState identity() { return {-Limits<Acc>::infinity(), Acc(0), Acc(0)}; }
  static __device__ __forceinline__ WeightedState of(WeightedState part) { return part; }

  __device__ __forceinline__ WeightedState rescaled(Acc m_new, Acc unit) const {
    if (m == m_new) return *this;
    return {m_new, Acc(0), rescaled_sum(w + r, m, m_new, unit)};
  }
  __device__ __forceinline__ WeightedState merge(WeightedState other, Acc unit) const {
    const Acc m_new = max_number(m, other.m);
    const WeightedState a = rescaled(m_new, unit), b = other.rescaled(m_new, unit);
    return {m_new, a.w + b.w, a.r + b.r};
  }
  __device__ __forceinline__ WeightedState extend(WeightedState later, Acc unit) const { return merge(later, unit); }

  template <int kCount>
  static __device__ __forceinline__ WeightedState merge_all(const WeightedState (&state)[kCount], Acc unit) {
    WeightedState total = identity();
#pragma unroll
    for (int i = 0; i < kCount; ++i) total = total.merge(state[i], unit);
    return total;
  }

  template <int kGroup, int kStride = 1>
  __device__ __forceinline__ WeightedState merge_group(Acc unit) const {
    if constexpr (kGroup == 1) return *this;
    const WeightedState own = rescaled(group_max<kGroup, kStride>(m), unit);
    return {own.m, group_sum<kGroup, kStride>(own.w), group_sum<kGroup, kStride>(own.r)};
  }

  __device__ __forceinline__ Acc lse(Acc unit) const {
    if (m - m != 0) {  // infinite: there are no others beside those that equal m
      if (w != w || r != r) return Limits<Acc>::nan();
      return m < 0 ? m : m + log_natural(w);
    }
    const Acc shift = mul_rn(m, unit);
    const bool near = r < w / 2 && -r < w / 2;  // w > 0, and the sum is near it
    return near ? shift + log_natural(w) + log1p_natural(r / w) : shift + log_natural(w + r);
  }
};

// The backward pass needs one plain sum per row; the same interface lets the kernels serve both.
template <class Acc>
struct SumState {
  using Part = SumState;
  Acc sum;

  static __device__ __forceinline__ SumState identity() { return {Acc(0)}; }
  static __device__ __forceinline__ SumState of(SumState part) { return part; }
  __device__ __forceinline__ SumState merge(SumState other, Acc) const { return {sum + other.sum}; }
  template <int kCount>
  static __device__ __forceinline__ SumState merge_all(const SumState (&state)[kCount], Acc) {
    SumState total = identity();
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.sum += state[i].sum;
    return total;
  }
  __device__ __forceinline__ SumState extend(SumState later, Acc unit) const { return merge(later, unit); }
  template <int kGroup, int kStride = 1>
  __device__ __forceinline__ SumState merge_group(Acc) const {
    return {group_sum<kGroup, kStride>(sum)};
  }
  template <int kGroup>
  __device__ __forceinline__ SumState add_group() const {
    return {group_sum<kGroup>(sum)};
  }
};

// A state to and from memory: one access, or two where it is of more than 16 bytes.
template <class State>
__device__ __forceinline__ State load_state(const State* ptr) {
  if constexpr (sizeof(State) <= 16) {
    return ptx::ld_global(ptr);
  } else {
    const uint4* half = reinterpret_cast<const uint4*>(ptr);
    const uint4 both[2] = {ptx::ld_global(half), ptx::ld_global(half + 1)};
    return reinterpret_cast<const State&>(both);
  }
}
template <class State>
__device__ __forceinline__ void store_state(State* ptr, State state) {
  if constexpr (sizeof(State) <= 16) {
    ptx::st_global(ptr, state);
  } else {
    const uint4* half = reinterpret_cast<const uint4*>(&state);
    ptx::st_global(reinterpret_cast<uint4*>(ptr), half[0]);
    ptx::st_global(reinterpret_cast<uint4*>(ptr) + 1, half[1]);
  }
}
template <class State>
__device__ __forceinline__ State load_shared_state(const State* smem_ptr) {
  if constexpr (sizeof(State) <= 16) {
    return ptx::ld_shared(smem_ptr);
  } else {
    const uint4* half = reinterpret_cast<const uint4*>(smem_ptr);
    const uint4 both[2] = {ptx::ld_shared(half), ptx::ld_shared(half + 1)};
    return reinterpret_cast<const State&>(both);
  }
}
template <class State>
__device__ __forceinline__ void store_shared_state(State* smem_ptr, State state) {
  if constexpr (sizeof(State) <= 16) {
    ptx::st_shared(smem_ptr, state);
  } else {
    const uint4* half = reinterpret_cast<const uint4*>(&state);
    ptx::st_shared(reinterpret_cast<uint4*>(smem_ptr), half[0]);
    ptx::st_shared(reinterpret_cast<uint4*>(smem_ptr) + 1, half[1]);
  }
}
