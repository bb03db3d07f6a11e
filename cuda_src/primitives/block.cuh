// Merging one state per warp over a block, and one state per block over a cluster.
#pragma once

#include <ptx/cluster.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/smem.cuh>

// Merges the states of kWarps warps (a power of two, at most 32), equal over each warp's lanes. Every thread of the
// block calls it once and gets the result. Shared memory: kWarps states.
template <int kWarps, class State>
__device__ __forceinline__ State block_merge(State state) {
  State* slots = ptx::static_smem<State, kWarps>();
  if (threadIdx.x % 32 == 0) ptx::st_shared(slots + threadIdx.x / 32, state);
  __syncthreads();  // every warp's slot is written before any warp reads them all
  return ptx::ld_shared(slots + threadIdx.x % kWarps).template merge_group<kWarps>();
}

// Merges one state per block over a cluster of kBlocks (a power of two, at most 8): every block writes its state into a
// slot of every block, and waits for its own slots to fill. One exchange; a block leaves only when all that is sent to
// it has arrived, so no closing barrier is needed. Shared memory: kBlocks states and one mbarrier.
template <int kBlocks, class State>
struct ClusterMerge {
  // First half, early in the kernel, so that the barrier's latency hides behind the loads.
  static __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(mbarrier(), 1);
      ptx::fence_mbarrier_init();  // the initialised mbarrier, before the cluster hears of it
      ptx::mbarrier_arrive_expect_tx(mbarrier(), kBlocks * sizeof(State));
    }
    // This block may be sent to. The fence has released its mbarrier; to release more would hold up the loads.
    ptx::cluster_arrive_relaxed();
  }

  // Second half: `state` is equal over the block; every thread calls it and gets the cluster's state.
  static __device__ __forceinline__ State merge(State state) {
    ptx::cluster_wait();  // every peer's mbarrier is ready to be counted down
    if (threadIdx.x < kBlocks) ptx::st_async(slots() + ptx::cluster_ctarank(), state, mbarrier(), threadIdx.x);
    ptx::mbarrier_wait_cluster(mbarrier(), 0);  // all kBlocks slots of this block are written
    return ptx::ld_shared(slots() + threadIdx.x % kBlocks).template merge_group<kBlocks>();
  }

 private:
  static __device__ __forceinline__ State* slots() { return ptx::static_smem<State, kBlocks, 1>(); }
  static __device__ __forceinline__ unsigned long long* mbarrier() {
    return ptx::static_smem<unsigned long long, 1, 2>();
  }
};
