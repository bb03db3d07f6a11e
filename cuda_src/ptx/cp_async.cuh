// Asynchronous copies from global to shared memory (sm_80 and newer), kept in groups by each thread.
#pragma once

namespace ptx {

// Begins to copy 16 bytes: the first `src_bytes` are read, the rest become zeros; both addresses are multiples of 16.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
__device__ __forceinline__ void cp_async_16(void* smem_ptr, const void* global_ptr, int src_bytes) {
  const unsigned int dst = static_cast<unsigned int>(__cvta_generic_to_shared(smem_ptr));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(global_ptr)),
               "r"(src_bytes)
               : "memory");
}

// Puts the thread's copies since its last commit into a group, which may be empty.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-commit-group
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the thread's kPending newest groups have landed; a barrier shows them to other threads.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-wait-group
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace ptx
