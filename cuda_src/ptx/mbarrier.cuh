// Asynchronous barriers in shared memory (sm_90 and newer); the 64-bit object counts arrivals and bytes.
#pragma once

namespace ptx {

// Makes *mbarrier a barrier whose every phase needs `arrivals` arrivals; one thread calls it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-init
__device__ __forceinline__ void mbarrier_init(unsigned long long* mbarrier, int arrivals) {
  const unsigned int bar = static_cast<unsigned int>(__cvta_generic_to_shared(mbarrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// Makes the caller's mbarrier_init visible to the cluster and the async proxy, once a cluster barrier follows.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-membar-fence
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival that also adds `bytes` to what the current phase waits for.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-arrive
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned long long* mbarrier, int bytes) {
  const unsigned int bar = static_cast<unsigned int>(__cvta_generic_to_shared(mbarrier));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// One arrival; releases what the thread did before.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-arrive
__device__ __forceinline__ void mbarrier_arrive(unsigned long long* mbarrier) {
  const unsigned int bar = static_cast<unsigned int>(__cvta_generic_to_shared(mbarrier));
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Returns once the phase of this parity is complete, having acquired what the block wrote before completing it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
__device__ __forceinline__ void mbarrier_wait(unsigned long long* mbarrier, int parity) {
  const unsigned int bar = static_cast<unsigned int>(__cvta_generic_to_shared(mbarrier));
  int done;
  do {
    asm volatile(
        "{\n .reg .pred done;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        " selp.s32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  } while (!done);
}

// The same, having acquired what the whole cluster wrote: also drops what L1 holds.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
__device__ __forceinline__ void mbarrier_wait_cluster(unsigned long long* mbarrier, int parity) {
  const unsigned int bar = static_cast<unsigned int>(__cvta_generic_to_shared(mbarrier));
  int done;
  do {
    asm volatile(
        "{\n .reg .pred done;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        " selp.s32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  } while (!done);
}

}  // namespace ptx
