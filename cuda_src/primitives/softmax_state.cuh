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
// Four forms of it, and a plain sum for the backward pass, have the same members:
//   SoftmaxState   m, l
//   RestState      m, l - 1: the logarithm of a sum near 1 keeps its digits
//   WeightedState  the same where elements have weights
//   TiltedState    either of the first two, and the sum that the entropy needs
// A thread adds its elements up as a Part: the state itself, but for RestState. The parts of a group of lanes become a
// State (of_group).
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

  // l as it counts towards a sum whose maximum is m_new >= m.
  __device__ __forceinline__ Acc rescaled(Acc m_new, Acc unit) const { return rescaled_sum(l, m, m_new, unit); }

  __device__ __forceinline__ SoftmaxState merge(SoftmaxState other, Acc unit) const {
    const Acc m_new = max_number(m, other.m);
    return {m_new, rescaled(m_new, unit) + other.rescaled(m_new, unit)};
  }

  // Adds a part whose m is at least this state's m, with one exponential.
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

  // The same for parts; kEqual: all lanes of the group already have the same m, which takes no exponential.
  template <int kGroup, int kStride, bool kEqual, class Rest>
  static __device__ __forceinline__ SoftmaxState of_group(SoftmaxState part, Acc unit, Rest) {
    if constexpr (kEqual) return {part.m, group_sum<kGroup, kStride>(part.l)};
    return part.template merge_group<kGroup, kStride>(unit);
  }

  __device__ __forceinline__ Acc sum() const { return l; }
  __device__ __forceinline__ Acc log_sum() const { return log_natural(l); }
  __device__ __forceinline__ Acc lse(Acc unit) const { return mul_rn(m, unit) + log_sum(); }
};

// r = l - 1. Sums are added up whole; one that comes out next to 1 is added up again without the term of the maximum.
template <class Acc>
struct alignas(2 * sizeof(Acc)) RestState {
  using Part = SoftmaxState<Acc>;
  Acc m;
  Acc r;

  static __device__ __forceinline__ RestState identity() { return {-Limits<Acc>::infinity(), Acc(-1)}; }
  static __device__ __forceinline__ bool is_near(Acc r) { return r >= 0 && r < Acc(0.125); }
  __device__ __forceinline__ Part whole() const { return {m, Acc(1) + r}; }

  // rest(m): what this thread's part adds to r, if its m is the group's.
  template <int kGroup, int kStride, bool kEqual, class Rest>
  static __device__ __forceinline__ RestState of_group(Part part, Acc unit, Rest rest) {
    const Acc m = kEqual ? part.m : group_max<kGroup, kStride>(part.m);
    Acc own = kEqual || kGroup == 1 ? part.l : part.rescaled(m, unit);
    Acc r = group_sum<kGroup, kStride>(own) - Acc(1);
    const bool near = is_near(r);
    if (__any_sync(0xffffffff, near)) {
      if (near && own >= 1) own = rest(m);
      own = group_sum<kGroup, kStride>(own);
      if (near) r = own;
    }
    return {m, r};
  }

  template <int kGroup, int kStride = 1>
  __device__ __forceinline__ RestState merge_group(Acc unit) const {
    if constexpr (kGroup == 1) return *this;
    return of_group<kGroup, kStride, false>(whole(), unit, [this](Acc) { return r; });
  }

  // One exponential: the sum of the larger maximum stays.
  __device__ __forceinline__ RestState merge(RestState other, Acc unit) const {
    const bool first = m >= other.m;
    const RestState high = first ? *this : other, low = first ? other : *this;
    const Acc own = low.whole().rescaled(high.m, unit);
    Acc r = high.sum() + own - Acc(1);
    if (is_near(r)) r = high.r + own;
    return {high.m, r};
  }

  template <int kCount>
  static __device__ __forceinline__ RestState merge_all(const RestState (&state)[kCount], Acc unit) {
    Acc m = -Limits<Acc>::infinity(), part[kCount], l = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) m = max_number(m, state[i].m);
#pragma unroll
    for (int i = 0; i < kCount; ++i) l += part[i] = state[i].whole().rescaled(m, unit);
    Acc r = l - Acc(1);
    if (is_near(r)) {
      r = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) r += state[i].m == m ? state[i].r : part[i];
    }
    return {m, r};
  }

  __device__ __forceinline__ Acc sum() const { return Acc(1) + r; }
  __device__ __forceinline__ Acc log_sum() const { return log1p_natural(r); }
  __device__ __forceinline__ Acc lse(Acc unit) const { return mul_rn(m, unit) + log_sum(); }
};

// w: the weights of all elements that equal m; r: the weighted sum of the others. Weights may be negative, and cancel.
template <class Acc>
struct alignas(4 * sizeof(Acc) > 16 ? 16 : 4 * sizeof(Acc)) WeightedState {
  using Part = WeightedState;
  Acc m;
  Acc w;
  Acc r;

  static __device__ __forceinline__ WeightedState identity() { return {-Limits<Acc>::infinity(), Acc(0), Acc(0)}; }

  __device__ __forceinline__ WeightedState rescaled(Acc m_new, Acc unit) const {
    if (m == m_new) return *this;
    return {m_new, Acc(0), rescaled_sum(w + r, m, m_new, unit)};
  }
  __device__ __forceinline__ WeightedState merge(WeightedState other, Acc unit) const {
    return m > other.m ? other.extend(*this, unit) : extend(other, unit);
  }
  __device__ __forceinline__ WeightedState extend(WeightedState later, Acc unit) const {
    const WeightedState own = rescaled(later.m, unit);
    return {later.m, own.w + later.w, own.r + later.r};
  }

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
  template <int kGroup, int kStride, bool, class Rest>
  static __device__ __forceinline__ WeightedState of_group(WeightedState part, Acc unit, Rest) {
    return part.template merge_group<kGroup, kStride>(unit);
  }

  __device__ __forceinline__ Acc lse(Acc unit) const {
    if (m - m != 0) {  // infinite: only the elements that equal m count
      if (w != w || r != r) return Limits<Acc>::nan();
      return m < 0 ? m : m + log_natural(w);
    }
    const Acc shift = mul_rn(m, unit);
    const bool near = r < w / 2 && -r < w / 2;  // w > 0, and the sum is near it
    return near ? shift + log_natural(w) + log1p_natural(r / w) : shift + log_natural(w + r);
  }
};

// t + e * d, a term of the sum of exp(d) d: 0 where e = exp(d) is, d may be -inf there.
template <class Acc>
__device__ __forceinline__ Acc add_tilted(Acc t, Acc e, Acc d) {
  return ptx::fma_rn(e, max_number(-Limits<Acc>::most(), d), t);
}

// Base, and t = sum of exp(d) d, d = t_i - shift(m). Where m is infinite, t is any number.
template <class Base>
struct alignas(16) TiltedState : Base {
  using Part = TiltedState<typename Base::Part>;
  using Acc = decltype(Base::m);
  Acc t;

  static __device__ __forceinline__ TiltedState identity() { return {Base::identity(), Acc(0)}; }

  // t as it counts towards a sum whose maximum is m_new >= m.
  __device__ __forceinline__ Acc rescaled_t(Acc m_new, Acc unit) const {
    const Acc d = this->m - shift_of(m_new), root = exp_root(d, unit);
    return add_tilted(times_from_root(t, root), times_from_root(this->sum(), root), d);
  }

  __device__ __forceinline__ TiltedState merge(TiltedState other, Acc unit) const {
    const Base both = Base::merge(other, unit);
    return {both, rescaled_t(both.m, unit) + other.rescaled_t(both.m, unit)};
  }
  __device__ __forceinline__ TiltedState extend(TiltedState later, Acc unit) const {
    return {Base::extend(later, unit), rescaled_t(later.m, unit) + later.t};
  }

  template <int kCount>
  static __device__ __forceinline__ TiltedState merge_all(const TiltedState (&state)[kCount], Acc unit) {
    TiltedState total = identity();
#pragma unroll
    for (int i = 0; i < kCount; ++i) total = total.merge(state[i], unit);
    return total;
  }

  template <int kGroup, int kStride = 1>
  __device__ __forceinline__ TiltedState merge_group(Acc unit) const {
    const Base all = Base::template merge_group<kGroup, kStride>(unit);
    return {all, kGroup == 1 ? t : group_sum<kGroup, kStride>(rescaled_t(all.m, unit))};
  }
  template <int kGroup, int kStride, bool kEqual, class Rest>
  static __device__ __forceinline__ TiltedState of_group(Part part, Acc unit, Rest rest) {
    const Base all = Base::template of_group<kGroup, kStride, kEqual>(part, unit, rest);
    return {all, group_sum<kGroup, kStride>(kEqual ? part.t : part.rescaled_t(all.m, unit))};
  }

  // Of the probabilities, in nats: log(l) - t / l.
  __device__ __forceinline__ Acc entropy(Acc unit) const { return this->log_sum() - mul_rn(t, unit) / this->sum(); }
};

// The backward pass needs one plain sum per row; the same interface lets the kernels serve both.
template <class Acc>
struct SumState {
  using Part = SumState;
  Acc sum;

  static __device__ __forceinline__ SumState identity() { return {Acc(0)}; }
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
  template <int kGroup, int kStride, bool, class Rest>
  static __device__ __forceinline__ SumState of_group(SumState part, Acc unit, Rest) {
    return part.template merge_group<kGroup, kStride>(unit);
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
