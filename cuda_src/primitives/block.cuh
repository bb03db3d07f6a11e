// Merging one state per warp over a block or a cluster.
#pragma once

#include <ptx/cluster.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/smem.cuh>

// Merges the states of kWarps warps (a power of two, at most 32), equal over each warp's lanes. Every thread of the
// block calls it and gets the result; kFirstWarp: only the first warp is sure to. With it, calls with
// `round` 0, 1, 2 ... may follow each other: there are two sets of slots, and no warp is two barriers ahead of another.
// Shared memory: kWarps states, with kFirstWarp 2 * kWarps.
template <int kWarps, bool kFirstWarp = false, class State, class Acc>
__device__ __forceinline__ State block_merge(State state, Acc unit, int round = 0) {
  State* slots = ptx::static_smem<State, kFirstWarp ? 2 * kWarps : kWarps>() + (kFirstWarp ? round % 2 * kWarps : 0);
  if (threadIdx.x % 32 == 0) store_shared_state(slots + threadIdx.x / 32, state);
  __syncthreads();  // every warp's slot is written before any warp reads them all
  if (kFirstWarp && threadIdx.x >= 32) return state;
  return load_shared_state(slots + threadIdx.x % kWarps).template merge_group<kWarps>(unit);
}

// Merges the states of the warps of a row, kWarps in each of kBlocks blocks of a cluster, in an order that does not
// depend on how the warps are spread over blocks: groups of 4 neighbouring warps first, then all groups, of the whole
// row, at once. In a cluster every block writes the states of its groups into slots of every block, and waits for its
// own slots to fill. One exchange; a block leaves only when all that is sent to it has arrived, so no closing barrier
// is needed. Shared memory: kWarps states; in a cluster also one per group of the row, and one mbarrier.
template <int kBlocks, int kWarps, class State>
struct RowMerge {
  static constexpr int kFour = kWarps < 4 ? kWarps : 4;
  static constexpr int kGroups = kWarps / kFour;  // per block
  static_assert(kGroups * kBlocks <= 32, "one lane per group of the row");

  // First half, early in the kernel, so that the barrier's latency hides behind the loads.
  static __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(mbarrier(), 1);
      ptx::fence_mbarrier_init();  // the initialised mbarrier, before the cluster hears of it
      ptx::mbarrier_arrive_expect_tx(mbarrier(), kBlocks * kGroups * sizeof(State));
    }
    // Peers may send to this block. The fence has released its mbarrier; releasing more would hold up the loads.
    ptx::cluster_arrive_relaxed();
  }

  // Second half: `state` is equal over a warp; every thread calls it and gets the row's state.
  template <class Acc>
  static __device__ __forceinline__ State merge(State state, Acc unit) {
    State* warps = ptx::static_smem<State, kWarps>();
    if (threadIdx.x % 32 == 0) ptx::st_shared(warps + threadIdx.x / 32, state);
    __syncthreads();  // every warp's state is written before any warp reads them all
    state = ptx::ld_shared(warps + threadIdx.x % kWarps).template merge_group<kFour>(unit);
    if constexpr (kBlocks == 1) return state.template merge_group<kGroups, kFour>(unit);
    ptx::cluster_wait();  // every peer's mbarrier is ready to be counted down
    // Lane g * kFour of every kWarps lanes has group g: each sends it to one block.
    const int group = threadIdx.x % kWarps / kFour, block = threadIdx.x % kFour + threadIdx.x / kWarps * kFour;
    if (threadIdx.x < 32 && block < kBlocks) {
      ptx::st_async(slots() + ptx::cluster_ctarank() * kGroups + group, state, mbarrier(), block);
    }
    ptx::mbarrier_wait_cluster(mbarrier(), 0);  // all slots of this block are written
    return ptx::ld_shared(slots() + threadIdx.x % (kBlocks * kGroups)).template merge_group<kBlocks * kGroups>(unit);
  }

 private:
  static __device__ __forceinline__ State* slots() { return ptx::static_smem<State, kBlocks * kGroups, 1>(); }
  static __device__ __forceinline__ unsigned long long* mbarrier() {
    return ptx::static_smem<unsigned long long, 1, 2>();
  }
};
