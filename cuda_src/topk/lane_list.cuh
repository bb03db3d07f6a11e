// Sorted lists of kList <= 8 candidates in registers, one per lane, and the best kList of a group of lanes.
//
// Sorting networks in place of insertions: what they do does not depend on the data, so no lane waits for another.
#pragma once

#include <primitives/candidate.cuh>

// Puts two candidates in order. `worse` is what remains of the two bit patterns without the better one: two selections
// would compare twice, once for a maximum and once for a minimum.
__device__ __forceinline__ void order(NarrowCandidate& better, NarrowCandidate& worse) {
  const unsigned long long both = better.bits ^ worse.bits;
  better.replace(worse.beats(better), worse);
  worse.bits = both ^ better.bits;
}
__device__ __forceinline__ void order(WideCandidate& better, WideCandidate& worse) {
  const WideCandidate first = better;
  const bool swap = worse.beats(first);
  better.replace(swap, worse);
  worse.replace(swap, first);
}

// Descending, by Batcher's odd-even merge sort: 19 comparisons for 8, 5 for 4.
template <class C, int kCount>
__device__ __forceinline__ void sort_descending(C (&c)[kCount]) {
#pragma unroll
  for (int run = 1; run < kCount; run *= 2) {
#pragma unroll
    for (int step = run; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kCount - step; ++i) {
        const int first = step % run;
        const bool pair = i >= first && (i - first) / step % 2 == 0;
        if (pair && i / (2 * run) == (i + step) / (2 * run)) order(c[i], c[i + step]);
      }
    }
  }
}

// The same where the first kUsed elements are bitonic.
template <int kUsed, class C, int kCount>
__device__ __forceinline__ void merge_descending(C (&c)[kCount]) {
#pragma unroll
  for (int step = kUsed / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kUsed; ++i) {
      if ((i & step) == 0) order(c[i], c[i + step]);
    }
  }
}

// The best of two descending lists, into the first.
template <class C, int kList>
__device__ __forceinline__ void absorb_list(C (&c)[kList], const C (&other)[kList]) {
#pragma unroll
  for (int i = 0; i < kList; ++i) c[i].replace(other[kList - 1 - i].beats(c[i]), other[kList - 1 - i]);
  merge_descending<kList>(c);
}

// How many elements of the group's list a lane holds after merge_group_lists, and how many lanes share the list.
template <int kList, int kGroup>
constexpr int kListHeld = kGroup < kList ? kList / kGroup : 1;
template <int kList, int kGroup>
constexpr int kListHolders = kGroup < kList ? kGroup : kList;

// The first element that the lane at `place` of the group holds: lanes lie in the order of their reversed bits.
template <int kList, int kGroup>
__device__ __forceinline__ int first_held(int place) {
  int first = 0;
#pragma unroll
  for (int bit = 1; bit < kListHolders<kList, kGroup>; bit *= 2) first = 2 * first + ((place & bit) != 0);
  return first * kListHeld<kList, kGroup>;
}

// Merges the descending lists of kGroup lanes, kStride lanes apart; `place`: this lane's in the group. All 32 lanes of
// the warp call it. Element first_held(place) + i is then c[i], and beyond the first kListHolders lanes repeat them.
//
// kSpan lanes already share a list, each holding a part of it. Two such lists are compared from opposite ends: the
// better ones are the best of both, in bitonic order, and each lane keeps half of what it had. Every second list lies
// reversed over its lanes, so that the opposite element is in the lane kSpan away.
template <int kGroup, int kStride, int kSpan = 1, class C, int kList>
__device__ __forceinline__ void merge_group_lists(C (&c)[kList], int place) {
  if constexpr (kSpan < kGroup) {
    constexpr int kHad = kListHeld<kList, kSpan>;
    constexpr int kHeld = kListHeld<kList, 2 * kSpan>;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const C other = c[kHad - 1 - i].shuffle_xor(kSpan * kStride);
      c[i].replace(other.beats(c[i]), other);
    }
    const bool reversed = (place & 2 * kSpan) != 0;
#pragma unroll
    for (int bit = 1; bit < kListHolders<kList, 2 * kSpan>; bit *= 2) {
      const bool wants_better = ((place & bit) != 0) == reversed;
      C other[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) other[i] = c[bit == kSpan ? kHeld - 1 - i : i].shuffle_xor(bit * kStride);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) c[i].replace(other[i].beats(c[i]) == wants_better, other[i]);
    }
    merge_descending<kHeld>(c);
    merge_group_lists<kGroup, kStride, 2 * kSpan>(c, place);
  }
}
