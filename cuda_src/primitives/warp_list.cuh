// The best candidates that a warp has seen, kept sorted over its lanes, behind a queue in shared memory.
//
// Element e of the list is best[e / 32] of lane e % 32, descending. A candidate that beats the k-th element is appended
// to the queue by ballot, whichever lane has it; a batch of the queue is sorted by a bitonic network and merged into
// the list. So a warp pays for the candidates that were really accepted, not for its unluckiest lane (the queues per
// thread of Johnson, Douze & Jegou, arXiv:1702.08734, section 4, fill unevenly).
#pragma once

#include <primitives/candidate.cuh>
#include <ptx/memory.cuh>

// Puts elements kStride apart in order: runs of kSize elements alternate in direction, the first one descends, or
// ascends with kAscending. Element e of an array over a warp is c[e / 32] of lane e % 32.
template <int kSize, int kStride, bool kAscending, class C, int kCount>
__device__ __forceinline__ void bitonic_step(C (&c)[kCount]) {
  constexpr int kRegisters = kStride / 32;  // between the two, where both are in one lane
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    if constexpr (kRegisters > 0) {
      if ((r & kRegisters) == 0) {
        const bool ascending = ((r * 32 & kSize) != 0) != kAscending;
        const C lower = c[r], upper = c[r | kRegisters];
        const bool swap = upper.beats(lower) != ascending;
        c[r].replace(swap, upper);
        c[r | kRegisters].replace(swap, lower);
      }
    } else {
      const int lane = threadIdx.x % 32;
      const bool ascending = (((kSize < 32 ? lane : r * 32) & kSize) != 0) != kAscending;
      const bool wants_better = ((lane & kStride) != 0) == ascending;
      const C other = c[r].shuffle_xor(kStride);
      c[r].replace(other.beats(c[r]) == wants_better, other);
    }
  }
}

// Sorts a bitonic array of kSize elements.
template <int kSize, bool kAscending, class C, int kCount, int kStride = kSize / 2>
__device__ __forceinline__ void bitonic_merge(C (&c)[kCount]) {
  bitonic_step<kSize, kStride, kAscending>(c);
  if constexpr (kStride > 1) bitonic_merge<kSize, kAscending, C, kCount, kStride / 2>(c);
}

// Sorts 32 * kCount elements (Batcher's bitonic network).
template <bool kAscending, class C, int kCount, int kSize = 2>
__device__ __forceinline__ void bitonic_sort(C (&c)[kCount]) {
  bitonic_merge<kSize, kAscending>(c);
  if constexpr (kSize < 32 * kCount) bitonic_sort<kAscending, C, kCount, 2 * kSize>(c);
}

template <class Candidate, int kPerLane>
struct WarpList {
  static constexpr int kBatch = kPerLane < 4 ? 1 : 2;  // candidates that a lane takes from the queue at a time

  Candidate best[kPerLane];
  Candidate kth;  // none until k candidates are known; equal over the warp
  Candidate* queue;
  int count;  // candidates in the queue; equal over the warp
  int k;

  // `queue`: shared memory of this warp alone.
  __device__ __forceinline__ WarpList(Candidate* queue, int k) : kth(Candidate::none()), queue(queue), count(0), k(k) {
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) best[r] = Candidate::none();
  }

  // Element e of the list, in every lane.
  __device__ __forceinline__ Candidate at(int e) const {
    Candidate found = best[0];
#pragma unroll
    for (int r = 1; r < kPerLane; ++r) found.replace(e / 32 == r, best[r]);
    return found.shuffle(e % 32);
  }

  // Queues the candidates of the lanes that want to. The caller drains before the queue overflows.
  __device__ __forceinline__ void append(bool wants, Candidate candidate) {
    const unsigned int lanes = __ballot_sync(0xffffffff, wants);
    const unsigned int below = lanes & ((1u << threadIdx.x % 32) - 1);
    if (wants) ptx::st_shared(queue + count + __popc(below), candidate);
    count += __popc(lanes);
  }

  // Merges batches of the queue into the list, whole ones or as many as the list holds, and with `all` the rest as
  // well. Starts at the end of the queue: in a row that ascends, what came last beats the others, which are then
  // dropped unsorted.
  __device__ __forceinline__ void drain(bool all) {
    __syncwarp();  // what other lanes have appended
    while (count >= (all ? 1 : min(k, 32 * kBatch))) {
      const int first = count > 32 * kBatch ? count - 32 * kBatch : 0;
      Candidate batch[kBatch];
      bool any = false;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int e = first + i * 32 + static_cast<int>(threadIdx.x % 32);
        batch[i] = e < count ? ptx::ld_shared(queue + e) : Candidate::none();
        const bool beats = batch[i].beats(kth);
        batch[i].replace(!beats, Candidate::none());
        any |= beats;
      }
      count = first;
      if (!__any_sync(0xffffffff, any)) continue;
      bitonic_sort<true>(batch);
      absorb(batch);
    }
    __syncwarp();  // batches are read before the queue is written again
  }

  // Merges an ascending array of as many elements or fewer.
  template <int kCount>
  __device__ __forceinline__ void absorb(const Candidate (&ascending)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Candidate& worst = best[kPerLane - kCount + i];
      worst.replace(ascending[i].beats(worst), ascending[i]);
    }
    bitonic_merge<32 * kPerLane, false>(best);
    kth = at(k - 1);
  }

  // Its k elements to global memory; topk_merge absorbs them from there.
  __device__ __forceinline__ void store(Candidate* ptr) const {
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      const int e = r * 32 + static_cast<int>(threadIdx.x % 32);
      if (e < k) ptx::st_global(ptr + e, best[r]);
    }
  }
  __device__ __forceinline__ void absorb_stored(const Candidate* ptr) {
    Candidate other[kPerLane];
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      const int e = 32 * kPerLane - 1 - r * 32 - static_cast<int>(threadIdx.x % 32);  // in reverse
      other[r] = e < k ? ptx::ld_global(ptr + e) : Candidate::none();
    }
    absorb(other);
  }

  // The list to and from shared memory; another warp's copy is absorbed from there, in reverse.
  __device__ __forceinline__ void save(Candidate* slot) const {
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) ptx::st_shared(slot + r * 32 + threadIdx.x % 32, best[r]);
  }
  __device__ __forceinline__ void load(const Candidate* slot) {
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) best[r] = ptx::ld_shared(slot + r * 32 + threadIdx.x % 32);
  }
  __device__ __forceinline__ void absorb_saved(const Candidate* slot) {
    Candidate other[kPerLane];
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      other[r] = ptx::ld_shared(slot + 32 * kPerLane - 1 - r * 32 - static_cast<int>(threadIdx.x % 32));
    }
    absorb(other);
  }
};

// Merges the lists of a block's first `lists` warps, a power of two; warp w may use kStride candidates of shared memory
// from slots + w * kStride on. The result is warp 0's. Every thread of the block calls it.
template <int kStride, class List, class Candidate>
__device__ __forceinline__ void merge_lists(List& list, Candidate* slots, int lists) {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int half = lists / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half) list.save(slots + warp * kStride);
    __syncthreads();  // the upper half's lists are written before the lower half reads them
    if (warp < half) list.absorb_saved(slots + (warp + half) * kStride);
  }
}
