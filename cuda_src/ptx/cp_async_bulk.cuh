// Tiles between global and shared memory by the Tensor Memory Accelerator (sm_90 and newer). One thread asks for a
// whole box of a tensor map; coordinates are in elements, innermost first. What lies outside of the tensor is loaded as
// zeros, which count among the bytes of a box, and is not stored, with one exception: a store writes 16 bytes at a
// time, also the last ones of a row that ends within them (https://github.com/triton-lang/triton/issues/11583).
#pragma once

// A CUtensorMap of rank 5 (cuattn/_device/tensor_map.py), in a kernel's parameters.
struct alignas(128) TensorMap {
  unsigned long long words[16];
};

namespace ptx {

// Prefetches the tensor map.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-prefetch-prefetchu
__device__ __forceinline__ void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Begins to load a box to `smem_ptr`, aligned to what its swizzle repeats after; its bytes complete on `mbarrier`.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
__device__ __forceinline__ void cp_async_bulk_tensor_load(void* smem_ptr, const TensorMap* map,
                                                          unsigned long long* mbarrier, int c0, int c1, int c2, int c3,
                                                          int c4) {
  const unsigned int dst = static_cast<unsigned int>(__cvta_generic_to_shared(smem_ptr));
  const unsigned int bar = static_cast<unsigned int>(__cvta_generic_to_shared(mbarrier));
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Begins to store a box from `smem_ptr`, whose writers have made a fence_proxy_async before a barrier.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
__device__ __forceinline__ void cp_async_bulk_tensor_store(const TensorMap* map, const void* smem_ptr, int c0, int c1,
                                                           int c2, int c3, int c4) {
  const unsigned int src = static_cast<unsigned int>(__cvta_generic_to_shared(smem_ptr));
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// Puts the thread's stores since its last commit into a group, which may be empty.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-commit-group
__device__ __forceinline__ void cp_async_bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the thread's kPending newest groups have read their shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-wait-group
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace ptx
