// Thread block clusters and distributed shared memory (sm_90 and newer).
#pragma once

// Cluster size of a kernel, a compile-time constant; nothing below sm_90, where only 1 is instantiated.
#if __CUDA_ARCH__ >= 900
#define CLUSTER_DIMS(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define CLUSTER_DIMS(blocks)
#endif

namespace ptx {

// Rank of this block in its cluster.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#special-registers-cluster-ctarank
__device__ __forceinline__ int cluster_ctarank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// First half of the cluster barrier; releases this thread's earlier writes.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// The same, but it releases nothing: what the thread wrote before stays its own. Waits for no memory access.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }

// Second half of the cluster barrier; acquires what every thread of the cluster released.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Address of the same shared-memory object in block `cta_rank` of the cluster.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-mapa
__device__ __forceinline__ unsigned int mapa(const void* smem_ptr, int cta_rank) {
  unsigned int remote;
  const unsigned int local = static_cast<unsigned int>(__cvta_generic_to_shared(smem_ptr));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(cta_rank));
  return remote;
}

// Writes `value` (4, 8 or 16 bytes) to `smem_ptr` of block `cta_rank`, then completes its bytes on `mbarrier` there.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st-async
template <class T>
__device__ __forceinline__ void st_async(T* smem_ptr, T value, unsigned long long* mbarrier, int cta_rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "st.async writes 4, 8 or 16 bytes");
  const unsigned int dst = mapa(smem_ptr, cta_rank);
  const unsigned int bar = mapa(mbarrier, cta_rank);
  const unsigned int* word = reinterpret_cast<const unsigned int*>(&value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(dst), "r"(word[0]),
                 "r"(bar)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(dst),
                 "r"(word[0]), "r"(word[1]), "r"(bar)
                 : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(dst),
        "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"(bar)
        : "memory");
  }
}

}  // namespace ptx
