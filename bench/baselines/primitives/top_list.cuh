// The kCount largest elements seen so far, in registers.
#pragma once

#include <baselines/primitives/row.cuh>

struct alignas(8) Candidate {
  float value;
  int index;

  static __device__ __forceinline__ Candidate none() { return {Limits<float>::nan(), -1}; }

  // Larger values first, and equal ones by index. A number comes before a NaN, a NaN before nothing.
  __device__ __forceinline__ bool before(Candidate other) const {
    return value == value && !(value < other.value || (value == other.value && index > other.index));
  }
};

template <int kCount>
struct TopList {
  Candidate entry[kCount];  // best first

  static __device__ __forceinline__ TopList none() {
    TopList list;
#pragma unroll
    for (int i = 0; i < kCount; ++i) list.entry[i] = Candidate::none();
    return list;
  }

  // Everything behind the new candidate moves down by one, and the last falls off.
  __device__ __forceinline__ void insert(Candidate candidate) {
    if (!candidate.before(entry[kCount - 1])) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!candidate.before(entry[i])) continue;
      const Candidate behind = entry[i];
      entry[i] = candidate;
      candidate = behind;
    }
  }

  // Merges the lists of groups of kGroup lanes; every lane gets its group's.
  template <int kGroup>
  __device__ __forceinline__ void merge_group() {
#pragma unroll 1  // the body is kCount * kCount steps long
    for (int offset = kGroup / 2; offset > 0; offset /= 2) {
      const TopList mine = *this;  // what the other lane takes, whatever is inserted in the meantime
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        insert({__shfl_xor_sync(0xffffffff, mine.entry[i].value, offset),
                __shfl_xor_sync(0xffffffff, mine.entry[i].index, offset)});
      }
    }
  }

  // Merges the lists of all threads of the block; every thread gets the result. Shared memory: one list per warp.
  __device__ __forceinline__ void merge_block() {
    merge_group<32>();
    Candidate* slots = ptx::static_smem<Candidate, kWarps * kCount>();
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) ptx::st_shared(slots + threadIdx.x / 32 * kCount + i, entry[i]);
    }
    __syncthreads();  // every warp's list is written before any warp reads them all
#pragma unroll
    for (int i = 0; i < kCount; ++i) entry[i] = ptx::ld_shared(slots + threadIdx.x % kWarps * kCount + i);
    merge_group<kWarps>();
  }
};
